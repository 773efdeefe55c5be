"""f-AnoGAN (Schlegl et al. 2019), row 2 of Table 1: a Wasserstein GAN of healthy slices, then an encoder into it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from diffusers_cf.baselines.method import TrainableMethod, residual_map, unit_images


_COARSEST = 4  # side of the coarsest feature map in pixels


class FAnoGAN(TrainableMethod):
    """Reconstruction by a generator of healthy slices; what it can't paint is lesion.

    Stage 1 trains critic and generator as a WGAN with gradient penalty (Gulrajani et al. 2017). Stage 2 freezes both
    and trains an encoder by the `izi_f` loss of f-AnoGAN. All three networks are the residual ones of the WGAN-GP
    paper down to 4 x 4 pixels, built of diffusers' residual blocks (which pool before their first convolution, not
    after the second): batch norm in generator and encoder, layer norm in the critic, whose penalty is per sample.

    The authors' size at 128 pixels (UPD study, Lagogiannis et al. 2023) is `block_out_channels=(64, 128, 256, 256,
    512, 512)`, at 64 pixels `(64, 128, 256, 512, 512)`; they train with `encoder_from=0.75` (30,000 steps, then
    10,000) and `encoder_learning_rate=5e-5`.

    Args:
        num_channels: channels of the images.
        image_size: side of the network's images in pixels, a power of two, at least 8.
        block_out_channels: widths from the finest level to the coarsest; the first `log2(image_size) - 1` are used,
            the last one again for further levels.
        latent_dim: width of z, at most the number of values of an image.
        critic_steps: steps of the critic for each one of the generator.
        penalty_weight: lambda, the weight of the gradient penalty.
        feature_weight: kappa, the weight of the critic's features in the encoder's loss.
        encoder_from: share of the training after which stage 2 begins.
        learning_rate: of critic and generator (Adam).
        encoder_learning_rate: of the encoder (RMSprop).

    Raises:
        ValueError: the networks can't be built for this size.
    """

    max_grad_norm = None
    # the penalty's second derivatives want float32
    mixed_precision = False

    @register_to_config
    def __init__(
        self,
        num_channels: int = 4,
        image_size: int = 64,
        block_out_channels: Sequence[int] = (16, 32, 64, 128, 128, 128),
        latent_dim: int = 128,
        critic_steps: int = 1,
        penalty_weight: float = 10.0,
        feature_weight: float = 1.0,
        encoder_from: float = 0.6,
        learning_rate: float = 2e-4,
        encoder_learning_rate: float = 2e-4,
    ):
        super().__init__()
        if image_size < 2 * _COARSEST or image_size & (image_size - 1):
            raise ValueError(f"image_size is {image_size}: it must be a power of two, at least {2 * _COARSEST}")
        levels = (image_size // _COARSEST).bit_length()
        if latent_dim > num_channels * image_size**2:
            raise ValueError(f"latent_dim is {latent_dim}: it must be at most {num_channels * image_size**2}")
        further = levels - len(block_out_channels)
        channels = (*block_out_channels[:levels], *block_out_channels[-1:] * further)
        width = channels[-1] * _COARSEST**2
        self.generator = image_generator(latent_dim, channels, num_channels)
        self.critic = nn.Sequential(feature_extractor(num_channels, channels, batch_norm=False), nn.Linear(width, 1))
        self.encoder = nn.Sequential(
            feature_extractor(num_channels, channels, batch_norm=True), nn.Linear(width, latent_dim), nn.Tanh()
        )

    @property
    def comparable_from(self) -> float:
        """The validation loss is the encoder's, which stage 2 alone trains."""
        return self.config.encoder_from

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for critic and generator, RMSprop for the encoder, as in the authors' code."""
        rate = self.config.learning_rate
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), rate, betas=(0.0, 0.9)),
            "generator": torch.optim.Adam(self.generator.parameters(), rate, betas=(0.0, 0.9)),
            "encoder": torch.optim.RMSprop(self.encoder.parameters(), self.config.encoder_learning_rate),
        }

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields `critic` (`critic_steps` times) and `generator` in stage 1, `encoder` in stage 2."""
        images = unit_images(batch)
        if progress >= self.config.encoder_from:
            yield "encoder", self.encoder_loss(images)
            return
        steps = self.config.critic_steps
        for step in range(steps):
            # a rotation of a uniform draw is uniform too
            mix = (batch["uniform"] + step / steps) % 1
            yield "critic", self.critic_loss(images, self.latents(batch, step), mix)
        yield "generator", self.generator_loss(self.latents(batch, steps))

    def latents(self, batch: dict[str, torch.Tensor], draw: int) -> torch.Tensor:
        """The z `(N, latent_dim)` of a step, from the batch's noise; small images begin again when it is used up."""
        noise, size = batch["noise"].flatten(1), self.config.latent_dim
        start = draw % (noise.shape[1] // size) * size
        return noise[:, start : start + size]

    def critic_loss(self, images: torch.Tensor, latents: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """WGAN-GP's critic: mean D(G(z)) - mean D(x) + lambda * penalty (Gulrajani et al. 2017, Algorithm 1).

        Args:
            images: `(N, C, h, w)` in [0, 1].
            latents: `(N, latent_dim)`.
            mix: `(N,)` in [0, 1), see [`gradient_penalty`].
        """
        with torch.no_grad():
            fake = self.generator(latents)
        penalty = gradient_penalty(self.critic, images, fake, mix)
        return self.critic(fake).mean() - self.critic(images).mean() + self.config.penalty_weight * penalty

    def generator_loss(self, latents: torch.Tensor) -> torch.Tensor:
        """WGAN-GP's generator: -mean D(G(z)), latents `(N, latent_dim)`."""
        with frozen(self.critic):
            return -self.critic(self.generator(latents)).mean()

    def encoder_loss(self, images: torch.Tensor) -> torch.Tensor:
        """The izi_f loss: mean square of x - G(E(x)) plus kappa times that of the critic's features of both.

        Args:
            images: `(N, C, h, w)` in [0, 1].
        """
        with frozen(self.generator, self.critic):
            reconstruction = self.generator(self.encoder(images))
            features = self.critic[0]
            feature_loss = functional.mse_loss(features(reconstruction), features(images))
        return functional.mse_loss(reconstruction, images) + self.config.feature_weight * feature_loss

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The encoder's loss; it compares models of stage 2 only, since its features are those of the critic."""
        with frozen(self):
            return self.encoder_loss(unit_images(batch))

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Maps `(N, h, w)` in [0, 1]: |x - G(E(x))|, mean over the channels, 0 outside the foreground.

        Args:
            images: `(N, C, H, W)` in input units.
        """
        images = self.network_input(images)
        with frozen(self):
            reconstruction = self.generator(self.encoder(images))
        return residual_map(images, reconstruction)


class ResidualBlock(ResnetBlock2D):
    """diffusers' residual block without a time embedding, `(N, C, H, W)` to twice or half the side, ReLU.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        batch_norm: batch norm in the place of layer norm (a group norm of one group).
        up: doubles the side, by nearest neighbours; else it is halved, by the mean.
    """

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool, up: bool):
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=1, non_linearity="relu",
            up=up, down=not up,
        )  # fmt: skip
        if batch_norm:
            self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(N, in, H, W)` -> `(N, out, 2 H, 2 W)` or `(N, out, H / 2, W / 2)`."""
        return super().forward(hidden_states, temb=None)


def image_generator(latent_dim: int, channels: Sequence[int], num_channels: int) -> nn.Sequential:
    """G: `(N, latent_dim)` -> `(N, num_channels, h, w)` in (0, 1); `channels` from the finest level to the coarsest."""
    coarsest = channels[-1]
    return nn.Sequential(
        nn.Linear(latent_dim, coarsest * _COARSEST**2),
        nn.Unflatten(1, (coarsest, _COARSEST, _COARSEST)),
        *[ResidualBlock(n_in, n_out, batch_norm=True, up=True) for n_in, n_out in pairwise(channels[::-1])],
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(),
        nn.Conv2d(channels[0], num_channels, 3, padding=1),
        nn.Sigmoid(),
    )


def feature_extractor(num_channels: int, channels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """The reflection of [`image_generator`]: `(N, num_channels, h, w)` -> `(N, 16 * channels[-1])`."""
    return nn.Sequential(
        nn.Conv2d(num_channels, channels[0], 3, padding=1),
        *[ResidualBlock(n_in, n_out, batch_norm, up=False) for n_in, n_out in pairwise(channels)],
        nn.Flatten(),
    )


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """Mean of (||grad D(x)||_2 - 1)^2 at x = mix * real + (1 - mix) * fake (Gulrajani et al. 2017, Eq. 3).

    Args:
        critic: images `(N, C, h, w)` -> scores `(N,)` or `(N, 1)`, each of its own image alone.
        real: `(N, C, h, w)`.
        fake: `(N, C, h, w)`.
        mix: share of the real image, `(N,)` in [0, 1].

    Returns:
        A scalar that can be differentiated by the critic's parameters.
    """
    mix = mix.to(real).view(-1, 1, 1, 1)
    mixed = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """What runs in this context leaves the modules as they are: eval mode, no gradients for their parameters."""
    modes = [module.training for module in modules]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for module in modules:
            module.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
        for parameter in parameters:
            parameter.requires_grad_(True)
