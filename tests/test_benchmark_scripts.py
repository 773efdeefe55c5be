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
SETTINGS = {"guidance_scale": 2, "strength": 0.5, "num_inference_steps": 4, "map": "reconstruction", "threshold": 0.1}
pytestmark = pytest.mark.slow


def run(script, *arguments):
    """Run a script of `benchmarks/`; return its exit code and its last line on stderr."""
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


def measured(script, *arguments):
    """Run a script and return its result."""
    code, error = run(script, *arguments)
    assert code == 0, error
    return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text())


@pytest.fixture
def files(make_pipeline, tmp_path):
    """Write a model and a data set of 2 channels, 8 x 8 and 16 x 16 pixels, and a patient."""
    pipe = make_pipeline()
    pipe.preprocessing = {"modalities": ["flair", "t1"], "settings": SETTINGS}
    pipe.save_pretrained(tmp_path / "model")
    write_training_set(tmp_path / "slices", test=(3, 4))
    write_brats(tmp_path, "P_0", "LPS")
    return tmp_path


def test_three_ways_of_inference_in_turn_and_a_whole_patient(files):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "speed.json"]
    options = ["--patient", files / "P_0", "--max_slices", 2, "--rounds", 2, "--dtype", "float32"]
    result = measured("speed", *paths, *options)
    passes = {way: row["passes_per_slice"] for way, row in result["ways"].items()}
    # K = 2 of 4 steps: encoding, two branches, reconstruction; the paper: 75 of 100 steps, encoding and two branches
    assert passes == {"ours": 4 * 2, "authors": 3 * 75, "plain": 3 * 75}
    for way, row in result["ways"].items():
        assert len(row["seconds_per_slice"]) == 2 and (row["times_ours"]["median"] == 1) == (way == "ours")
    assert set(result["patient"]) == {"ours", "authors"} and result["command"] and result["commit"]


def test_two_ways_of_training_in_turn(files):
    options = ["--batch_size", 2, "--steps", 1, "--rounds", 2, "--resolution", 16]
    result = measured("training_speed", "--dataset", files / "slices", "--output", files / "training.json", *options)
    for row in result["ways"].values():
        assert len(row["images_per_second"]) == 2 and min(row["images_per_second"]) > 0
        assert len(row["largest_costs"]) == 5 and 0 < sum(cost["share"] for cost in row["largest_costs"]) <= 1


@pytest.mark.parametrize(
    ("script", "options", "reason"),
    [
        ("speed", ["--dataset", "slices", "--rounds", 0], "--rounds must be at least 1"),
        ("compare", ["--first", "other.json", "--second", "other.json"], "other.json: not a result of"),
        ("scales", ["--dataset", "bare"], "needs slices of flair with lesion masks"),
    ],
)
def test_what_can_not_be_measured_is_refused(files, monkeypatch, script, options, reason):
    monkeypatch.chdir(files)
    Path("other.json").write_text("{}")
    write_training_set(Path("bare"), masks=False)
    code, error = run(script, *options, "--output", "none/out.json")
    assert code == 2 and reason in error and not Path("none").exists()


def test_round_trip_error_is_that_of_both_passes_of_the_pipeline_on_healthy_slices(files):
    options = ["--strengths", 0.5, "--num_inference_steps", 4, 10, "--split", "validation", "--dtype", "float32"]
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "out.json"]
    found = measured("round_trip", *paths, *options)
    assert found["n_slices"] == 5 and [row["num_inference_steps"] for row in found["rows"]] == [4, 10]
    assert all(0 < row["mean_error"] <= row["worst_slice"] for row in found["rows"])
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    pipe.set_progress_bar_config(disable=True)
    dataset = SliceDataset(files / "slices", "validation")
    images = dataset.collate(dataset.__getitems__([0, 1, 2, 3, 4]))["images"]
    small = torch.nn.functional.interpolate(images, (8, 8), mode="area").clamp(max=1)
    decoded = pipe.denoise(pipe.invert(images, 0.5, 10), None, 0, 0.5, 10)
    inside = (small > 0).any(dim=1)
    errors = [(d - s).abs().mean(dim=0)[i].mean() for d, s, i in zip(decoded, small, inside, strict=True)]
    assert found["rows"][1]["mean_error"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-3)


def test_two_settings_compared_on_the_same_patients(files):
    for name, scale in (("one", 1), ("three", 3)):
        options = ["--dataset", files / "slices", "--guidance_scale", scale, "--output", files / f"{name}.json"]
        assert main([str(part) for part in ["evaluate", "--model", files / "model", *options]]) == 0
    one, three, out = files / "one.json", files / "three.json", files / "difference.json"
    result = measured("compare", "--first", one, "--second", three, "--output", out)
    expected = json.loads(one.read_text())
    assert result["raw"]["auprc"][0] == expected["auprc"]
    assert result["postprocessed"]["ideal_dice"][0] == expected["postprocessed"]["ideal_dice"]
    for chain in ("raw", "postprocessed"):
        first, second = result[chain]["auprc"]
        assert result[chain]["difference"] == pytest.approx(first - second, abs=1e-4)
    assert [side["settings"]["guidance_scale"] for side in result["first"] + result["second"]] == [1, 3]
    same = measured("compare", "--first", one, one, "--second", one, one, "--output", out)
    assert same["raw"]["interval"] == [0, 0]


def test_scales_script_measures_each_scale_and_patient(files):
    """A scale changes no order within a patient: of one patient all scales have the same AUPRC, pooled and its own."""
    options = ["--dataset", files / "slices", "--split", "validation", "--output", files / "out.json"]
    found = measured("scales", *options)["datasets"]["slices"]
    assert found["n_patients"] == 1 and len(found["scales"]) == 7
    for scores in found["scales"].values():
        assert scores["auprc"] == pytest.approx(scores["per_patient_auprc"]) and 0 < scores["ideal_dice"] <= 1
    assert len({round(scores["auprc"], 6) for scores in found["scales"].values()}) == 1


def test_position_alone_tells_the_label_where_lesions_lie_at_one_height(files):
    """In these patients all lesions lie at the top, where no healthy slice is to match them."""
    (found,) = measured("position", files / "slices", "--output", files / "out.json")["slice_auroc"]
    assert found == {"test": 1.0, "drawn": 1.0, "drawn, matched": 1.0}
