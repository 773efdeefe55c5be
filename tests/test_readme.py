"""What README.md and examples/ show a new user runs, with the model that ships."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_cf.demo import SHIPPED_MODEL


ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_of_the_readme(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)  # noqa: S102
    assert names["out"].heatmaps.shape == (1, 128, 128)
    assert names["out"].counterfactuals.shape == (1, 4, 128, 128)


def test_the_readme_has_python_to_run():
    assert BLOCKS


def test_quickstart_writes_its_picture(tmp_path):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"](tmp_path / "quickstart.png")
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_way_from_phantom_to_scores(tmp_path):
    """examples/train_phantom.sh at its smallest: a few patients, two steps, a coarse grid."""
    small = {"OUT": str(tmp_path), "STEPS": "2", "PATIENTS": "3", "GRID": "10", "SLICES": "4"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "examples" / "train_phantom.sh")]
    done = subprocess.run(command, env=os.environ | small | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"model.json", "threshold-flair.json"} <= {path.name for path in tmp_path.iterdir()}


def test_the_shipped_model_fits_its_size_limit_and_is_documented():
    weights = list(SHIPPED_MODEL.rglob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in weights) <= 16 * 2**20
    card = (SHIPPED_MODEL / "README.md").read_text(encoding="utf-8")
    assert "train_counterfactual.py" in card and "not a medical device" in card.lower()
