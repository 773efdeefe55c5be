"""What commands write to a pipe or a terminal: messages, progress, and one line when they are stopped."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from training_data import options, write_training_set


ROOT = Path(__file__).parents[1]
STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) .+")
# bars in a bar, and messages of ours, of others, and of others with a handler of their own
TALK = """
import logging, sys, warnings
from tqdm.auto import tqdm
from diffusers_cf import logs
from diffusers_cf.arguments import run_command

bars = [tqdm]
if "libraries" in sys.argv:
    import accelerate.utils, datasets.utils, diffusers.utils.logging
    bars += [accelerate.utils.tqdm, datasets.utils.tqdm, diffusers.utils.logging.tqdm]
own_handler = logging.getLogger("apart")
own_handler.addHandler(logging.StreamHandler())
own_handler.propagate = False

def talk():
    for _ in tqdm(range(3), desc="ours"):
        for index, bar in enumerate(bars):
            for _ in bar(range(2), desc=f"bar {index}"):
                tqdm.write("result")
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("diffusers_cf.here"), level)("our " + level)
        getattr(logging.getLogger("elsewhere"), level)("their " + level)
    own_handler.warning("their own handler")
    warn = warnings.warn; text = "deprecated"
    warn(text)

logs.INTERVAL = float(sys.argv[2])
raise SystemExit(run_command(talk, sys.argv[1]))
"""
PREPARE = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from data_files import MadeSource
from diffusers_cf.arguments import run_command
from diffusers_cf.data.prepare import prepare

class Slow(MadeSource):
    def load(self, patient, problems):
        if patient == "p03":
            print("at p03", file=sys.stderr, flush=True)
            time.sleep(3600)
        return super().load(patient, problems)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    raise SystemExit(run_command(lambda: prepare(Slow(6), sys.argv[2], num_workers=int(sys.argv[3]))))
"""
TRAIN = """
import signal, sys
from diffusers_cf import logs
from diffusers_cf.arguments import run_command
from train_counterfactual import main, parse_args

logs.INTERVAL = 0
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(run_command(lambda: main(parse_args())))
"""


def talk(level, *more, interval=0, **streams):
    return subprocess.run([sys.executable, "-c", TALK, level, str(interval), *more], text=True, cwd=ROOT, **streams)


def test_in_a_pipe_progress_is_lines_with_time_stamps():
    said = talk("info", "libraries", capture_output=True)
    assert said.returncode == 0 and "\r" not in said.stdout + said.stderr and "\x1b" not in said.stdout + said.stderr
    lines = said.stderr.splitlines()
    # a warning of Python is two lines
    assert {line for line in lines if not STAMPED.fullmatch(line)} <= {"their own handler", "  warn(text)", ""}
    assert lines.count("") <= 1
    messages = [line.split(" ", 3)[3] for line in lines if STAMPED.fullmatch(line)]
    assert [message for message in messages if re.fullmatch("(our|their) [a-z]+", message)] == [
        "our info", "our warning", "their warning", "our error", "their error"
    ]  # fmt: skip
    for name in ("ours", "bar 0", "bar 1", "bar 2", "bar 3"):
        assert any(message.startswith(f"{name}: ") for message in messages), name


def test_a_bar_logs_seldom_and_when_it_is_full():
    bars = [line for line in talk("info", interval=1000, capture_output=True).stderr.splitlines() if "%" in line]
    assert len([line for line in bars if " INFO ours: 100% 3/3 [" in line]) == 1
    assert all("100%" in line for line in bars)


@pytest.mark.parametrize(("level", "kept"), [("debug", "diwe"), ("warning", "we"), ("error", "e")])
def test_the_level_chooses_what_is_said(level, kept):
    said = talk(level, capture_output=True).stderr
    assert "".join(name[0] for name in ("debug", "info", "warning", "error") if f"our {name}" in said) == kept
    assert ("their info" in said) == ("100%" in said) == (level == "debug") and "their debug" not in said
    assert ("their own handler" in said) == ("deprecated" in said) == (level != "error")


def test_in_a_terminal_bars_stay():
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with subprocess.Popen(
        [sys.executable, "-c", TALK, "info", "0"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal
    ) as process:
        os.close(terminal)
        said = b""
        with contextlib.suppress(OSError):  # when nobody has the terminal open any more
            while more := os.read(main, 4096):
                said += more
    os.close(main)
    said = said.decode()
    assert process.returncode == 0 and "\rours: 100%|" in said and not re.search(r"\d\d:\d\d:\d\d,\d{3}", said)


def stop(command, number, waits_for, **options):
    """Send a signal to a process and its workers after a line on stderr; return the code and what it said then."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options) as process:
        lines = []
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if waits_for in line:
                break
        os.killpg(process.pid, number)
        said = process.stderr.read().splitlines()
    return process.returncode, lines, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word", "num_workers"), [(signal.SIGINT, 130, "Ctrl-C", 2), (signal.SIGTERM, 143, "SIGTERM", 1)]
)
def test_a_stopped_preparation_says_one_line(number, code, word, num_workers, tmp_path):
    (tmp_path / "run.py").write_text(PREPARE)
    command = [sys.executable, tmp_path / "run.py", Path(__file__).parent, tmp_path / "set", str(num_workers)]
    found, _, said = stop(command, number, "at p03", cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (found, said) == (code, [f"error: stopped by {word}"])
    assert not (tmp_path / "set" / "data").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_stopped_training_says_one_line(number, code, word, tmp_path):
    given = options(write_training_set(tmp_path / "slices"), tmp_path / "out", max_train_steps=100_000)
    command = [sys.executable, "-c", TRAIN, *given]
    found, before, said = stop(command, number, "images_per_second", cwd=ROOT)
    assert found == code and said[-1] == f"error: stopped by {word}"
    assert all(STAMPED.fullmatch(line) for line in [*before, *said[:-1]])
    # checkpoints are whole, a folder without any is removed, and there is neither a model nor something half-written
    assert {path.name.split("-")[0] for path in tmp_path.glob("out/*")} <= {"checkpoint", "logs", "losses.json"}
