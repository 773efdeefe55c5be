"""Slices at another size, the same way wherever it is done."""

import torch
from torch.nn import functional


def resize_images(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images `(N, C, H, W)` at another size: mean over the area where it shrinks, bilinear where it grows."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if size[0] < images.shape[-2]:
        return functional.interpolate(images, size, mode="area")
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)
