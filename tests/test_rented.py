"""The script for rented machines: in order, in time, on from where it was, and packed."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from diffusers_cf import CounterfactualDDIMPipeline


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import rented  # noqa: E402


MODEL = ("phantom", "rate", "train-phantom", "settings-phantom", "scores-phantom")


def rental(tmp_path, only=MODEL, **arrays):
    given = {"arrays": None, "split_file": None} | arrays
    return rented.Rental(tmp_path / "work", rented.SIZES["smoke"], only=list(only), **given)


def call(tmp_path, minutes, *options):
    command = [sys.executable, ROOT / "benchmarks" / "rented.py", "--work", tmp_path / "work", "--preset", "smoke"]
    command += ["--output", tmp_path / "out", "--minutes", minutes, *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)


def test_a_model_from_nothing_to_what_is_taken_home(tmp_path):
    done = call(tmp_path, 12, "--steps", *MODEL)
    assert done.returncode == 0 and "left: nothing" in done.stdout, done.stderr
    with tarfile.open(tmp_path / "out" / "scores.tar.gz") as tar:
        tar.extractall(tmp_path / "home", filter="data")
    scores = tmp_path / "home" / "scores"
    curve = json.loads((scores / "phantom" / "learning_curve.json").read_text())
    assert [row["images"] for row in curve] == [4 * row["step"] for row in curve] and len(curve) > 1
    assert json.loads((scores / "phantom" / "model.json").read_text())["auprc"] > 0
    assert json.loads((scores / "training_speed.json").read_text())["ways"]["ours"]
    parts = sorted((tmp_path / "out").glob("phantom.tar.*"))
    (tmp_path / "phantom.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "phantom.tar") as tar:
        tar.extractall(tmp_path / "home", filter="data")
    half = CounterfactualDDIMPipeline.from_pretrained(tmp_path / "home" / "phantom", dtype=torch.float16)
    full = CounterfactualDDIMPipeline.from_pretrained(tmp_path / "work" / "models" / "phantom")
    assert half.preprocessing["settings"] == full.preprocessing["settings"]
    for name, weight in full.unet.state_dict().items():
        assert torch.equal(half.unet.state_dict()[name], weight.half()), name


def test_the_most_valuable_comes_first():
    given = {"arrays": Path("slices.npz"), "split_file": Path("splits.json"), "only": None}
    names = [step.name for step in rented.Rental(Path("work"), rented.SIZES["paper"], **given).steps]
    first = [names.index(name) for name in ("train-phantom", "train-split_1", "benchmark-phantom", "speed")]
    assert first == sorted(first) and names[-1] == "speed"


def test_a_call_ends_in_time_and_the_next_goes_on(tmp_path, monkeypatch):
    work, called = rental(tmp_path, MODEL[:2]), []
    programs = {"phantom": "pass", "rate": "import time; time.sleep(60)"}

    def command(name):
        called.append(name)
        return [sys.executable, "-c", programs[name]]

    monkeypatch.setattr(rented.Rental, "_prepare_phantom", lambda self: command("phantom"))
    monkeypatch.setattr(rented.Rental, "_rate", lambda self: command("rate"))
    start = time.monotonic()
    assert rented.run_steps(work, start + 3) == []
    assert time.monotonic() - start < 30 and called == ["phantom", "rate"]
    programs["rate"] = "pass"
    assert rented.run_steps(work, time.monotonic() + 30) == []
    assert called == ["phantom", "rate", "rate"]  # what is done is not done again


def test_a_failure_ends_its_chain_alone(tmp_path, monkeypatch):
    made = dict.fromkeys(("phantom", "rate", "split_1"), "pass") | {"phantom": "raise SystemExit(3)"}
    called = []

    def command(name):
        called.append(name)
        return [sys.executable, "-c", made[name]]

    monkeypatch.setattr(rented.Rental, "_prepare_phantom", lambda self: command("phantom"))
    monkeypatch.setattr(rented.Rental, "_rate", lambda self: command("rate"))
    monkeypatch.setattr(rented.Rental, "_prepare_arrays", lambda self, split: command(split))
    work = rental(tmp_path, ("phantom", "rate", "split_1"), arrays=Path("slices.npz"), split_file=Path("splits.json"))
    assert rented.run_steps(work, time.monotonic() + 60) == ["phantom"]
    assert called == ["phantom", "split_1"]


def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(tmp_path):
    work = rental(tmp_path)
    work.scores.mkdir(parents=True)
    rate = {"ways": {"ours": {"images_per_second": [10.0, 8.0]}}}
    (work.scores / "training_speed.json").write_text(json.dumps(rate))
    assert work.training_steps() == 2  # 8 images a second for 1 second, 4 a step
    assert "--resume_from_checkpoint" not in work._train("phantom", ())
    (work.model("phantom") / "checkpoint-2").mkdir(parents=True)
    command = work._train("phantom", ())
    assert command[command.index("--resume_from_checkpoint") + 1] == "latest"


@pytest.mark.parametrize(
    "options, reason",
    [
        (("--steps", "train"), "--steps train: it must be one of phantom, rate, train-phantom"),
        (("--input", "slices.npz"), "--input and --split_file belong together"),
        (("--input", "slices.npz", "--split_file", "splits.json"), "slices.npz: is missing"),
        (("--minutes", "0.1"), "--minutes must be more than 0.3, not 0.1"),
    ],
)
def test_bad_input(tmp_path, options, reason):
    done = call(tmp_path, 5, *options)
    assert done.returncode == 2 and f"error: {reason}" in done.stderr
    assert not (tmp_path / "work" / "done").exists()
