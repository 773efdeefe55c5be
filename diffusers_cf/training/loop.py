"""The parts of the training loop: reproducible batches, augmentation, progress and checkpoints.

Everything random about a training image depends only on the seed and on the image's global position in the run. So
any number of processes, any number of accumulation steps and a resumed run all see the same images, noise, timesteps
and dropped conditions.
"""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional

from diffusers_cf.errors import InputError, first_line
from diffusers_cf.images import foreground_windows, resize_images


_CHUNK = 8192
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"
ADVICE = "lower --learning_rate or use bf16; the checkpoints saved so far are whole"


class TrainingSlices(torch.utils.data.Dataset):
    """An endless training set: an item is the image at a global position of the run, classes balanced in expectation.

    Args:
        slices: a `SliceDataset` (anything with `labels`, `__getitems__` and `collate`).
        seed (`int`): seed of the run.
        image_size (`tuple[int, int]`): height and width of the network's input.
        max_samples (`int`, *optional*): use only the first slices, as many as this.
        num_train_timesteps (`int`): T; timesteps are drawn uniformly from [0, T).
        random_flip (`bool`): mirror left and right with probability 0.5.
        augment (`bool`): small rotation, scale, shift and per-channel gain, see [`augment_images`].
        crop_background (`float`): share of the images that are cut to the window around their foreground.
        window_side (`int`): side of a window that the foreground fits into.
        clip_input (`bool`): cut images at 1, as [`CounterfactualDDIMPipeline`] does.

    Raises:
        InputError: there is no slice.
    """

    def __init__(
        self, slices, seed: int, image_size: tuple[int, int], max_samples: int | None = None,
        num_train_timesteps: int = 1000, random_flip: bool = False, augment: bool = False,
        crop_background: float = 0.0, window_side: int = 48, clip_input: bool = True,
    ):  # fmt: skip
        self.slices, self.seed, self.image_size = slices, seed, image_size
        self.num_train_timesteps, self.random_flip, self.augment = num_train_timesteps, random_flip, augment
        self.crop_background, self.window_side, self.clip_input = crop_background, window_side, clip_input
        self.labels = np.asarray(slices.labels)[:max_samples]
        self.num_slices = len(self.labels)
        if not self.num_slices:
            raise InputError(f"{getattr(slices, 'folder', 'the data set')}: the training split is empty")
        self.by_class = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        self.chunks = {}

    def classes(self) -> set[int]:
        """Return the indices of the classes that have slices."""
        return set(self.labels.tolist())

    @property
    def num_patients(self) -> int:
        """Number of patients that have slices."""
        return len(np.unique(self.slices.patients[: self.num_slices]))

    def index_at(self, position: int) -> int:
        """Return the index of the slice at a position: draw a class uniformly, then one of its slices uniformly."""
        chunk, offset = divmod(position, _CHUNK)
        if chunk not in self.chunks:
            random = np.random.default_rng([self.seed, chunk])
            classes, ranks = random.integers(len(self.by_class), size=_CHUNK), random.random(_CHUNK)
            drawn = [self.by_class[c][int(r * len(self.by_class[c]))] for c, r in zip(classes, ranks, strict=True)]
            self.chunks = {chunk: np.array(drawn)}
        return int(self.chunks[chunk][offset])

    def __getitems__(self, positions: list[int]) -> list[tuple]:
        """Return pairs `(position, row)`."""
        rows = self.slices.__getitems__([self.index_at(position) for position in positions])
        return list(zip(positions, rows, strict=True))

    def collate(self, items: list[tuple]) -> dict[str, torch.Tensor]:
        """Make a batch of pairs `(position, row)`.

        Returns:
            `images` and `noise` `(N, C, h, w)`, `labels`, `timesteps`, `uniform` (for dropping the condition) and
            `is_cropped` (for `collate_parts`) `(N,)`. Images lie in [-1, 1]; peaks left in or a gain can exceed 1.
        """
        positions, rows = zip(*items, strict=True)
        batch = self.slices.collate(list(rows))
        images = batch["images"].clamp(max=1) if self.clip_input else batch["images"]
        images = resize_images(images, self.image_size)
        generators = [torch.Generator().manual_seed(position_seed(self.seed, position)) for position in positions]
        draws = torch.stack([torch.rand(_FIXED_DRAWS + images.shape[1], generator=g) for g in generators])
        if self.augment or self.random_flip:
            images = augment_images(images, draws[:, 2:], self.random_flip, self.augment)
        return {
            "images": images * 2 - 1,
            "labels": batch["labels"],
            "noise": torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators]),
            "timesteps": (draws[:, 0].double() * self.num_train_timesteps).long(),
            "uniform": draws[:, 1],
            # the last draw, so that all others are the same with and without windows
            "is_cropped": torch.cat([torch.rand(1, generator=g) for g in generators]) < self.crop_background,
        }

    def collate_parts(self, items: list[tuple]) -> list[dict[str, torch.Tensor]]:
        """Make a batch as [`collate`] does, in parts of one size: whole images first, then each size of window."""
        batch = self.collate(items)
        is_cropped = batch.pop("is_cropped")
        if not is_cropped.any():
            return [batch]
        inside = (batch["images"] > -1).any(dim=1) & is_cropped[:, None, None]
        windows = foreground_windows(inside, self.window_side)
        windows = [group for group in windows if group.size != tuple(self.image_size)]
        is_whole = torch.ones(len(is_cropped), dtype=torch.bool)
        is_whole[[number for group in windows for number in group.index]] = False
        parts = [{key: value[is_whole] for key, value in batch.items()}] if is_whole.any() else []
        for group in windows:
            parts.append({k: group.cut(v) if v.ndim == 4 else v[group.index] for k, v in batch.items()})
        return parts

    def batches(self, positions: Iterable[list[int]], num_workers: int, pin_memory: bool) -> Iterable[list[dict]]:
        """Load the batches of [`collate_parts`] at lists of global positions with a `DataLoader`."""
        return torch.utils.data.DataLoader(
            self,
            batch_sampler=positions,
            collate_fn=self.collate_parts,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Without its own, the loader draws from the global generator, which a checkpoint has just restored.
            generator=torch.Generator(),
        )


