"""Errors of the user or the machine end a command with one line and an exit code, others with a traceback."""

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from diffusers_cf.arguments import run_command
from diffusers_cf.errors import InputError, reading
from diffusers_cf.files import read_json


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("scan.nii:\n  bad"), "error: scan.nii: bad"),
        (OSError(28, "No space left", "out/heatmap.nii.gz"), "error: out/heatmap.nii.gz: No space left"),
        (OSError("broken pipe"), "error: broken pipe"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates"), "error: 'a\\udcff' can't be written as utf-8"),
        (MemoryError("Unable to allocate 9 GiB"), "error: out of memory (Unable to allocate 9 GiB)"),
        (BrokenProcessPool("terminated abruptly"), "error: a worker process was killed"),
    ],
)
def test_an_error_of_user_or_machine_is_one_line_and_exit_code_2(error, line, capsys):
    def fail():
        raise error

    assert run_command(fail) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    assert run_command(lambda: None) == 0 and run_command(lambda: 3) == 3


def test_a_command_runs_without_an_error_stream(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(lambda: read_json(tmp_path / "missing")) == 2


@pytest.mark.parametrize("number, code, line", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_stopped_command_cleans_up_and_says_so(number, code, line, tmp_path):
    text = (
        "import os, signal, sys; from diffusers_cf.arguments import run_command; from diffusers_cf.files import new_file\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "def work():\n"
        "    with new_file(sys.argv[1]) as temporary:\n"
        "        temporary.write_text('half'); os.kill(os.getpid(), int(sys.argv[2]))\n"
        "raise SystemExit(run_command(work))\n"
    )
    command = [sys.executable, "-c", text, tmp_path / "out", str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and done.stderr == f"error: stopped by {line}\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("x"), r"^scan.npz: not a readable .npz file \('x'\)"),
        (FileNotFoundError(2, "No such file"), r"^scan.npz: can't be read \(No such file\)"),
        (InputError("mine"), "^mine$"),
    ],
)
def test_an_error_of_any_reader_names_the_file(error, expected):
    with pytest.raises(InputError, match=expected), reading("scan.npz", ".npz file"):
        raise error
    with pytest.raises(MemoryError), reading("scan.npz", ".npz file"):
        raise MemoryError
