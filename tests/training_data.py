"""A slice data set of three patients that training's tests write: 16 x 16 pixels, seconds to train on."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState

from diffusers_cf.arguments import run_command
from diffusers_cf.data.slices import PatientSlices, slices_to_table, write_tables
from train_counterfactual import main, parse_args


CLASSES = ("healthy", "unhealthy")
STEPS = 12
OPTIONS = {
    "resolution": 16, "train_batch_size": 8, "max_train_steps": STEPS, "checkpointing_steps": 4, "validation_steps": 0,
    "logging_steps": 1, "lr_warmup_steps": 6, "learning_rate": 3e-4, "seed": 3, "mixed_precision": "no",
}  # fmt: skip


def made_patient(index: int, channels: int, masks: bool, size: int, area: float = 0.8) -> PatientSlices:
    """8 slices of a grey disc, the last 3 with a bright lesion."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    disc, lesion = x**2 + y**2 < area, (x - 0.3) ** 2 + y**2 < 0.06
    drawn = np.zeros((8, size, size), dtype=np.uint8)
    drawn[5:] = lesion
    images = (0.5 + 0.05 * rng.standard_normal((8, channels, size, size))) * disc + 0.4 * drawn[:, None]
    labels = (np.arange(8) >= 5).astype(np.int64)
    return PatientSlices(f"p{index}", images.astype(np.float32), labels, np.arange(8) + 30, drawn if masks else None)


def write_training_set(folder, channels=2, masks=True, classes=CLASSES, size=16, test=(), area=0.8, **changes):
    """Patients 0 and 1 for training, 2 for validation, those of `test` for test; returns the folder."""
    (folder / "data").mkdir(parents=True)
    splits = {}
    for split, patients in {"train": (0, 1), "validation": (2,), "test": test}.items():
        made = [made_patient(index, channels, masks, size, area) for index in patients]
        splits[split] = {"patients": len(made), "slices": 8 * len(made), "unhealthy": 3 * len(made)}
        if made:
            tables = [slices_to_table(patient, classes) for patient in made]
            write_tables(folder / "data" / f"{split}-00000-of-00001.parquet", tables, classes)
    facts = {
        "version": 1, "modalities": ["flair", "t1", "t1ce", "t2"][:channels], "class_names": list(classes),
        "size": size, "channels": channels, "dtype": "float16", "scale": 1, "field_mm": 240.0, "percentile": 99.0,
        "source": "made", "seed": 0, "has_masks": masks, "splits": splits,
    }  # fmt: skip
    (folder / "preprocessing.json").write_text(json.dumps(facts | changes))
    return folder


class MadeSlices:
    """Slices in memory, read as a `SliceDataset` is."""

    def __init__(self, images, labels):
        self.folder, self.images, self.labels = "made", images, np.array(labels)

    def __getitems__(self, indices):
        return indices

    def collate(self, rows):
        return {"images": self.images[rows], "labels": torch.from_numpy(self.labels[rows])}


def two_slices():
    """One image with a foreground of 20 x 12 pixels, and one that is filled."""
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    images[0, :, :5] = images[0, :, 25:] = images[0, :, :, :10] = images[0, :, :, 22:] = 0
    return MadeSlices(images, (0, 1))


def forget_accelerator():
    """Let the next accelerator have another precision and another number of parts."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def stub_accelerator():
    """One process that saves a file as its state."""

    def save(folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"weights")

    return SimpleNamespace(
        is_main_process=True, wait_for_everyone=lambda: None, save_state=save, device="cpu",
        reduce=lambda value, how: value, logged=[], trackers=[], print=lambda *text: None,
    )  # fmt: skip


def options(dataset, output, **changes):
    given = {"dataset": dataset, "output_dir": output} | OPTIONS | changes
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items() if value is not None
    ]


def run_here(dataset, output, **changes):
    """Exit code of a run in this process."""
    forget_accelerator()
    return run_command(lambda: main(parse_args(options(dataset, output, **changes))))


def train(dataset, output, **changes):
    assert run_here(dataset, output, **changes) == 0
    return output
