"""The two rows of Table 1 that rest on a variational autoencoder of healthy slices: reconstruction and restoration."""

import math
from collections.abc import Iterable, Iterator

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_cf.baselines.method import AnomalyMethod, TrainableMethod, evaluation_mode, residual_map, unit_images


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of each dimension, in nats (Kingma and Welling 2014, appendix B).

    Args:
        mean (`torch.Tensor`): mu, `(N, D)`.
        log_variance (`torch.Tensor`): log sigma^2, `(N, D)`.

    Returns:
        `torch.Tensor`: `(N, D)`, at least 0.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def negative_elbo(
    images: torch.Tensor,
    reconstructions: torch.Tensor,
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    kl_weight: float,
) -> torch.Tensor:
    """What training minimises, of each image: mean squared error over `(C, h, w)` + `kl_weight` * mean KL over D.

    Up to a factor and a constant this is the negative evidence lower bound of a Gaussian decoder. Both terms are
    means, as in UPD_study (Lagogiannis et al. 2023), so that its weight 1e-3 holds.

    Args:
        images (`torch.Tensor`): `(N, C, h, w)`.
        reconstructions (`torch.Tensor`): `(N, C, h, w)`.
        mean (`torch.Tensor`): of the code, `(N, D)`.
        log_variance (`torch.Tensor`): of the code, `(N, D)`.
        kl_weight (`float`): of the mean KL.

    Returns:
        `torch.Tensor`: `(N,)`.
    """
    squared_error = (images - reconstructions).square().flatten(1).mean(dim=1)
    return squared_error + kl_weight * kl_divergence(mean, log_variance).mean(dim=1)


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Anisotropic total variation, the sum of |differences| of neighbours over `(C, h, w)`: `(N, C, h, w) -> (N,)`.

    As in Chen et al. 2020 and Baur et al. 2021; UPD_study squares the differences, which blurs the edges of a lesion.
    """
    rows = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).sum(dim=1)
    columns = (images[..., :, 1:] - images[..., :, :-1]).abs().flatten(1).sum(dim=1)
    return rows + columns


class VariationalAutoencoder(TrainableMethod):
    """VAE of healthy slices, map by reconstruction, `|x - x_rec|` (UPD_study, Lagogiannis et al. 2023).

    Halvings by [3x3 stride 2, batch norm, LeakyReLU] down to `bottleneck_side`, a 1x1 convolution to few channels, a
    linear layer to mean and log-variance; the decoder is its reflection and ends without an activation. The code at
    test time is its mean: UPD_study draws it, which adds noise to the map.

    The size of UPD_study at 128 pixels: `image_size=128, base_channels=16, max_channels=512, bottleneck_side=2,
    latent_dim=512, learning_rate=1e-4`, 30,000 steps of 64 images.

    Args:
        num_channels (`int`): of the images.
        image_size (`int`): side of the network's input in pixels, a power of two above `bottleneck_side`.
        base_channels (`int`): of the finest level; each next level has twice as many.
        max_channels (`int`): no level has more.
        bottleneck_side (`int`): side of the coarsest level in pixels.
        bottleneck_channels (`int`): of the coarsest level before the linear layer.
        latent_dim (`int`): D, of the code; no more than an image has values.
        kl_weight (`float`): of the mean KL beside the mean squared error.
        learning_rate (`float`): of Adam.

    Raises:
        ValueError: for an `image_size` or a `latent_dim` that doesn't fit.
    """

    @register_to_config
    def __init__(
        self,
        num_channels: int = 4,
        image_size: int = 64,
        base_channels: int = 32,
        max_channels: int = 256,
        bottleneck_side: int = 4,
        bottleneck_channels: int = 16,
        latent_dim: int = 128,
        kl_weight: float = 1e-3,
        learning_rate: float = 1e-3,
    ):
        super().__init__()
        num_levels = int(math.log2(max(image_size // bottleneck_side, 1)))
        if num_levels < 1 or bottleneck_side * 2**num_levels != image_size:
            raise ValueError(f"image_size is {image_size}: it must be {bottleneck_side} times a power of two above 1")
        if latent_dim > num_channels * image_size**2:
            raise ValueError(f"latent_dim is {latent_dim}: an image has only {num_channels * image_size**2} values")
        widths = [min(base_channels * 2**level, max_channels) for level in range(num_levels)]
        bottleneck = (bottleneck_channels, bottleneck_side, bottleneck_side)
        self.encoder = _encoder(num_channels, widths, bottleneck_channels)
        self.to_code = nn.Linear(math.prod(bottleneck), 2 * latent_dim)
        self.from_code = nn.Sequential(nn.Linear(latent_dim, math.prod(bottleneck)), nn.Unflatten(1, bottleneck))
        self.decoder = _decoder(num_channels, widths, bottleneck_channels)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the code, each `(N, D)`, of images `(N, C, h, w)` in [0, 1]."""
        mean, log_variance = self.to_code(self.encoder(images).flatten(1)).float().chunk(2, dim=1)
        return mean, log_variance

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Reconstruction `(N, C, h, w)` of a code `(N, D)`."""
        return self.decoder(self.from_code(code)).float()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"vae": torch.optim.Adam(self.parameters(), self.config.learning_rate, betas=(0.0, 0.9))}

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        images = unit_images(batch)
        mean, log_variance = self.encode(images)
        # the batch's own noise: it is a function of the image's position in the run, whatever the process
        noise = batch["noise"].flatten(1)[:, : self.config.latent_dim]
        code = mean + (log_variance / 2).exp() * noise
        yield "vae", negative_elbo(images, self.decode(code), mean, log_variance, self.config.kl_weight).mean()

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network_input(images)
        with evaluation_mode(self):
            mean, _ = self.encode(images)
            return residual_map(images, self.decode(mean))


def _encoder(num_channels: int, widths: list[int], bottleneck_channels: int) -> nn.Sequential:
    layers = []
    for before, width in zip([num_channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU()]
    last = nn.Conv2d(widths[-1], bottleneck_channels, 1)
    return nn.Sequential(*layers, last, nn.BatchNorm2d(bottleneck_channels), nn.LeakyReLU())


def _decoder(num_channels: int, widths: list[int], bottleneck_channels: int) -> nn.Sequential:
    layers = [nn.Conv2d(bottleneck_channels, widths[-1], 1), nn.BatchNorm2d(widths[-1]), nn.LeakyReLU()]
    for before, width in zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True):
        layers.append(nn.ConvTranspose2d(before, width, 3, stride=2, padding=1, output_padding=1))
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[0], num_channels, 1))


def restoration_objective(
    vae: VariationalAutoencoder, restored: torch.Tensor, images: torch.Tensor, tv_weight: float
) -> torch.Tensor:
    """What restoration lowers, of each image: C*h*w * negative ELBO(x_r) + `tv_weight` * TV(x_r - x).

    Every term is a sum over an image's pixels and none goes across the batch. So the gradient of a pixel is of the
    order of twice its error, whatever the image's size, and that of an image is the same in any batch. Steps of
    published code are for other reductions: UPD_study's 1e3 is for means over batch and pixels, the same as a step of
    about 1e-3 here for 64 images of one channel and 128 x 128; Baur et al. take 1e-3 for sums, of |errors| in place
    of squares.

    Args:
        vae (`VariationalAutoencoder`): in evaluation mode; the code is its mean.
        restored (`torch.Tensor`): x_r, `(N, C, h, w)`.
        images (`torch.Tensor`): x, `(N, C, h, w)` in [0, 1].
        tv_weight (`float`): lambda.

    Returns:
        `torch.Tensor`: `(N,)`.
    """
    mean, log_variance = vae.encode(restored)
    elbo = negative_elbo(restored, vae.decode(mean), mean, log_variance, vae.config.kl_weight)
    return images[0].numel() * elbo + tv_weight * total_variation(restored - images)


class VAERestoration(AnomalyMethod):
    """Gradient ascent of the ELBO from the image itself, map `|x - x_r|` (Chen et al. 2020; settings as UPD_study).

    `settings` holds `num_steps`, `step_size` and `tv_weight` of [`restoration_objective`]. 100 steps of 0.005 go as
    far as the published 500 of about 0.001. The published clamp of the gradient to [-50, 50] is left out: with images
    in [0, 1] no gradient comes near it.

    |.| has no slope at 0, so a fixed step makes the change jitter by up to 4 `step_size` * `tv_weight` a pixel. A
    large weight therefore ends above the objective that it began with, and changes healthy slices more again: this
    is what gives [`choose`] its minimum. With steps that fall to 0 it would take weights that keep lesions, too.

    Args:
        vae (`VariationalAutoencoder`): trained.
    """

    # the first is in use until another one is chosen
    candidates = tuple(
        {"num_steps": 100, "step_size": 0.005, "tv_weight": weight} for weight in (0.2, 0.0, 0.05, 0.1, 0.4, 0.8)
    )

    def __init__(self, vae: VariationalAutoencoder):
        super().__init__()
        self.vae = vae

    @property
    def network_evaluations_per_slice(self) -> int:
        """One for each step: a forward pass with its backward pass counts as one, though it costs about three."""
        return self.settings["num_steps"]

    def restore(self, images: torch.Tensor) -> torch.Tensor:
        """x_r `(N, C, h, w)` of images x `(N, C, h, w)` at network size, in [0, 1]."""
        num_steps, step_size, tv_weight = (self.settings[key] for key in ("num_steps", "step_size", "tv_weight"))
        restored = images.detach()
        with torch.enable_grad(), evaluation_mode(self.vae):
            for _ in range(num_steps):
                restored.requires_grad_()
                objective = restoration_objective(self.vae, restored, images, tv_weight).sum()
                (gradient,) = torch.autograd.grad(objective, restored)
                restored = (restored - step_size * gradient).detach()
        return restored

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.vae.network_input(images)
        return residual_map(images, self.restore(images))

    def choose(self, images_batches: Iterable[torch.Tensor]) -> dict:
        """Finds the candidate that changes healthy slices least, by the mean of |x - x_r| over pixels and channels.

        `settings` in use stay as they are.

        Args:
            images_batches (`Iterable[torch.Tensor]`): healthy validation slices, `(N, C, H, W)` in input units.

        Returns:
            `dict`: `settings`, the candidate, the first one of equals; `scores`, those of all candidates in their
                order.

        Raises:
            ValueError: there is no slice.
        """
        kept, sums, count = self.settings, [0.0] * len(self.candidates), 0
        for batch in images_batches:
            images = self.vae.network_input(batch)
            count += images.numel()
            for index, candidate in enumerate(self.candidates):
                self.settings = candidate
                sums[index] += (images - self.restore(images)).abs().sum().item()
        self.settings = kept
        if not count:
            raise ValueError("images_batches is empty: a weight can't be chosen without healthy slices")
        scores = [total / count for total in sums]
        return {"settings": dict(self.candidates[scores.index(min(scores))]), "scores": scores}
