"""Post-processing of maps and masks, the same for every method in evaluation and segmentation.

`remove_small_components` works on thresholded maps, so it changes Dice at a threshold, but not AUPRC or ideal Dice.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from scipy import ndimage


FILTER_SIZE = 5
ERODED_FILL = 0.95
BRIGHT = 3.0  # robust z-score from which tissue counts fully
MIN_COMPONENT_SIZE = 20


def foreground_mask(images: np.ndarray) -> np.ndarray:
    """Return where any channel of `(N, C, H, W)`, an array or CPU tensor, is above 0: bool `(N, H, W)`."""
    return (np.asarray(images) > 0).any(axis=1)


def eroded_foreground_mask(images: np.ndarray) -> np.ndarray:
    """Return the foreground without its rim: where the mean of `foreground_mask` over 5 x 5 pixels is above 0.95.

    One of the 25 pixels may be background, so a single hole inside the tissue erodes nothing. The border pixel is
    repeated outside the image, so an image that is foreground everywhere keeps its border.

    Args:
        images (`np.ndarray` or `torch.Tensor`): `(N, C, H, W)`, on the CPU, background 0.

    Returns:
        `np.ndarray`: bool `(N, H, W)`.
    """
    foreground = foreground_mask(images)
    # count in integers: a floating-point mean near the limit depends on rounding
    filled = foreground.astype(np.int32)
    for axis in (1, 2):
        filled = ndimage.correlate1d(filled, np.ones(FILTER_SIZE), axis=axis, mode="nearest")
    return foreground & (filled > ERODED_FILL * FILTER_SIZE**2)


def robust_z(values: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Return (v - median) / (1.4826 * median absolute deviation), with median and deviation of the `tissue`."""
    median = np.median(tissue)
    return (values - median) / (1.4826 * np.median(np.abs(tissue - median)) + 1e-6)


