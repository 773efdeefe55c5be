"""A student: a plain U-Net that learns the anomaly maps of another method, so that a map costs one pass a slice.

It sees images, their labels and the teacher's maps, never a mask. Averaged over many images, what the teacher gets
wrong at random cancels out, and slices labelled healthy teach the student what the teacher marks without reason.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch.nn import functional

from diffusers_cf.baselines.method import TrainableMethod
from diffusers_cf.errors import InputError
from diffusers_cf.maps import student_maps


# Targets are 0 below this quantile of the foreground of healthy slices, and 1 above that of unhealthy ones.
HEALTHY_QUANTILE, UNHEALTHY_QUANTILE = 0.98, 0.995
WARM_UP = 0.05  # share of the training in which the learning rate rises


class Student(TrainableMethod):
    """A stock `UNet2DModel` with one output channel, the logit of the target.

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels, a multiple of 8.
        block_out_channels (`tuple[int]`): channels of each level.
        learning_rate (`float`): the highest one; it rises over the first 5 % and then falls as a cosine.
    """

    trained_on = "all"
    averaged = True

    @register_to_config
    def __init__(
        self, num_channels: int = 1, image_size: int = 128, block_out_channels: tuple[int, ...] = (16, 32, 64, 96),
        learning_rate: float = 2e-3,
    ):  # fmt: skip
        super().__init__()
        levels = len(block_out_channels)
        self.network = UNet2DModel(
            image_size, num_channels, out_channels=1, block_out_channels=block_out_channels, layers_per_block=1,
            down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels, norm_num_groups=8,
            add_attention=False,
        )  # fmt: skip

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": torch.optim.AdamW(self.network.parameters(), self.config.learning_rate, fused=True)}

    def learning_rate_factor(self, progress: float) -> float:
        return min(1.0, (progress + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(progress * math.pi))

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        logits = self.network(batch["images"], 0).sample[:, 0]
        yield "network", student_loss(logits, batch["targets"])

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        return student_maps(self.network, images.to(self.device))


def student_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus half of one minus the soft Dice of the batch.

    Args:
        logits (`torch.Tensor`): `(N, h, w)`.
        targets (`torch.Tensor`): `(N, h, w)` in [0, 1].
    """
    logits = logits.float()
    found = logits.sigmoid()
    dice = (2 * (found * targets).sum() + 1) / (found.square().sum() + targets.square().sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, targets) + 0.5 * (1 - dice)


class TaughtSlices(torch.utils.data.Dataset):
    """A split of a slice data set with the target `(H, W)` of each slice, for [`training.batches.TrainingSlices`].

    Args:
        slices (`SliceDataset`): the split.
        targets (`np.ndarray`): `(N, H, W)` in [0, 1], from [`targets_of_maps`].
    """

    def __init__(self, slices, targets: np.ndarray):
        self.slices, self.targets = slices, targets
        self.labels, self.patients, self.folder = slices.labels, slices.patients, slices.folder

    def __getitems__(self, indices: list[int]) -> list[tuple]:
        return list(zip(indices, self.slices.__getitems__(indices), strict=True))

    def collate(self, items: list[tuple]) -> dict:
        """Return the batch of `SliceDataset.collate` with `targets` `(N, H, W)`."""
        indices, rows = zip(*items, strict=True)
        targets = torch.from_numpy(self.targets[list(indices)].astype(np.float32))
        return self.slices.collate(list(rows)) | {"targets": targets}


def targets_of_maps(
    maps: np.ndarray, inside: np.ndarray, labels: Iterable[int], accept_weak: bool = False
) -> np.ndarray:
    """Return targets in [0, 1], float16 `(N, H, W)`: maps on one scale from image labels, all 0 in healthy slices.

    Args:
        maps (`np.ndarray`): `(N, H, W)`, post-processed.
        inside (`np.ndarray`): bool `(N, H, W)`, the foreground.
        labels (`Iterable[int]`): `(N,)`, 0 is healthy; both kinds.
        accept_weak (`bool`): whether to scale a teacher by unhealthy slices alone whose maps of them are not above those
            of healthy ones, as in a table that has a row for every method.

    Raises:
        InputError: unhealthy slices are not above healthy ones, and `accept_weak` is False.
    """
    healthy = np.asarray(labels) == 0
    low = np.quantile(maps[healthy][inside[healthy]].astype(np.float32), HEALTHY_QUANTILE)
    high = np.quantile(maps[~healthy][inside[~healthy]].astype(np.float32), UNHEALTHY_QUANTILE)
    if not high > low and accept_weak:
        low = np.quantile(maps[~healthy][inside[~healthy]].astype(np.float32), HEALTHY_QUANTILE)
        high = max(high, np.nextafter(low, np.float32(np.inf)))
    if not high > low:
        raise InputError(
            "the teacher's maps of unhealthy slices are not above those of healthy ones: nothing to learn"
        )
    targets = np.clip((maps.astype(np.float32) - low) / (high - low), 0, 1) * inside
    targets[healthy] = 0
    return targets.astype(np.float16)