_FIXED_DRAWS = 2 + 6  # timestep, dropping; flip, rotation, two scales, two shifts; then a gain for each channel


def position_seed(seed: int, position: int) -> int:
    """Return the seed of the image at a global position, independent of its neighbours'."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def augment_images(images: torch.Tensor, uniform: torch.Tensor, flip: bool, deform: bool) -> torch.Tensor:
    """Mirror images, and deform them by up to 10 degrees, 10 % scale, 5 % shift and 10 % gain per channel.

    Background stays 0.

    Args:
        images (`torch.Tensor`): `(N, C, H, W)`, at least 0.
        uniform (`torch.Tensor`): draws from U[0, 1), `(N, 6 + C)`.
        flip (`bool`): mirror left and right where the first draw is below 0.5.
        deform (`bool`): the rest.
    """
    signed = uniform * 2 - 1
    mirror = torch.where(uniform[:, 0] < 0.5, -1.0, 1.0) if flip else torch.ones(len(images))
    if not deform:
        return torch.where(mirror[:, None, None, None] < 0, images.flip(-1), images)
    angle = signed[:, 1] * math.radians(10)
    scale_y, scale_x = 1 + 0.1 * signed[:, 2], 1 + 0.1 * signed[:, 3]
    shift_y, shift_x = 0.1 * signed[:, 4], 0.1 * signed[:, 5]
    rows = [
        torch.stack([mirror * scale_x * angle.cos(), -scale_x * angle.sin(), shift_x], dim=1),
        torch.stack([mirror * scale_y * angle.sin(), scale_y * angle.cos(), shift_y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved * (1 + 0.1 * signed[:, 6:, None, None])


class PositionBatches(torch.utils.data.Sampler):
    """Batches of global positions for one process: its share of each accumulation step.

    Args:
        first_step, last_step (`int`): yield batches for the optimiser steps [first, last).
        batch_size (`int`): images per process and accumulation step.
        parts (`int`): gradient accumulation steps.
        rank (`int`): index of this process.
        world_size (`int`): number of processes.
    """

    def __init__(self, first_step: int, last_step: int, batch_size: int, parts: int, rank: int, world_size: int):
        self.steps, self.batch_size, self.parts = range(first_step, last_step), batch_size, parts
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self):
        for step in self.steps:
            for part in range(self.parts):
                start = ((step * self.parts + part) * self.world_size + self.rank) * self.batch_size
                yield list(range(start, start + self.batch_size))


class averaged_weights:
    """Context in which the model is in evaluation mode and holds its EMA weights."""

    def __init__(self, model: torch.nn.Module, ema):
        self.model, self.ema = model, ema

    def __enter__(self):
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        return self.model.eval()

    def __exit__(self, *exception):
        self.ema.restore(self.model.parameters())
        self.model.train()


class Progress:
    """Report the mean loss and the speed since the last report, and check that the loss is finite.

    Args:
        accelerator: averages over the processes and logs.
        bar: a tqdm bar of optimiser steps.
        step (`int`): optimiser steps done.
        parts (`int`): gradient accumulation steps.
        images_per_step (`int`): images per optimiser step, over all processes.
    """

    def __init__(self, accelerator, bar, step: int, parts: int, images_per_step: int):
        self.accelerator, self.bar, self.parts, self.images_per_step = accelerator, bar, parts, images_per_step
        self.sum = torch.zeros((), device=accelerator.device)
        self.since, self.start = step, time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one accumulation step."""
        self.sum += loss / self.parts

    def report(self, step: int, rate: float) -> None:
        """Log loss, learning rate and speed.

        Raises:
            InputError: the loss is NaN or infinite.
        """
        loss = self.accelerator.reduce(self.sum, "mean").item() / (step - self.since)
        if not math.isfinite(loss):
            raise InputError(f"the loss became {loss} between steps {self.since} and {step}: {ADVICE}")
        speed = (step - self.since) * self.images_per_step / (time.perf_counter() - self.start)
        self.bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{speed:.1f}")
        self.accelerator.log({"loss": loss, "lr": rate, "images_per_second": speed}, step)
        self.sum.zero_()
        self.since, self.start = step, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent in this context out of the speed."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


