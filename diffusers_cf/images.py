"""Images at the network's size, and windows around their foreground."""

from dataclasses import dataclass

import torch
from torch.nn import functional


MARGIN = 2  # pixels of background that a window keeps around the foreground


def resize_images(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize images `(N, C, H, W)` by area averaging where they shrink, else by bilinear interpolation.

    Args:
        images (`torch.Tensor`): `(N, C, H, W)`.
        size (`tuple[int, int]`): new height and width in pixels.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return functional.interpolate(images, size, mode="area" if size[0] < images.shape[-2] else "bilinear")


def network_images(images: torch.Tensor, size: tuple[int, int], clip: bool) -> torch.Tensor:
    """Return images in the network's range and size, float32 `(N, C, h, w)` in [-1, 1].

    Args:
        images (`torch.Tensor`): `(N, C, H, W)` in input units, background 0.
        size (`tuple[int, int]`): height h and width w of the network's input in pixels.
        clip (`bool`): clip intensities at 1. Otherwise the result exceeds 1 where they do.
    """
    images = images.float()
    return resize_images(images.clamp(max=1) if clip else images, size) * 2 - 1


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Return the tensor on a device; a copy from the CPU to a GPU is asynchronous."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Windows:
    """Windows of equal size, each in one image of a batch.

    Args:
        index (`list[int]`): position in the batch of each window's image.
        corners (`list[tuple[int, int]]`): row and column of each window's upper left pixel.
        size (`tuple[int, int]`): height h and width w of all windows in pixels.
    """

    index: list[int]
    corners: list[tuple[int, int]]
    size: tuple[int, int]

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """Return the windows `(n, .., h, w)` of a batch of images `(N, .., H, W)`."""
        return torch.stack([images[place] for place in self._places()])

    def paste(self, images: torch.Tensor, windows: torch.Tensor) -> None:
        """Write windows `(n, .., h, w)` into a batch of images `(N, .., H, W)`."""
        for place, window in zip(self._places(), windows, strict=True):
            images[place] = window

    def _places(self) -> list[tuple]:
        """Return the index of each window in a batch of images."""
        height, width = self.size
        corners = zip(self.index, self.corners, strict=True)
        return [(i, ..., slice(top, top + height), slice(left, left + width)) for i, (top, left) in corners]


def window_side(image_size: tuple[int, int], halvings: int) -> int:
    """Return the side of square windows: three quarters of the image, rounded up to what the network can halve.

    There is only one such size, because each size needs a network call of its own and is seen less often in training.

    Args:
        image_size (`tuple[int, int]`): height and width of the network's input in pixels.
        halvings (`int`): how often the network halves its input.
    """
    multiple = 2**halvings
    return -(-3 * max(image_size) // (4 * multiple)) * multiple


def foreground_windows(inside: torch.Tensor, side: int | None) -> list[Windows]:
    """Return a window around the foreground of each image, in one group for each size; empty images have none.

    A window depends on its own image only, so the composition of a batch does not change it.

    Args:
        inside (`torch.Tensor`): the foreground, bool `(N, H, W)`.
        side (`int`, *optional*): side of a window in pixels. Where the foreground does not fit into it, and if it is
            None, the window is as long as the image.
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
    """Return first pixel and length of a window along one axis, given which rows or columns hold foreground."""
    whole, found = len(filled), filled.nonzero()[:, 0]
    first, last = int(found[0]) - MARGIN, int(found[-1]) + MARGIN
    if side is None or side >= whole or last - first + 1 > side:
        return 0, whole
    return max(0, min(whole - side, (first + last + 1 - side) // 2)), side
