"""Variational autoencoder of healthy slices: maps by reconstruction and by restoration (Chen et al. 2020).

Recipe of UPD_study (Lagogiannis et al. 2023): 128 x 128 pixels, 30,000 steps of 64 images, Adam with learning rate 1e-4
and betas (0, 0.9), weight 1e-3 of the mean KL; restoration by 500 gradient steps.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_cf.baselines.method import AnomalyMethod, Grid, TrainableMethod, frozen, residual_map, unit_images


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Return the anisotropic total variation, the sum of |differences| of neighbours: `(N, C, h, w)` to `(N,)`.

    As in Chen et al. 2020 and Baur et al. 2021; UPD_study squares the differences, which blurs the edges of a lesion.
    """
    rows = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).sum(dim=1)
    columns = (images[..., :, 1:] - images[..., :, :-1]).abs().flatten(1).sum(dim=1)
    return rows + columns


class VariationalAutoencoder(TrainableMethod):
    """The VAE (method id `vae`), anomaly map by reconstruction `|x - x_rec|`.

    Each level of the encoder halves the side: 3 x 3 convolution with stride 2, batch norm, LeakyReLU. A 1 x 1
    convolution and a linear layer give mean and log-variance. The decoder mirrors this and ends without an activation.
    The code at inference is its mean: UPD_study draws it, which adds noise to the map.

    The size of UPD_study is `image_size=128, base_channels=16, max_channels=512, bottleneck_side=2, latent_dim=512`.

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels, `bottleneck_side` times a power of two above 1.
        base_channels (`int`): channels of the finest level; each next level has twice as many.
        max_channels (`int`): most channels of a level.
        bottleneck_side (`int`): side of the coarsest level in pixels.
        bottleneck_channels (`int`): channels of the coarsest level before the linear layer.
        latent_dim (`int`): D, the width of the code, at most the number of values of an image.
        kl_weight (`float`): weight of the mean KL beside the mean squared error.
        learning_rate (`float`): of Adam.

    Raises:
        ValueError: `image_size` or `latent_dim` does not fit.
    """

    @register_to_config
    def __init__(
        self, num_channels: int = 4, image_size: int = 64, base_channels: int = 32, max_channels: int = 256,
        bottleneck_side: int = 4, bottleneck_channels: int = 16, latent_dim: int = 128, kl_weight: float = 1e-3,
        learning_rate: float = 1e-3,
    ):  # fmt: skip
        super().__init__()
        num_levels = (image_size // bottleneck_side).bit_length() - 1
        if num_levels < 1 or bottleneck_side << num_levels != image_size:
            raise ValueError(f"image_size is {image_size}: it must be {bottleneck_side} times a power of two above 1")
        if latent_dim > num_channels * image_size**2:
            raise ValueError(f"latent_dim is {latent_dim}: an image has only {num_channels * image_size**2} values")
        widths = [min(base_channels * 2**level, max_channels) for level in range(num_levels)]
        bottleneck = (bottleneck_channels, bottleneck_side, bottleneck_side)

        layers = []
        for before, width in pairwise([num_channels, *widths]):
            layers += _normalized(nn.Conv2d(before, width, 3, stride=2, padding=1))
        self.encoder = nn.Sequential(*layers, *_normalized(nn.Conv2d(widths[-1], bottleneck_channels, 1)))
        self.to_code = nn.Linear(math.prod(bottleneck), 2 * latent_dim)
        self.from_code = nn.Sequential(nn.Linear(latent_dim, math.prod(bottleneck)), nn.Unflatten(1, bottleneck))
        layers = _normalized(nn.Conv2d(bottleneck_channels, widths[-1], 1))
        for before, width in zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True):
            layers += _normalized(nn.ConvTranspose2d(before, width, 3, stride=2, padding=1, output_padding=1))
        self.decoder = nn.Sequential(*layers, nn.Conv2d(widths[0], num_channels, 1))

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log-variance of the code, each `(N, D)`, of images `(N, C, h, w)` in [0, 1]."""
        mean, log_variance = self.to_code(self.encoder(images).flatten(1)).float().chunk(2, dim=1)
        return mean, log_variance

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction `(N, C, h, w)` of a code `(N, D)`."""
        return self.decoder(self.from_code(code)).float()

    def negative_elbo(
        self, images: torch.Tensor, code: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
    ) -> torch.Tensor:
        """Return each image's mean squared error over `(C, h, w)` + `kl_weight` * mean KL over D.

        This is the negative evidence lower bound of a Gaussian decoder, up to a factor and a constant. Both terms are
        means, as in UPD_study, whose weight 1e-3 therefore applies. The KL is that of N(mu, sigma^2) from N(0, 1)
        (Kingma and Welling 2014, appendix B).

        Args:
            images (`torch.Tensor`): `(N, C, h, w)` in [0, 1].
            code (`torch.Tensor`): what is decoded, `(N, D)`.
            mean (`torch.Tensor`): mu of the code, `(N, D)`.
            log_variance (`torch.Tensor`): log sigma^2 of the code, `(N, D)`.

        Returns:
            `torch.Tensor`: `(N,)`.
        """
        squared_error = (images - self.decode(code)).square().flatten(1).mean(dim=1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return squared_error + self.config.kl_weight * kl.mean(dim=1)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"vae": torch.optim.Adam(self.parameters(), self.config.learning_rate, betas=(0.0, 0.9))}

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        images = unit_images(batch)
        mean, log_variance = self.encode(images)
        # the batch's noise depends only on the image's position in the run, so that resuming repeats it
        noise = batch["noise"].flatten(1)[:, : self.config.latent_dim]
        code = mean + (log_variance / 2).exp() * noise
        yield "vae", self.negative_elbo(images, code, mean, log_variance).mean()

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network_input(images)
        with frozen(self):
            mean, _ = self.encode(images)
            return residual_map(images, self.decode(mean))


