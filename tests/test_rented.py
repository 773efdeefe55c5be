"""The script for rented machines: in order, in time, on from where it was, and packed."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_cf import CounterfactualDDIMPipeline, InputError
from diffusers_cf.training.loop import STATE_FILE


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import rented  # noqa: E402


MODEL = ("phantom", "rate", "train-phantom", "settings-phantom", "scores-phantom")


def rental(tmp_path, only=MODEL, **arrays):
    given = {"arrays": None, "split_file": None} | arrays
    return rented.Rental(tmp_path / "work", rented.SIZES["smoke"], only=only, **given)


def call(tmp_path, minutes, *options):
    command = [sys.executable, ROOT / "benchmarks" / "rented.py", "--work", tmp_path / "work", "--preset", "smoke"]
    command += ["--output", tmp_path / "out", "--minutes", minutes, *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)


def write_arrays(folder: Path) -> tuple[Path, Path]:
    """Slices of 6 patients with a bright square in every other one, and their three splits."""
    patients, rng = [f"p{number}" for number in range(6)], np.random.default_rng(0)
    images = rng.uniform(0.2, 0.5, (6 * 4, 1, 32, 32)).astype(np.float32)
    images[:, :, :4] = 0
    masks = np.zeros((6 * 4, 32, 32), np.uint8)
    masks[::2, 8:20, 8:20] = 1
    images[:, 0] += 0.5 * masks
    names = {"patient": np.repeat(patients, 4), "slice": np.tile(np.arange(4), 6), "modalities": np.array(["flair"])}
    np.savez(
        folder / "slices.npz", images=(255 * images).astype(np.uint8), masks=masks, scale=np.float32(255), **names
    )
    turned = [patients[turn:] + patients[:turn] for turn in range(3)]
    splits = {f"split_{i + 1}": {"train": p[:4], "validation": p[4:5], "test": p[5:]} for i, p in enumerate(turned)}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder / "slices.npz", folder / "splits.json"


@pytest.mark.slow
def test_every_run_from_nothing_to_what_is_taken_home(tmp_path):
    slices, splits = write_arrays(tmp_path)
    done = call(tmp_path, 14, "--input", slices, "--split_file", splits)
    assert done.returncode == 0 and "left: nothing" in done.stdout, done.stderr
    with tarfile.open(tmp_path / "out" / "scores.tar.gz") as tar:
        tar.extractall(tmp_path / "home", filter="data")
        assert {Path(name).suffix for name in tar.getnames()} == {".json", ".md", ".png"}
    scores = tmp_path / "home" / "scores"
    for split in rented.SPLITS:
        assert json.loads((scores / split / "model.json").read_text())["auprc"] > 0
    for name, count in (("phantom", 1), ("arrays", 3)):
        table = json.loads((scores / f"benchmark-{name}" / "table1.json").read_text())
        assert {row["method"] for row in table["rows"]} == {"ours", "threshold-flair", "cam"}
        assert {len(row["raw"]["auprc"]["values"]) for row in table["rows"]} == {count}
    assert json.loads((scores / "speed.json").read_text())["ways"]["ours"]["peak_memory_mib"] > 0
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
    worth = ("train-phantom", "train-split_1", "diffusion-phantom", "diffusion-arrays", "others-phantom", "speed")
    places = [names.index(name) for name in worth]
    assert places == sorted(places) and names[-1] == "speed"


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


def test_of_a_failure_only_those_suffer_that_need_it(tmp_path, monkeypatch):
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
    work.work.mkdir()
    assert "--resume_from_checkpoint" not in work._train()
    (work.model("phantom") / "checkpoint-2").mkdir(parents=True)
    command = work._train()
    assert command[command.index("--resume_from_checkpoint") + 1] == "latest"


def test_a_training_is_as_long_as_the_measured_rate_and_the_time_allow(tmp_path, monkeypatch):
    work = rental(tmp_path)
    sizes = {"batch_size": 4, "seconds": 30, "after": 5, "rate": 2.0, "limit": 100}
    work.size = dataclasses.replace(work.size, **sizes)
    work.scores.mkdir(parents=True)
    monkeypatch.setattr(rented.time, "monotonic", lambda: 100.0)

    def steps(**files):
        (work.work / "training_steps").unlink(missing_ok=True)
        for name, result in files.items():
            (work.scores / f"{name.replace('__', '.')}.json").write_text(json.dumps(result))
        return work.training_steps()

    assert steps() == 15  # 2 images a second for 30 seconds, 4 a step
    assert steps(training_speed__first={"images_per_second": 6.0}) == 45
    assert steps(training_speed={"ways": {"ours": {"images_per_second": [10.0, 8.0]}}}) == 60
    work.deadline = 121.0  # 21 seconds left, 5 of them for what comes after
    assert steps() == 32
    work.deadline = 101.0
    assert work.training_steps() == 32  # on with the schedule that it began with
    assert steps() == 2
    work.size, work.deadline = dataclasses.replace(work.size, limit=7), 900.0
    assert steps() == 7


def test_real_slices_are_learned_from_the_model_of_phantoms(tmp_path):
    work = rental(tmp_path, None, arrays=Path("slices.npz"), split_file=Path("splits.json"))
    (step,) = [step for step in work.steps if step.name == "train-split_2"]
    command = step.command()
    assert step.needs == ("split_2", "train-phantom")
    assert command[command.index("--pretrained_model") + 1] == str(work.model("phantom"))
    assert command[command.index("--dataset") + 1] == work.data("split_2")


def test_what_is_asked_for_without_what_it_needs_is_refused(tmp_path):
    with pytest.raises(InputError, match="^--steps settings-phantom: needs train-phantom, which is neither done nor"):
        rental(tmp_path, ("phantom", "settings-phantom"))
    (tmp_path / "work" / "done").mkdir(parents=True)
    (tmp_path / "work" / "done" / "train-phantom").touch()
    assert [step.name for step in rental(tmp_path, ("settings-phantom",)).steps] == ["settings-phantom"]


def test_what_is_done_is_taken_home_at_once(tmp_path, monkeypatch):
    work, taken = rental(tmp_path, MODEL[:2]), []
    monkeypatch.setattr(rented.Rental, "_prepare_phantom", lambda self: [sys.executable, "-c", "pass"])
    monkeypatch.setattr(rented.Rental, "_rate", lambda self: [sys.executable, "-c", "raise SystemExit(3)"])
    take = lambda: taken.append(sorted(path.name for path in (work.work / "done").iterdir()))  # noqa: E731
    assert rented.run_steps(work, time.monotonic() + 60, take) == ["rate"]
    assert taken == [["phantom"]]


def test_of_a_training_that_was_stopped_its_last_checkpoint_goes_home(tmp_path, monkeypatch):
    work, packed = rental(tmp_path), []
    monkeypatch.setattr(rented, "_pack_model", lambda model, half, output: packed.append((model, half.name)))
    for step in (250, 500):
        (work.model("phantom") / f"checkpoint-{step}").mkdir(parents=True)
        (work.model("phantom") / f"checkpoint-{step}" / STATE_FILE).write_text("{}")
    (work.model("a") / "checkpoint-1").mkdir(parents=True)
    (work.model("a") / "checkpoint-1" / STATE_FILE).write_text("{}")
    (work.work / "done").mkdir()
    (work.work / "done" / "train-a").touch()  # its last checkpoint is no news
    rented.take_unfinished(work, tmp_path / "out")
    assert packed == [(work.model("phantom") / "checkpoint-500" / "pipeline", "phantom-unfinished")]
    work.taken = "small"
    rented.take_unfinished(work, tmp_path / "out")
    assert len(packed) == 1


def test_one_model_a_call_and_each_as_it_is_now(tmp_path, monkeypatch):
    """Several would be more files than come home from a rental."""
    work, packed = rental(tmp_path), []
    monkeypatch.setattr(rented, "_pack_model", lambda model, half, output: packed.append(half.name))
    (work.work / "done").mkdir(parents=True)
    for name in ("phantom", "split_1"):
        work.model(name).mkdir(parents=True)
        (work.model(name) / "preprocessing.json").write_text("{}")
        (work.work / "done" / f"train-{name}").touch()
    for _ in range(3):
        rented.take_home(work, tmp_path / "out")
    assert packed == ["phantom"]
    os.utime(work.model("phantom") / "preprocessing.json", (1, 1))  # settings were stored since
    rented.take_home(work, tmp_path / "out")
    assert packed == ["phantom", "phantom"]
    for _ in range(2):
        later = rental(tmp_path)
        rented.take_home(later, tmp_path / "out")
        rented.take_unfinished(later, tmp_path / "out")
    assert packed == ["phantom", "phantom", "split_1"]


@pytest.mark.parametrize(
    "options, reason",
    [
        (("--steps", "train"), "--steps train: it must be one of phantom, rate, train-phantom"),
        (("--input", "slices.npz"), "--input and --split_file belong together"),
        (("--input", "slices.npz", "--split_file", "splits.json"), "slices.npz: is missing"),
        (("--steps", "rate"), "--steps rate: needs phantom, which is neither done nor asked for"),
        (("--minutes", "0.1"), "--minutes must be more than 0.3, not 0.1"),
    ],
)
def test_bad_input(tmp_path, options, reason):
    done = call(tmp_path, 5, *options)
    assert done.returncode == 2 and f"error: {reason}" in done.stderr
    assert not (tmp_path / "work" / "done").exists()
