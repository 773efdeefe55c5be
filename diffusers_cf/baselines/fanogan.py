"""f-AnoGAN (Schlegl et al. 2019): a Wasserstein GAN of healthy slices, then an encoder into its latent space.

Stage 1 trains critic and generator as WGAN-GP (Gulrajani et al. 2017, Algorithm 1). Stage 2 freezes both and trains the
encoder with the izi_f loss of f-AnoGAN. Recipe of UPD_study (Lagogiannis et al. 2023): batches of 64, 30,000 steps of
stage 1 (one critic step each, Adam 2e-4 with betas (0, 0.9)), 10,000 steps of stage 2 (RMSprop 5e-5).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from diffusers_cf.baselines.method import TrainableMethod, frozen, residual_map, unit_images


COARSEST = 4  # side of the coarsest feature map in pixels


class FAnoGAN(TrainableMethod):
    """f-AnoGAN (method id `fanogan`), anomaly map `|x - G(E(x))|`.

    The three networks are the residual ones of WGAN-GP down to 4 x 4 pixels, built from diffusers' residual blocks,
    which pool before their first convolution. Generator and encoder have batch norm; the critic has layer norm, because
    its penalty is per sample.

    The size of UPD_study at 128 pixels is `block_out_channels=(64, 128, 256, 256, 512, 512)`, at 64 pixels
    `(64, 128, 256, 512, 512)`, with `encoder_from=0.75, encoder_learning_rate=5e-5`.

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels, a power of two, at least 8.
        block_out_channels (`Sequence[int]`): channels of each level, the finest first; the first
            `log2(image_size) - 1` are used, and the last one is repeated if there are fewer.
        latent_dim (`int`): width of z, at most half the number of values of an image: a step draws two.
        penalty_weight (`float`): lambda, the weight of the gradient penalty.
        feature_weight (`float`): kappa, the weight of the critic's features in the encoder's loss.
        encoder_from (`float`): share of the training after which stage 2 begins.
        learning_rate (`float`): of critic and generator.
        encoder_learning_rate (`float`): of the encoder.

    Raises:
        ValueError: `image_size` or `latent_dim` does not fit.
    """

    max_grad_norm = None
    mixed_precision = False  # the second derivatives of the penalty need float32

    @register_to_config
    def __init__(
        self, num_channels: int = 4, image_size: int = 64,
        block_out_channels: Sequence[int] = (16, 32, 64, 128, 128, 128), latent_dim: int = 128,
        penalty_weight: float = 10.0, feature_weight: float = 1.0, encoder_from: float = 0.6,
        learning_rate: float = 2e-4, encoder_learning_rate: float = 2e-4,
    ):  # fmt: skip
        super().__init__()
        if image_size < 2 * COARSEST or image_size & (image_size - 1):
            raise ValueError(f"image_size is {image_size}: it must be a power of two, at least {2 * COARSEST}")
        if latent_dim > num_channels * image_size**2 // 2:
            raise ValueError(f"latent_dim is {latent_dim}: it must be at most {num_channels * image_size**2 // 2}")
        levels = (image_size // COARSEST).bit_length()
        missing = levels - len(block_out_channels)
        channels = (*block_out_channels[:levels], *block_out_channels[-1:] * missing)
        width = channels[-1] * COARSEST**2
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, width),
            nn.Unflatten(1, (channels[-1], COARSEST, COARSEST)),
            *[ResidualBlock(n_in, n_out, batch_norm=True, up=True) for n_in, n_out in pairwise(channels[::-1])],
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
            nn.Conv2d(channels[0], num_channels, 3, padding=1),
            nn.Sigmoid(),
        )
        self.critic = nn.Sequential(feature_extractor(num_channels, channels, batch_norm=False), nn.Linear(width, 1))
        self.encoder = nn.Sequential(
            feature_extractor(num_channels, channels, batch_norm=True), nn.Linear(width, latent_dim), nn.Tanh()
        )

    @property
    def comparable_from(self) -> float:
        """The validation loss is the encoder's, which only stage 2 trains."""
        return self.config.encoder_from

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rate = self.config.learning_rate
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), rate, betas=(0.0, 0.9)),
            "generator": torch.optim.Adam(self.generator.parameters(), rate, betas=(0.0, 0.9)),
            "encoder": torch.optim.RMSprop(self.encoder.parameters(), self.config.encoder_learning_rate),
        }

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `critic` and `generator` in stage 1, `encoder` in stage 2."""
        images, size = unit_images(batch), self.config.latent_dim
        if progress >= self.config.encoder_from:
            yield "encoder", self.encoder_loss(images)
        else:
            noise = batch["noise"].flatten(1)
            yield "critic", self.critic_loss(images, noise[:, :size], batch["uniform"])
            yield "generator", self.generator_loss(noise[:, size : 2 * size])

    def critic_loss(self, images: torch.Tensor, latents: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """Return mean D(G(z)) - mean D(x) + lambda * penalty, of x `(N, C, h, w)` and z `(N, latent_dim)`."""
        with torch.no_grad():
            fake = self.generator(latents)
        penalty = gradient_penalty(self.critic, images, fake, mix)
        return self.critic(fake).mean() - self.critic(images).mean() + self.config.penalty_weight * penalty

    def generator_loss(self, latents: torch.Tensor) -> torch.Tensor:
        """Return -mean D(G(z)) of latents z `(N, latent_dim)`."""
        with frozen(self.critic):
            return -self.critic(self.generator(latents)).mean()

    def encoder_loss(self, images: torch.Tensor) -> torch.Tensor:
        """Return the izi_f loss of images `(N, C, h, w)` in [0, 1].

        It is the mean square of x - G(E(x)), plus kappa times that of the difference of the critic's features.
        """
        with frozen(self.generator, self.critic):
            reconstruction = self.generator(self.encoder(images))
            features = self.critic[0]
            feature_loss = functional.mse_loss(features(reconstruction), features(images))
        return functional.mse_loss(reconstruction, images) + self.config.feature_weight * feature_loss

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network_input(images)
        with frozen(self):
            return residual_map(images, self.generator(self.encoder(images)))


class ResidualBlock(ResnetBlock2D):
    """diffusers' residual block with ReLU and no time embedding; it doubles or halves the side.

    Args:
        in_channels (`int`): input channels.
        out_channels (`int`): output channels.
        batch_norm (`bool`): batch norm instead of layer norm (a group norm of one group).
        up (`bool`): double the side, by nearest neighbours; False halves it, by the mean.
    """

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool, up: bool):
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=1, non_linearity="relu",
            up=up, down=not up,
        )  # fmt: skip
        if batch_norm:
            self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states, temb=None)


def feature_extractor(num_channels: int, channels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """Return the mirror image of the generator: `(N, num_channels, h, w)` to `(N, 16 * channels[-1])`."""
    return nn.Sequential(
        nn.Conv2d(num_channels, channels[0], 3, padding=1),
        *[ResidualBlock(n_in, n_out, batch_norm, up=False) for n_in, n_out in pairwise(channels)],
        nn.Flatten(),
    )


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """Return the mean of (||grad D(x)||_2 - 1)^2 at x = mix * real + (1 - mix) * fake (Gulrajani et al. 2017, Eq. 3).

    Args:
        critic (`Callable`): D, images `(N, C, h, w)` to scores `(N,)` or `(N, 1)`, each of its own image only.
        real (`torch.Tensor`): `(N, C, h, w)`.
        fake (`torch.Tensor`): `(N, C, h, w)`.
        mix (`torch.Tensor`): share of the real image, `(N,)` in [0, 1].

    Returns:
        `torch.Tensor`: a scalar, differentiable by the critic's parameters.
    """
    mix = mix.to(real).view(-1, 1, 1, 1)
    mixed = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
