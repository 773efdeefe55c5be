"""What README.md and examples/ show a new user runs, with the model that ships."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import tiny_pipeline

from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.loading import PRETRAINED


ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run_example(script, folder, *stages, **settings):
    """Run the stages of a shell script of `examples/` in a folder, with the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | settings | {"PATH": path, "PYTHONPATH": str(ROOT)}
    for stage in stages or [""]:
        command = ["bash", str(ROOT / "examples" / script), stage]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("block", BLOCKS or [""])
def test_python_blocks_of_the_readme(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)  # noqa: S102
    assert names["out"].heatmaps.shape == (1, 128, 128)
    assert names["out"].counterfactuals.shape == (1, 4, 128, 128)


def test_python_block_of_the_documentation():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/python.md").read_text("utf-8"), re.DOTALL)
    names = {}
    exec(block, names)  # noqa: S102
    assert names["latents"].shape == names["healthy"][3.0].shape == (2, 4, 64, 64)


def test_quickstart_writes_its_picture(tmp_path):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"](tmp_path / "quickstart.png")
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_way_from_phantom_to_scores(tmp_path):
    """examples/train_phantom.sh at its smallest: a few patients, two steps, a coarse grid."""
    small = {"OUT": ".", "STEPS": "2", "PATIENTS": "3", "GRID": "10", "SLICES": "4"}
    run_example("train_phantom.sh", tmp_path, **small)
    assert {"model.json", "threshold-flair.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_walk_through_of_fine_tuning(tmp_path):
    """examples/fine_tune.sh on three phantoms with labels in place of masks, and a model that takes seconds."""
    pipe = tiny_pipeline(channels=4)
    settings = {"guidance_scale": 3.0, "strength": 0.2, "num_inference_steps": 10, "map": "reconstruction"}
    pipe.preprocessing = {"modalities": ["flair", "t1", "t1ce", "t2"], "settings": settings | {"threshold": 0.05}}
    pipe.save_pretrained(tmp_path / "model")
    lines = ["patient,slice,label"]
    for index in range(3):
        folder = write_patient(make_patient(7, index), tmp_path / "scans")
        next(folder.glob("*seg*")).unlink()
        lines += [f"{folder.name},{number},{('unhealthy', 'healthy')[number % 3 == 0]}" for number in range(12, 40)]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    settings = {"MODEL": "model", "SCANS": "scans", "LABELS": "labels.csv", "STEPS": "20", "SIZE": "32", "WORK": "out"}
    run_example("fine_tune.sh", tmp_path, "prepare", "train", "compare", **settings)
    facts = json.loads((tmp_path / "out" / "model" / "preprocessing.json").read_text())
    assert facts["training"]["base_model"] == "model" and facts["settings"]["map"] == "reconstruction"
    assert facts["settings"]["threshold"] > 0 and facts["threshold_chosen_by"]["rule"] == "slice-labels"
    assert {"before.html", "after.html"} <= {path.name for path in (tmp_path / "out").iterdir()}

    settings |= {"MODALITIES": "t1 flair", "WORK": "some", "COMPARE": "after", "STEPS": "1"}
    for patient in (tmp_path / "scans").iterdir():
        for name in ("t1ce", "t2"):
            next(patient.glob(f"*{name}.nii.gz")).unlink()
    run_example("fine_tune.sh", tmp_path, "prepare", "train", "compare", **settings)
    made = json.loads((tmp_path / "some" / "after" / "summary.json").read_text())
    assert (tmp_path / "some" / "after.html").exists() and not (tmp_path / "some" / "before").exists(), made


def test_the_shipped_model_fits_its_size_limit_and_is_documented():
    weights = list((PRETRAINED / "phantom_small").rglob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in weights) <= 16 * 2**20
    card = (PRETRAINED / "phantom_small" / "README.md").read_text(encoding="utf-8")
    assert "train_counterfactual.py" in card and "not a medical device" in card.lower()
