"""The denoising autoencoder of Table 1 (Kascenas et al. 2022): a U-Net that takes coarse noise off healthy slices."""

import math
from collections.abc import Iterator

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional

from diffusers_cf.baselines.method import TrainableMethod, foreground, residual_map, unit_images


NOISE_STD = 0.2
NOISE_CELLS = 16  # along a side of the image


def coarse_noise(noise: torch.Tensor, uniform: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Noise of std 0.2 on 16 x 16 points, enlarged bilinearly, rolled by a random shift, masked.

    Kascenas et al. 2022: 16 x 16 for images of 128 x 128, drawn for each channel. It is as coarse as a lesion, so other
    resolutions have as many points of the same field, at most one for 2 pixels a side. Enlarging takes the std between
    the points down, at 128 x 128 to 0.2 * 0.664 on average (root mean square) away from the frame.

    Args:
        noise (`torch.Tensor`): draws from N(0, 1), `(N, C, h, w)`; a corner of it is used.
        uniform (`torch.Tensor`): draws from U[0, 1), `(N,)`, for one of the h * w shifts, the same in all channels.
        mask (`torch.Tensor`): 1 where noise may be, 0 elsewhere, `(N, 1, h, w)`.

    Returns:
        `torch.Tensor`: `(N, C, h, w)`.
    """
    height, width = noise.shape[-2:]
    rows, columns = (min(NOISE_CELLS, side // 2) for side in (height, width))
    coarse = NOISE_STD * noise[..., :rows, :columns]
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    shifts = (uniform.double() * height * width).long().tolist()
    rolled = [image.roll(divmod(shift, width), (-2, -1)) for image, shift in zip(smooth, shifts, strict=True)]
    return torch.stack(rolled) * mask


def foreground_mse(predictions: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error, mean over channels and over the pixels of the mask in all images; 0 for an empty mask.

    Args:
        predictions (`torch.Tensor`): `(N, C, h, w)`.
        images (`torch.Tensor`): `(N, C, h, w)`.
        mask (`torch.Tensor`): 1 where it counts, 0 elsewhere, `(N, 1, h, w)`.
    """
    squared_error = (predictions - images).square() * mask
    return squared_error.sum() / (mask.sum() * images.shape[1]).clamp(min=1)


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1, each over its inputs (Qiao et al. 2019, Eq. 6)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return self._conv_forward(images, (self.weight - mean) / (variance + 1e-8).sqrt(), self.bias)


def _conv_block(before: int, width: int, num_groups: int) -> nn.Sequential:
    layers = []
    for channels in (before, width):
        conv = WeightStandardizedConv2d(channels, width, 3, padding=1, padding_mode="reflect")
        layers += [conv, nn.GroupNorm(num_groups, width), nn.SiLU()]
    return nn.Sequential(*layers)


class DenoisingUNet(nn.Module):
    """The U-Net of Kascenas et al. 2022: two standardised convolutions a level, group norm, swish, reflected borders.

    It goes down by mean pooling and up by 2x2 transposed convolutions; levels meet by concatenation.

    Args:
        num_channels (`int`): in and out.
        block_out_channels (`tuple[int]`): of each level, the finest first.
        norm_num_groups (`int`): divides each of them.
    """

    def __init__(self, num_channels: int, block_out_channels: tuple[int, ...], norm_num_groups: int):
        super().__init__()
        widths = list(block_out_channels)
        self.down = nn.ModuleList(
            _conv_block(before, width, norm_num_groups)
            for before, width in zip([num_channels, *widths], widths, strict=False)
        )
        self.enlarge, self.up = nn.ModuleList(), nn.ModuleList()
        for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.enlarge.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.up.append(_conv_block(2 * fine, fine, norm_num_groups))
        self.out = nn.Conv2d(widths[0], num_channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, C, h, w)` in, images `(N, C, h, w)` out; h and w are multiples of 2^(levels - 1)."""
        levels = [self.down[0](images)]
        for block in self.down[1:]:
            levels.append(block(functional.avg_pool2d(levels[-1], 2)))
        hidden = levels.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            hidden = block(torch.cat([levels.pop(), enlarge(hidden)], dim=1))
        return self.out(hidden)


class DenoisingAutoencoder(TrainableMethod):
    """DAE of healthy slices (Kascenas et al. 2022): trained to take [`coarse_noise`] off, map `|x - f(x)|`.

    The published size: `image_size=128, block_out_channels=(64, 128, 256, 512), learning_rate=1e-4,
    num_half_cycles=21` (7.7 M parameters), 67,200 steps of 16 images.

    Args:
        num_channels (`int`): of the images.
        image_size (`int`): side of the network's input in pixels, a multiple of the coarsest level's pixel, two or more.
        block_out_channels (`tuple[int]`): of the U-Net's levels, the finest first.
        norm_num_groups (`int`): of the group norms.
        learning_rate (`float`): the highest one of Adam (AMSGrad).
        num_half_cycles (`int`): how often the learning rate falls or rises between it and 0, as a cosine; odd numbers
            end at 0. Published: T_max 100 in 2100 periods of 32 steps, which is 21.

    Raises:
        ValueError: for an `image_size` or `block_out_channels` that don't fit together.
    """

    max_grad_norm = 0.5

    @register_to_config
    def __init__(
        self,
        num_channels: int = 4,
        image_size: int = 64,
        block_out_channels: tuple[int, ...] = (16, 48, 96, 192),
        norm_num_groups: int = 8,
        learning_rate: float = 1e-3,
        num_half_cycles: int = 1,
    ):
        super().__init__()
        coarsest = 2 ** (len(block_out_channels) - 1)
        if image_size % coarsest or image_size < 2 * coarsest:
            raise ValueError(f"image_size is {image_size}: it must be a multiple of {coarsest}, two or more")
        self.network = DenoisingUNet(num_channels, tuple(block_out_channels), norm_num_groups)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rate = self.config.learning_rate
        return {"network": torch.optim.Adam(self.parameters(), rate, weight_decay=1e-5, amsgrad=True)}

    def learning_rate_factor(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * self.config.num_half_cycles * progress))

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        images = unit_images(batch)
        mask = foreground(images)
        noisy = images + coarse_noise(batch["noise"], batch["uniform"], mask)
        yield "network", foreground_mse(self.network(noisy).float(), images, mask)

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network_input(images)
        return residual_map(images, self.network(images))
