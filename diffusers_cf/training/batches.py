"""Reproducible training batches.

Everything random about a training image depends only on the seed and on the image's global position in the run. So
any number of processes, any number of accumulation steps and a resumed run all see the same images, noise, timesteps
and dropped conditions.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional

from diffusers_cf.errors import InputError
from diffusers_cf.images import foreground_windows, resize_images, window_side


_CHUNK = 8192
PARTS_OF_HEAD = 12  # within which positions match


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
        halvings (`int`): how often the network halves its input; see [`images.window_side`].
        clip_input (`bool`): cut images at 1, as [`CounterfactualDDIMPipeline`] does.
        match_positions (`bool`): draw every class at the same positions in the head, as far as it has slices there, so
            that a slice's position says less about its label.
        channel_dropout (`float`): share of the images in which some channels are background throughout, as in a patient who
            lacks these modalities. Which ones is drawn uniformly from all choices that leave a channel.

    Raises:
        InputError: there is no slice, the images have no smaller windows, or only one channel.
    """

    def __init__(
        self, slices, seed: int, image_size: tuple[int, int], max_samples: int | None = None,
        num_train_timesteps: int = 1000, random_flip: bool = False, augment: bool = False, crop_background: float = 0.0,
        halvings: int = 3, clip_input: bool = True, match_positions: bool = False, channel_dropout: float = 0.0,
    ):  # fmt: skip
        self.slices, self.seed, self.image_size = slices, seed, image_size
        self.num_train_timesteps, self.random_flip, self.augment = num_train_timesteps, random_flip, augment
        self.crop_background, self.clip_input, self.channel_dropout = crop_background, clip_input, channel_dropout
        self.window_side = window_side(image_size, halvings)
        if crop_background and self.window_side >= image_size[0]:
            raise InputError(f"--crop_background: images of {image_size[0]} pixels are too small to be cut to windows")
        if channel_dropout and slices.preprocessing["channels"] == 1:
            raise InputError("--channel_dropout: these images have one channel, and without it nothing is left")
        self.labels = np.asarray(slices.labels)[:max_samples]
        self.num_slices = len(self.labels)
        if not self.num_slices:
            raise InputError(f"{getattr(slices, 'folder', 'the data set')}: the training split is empty")
        parts = np.zeros(self.num_slices, int)  # of the head; one part is all of it
        if match_positions:
            positions = relative_positions(slices.patients[: self.num_slices], slices.slices[: self.num_slices])
            parts = np.minimum((positions * PARTS_OF_HEAD).astype(int), PARTS_OF_HEAD - 1)
        names, counts = np.unique(parts, return_counts=True)
        self.shares, classes = counts / self.num_slices, np.unique(self.labels)
        by_class = [[np.flatnonzero((parts == part) & (self.labels == label)) for label in classes] for part in names]
        # in each part the rows of each class
        self.groups = [[rows for rows in group if len(rows)] for group in by_class]
        self.chunks = {}

    @property
    def num_patients(self) -> int:
        """Number of patients that have slices."""
        return len(np.unique(self.slices.patients[: self.num_slices]))

    def index_at(self, position: int) -> int:
        """Return the index of the slice at a position of the run.

        Draw a part of the head (one part is all of it, unless positions are to match), then a class uniformly, then one
        of its slices there uniformly.
        """
        chunk, offset = divmod(position, _CHUNK)
        if chunk not in self.chunks:
            random = np.random.default_rng([self.seed, chunk])
            own = np.random.default_rng([self.seed, chunk, 1])  # the other draws are the same without matching
            groups = [self.groups[i] for i in own.choice(len(self.groups), _CHUNK, p=self.shares)]
            classes, ranks = random.integers([len(group) for group in groups]), random.random(_CHUNK)
            drawn = [(of := group[c])[int(r * len(of))] for group, c, r in zip(groups, classes, ranks, strict=True)]
            self.chunks = {chunk: np.array(drawn)}
        return int(self.chunks[chunk][offset])

    def __getitems__(self, positions: list[int]) -> list[tuple]:
        """Return pairs `(position, row)`."""
        rows = self.slices.__getitems__([self.index_at(position) for position in positions])
        return list(zip(positions, rows, strict=True))

    def collate(self, items: list[tuple]) -> dict[str, torch.Tensor]:
        """Make a batch of pairs `(position, row)`.

        Returns:
            `images` and `noise` `(N, C, h, w)`, `targets` `(N, h, w)` where the slices have some, `labels`, `timesteps`,
            `uniform` (for dropping the condition) and `is_cropped` (for `collate_parts`) `(N,)`. Images lie in [-1, 1]; peaks left in or a gain can exceed 1.
        """
        positions, rows = zip(*items, strict=True)
        batch = self.slices.collate(list(rows))
        images = batch["images"].clamp(max=1) if self.clip_input else batch["images"]
        generators = [torch.Generator().manual_seed(position_seed(self.seed, position)) for position in positions]
        channels = images.shape[1]
        draws = torch.stack([torch.rand(_FIXED_DRAWS + channels, generator=g) for g in generators])
        deformation = draws[:, 2:]
        if "targets" in batch:  # they move with the image, and have no gain
            images = torch.cat([images, batch["targets"][:, None]], dim=1)
            deformation = functional.pad(deformation, (0, 1), value=0.5)
        images = resize_images(images, self.image_size)
        if self.augment or self.random_flip:
            images = augment_images(images, deformation, self.random_flip, self.augment)
        images, *targets = images.split([channels, images.shape[1] - channels], dim=1)
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
        # the last draws, so that all others are the same with and without windows and dropout
        is_cropped, drops, subset = torch.stack([torch.rand(3, generator=g) for g in generators]).T
        if self.channel_dropout:
            kept = (subset * (2**channels - 2)).long() + 1  # bit c says whether channel c stays: some, but not all
            kept = torch.where(drops < self.channel_dropout, kept, 2**channels - 1)
            images = images * (kept[:, None] >> torch.arange(channels) & 1)[:, :, None, None]
        return {
            "images": images * 2 - 1,
            **({"targets": targets[0][:, 0]} if "targets" in batch else {}),
            "labels": batch["labels"],
            "noise": noise,
            "timesteps": (draws[:, 0].double() * self.num_train_timesteps).long(),
            "uniform": draws[:, 1],
            "is_cropped": is_cropped < self.crop_background,
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


def relative_positions(patients: Sequence[str], slices: Sequence[int]) -> np.ndarray:
    """Return the position of each slice within its patient: 0 the lowest slice given, 1 the highest, 0.5 a single one.

    Args:
        patients (`Sequence[str]`): `(N,)`, patient of each slice.
        slices (`Sequence[int]`): `(N,)`, axial index of each slice.

    Returns:
        `np.ndarray`: float64 `(N,)` in [0, 1].
    """
    patients, slices = np.asarray(patients), np.asarray(slices, dtype=np.float64)
    positions = np.full(len(slices), 0.5)
    for patient in np.unique(patients):
        own = patients == patient
        low, high = slices[own].min(), slices[own].max()
        if high > low:
            positions[own] = (slices[own] - low) / (high - low)
    return positions


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
