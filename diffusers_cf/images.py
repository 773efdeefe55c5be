"""Slices at another size, and the windows of them that hold what is worth computing."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional


MARGIN = 2  # pixels of background that a window keeps around the foreground


def resize_images(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images `(N, C, H, W)` at another size: mean over the area where it shrinks, bilinear where it grows."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if size[0] < images.shape[-2]:
        return functional.interpolate(images, size, mode="area")
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)


def network_images(images: torch.Tensor, size: tuple[int, int], clip: bool) -> torch.Tensor:
    """Images `(N, C, H, W)` in input units as a network takes them: float32 `(N, C, *size)` in [-1, 1].

    Args:
        images: on the data set's intensity scale.
        size: height and width at which the network works.
        clip: cut what is above 1.
    """
    images = images.float()
    return resize_images(images.clamp(max=1) if clip else images, size) * 2 - 1


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A tensor on a device; on its way to a GPU nobody waits for it."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_images(images: torch.Tensor, channels: int, size: tuple[int, int]) -> None:
    """Raises ValueError unless images are finite floats `(N, channels, H, W)` of the aspect of `size`, none negative."""
    height, width = size
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images has shape {tuple(images.shape)}: it must be (N, {channels}, H, W)")
    if not images.is_floating_point():
        raise ValueError(f"images is {images.dtype}: it must be floating, on the model's intensity scale")
    if images.shape[2] * width != images.shape[3] * height:
        raise ValueError(f"images has shape {tuple(images.shape)}: its sides must be as {height} to {width}")
    if images.numel() and not (torch.isfinite(images).all() and images.min() >= 0):
        raise ValueError("images holds NaN, infinite or negative values: it must be 0 outside, positive inside")


@dataclass(frozen=True)
class Windows:
    """Images of a batch whose foreground fits into windows of one size.

    Attributes:
        index: which images, by position in the batch.
        corners: upper left pixel of each one's window.
        size: height and width of all the windows.
    """

    index: list[int]
    corners: list[tuple[int, int]]
    size: tuple[int, int]

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """The windows `(n, .., *size)` of these images of a batch `(N, .., H, W)`."""
        return torch.stack(list(self._views(images)))

    def paste(self, images: torch.Tensor, windows: torch.Tensor) -> None:
        """Puts windows `(n, .., *size)` into their places in a batch `(N, .., H, W)`."""
        for view, window in zip(self._views(images), windows, strict=True):
            view.copy_(window)

    def _views(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        height, width = self.size
        for number, (top, left) in zip(self.index, self.corners, strict=True):
            yield images[number, ..., top : top + height, left : left + width]


def window_side(image_size: tuple[int, int], halvings: int) -> int:
    """The side of a window where the foreground fits into it: three quarters of the image, as the network can halve it.

    A single one, since each size is a call of its own, with fewer images, and rarer in a training.
    """
    multiple = 2**halvings
    return -(-3 * max(image_size) // (4 * multiple)) * multiple


def foreground_windows(inside: torch.Tensor, side: int | None) -> list[Windows]:
    """Windows around the foreground of each image, one group for each size; empty images are in none.

    A window depends on its own image alone, so the batch that an image comes in changes nothing.

    Args:
        inside: bool `(N, H, W)`, the foreground.
        side: of windows, where the foreground fits into it; else it is the image's own. None = always the image's own.
    """
    rows, columns = (inside.any(dim=axis).cpu() for axis in (2, 1))
    groups: dict[tuple[int, int], tuple[list, list]] = {}
    for number in range(len(inside)):
        if rows[number].any():
            (top, height), (left, width) = _span(rows[number], side), _span(columns[number], side)
            index, corners = groups.setdefault((height, width), ([], []))
            index.append(number)
            corners.append((top, left))
    return [Windows(index, corners, size) for size, (index, corners) in groups.items()]


def _span(filled: torch.Tensor, side: int | None) -> tuple[int, int]:
    """First pixel and length of a window around the pixels that are filled, `(whole,)`."""
    whole, found = len(filled), filled.nonzero()[:, 0]
    first, last = int(found[0]) - MARGIN, int(found[-1]) + MARGIN
    if side is None or side >= whole or last - first + 1 > side:
        return 0, whole
    return max(0, min(whole - side, (first + last + 1 - side) // 2)), side


def network_windows(prepared: torch.Tensor, image_size: tuple[int, int], halvings: int | None) -> list[Windows]:
    """Return windows around the content of x_0 `(N, C, h, w)`; whole images where `halvings` is None."""
    side = None if halvings is None else window_side(image_size, halvings)
    return foreground_windows((prepared > -1).any(dim=1), side)