def _normalized(conv: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU()]


class VAERestoration(AnomalyMethod):
    """Gradient descent on [`objective`] from the image itself, anomaly map `|x - x_r|` (method id `vae-restoration`).

    100 steps of 0.005 go as far as the published 500 of about 0.001. The published clamp of the gradient to [-50, 50]
    is left out: with images in [0, 1] no gradient comes near it.

    The gradient of |.| does not vanish near 0, so with a fixed step the change oscillates by up to
    4 * `step_size` * `tv_weight` a pixel. A weight that is too large therefore changes healthy slices more, and
    [`choose`] finds a minimum. With decaying steps it would choose weights that preserve lesions.

    Args:
        vae (`VariationalAutoencoder`): the trained network.
    """

    candidates = tuple(
        {"num_steps": 100, "step_size": 0.005, "tv_weight": weight} for weight in (0.2, 0.0, 0.05, 0.1, 0.4, 0.8)
    )

    def __init__(self, vae: VariationalAutoencoder):
        super().__init__()
        self.vae = vae

    def candidates_on(self, grid: Grid) -> Sequence[dict]:
        """Return the candidates with the grid's number of steps, scaled so that they go as far in all."""
        steps = grid.restoration_steps or 100
        return [c | {"num_steps": steps, "step_size": c["step_size"] * 100 / steps} for c in self.candidates]

    @property
    def network_evaluations_per_slice(self) -> int:
        """One NFE a step: forward and backward pass count as one, though they cost about three."""
        return self.settings["num_steps"]

    def objective(self, restored: torch.Tensor, images: torch.Tensor, tv_weight: float) -> torch.Tensor:
        """Return what restoration minimises for each image: C*h*w * negative ELBO(x_r) + `tv_weight` * TV(x_r - x).

        Every term is a sum over the pixels of one image, so that the gradient does not depend on the batch. The step
        size 1e3 of UPD_study, which takes means over 64 images of 128 x 128 pixels, is about 1e-3 here.

        Args:
            restored (`torch.Tensor`): x_r, `(N, C, h, w)`.
            images (`torch.Tensor`): x, `(N, C, h, w)` in [0, 1].
            tv_weight (`float`): lambda, the weight of the total variation.

        Returns:
            `torch.Tensor`: `(N,)`.
        """
        mean, log_variance = self.vae.encode(restored)
        elbo = self.vae.negative_elbo(restored, mean, mean, log_variance)
        return images[0].numel() * elbo + tv_weight * total_variation(restored - images)

    def restore(self, images: torch.Tensor, num_steps: int, step_size: float, tv_weight: float) -> torch.Tensor:
        """Return x_r `(N, C, h, w)` of images x `(N, C, h, w)` in [0, 1] at the network's size."""
        restored = images.detach()
        with torch.enable_grad(), frozen(self.vae):
            for _ in range(num_steps):
                restored.requires_grad_()
                (gradient,) = torch.autograd.grad(self.objective(restored, images, tv_weight).sum(), restored)
                restored = (restored - step_size * gradient).detach()
        return restored

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.vae.network_input(images)
        return residual_map(images, self.restore(images, **self.settings))

    def choose(self, images_batches: Iterable[torch.Tensor]) -> dict:
        """Return the candidate that changes healthy slices least, by the mean |x - x_r| over pixels and channels.

        Args:
            images_batches (`Iterable[torch.Tensor]`): healthy validation slices, `(N, C, H, W)` in input units.

        Returns:
            `dict`: `settings`, the first of the best candidates; `scores`, those of all candidates in their order.
        """
        sums, count = [0.0] * len(self.candidates), 0
        for batch in images_batches:
            images = self.vae.network_input(batch)
            count += images.numel()
            for index, candidate in enumerate(self.candidates):
                sums[index] += (images - self.restore(images, **candidate)).abs().sum().item()
        scores = [total / count for total in sums]
        return {"settings": dict(self.candidates[scores.index(min(scores))]), "scores": scores}