def check_weights(weights: list[torch.Tensor], step: int) -> None:
    """Raise `InputError` if the last update made weights NaN or infinite: its own loss can't show that yet."""
    if not all(w.isfinite().all() for w in weights):
        raise InputError(f"the weights became NaN or infinite by step {step}: {ADVICE}")


def finished_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    found = [
        p for p in Path(folder).glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and (p / STATE_FILE).is_file()
    ]
    return sorted(found, key=_step)


def check_output_folder(output: Path, resume_from: str | None) -> None:
    """Raise `InputError` if a new run would write into a folder that holds another run's checkpoints."""
    finished = finished_checkpoints(output)
    if finished and not resume_from:
        raise InputError(
            f"{output} already holds {finished[-1].name}: go on from it with --resume_from_checkpoint latest,"
            " or start in another --output_dir"
        )


def save_checkpoint(accelerator, folder: Path, step: int, facts: dict, save_model, limit: int | None) -> None:
    """Save the whole training state as `checkpoint-STEP`, or nothing; then delete the oldest beyond `limit`.

    Args:
        accelerator: holds the state to save.
        folder (`Path`): the run's output folder.
        step (`int`): optimiser steps done.
        facts (`dict`): for trainer_state.json, which is written last.
        save_model: `(folder) -> None`, saves the EMA weights as a pipeline; called on the main process.
        limit (`int`, *optional*): how many checkpoints to keep.

    Raises:
        OSError: the checkpoint can't be written; nothing of it is left.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_model(temporary / "pipeline")
            (temporary / STATE_FILE).write_text(json.dumps({"step": step} | facts, indent=2))
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of torch and safetensors raise their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(errno.EIO, f"the checkpoint can't be written ({first_line(error)})", str(final)) from error
    if accelerator.is_main_process:
        if final.exists():
            _delete(final)
        os.replace(temporary, final)
        kept = [p for p in finished_checkpoints(folder) if _step(p) <= step]
        for old in kept[:-limit] if limit else []:
            _delete(old)
    accelerator.wait_for_everyone()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _delete(checkpoint: Path) -> None:
    # Rename first: a kill halfway must not leave a folder that looks complete.
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def find_checkpoint(folder: Path, name: str | None, facts: dict) -> tuple[Path, int] | None:
    """Return the checkpoint to resume from and its step, or None if there is none.

    Args:
        folder (`Path`): the run's output folder.
        name (`str`, *optional*): a path, a name in the folder, or `latest`.
        facts (`dict`): what must equal the checkpoint's trainer_state.json: seed, batch, data.

    Raises:
        InputError: the checkpoint is missing, incomplete or has other `facts`.
    """
    if name is None:
        return None
    if name == "latest":
        finished = finished_checkpoints(folder)
        if not finished:
            return None
        path = finished[-1]
    else:
        path = Path(name) if Path(name).is_dir() else Path(folder) / name
    try:
        state = json.loads((path / STATE_FILE).read_text())
        step = int(state["step"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a complete checkpoint ({type(error).__name__} at {STATE_FILE})") from None
    for key, value in facts.items():
        if state.get(key) != value:
            raise InputError(f"{path}: made with {key} = {state.get(key)}, this run has {value}")
    return path, step
