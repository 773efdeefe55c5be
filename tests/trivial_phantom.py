"""A bright square on noise: what any method must find after a training of seconds."""

import torch
from accelerate import Accelerator

from diffusers_cf.baselines import NETWORKS, network_of_data
from diffusers_cf.baselines.method import TrainableMethod
from diffusers_cf.training.loop import Training


SIDE, SQUARE = 16, 4
TINY = {
    "fanogan": {
        "block_out_channels": (8, 16, 16),
        "latent_dim": 32,
        "learning_rate": 1e-3,
        "encoder_learning_rate": 1e-3,
    },
    "vae": {"base_channels": 16},
    "dae": {"block_out_channels": (8, 16, 32)},
    "cam": {"embedding_size": 16, "hidden_sizes": (32,), "depths": (2,)},
}


def tiny(name: str, **changes) -> TrainableMethod:
    """Return an untrained network of `NETWORKS` for the trivial slices."""
    torch.manual_seed(0)
    if name in TINY:
        return NETWORKS[name].cls(**{"num_channels": 1, "image_size": SIDE} | TINY[name] | changes)
    return network_of_data(name, "small", 1, SIDE, ("healthy", "unhealthy"))


def trivial_slices(count: int, seed: int, lesions: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `(N, 1, 16, 16)` in input units, tissue of about 0.4 within a rim of background, and masks."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.4 + 0.03 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    masks = torch.zeros(count, SIDE, SIDE)
    corners = torch.randint(3, SIDE - 3 - SQUARE, (count, 2), generator=generator)
    if lesions:
        for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
            mask[y : y + SQUARE, x : x + SQUARE] = 1
    images = (images + 0.4 * masks[:, None]).clamp(min=0.01)
    images[..., :2], images[..., -2:], images[..., :2, :], images[..., -2:, :] = 0, 0, 0, 0
    return images, masks


def trivial_batch(count: int, seed: int, trained_on: str) -> dict[str, torch.Tensor]:
    """Return a batch as the training loop makes it; with `all`, every other slice has a square."""
    images, _ = trivial_slices(count, seed, False)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, dtype=torch.long)
    if trained_on == "all":
        labels[1::2] = 1
        images[1::2] = trivial_slices(count, seed + 1, True)[0][1::2]
    return {
        "images": images * 2 - 1, "labels": labels, "noise": torch.randn(images.shape, generator=generator),
        "timesteps": torch.randint(1000, (count,), generator=generator), "uniform": torch.rand(count, generator=generator),
    }  # fmt: skip


def training_step(method: TrainableMethod, optimizers: dict, batch: dict, progress: float) -> None:
    """Do one step of the training loop."""
    step = Training(
        Accelerator(cpu=True), method, lambda part, _: method.losses(part, progress), optimizers, None, None, {}, 1, 1,
        max_grad_norm=method.max_grad_norm,
    )  # fmt: skip
    step.accumulate([batch])


def train_briefly(method: TrainableMethod, steps: int) -> TrainableMethod:
    """Train on fresh trivial slices."""
    torch.manual_seed(0)
    method.train()
    optimizers = method.optimizers()
    for step in range(steps):
        training_step(method, optimizers, trivial_batch(16, 1000 + 2 * step, method.trained_on), step / steps)
    return method.eval()
