"""A bright square on noise: the least that any method must find, and a training of seconds."""

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from diffusers_cf.baselines.method import TrainableMethod


SIDE, SQUARE = 16, 4


def trivial_slices(count: int, seed: int, lesions: bool, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(N, C, 16, 16)` in input units, smooth tissue of about 0.4 with a rim of background, and masks."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.4 + 0.03 * torch.randn(count, channels, SIDE, SIDE, generator=generator)
    masks = torch.zeros(count, SIDE, SIDE)
    corners = torch.randint(3, SIDE - 3 - SQUARE, (count, 2), generator=generator)
    if lesions:
        for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
            mask[y : y + SQUARE, x : x + SQUARE] = 1
    images = (images + 0.4 * masks[:, None]).clamp(min=0.01)
    images[..., :2], images[..., -2:], images[..., :2, :], images[..., -2:, :] = 0, 0, 0, 0
    return images, masks


def trivial_batch(count: int, seed: int, trained_on: str, channels: int = 1) -> dict[str, torch.Tensor]:
    """A batch as the training loop makes it; half of it with a square where a method may see `all` slices."""
    healthy, _ = trivial_slices(count, seed, False, channels)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, dtype=torch.long)
    if trained_on == "all":
        sick, _ = trivial_slices(count, seed + 1, True, channels)
        labels[1::2] = 1
        healthy[1::2] = sick[1::2]
    return {
        "images": healthy * 2 - 1,
        "labels": labels,
        "noise": torch.randn(healthy.shape, generator=generator),
        "timesteps": torch.randint(1000, (count,), generator=generator),
        "uniform": torch.rand(count, generator=generator),
    }


def train_briefly(method: TrainableMethod, steps: int, count: int = 16) -> TrainableMethod:
    """Trains on fresh trivial slices, by the steps that the shared loop takes, too."""
    from diffusers_cf.baselines.training import training_step

    torch.manual_seed(0)
    method.train()
    optimizers = method.optimizers()
    for step in range(steps):
        batch = trivial_batch(count, 1000 + 2 * step, method.trained_on, method.config.num_channels)
        training_step(method, optimizers, batch, step / steps)
    return method.eval()


def trivial_auprc(method, count: int = 24, channels: int = 1) -> tuple[float, float]:
    """AUPRC of a method's maps over all pixels of unseen sick slices, and the prevalence it is compared with."""
    images, masks = trivial_slices(count, 7, True, channels)
    maps = torch.as_tensor(method.anomaly_map(images)).detach().float()
    maps = torch.nn.functional.interpolate(maps[:, None], size=masks.shape[1:], mode="bilinear")[:, 0]
    return average_precision_score(masks.numpy().ravel(), maps.numpy().ravel()), float(np.mean(masks.numpy()))