@dataclass(frozen=True)
class PostProcessing:
    """The chain of every method: weight by brightness, clear the rim, median filter in plane, Gaussian across slices.

    The defaults are the paper's, without weights. Both filters help where lesions are large and harm where they are small,
    so validation patients decide about their sizes.

    Attributes:
        median_size (`int`): side of the median filter in pixels, odd; 1 for none.
        slice_sigma (`float`): standard deviation of the Gaussian filter in slices; 0 for none.
        clear_rim (`bool`): whether to clear the rim of the foreground. It helps a map that is wrong at edges, and loses
            lesions that touch the edge of the brain.
        bright_channel (`int`, *optional*): channel in which lesions are bright, such as FLAIR; None for no weights. The map
            is multiplied by min(max(z, 0) / 3, 1)^2, where z is the channel's robust z-score within the patient's tissue:
            dark tissue is no lesion, and what is unexpected counts fully where it is bright as well.
    """

    median_size: int = FILTER_SIZE
    slice_sigma: float = 0.0
    clear_rim: bool = True
    bright_channel: int | None = None

    def __post_init__(self):
        if not isinstance(self.median_size, int) or self.median_size < 1 or self.median_size % 2 == 0:
            raise ValueError(
                f"median_size is {self.median_size!r}: it must be an odd number of pixels, 1 for no filter"
            )
        if not isinstance(self.slice_sigma, (int, float)) or not 0 <= self.slice_sigma < 100:
            raise ValueError(f"slice_sigma is {self.slice_sigma!r}: it must be a number of slices, 0 for no filter")
        if self.bright_channel is not None and (not isinstance(self.bright_channel, int) or self.bright_channel < 0):
            raise ValueError(
                f"bright_channel is {self.bright_channel!r}: it must be the number of a channel, 0 the first"
            )

    @classmethod
    def of(cls, settings: Mapping, **given) -> "PostProcessing | None":
        """Return the chain that a model's `settings` recommend in `postprocess`: true, false or a dict; None is false.

        Args:
            settings (`Mapping`): the settings of a preprocessing.json.
            **given: attributes that replace the recommended ones; None keeps them.

        Raises:
            ValueError: an attribute is unknown or out of range.
        """
        value = settings.get("postprocess", False)
        given = {name: number for name, number in given.items() if number is not None}
        if value is False and not given:
            return None
        known = value if isinstance(value, Mapping) else {}
        if not isinstance(value, (bool, Mapping)) or set(known) - {f.name for f in fields(cls)}:
            raise ValueError(
                f"`postprocess` in its preprocessing.json is {value!r}: it must be true, false or hold median_size, slice_sigma, clear_rim"
                " and bright_channel"
            )
        return cls(**(dict(known) | given))

    def check_channels(self, channels: int) -> None:
        """Raise `ValueError` if images of so many channels have no `bright_channel`."""
        if (self.bright_channel or 0) >= channels:
            raise ValueError(
                f"bright_channel is {self.bright_channel}: the images have {channels} channels, 0 the first"
            )

    @property
    def as_setting(self) -> bool | dict:
        """What `of` reads: true for the paper's chain, as in older models."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return True if self == type(self)() else given

    def apply(
        self, maps: np.ndarray, images: np.ndarray, slices: np.ndarray | None = None, patient: np.ndarray | None = None
    ) -> np.ndarray:
        """Weight maps by brightness, clear them outside the (eroded) foreground and filter them.

        Cleared pixels get 0. If there are negative scores, they get the lowest score in the foreground of all slices
        given, so pass all slices of a patient at once.

        Args:
            maps (`np.ndarray`): `(N, H, W)`, higher = more lesion.
            images (`np.ndarray` or `torch.Tensor`): `(N, C, H, W)` of the same height and width, background 0.
            slices (`np.ndarray`, *optional*): `(N,)`, axial index of each slice of the patient, for the filter across
                slices; 0 to N - 1 by default.
            patient (`np.ndarray`, *optional*): `(S, C, h, w)`, all slices of the patient, for the weights; `images` by
                default.

        Returns:
            `np.ndarray`: float32 `(N, H, W)`.
        """
        maps = np.asarray(maps, dtype=np.float32)
        if self.bright_channel is not None:
            values, of = (
                np.asarray(part)[:, self.bright_channel] for part in (images, images if patient is None else patient)
            )
            if (tissue := of[of > 0]).size:  # a patient may lack this channel
                maps = maps * np.clip(robust_z(values, tissue) / BRIGHT, 0, 1) ** 2
        foreground = foreground_mask(images)
        cleared = np.float32(min(0, maps.min(initial=0, where=foreground)))
        maps = np.where(eroded_foreground_mask(images) if self.clear_rim else foreground, maps, cleared)
        maps = ndimage.median_filter(maps, size=(1, self.median_size, self.median_size), mode="nearest")
        if self.slice_sigma:
            numbers = np.arange(len(maps)) if slices is None else np.asarray(slices)
            distances = (numbers[:, None] - numbers) / self.slice_sigma
            weights = np.exp(-0.5 * distances**2).astype(np.float32)
            weights[abs(distances) > 4] = 0
            # a mean over the tissue alone, so that lesions at the ends of the head do not pale
            sums, shares = (np.tensordot(weights, part, axes=1) for part in (maps * foreground, foreground * 1.0))
            maps = (sums / np.maximum(shares, 1e-6)).astype(np.float32)
        # the filters can spread scores to the background
        return np.where(foreground, maps, cleared)


def remove_small_components(
    masks: np.ndarray, slices: np.ndarray | None = None, min_size: int = MIN_COMPONENT_SIZE
) -> np.ndarray:
    """Remove connected components of fewer than `min_size` voxels from one patient's binary masks.

    Components are three-dimensional (26 neighbours); a gap in the slice numbers separates them.

    Args:
        masks (`np.ndarray`): `(S, H, W)`, nonzero = lesion.
        slices (`np.ndarray`, *optional*): `(S,)`, axial index of each slice, in any order; 0 to S - 1 by default.
        min_size (`int`): smallest component that stays, in voxels.

    Returns:
        `np.ndarray`: bool `(S, H, W)`, in the order given.
    """
    masks = np.asarray(masks) > 0
    slices = np.arange(len(masks)) if slices is None else np.asarray(slices)
    order = np.argsort(slices, kind="stable")
    kept = np.zeros_like(masks)
    gaps = np.flatnonzero(np.diff(slices[order]) != 1) + 1
    for run in np.split(order, gaps):
        components, _ = ndimage.label(masks[run], structure=np.ones((3, 3, 3)))
        large = np.bincount(components.ravel()) >= min_size
        large[:1] = False
        kept[run] = large[components]
    return kept
