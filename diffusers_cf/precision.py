"""A U-Net that computes in a half-precision dtype where its prediction does not suffer."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn


# Guidance multiplies the difference of two predictions that are nearly equal, and with it what each was rounded by. Most
# of that comes from the sum of all residual blocks and from the finest level, where the image itself passes.
EXACT = ("conv_in", "conv_out", "time_embedding")
EXACT_WITHIN = ("conv_shortcut", "samplers.0.conv")


def exact_modules(unet: UNet2DConditionModel) -> list[nn.Module]:
    """What stays in float32: both ends, the finest level, the time embedding, and the path around residual blocks.

    On a GPU, convolutions in float32 are TF32 unless PyTorch is told otherwise.
    """
    chosen = [getattr(unet, name) for name in EXACT] + [unet.down_blocks[0], unet.up_blocks[-1]]
    return chosen + [module for name, module in unet.named_modules() if name.endswith(EXACT_WITHIN)]


def compute_in(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Makes a float32 U-Net compute in `dtype`, all but [`exact_modules`]; what it takes and gives stays float32.

    Args:
        unet (`UNet2DConditionModel`): on the device where it will run.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`; float32 changes nothing.
    """
    if dtype == torch.float32:
        return
    device = unet.device.type
    unet._computing_dtype = dtype
    for module in exact_modules(unet):
        module.forward = torch.autocast(device, enabled=False)(module.forward)
    unet.forward = torch.autocast(device, dtype)(unet.forward)


def computing_dtype(unet: UNet2DConditionModel) -> str:
    """Name of the dtype that a U-Net computes in: `compute_in`'s, else that of its weights."""
    return str(getattr(unet, "_computing_dtype", unet.dtype)).removeprefix("torch.")
