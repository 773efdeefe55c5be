"""The command line: spelling of options, --help, exit codes, and the demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.cli import COMMANDS, build_parser, main
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder


ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "diffusers", "datasets", "gradio", "matplotlib", "nibabel", "pandas", "pyarrow", "sklearn"}


def test_options_may_be_written_with_either_dash():
    parser = ArgumentParser()
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--name")
    for arguments in (["--batch_size", "3"], ["--batch-size", "3"], ["--batch-size=3"]):
        assert parser.parse_args(arguments).batch_size == 3
    assert parser.parse_args(["--name", "a-b"]).name == "a-b"
    assert parser.parse_args(["--name=--a-b"]).name == "--a-b"


def test_a_command_that_fails_leaves_no_empty_folder(tmp_path):
    def command(written):
        make_folder(tmp_path / "old" / "new" / "newest")
        if written:
            (tmp_path / "old" / "new" / "result").touch()
        raise InputError("no")

    (tmp_path / "old").mkdir()
    for written, left in [(False, ["old"]), (True, ["new", "old", "result"])]:
        assert run_command(lambda written=written: command(written)) == 2
        assert sorted(path.name for path in tmp_path.rglob("*")) == left


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_quick(name):
    """It explains every option and imports no heavy library."""
    code = (
        "import sys; from diffusers_cf.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"except SystemExit as stopped: print(stopped.code, {HEAVY} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, *([name] if name else []), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does_and_its_default(name):
    parser = build_parser(name)._subparsers._group_actions[0].choices[name]
    one_of_several = [action for group in parser._mutually_exclusive_groups for action in group._group_actions]
    for action in parser._actions[1:]:
        assert action.help, action.dest
        if action.option_strings and not action.required and action not in one_of_several:
            assert "default: " in action.help.lower() or "required" in action.help, action.dest


@pytest.mark.parametrize("arguments", [[], ["sgement"], ["segment"], ["demo", "--seed", "many"]])
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, reason",
    [("--index=315", "the model knows patients 0 to 315"), ("--seed=-1", "0 or more"), ("--model=missing", "missing")],
)
def test_the_demo_refuses_what_it_can_not_show(option, reason, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "out"), option]) == 2
    error = capsys.readouterr().err
    assert reason in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.slow
def test_the_demo_finds_a_lesion(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert 0 < scores["FLAIR threshold"]["auprc"] < 1
    assert 0 < scores["this model"]["auprc"] <= 1
    result = json.loads((ROOT / "results/phantom/phantom_small.json").read_text(encoding="utf-8"))
    dice = result["postprocessed"]["per_patient_dice"]
    median = sorted(zip(dice["values"], dice["patients"], strict=True))[(len(dice["values"]) - 1) // 2][1]
    assert scores["this model"]["dice"] == pytest.approx(
        dict(zip(dice["patients"], dice["values"], strict=True))[median], abs=0.05
    )
    patient = tmp_path / "segmentation" / median
    assert {"heatmap.nii.gz", "mask.nii.gz", "preview.png", "report.json"} <= {p.name for p in patient.iterdir()}
    assert "AUPRC" in capsys.readouterr().out
