"""Denoising autoencoder, DAE (Kascenas et al. 2022): a U-Net that removes coarse noise from healthy slices.

Published recipe: 128 x 128 pixels, 67,200 steps of 16 images, Adam (AMSGrad) with learning rate 1e-4, weight decay
1e-5 and gradients clipped at 0.5; the cosine learning rate has T_max 100 in 2,100 periods of 32 steps.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional

from diffusers_cf.baselines.method import TrainableMethod, foreground, residual_map, unit_images


NOISE_STD = 0.2
NOISE_POINTS = 16  # along a side of the image


def coarse_noise(noise: torch.Tensor, uniform: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return noise of std 0.2 on 16 x 16 points, upsampled bilinearly, rolled by a random shift, and masked.

    The published noise has 16 x 16 points for 128 x 128 pixels, about as coarse as a lesion. Other image sizes have as
    many points, but at most one for two pixels along a side. Interpolation lowers the standard deviation between the
    points: at 128 x 128 to 0.664 * 0.2, as a root mean square away from the border.

    Args:
        noise (`torch.Tensor`): draws from N(0, 1), `(N, C, h, w)`; only a corner of it is used.
        uniform (`torch.Tensor`): draws from U[0, 1), `(N,)`; each selects one of h * w shifts, for all channels.
        mask (`torch.Tensor`): 1 where there may be noise, else 0, `(N, 1, h, w)`.

    Returns:
        `torch.Tensor`: `(N, C, h, w)`.
    """
    height, width = noise.shape[-2:]
    rows, columns = (min(NOISE_POINTS, side // 2) for side in (height, width))
    coarse = NOISE_STD * noise[..., :rows, :columns]
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    shifts = (uniform.double() * height * width).long().tolist()
    rolled = [image.roll(divmod(shift, width), (-2, -1)) for image, shift in zip(smooth, shifts, strict=True)]
    return torch.stack(rolled) * mask


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1, each over its inputs (Qiao et al. 2019, Eq. 6)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return self._conv_forward(images, (self.weight - mean) / (variance + 1e-8).sqrt(), self.bias)


def _conv_block(before: int, width: int) -> nn.Sequential:
    layers = []
    for channels in (before, width):
        conv = WeightStandardizedConv2d(channels, width, 3, padding=1, padding_mode="reflect")
        layers += [conv, nn.GroupNorm(8, width), nn.SiLU()]
    return nn.Sequential(*layers)


class DenoisingUNet(nn.Module):
    """The U-Net of Kascenas et al. 2022: two weight-standardised convolutions a level, group norm, SiLU.

    It has reflection padding, average pooling on the way down, 2 x 2 transposed convolutions on the way up, and
    concatenated skip connections.

    Args:
        num_channels (`int`): image channels.
        block_out_channels (`Sequence[int]`): channels of each level, the finest first, multiples of 8.
    """

    def __init__(self, num_channels: int, block_out_channels: Sequence[int]):
        super().__init__()
        widths = list(block_out_channels)
        self.down = nn.ModuleList(_conv_block(*pair) for pair in pairwise([num_channels, *widths]))
        self.enlarge, self.up = nn.ModuleList(), nn.ModuleList()
        for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.enlarge.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.up.append(_conv_block(2 * fine, fine))
        self.out = nn.Conv2d(widths[0], num_channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `(N, C, h, w)` to images `(N, C, h, w)`; h and w are multiples of `2^(levels - 1)`."""
        levels = [self.down[0](images)]
        for block in self.down[1:]:
            levels.append(block(functional.avg_pool2d(levels[-1], 2)))
        hidden = levels.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            hidden = block(torch.cat([levels.pop(), enlarge(hidden)], dim=1))
        return self.out(hidden)


class DenoisingAutoencoder(TrainableMethod):
    """The DAE (method id `dae`): trained to remove [`coarse_noise`], anomaly map `|x - f(x)|` without noise.

    The published size is `image_size=128, block_out_channels=(64, 128, 256, 512)`, 7.7 million parameters.

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels, a multiple of `2^(levels - 1)`, at least twice that.
        block_out_channels (`Sequence[int]`): channels of each level, the finest first, multiples of 8.
        learning_rate (`float`): the highest one.
        num_half_cycles (`int`): half periods of the cosine learning rate in a training; odd numbers end at 0. The
            published schedule has 21.
    """

    max_grad_norm = 0.5

    @register_to_config
    def __init__(
        self, num_channels: int = 4, image_size: int = 64, block_out_channels: Sequence[int] = (16, 48, 96, 192),
        learning_rate: float = 1e-3, num_half_cycles: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.network = DenoisingUNet(num_channels, block_out_channels)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rate = self.config.learning_rate
        return {"network": torch.optim.Adam(self.parameters(), rate, weight_decay=1e-5, amsgrad=True)}

    def learning_rate_factor(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * self.config.num_half_cycles * progress))

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the mean squared error over channels and foreground pixels; 0 for a batch without foreground."""
        images = unit_images(batch)
        mask = foreground(images)
        restored = self.network(images + coarse_noise(batch["noise"], batch["uniform"], mask)).float()
        squared_error = (restored - images).square() * mask
        yield "network", squared_error.sum() / (mask.sum() * images.shape[1]).clamp(min=1)

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network_input(images)
        return residual_map(images, self.network(images))
