"""The scripts that measure speed and differences, at their smallest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_files import write_brats
from training_data import write_training_set

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.cli import main
from diffusers_cf.data.slices import SliceDataset


ROOT = Path(__file__).parent.parent
SETTINGS = {
    "guidance_scale": 2.0,
    "strength": 0.5,
    "num_inference_steps": 4,
    "map": "reconstruction",
    "threshold": 0.1,
}


def run(script, *arguments):
    """A script of `benchmarks/`."""
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture
def files(make_pipeline, tmp_path):
    """A model and a data set of 2 channels, 8 x 8 and 16 x 16 pixels, and a patient."""
    pipe = make_pipeline()
    pipe.preprocessing = {"modalities": ["flair", "t1"], "settings": SETTINGS}
    pipe.save_pretrained(tmp_path / "model")
    write_training_set(tmp_path / "slices", test=(3, 4))
    write_brats(tmp_path, "P_0", "LPS")
    return tmp_path


@pytest.mark.slow
def test_three_ways_of_inference_in_turn_and_a_whole_patient(files):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "speed.json"]
    done = run("speed", *paths, "--patient", files / "P_0", "--max_slices", 2, "--rounds", 2, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    result = json.loads((files / "speed.json").read_text())
    passes = {way: row["passes_per_slice"] for way, row in result["ways"].items()}
    # K = 2 of 4 steps: encoding, two branches, reconstruction; the paper: 75 of 100 steps, encoding and two branches
    assert passes == {"ours": 4 * 2, "authors": 3 * 75, "plain": 3 * 75}
    for way, row in result["ways"].items():
        assert len(row["seconds_per_slice"]) == 2 and (row["times_ours"]["median"] == 1) == (way == "ours")
    assert set(result["patient"]) == {"ours", "authors"} and result["command"] and result["commit"]


@pytest.mark.slow
def test_a_network_of_another_size_stands_in_for_the_models(files):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "speed.json"]
    done = run("speed", *paths, "--unet_size", "small", "--max_slices", 1, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((files / "speed.json").read_text())["ways"]["plain"]["passes_per_slice"] == 225


@pytest.mark.slow
def test_two_ways_of_training_in_turn(files):
    options = ["--batch_size", 2, "--steps", 1, "--rounds", 2, "--resolution", 16]
    done = run("training_speed", "--dataset", files / "slices", "--output", files / "training.json", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((files / "training.json").read_text())
    for row in result["ways"].values():
        assert len(row["images_per_second"]) == 2 and min(row["images_per_second"]) > 0
        assert len(row["largest_costs"]) == 5 and 0 < sum(cost["share"] for cost in row["largest_costs"]) <= 1
    assert result["times_plain"]["least"] <= result["times_plain"]["median"] <= result["times_plain"]["most"]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "option"), [("speed", "rounds"), ("training_speed", "steps")])
def test_nothing_to_measure_is_refused(files, script, option):
    done = run(script, "--dataset", files / "slices", "--output", files / "none" / "out.json", f"--{option}", 0)
    assert done.returncode == 2 and f"--{option} must be at least 1" in done.stderr
    assert not (files / "none").exists()


@pytest.mark.slow
def test_round_trip_measures_healthy_slices(files):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "out.json"]
    done = run("round_trip", *paths, "--num_inference_steps", 4, 8, "--strengths", 0.5, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    found = json.loads((files / "out.json").read_text())
    assert found["n_slices"] == 10 and [row["num_inference_steps"] for row in found["rows"]] == [4, 8]
    assert all(0 < row["mean_error"] <= row["worst_slice"] for row in found["rows"])


@pytest.mark.slow
def test_round_trip_error_is_that_of_both_passes_of_the_pipeline(files):
    options = ["--strengths", "0.5", "--num_inference_steps", "10", "--split", "validation", "--dtype", "float32"]
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "round_trip.json"]
    done = run("round_trip", *paths, *options)
    assert done.returncode == 0, done.stderr
    row = json.loads((files / "round_trip.json").read_text())["rows"][0]
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    pipe.set_progress_bar_config(disable=True)
    dataset = SliceDataset(files / "slices", "validation")
    images = dataset.collate(dataset.__getitems__([0, 1, 2, 3, 4]))["images"]
    small = torch.nn.functional.interpolate(images, (8, 8), mode="area").clamp(max=1)
    decoded = pipe.denoise(pipe.invert(images, 0.5, 10), None, 0, 0.5, 10)
    inside = (small > 0).any(dim=1)
    errors = [(d - s).abs().mean(dim=0)[i].mean() for d, s, i in zip(decoded, small, inside, strict=True)]
    assert row["mean_error"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-3)
    assert row["num_inference_steps"] == 10 and row["strength"] == 0.5


@pytest.mark.slow
def test_two_settings_compared_on_the_same_patients(files):
    for name, scale in (("one", 1), ("three", 3)):
        options = ["--dataset", files / "slices", "--guidance_scale", scale, "--output", files / f"{name}.json"]
        assert main([str(part) for part in ["evaluate", "--model", files / "model", *options]]) == 0
    one, three, out = files / "one.json", files / "three.json", files / "difference.json"
    done = run("compare", "--first", one, "--second", three, "--output", out)
    assert done.returncode == 0, done.stderr
    result, expected = (json.loads(path.read_text()) for path in (out, one))
    assert result["raw"]["auprc"][0] == expected["auprc"]
    assert result["postprocessed"]["ideal_dice"][0] == expected["postprocessed"]["ideal_dice"]
    for chain in ("raw", "postprocessed"):
        first, second = result[chain]["auprc"]
        assert result[chain]["difference"] == pytest.approx(first - second, abs=1e-4)
        low, high = result[chain]["interval"]
        assert low <= high
    assert [side["settings"]["guidance_scale"] for side in result["first"] + result["second"]] == [1, 3]
    same = run("compare", "--first", one, one, "--second", one, one, "--output", out)
    assert same.returncode == 0, same.stderr
    assert json.loads(out.read_text())["raw"]["interval"] == [0, 0]


@pytest.mark.slow
def test_what_is_no_result_is_refused(files):
    (files / "other.json").write_text("{}")
    paths = ["--first", files / "other.json", "--second", files / "other.json", "--output", files / "out.json"]
    done = run("compare", *paths)
    assert done.returncode == 2 and "other.json: not a result of diffusers-cf evaluate" in done.stderr
    assert not (files / "out.json").exists()


@pytest.mark.slow
def test_scales_script_measures_each_scale_and_patient(files):
    """A scale changes no order within a patient: of one patient all scales have the same AUPRC, pooled and its own."""
    done = run("scales", "--dataset", files / "slices", "--split", "validation", "--output", files / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((files / "out.json").read_text())["datasets"]["slices"]
    assert found["n_patients"] == 1 and len(found["scales"]) == 7
    for scores in found["scales"].values():
        assert scores["auprc"] == pytest.approx(scores["per_patient_auprc"]) and 0 < scores["ideal_dice"] <= 1
    assert len({round(scores["auprc"], 6) for scores in found["scales"].values()}) == 1
    two = run("scales", "--dataset", files / "slices", "--output", files / "two.json")
    scales = json.loads((files / "two.json").read_text())["datasets"]["slices"]["scales"]
    assert two.returncode == 0 and len({round(scores["per_patient_auprc"], 6) for scores in scales.values()}) == 1
    bare = write_training_set(files / "bare", masks=False)
    refused = run("scales", "--dataset", bare, "--output", files / "three.json")
    assert refused.returncode == 2 and "needs slices of flair with lesion masks" in refused.stderr
