"""What the package costs: modules that an import loads, memory of an evaluation, and what half precision loses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import write_dataset

from diffusers_cf.data.phantom import FROZEN_SEED, PhantomSource
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask, postprocess_maps
from diffusers_cf.inference import computes_in_bfloat16, open_pipeline
from diffusers_cf.loading import PRETRAINED


ROOT = Path(__file__).parent.parent
DIFFUSERS = "from diffusers import DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel"
HEAVY = (
    "datasets", "gradio", "matplotlib", "nibabel", "nilearn", "pandas", "pyarrow", "scipy", "sklearn", "torchvision",
)  # fmt: skip


def python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_brings_no_heavy_library_that_diffusers_does_not():
    code = (
        f"import sys; {DIFFUSERS}; before = set(sys.modules); import diffusers_cf; print(*set(sys.modules) - before)"
    )
    assert not {name.partition(".")[0] for name in python(code).split()} & set(HEAVY)


def test_help_loads_no_command():
    code = (
        "import sys; from diffusers_cf.cli import main; before = set(sys.modules)\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', *set(sys.modules) - before)"
    )
    text, _, loaded = python(code).rpartition("loaded")
    assert "segment" in text and not any(name.startswith(("diffusers_cf", *HEAVY)) for name in loaded.split())


def peak_memory(folder: Path, output: Path) -> float:
    """Peak of the memory that an evaluation in a process of its own holds, in MiB, without pages of files."""
    code = (
        "import sys, threading, time; from diffusers_cf.cli import main; peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        status = open('/proc/self/status').read().split()\n"
        "        peak = max(peak, int(status[status.index('RssAnon:') + 1]) / 1024)\n"
        "        time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        f"assert main(['evaluate', '--method', 'threshold-flair', '--dataset', {str(folder)!r},"
        f" '--output', {str(output)!r}, '--batch_size', '8']) == 0\n"
        "print('peak', peak)"
    )
    return float(python(code).rpartition("peak")[2])


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


def phantom_slices():
    """Every sixth slice of three phantom patients with a lesion, 64 x 64: images and masks."""
    source, found = PhantomSource(FROZEN_SEED, size=64), []
    for patient in map(source.read, source.fixed_splits()["validation"]):
        found += [patient] * bool(patient.masks.any())
        if len(found) == 3:
            break
    return (np.concatenate([getattr(patient, name)[::6] for patient in found]) for name in ("images", "masks"))


@pytest.mark.slow
@pytest.mark.skipif(not computes_in_bfloat16("cpu"), reason="bfloat16 is emulated here")
def test_bfloat16_finds_what_float32_finds():
    """Within one point of AUPRC in the foreground after post-processing."""
    images, masks = phantom_slices()
    inside, scores = foreground_mask(images), []
    for dtype in ("float32", "bfloat16"):
        maps = open_pipeline(str(PRETRAINED / "phantom_small"), "cpu", dtype)(torch.from_numpy(images)).heatmaps
        counts = PixelCounts()
        counts.update(postprocess_maps(maps.float().numpy(), images)[inside], masks[inside])
        scores.append(counts.average_precision())
    assert scores[0] > 5 * masks.sum() / inside.sum()
    assert scores[1] == pytest.approx(scores[0], abs=0.01)
