"""`diffusers-cf evaluate` from its command line."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_data import MODALITIES, write_dataset
from model_files import edit_json, write_model

from diffusers_cf.baselines import make_baseline
from diffusers_cf.cli import main
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.evaluation.protocol import evaluate
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.provenance import package_commit
from diffusers_cf.settings import PAPER_SETTINGS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set") / "dataset")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    settings = {"guidance_scale": 2.0, "strength": 0.2, "num_inference_steps": 10, "threshold": 0.05}
    facts = {"modalities": MODALITIES, "settings": settings}
    return write_model(tmp_path_factory.mktemp("model") / "model", facts)


def run(*options):
    return main(["evaluate", *map(str, options)])


def test_a_baseline_from_the_command_line(dataset, tmp_path, capsys):
    output = tmp_path / "new" / "RESULT.json"
    assert run("--method", "threshold", "--dataset", dataset, "--output", output, "--batch_size", 1) == 0
    result = json.loads(output.read_text())
    method = make_baseline("threshold", MODALITIES)
    expected = evaluate(method.anomaly_map, SliceDataset(dataset, "test"), whole_patients=True, progress=False)
    for key in set(expected) - {"seconds_per_slice"}:
        assert result[key] == expected[key]
    assert result["method"] == "threshold" and result["settings"] == {"threshold": None}
    assert result["dataset"]["seed"] == 3 and result["dataset"]["split"] == "test"
    assert result["commit"] == package_commit() and result["seed"] == 0 and result["command"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["RESULT.counts.npz", "RESULT.json"]
    assert f"{expected['auprc']:.3f}" in capsys.readouterr().out


def test_a_model_with_its_recommended_settings(dataset, model, tmp_path):
    output = tmp_path / "RESULT.json"
    options = ["--batch-size", 3, "--dtype", "float32"]
    assert run("--model", model, "--dataset", dataset, "--output", output, *options) == 0
    result = json.loads(output.read_text())
    assert result["n_patients"] == 3 and result["n_slices"] == 12
    assert result["per_patient_dice"]["patients"] == ["p0", "p1", "p2"]
    assert result["per_patient_dice"]["threshold"] == 0.05
    assert result["settings"]["num_inference_steps"] == 10 and result["settings"]["map"] == "counterfactual"
    assert result["network_evaluations_per_slice"] == 2 + 2 * 2
    pipe = CounterfactualDDIMPipeline.from_pretrained(model)
    expected = evaluate(pipe.anomaly_map, SliceDataset(dataset, "test"), progress=False)
    assert result["auprc"] == pytest.approx(expected["auprc"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "settings", "evaluations"),
    [
        (["--guidance_scale", 1, "--strength", 0.1, "--map", "reconstruction", "--threshold", 0.5],
         (1.0, 0.1, 10, "reconstruction", 0.5), 3),
        (["--settings", "paper", "--num_inference_steps", 4], (3.0, 0.75, 4, "counterfactual", None), 9),
    ],
)  # fmt: skip
def test_settings_of_the_command_line_and_of_the_paper(dataset, model, tmp_path, options, settings, evaluations):
    output = tmp_path / "RESULT.json"
    assert run("--model", model, "--dataset", dataset, "--output", output, *options) == 0
    result = json.loads(output.read_text())
    assert result["settings"] == dict(zip(PAPER_SETTINGS, settings, strict=True))
    assert result["network_evaluations_per_slice"] == evaluations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "thresh"], "no method thresh"), (["--method", "threshold-t2"], "needs the modality t2"),
        (["--method", "threshold", "--strength", "0.5"], "--strength is a setting of models"),
        (["--method", "threshold", "--guidance_scale", "0"], "--guidance_scale is a setting of models"),
        (["--method", "threshold", "--split", "train"], "has no slices in its split train"),
        (["--method", "threshold", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["--method", "threshold", "--output", "RESULT.txt"], "RESULT.txt"),
        (["--method", "threshold", "--device", "nonsense"], "--device nonsense"),
        (["--method", "threshold", "--shard", "3/2"], "--shard 3/2"),
        (["--model", "MODEL", "--num_inference_steps", "7"], "num_inference_steps is 7"),
        (["--model", "MODEL", "--strength", "2"], "strength is 2"), (["--model", "MODEL", "--map", "signed"], "`signs`"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line_and_exit_code_2(dataset, model, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    options = [str(model) if option == "MODEL" else option for option in options]
    assert run("--dataset", dataset, "--output", "RESULT.json", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and sum(line.startswith("error: ") for line in lines) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "sweep", "calibrate"])
def test_data_of_another_scale_other_modalities_or_without_masks(command, model, dataset, tmp_path, capsys):
    """A model never sees such images; thresholds can be calibrated without masks."""
    other = shutil.copytree(model, tmp_path / "other")
    edit_json(other / "preprocessing.json", normalize="median")
    swapped = write_dataset(tmp_path / "swapped", modalities=["t1", "flair"])
    bare = write_dataset(tmp_path / "bare", has_masks=False)
    cases = [(other, dataset, "scale median"), (model, swapped, "takes flair, t1"), (model, bare, "no lesion masks")]
    for chosen, data, reason in cases[: 2 if command == "calibrate" else 3]:
        options = ["--model", chosen, "--dataset", data, "--split", "test", "--output", tmp_path / "R.json"]
        assert main([command, *map(str, options)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and reason in line and str(data) in line
    assert {path.name for path in tmp_path.iterdir()} == {"other", "swapped", "bare"}


def test_a_command_that_fails_leaves_no_folder_for_its_output(dataset, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_cf.evaluation.protocol.begin_parts", fail)
    assert run("--method", "threshold", "--dataset", dataset, "--output", tmp_path / "new" / "RESULT.json") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--method", "threshold", "--model", "folder"]])
def test_one_of_model_and_method_is_needed(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--dataset", "folder", "--output", "RESULT.json", *options)
    assert "--model" in capsys.readouterr().err


def peak_memory(folder: Path, output: Path) -> float:
    """Peak of the memory that an evaluation in a process of its own holds, in MiB, without pages of files."""
    options = ["--method", "threshold-flair", "--dataset", folder, "--output", output, "--batch_size", "8"]
    process, peak = subprocess.Popen([sys.executable, "-m", "diffusers_cf.cli", "evaluate", *options]), 0
    while process.poll() is None:
        _, found, held = Path(f"/proc/{process.pid}/status").read_text().partition("RssAnon:")
        if found:  # else it has just ended
            peak = max(peak, int(held.split()[0]) / 1024)
        time.sleep(0.005)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_patients(tmp_path):
    """200 patients of 2 MB each in memory, against 40, which are enough to fill all batches on their way."""
    peaks = []
    for count in (40, 200):
        folder = write_dataset(tmp_path / str(count), patients=count, size=256)
        peaks.append(peak_memory(folder, tmp_path / f"{count}.json"))
        assert json.loads((tmp_path / f"{count}.json").read_text())["n_patients"] == count
    assert peaks[1] < 1.1 * peaks[0]
