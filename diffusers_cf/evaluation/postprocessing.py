"""Post-processing of maps and masks, the same for every method in evaluation and segmentation.

`remove_small_components` works on thresholded maps, so it changes Dice at a threshold, but not AUPRC or ideal Dice.
"""

import numpy as np
from scipy import ndimage


FILTER_SIZE = 5
ERODED_FILL = 0.95
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


def postprocess_maps(maps: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Clear maps outside the eroded foreground, then median filter each slice over 5 x 5 pixels.

    Cleared pixels get 0. If there are negative scores, they get the lowest score in the foreground of all slices given,
    so pass all slices of a patient at once.

    Args:
        maps (`np.ndarray`): `(N, H, W)`, higher = more lesion.
        images (`np.ndarray` or `torch.Tensor`): `(N, C, H, W)` of the same height and width, background 0.

    Returns:
        `np.ndarray`: float32 `(N, H, W)`.
    """
    maps = np.asarray(maps, dtype=np.float32)
    foreground = foreground_mask(images)
    cleared = np.float32(min(0, maps.min(initial=0, where=foreground)))
    masked = np.where(eroded_foreground_mask(images), maps, cleared)
    filtered = ndimage.median_filter(masked, size=(1, FILTER_SIZE, FILTER_SIZE), mode="nearest")
    # the filter can spread scores to the background
    return np.where(foreground, filtered, cleared)


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
