"""The one post-processing chain that every method goes through before a map is measured or segmented.

Maps are masked by the eroded foreground and median filtered (`postprocess_maps`), which changes every measure. Removing
small components (`remove_small_components`) needs a threshold first: it changes masks, and Dice at a stated threshold,
but neither AUPRC nor ideal Dice.
"""

import numpy as np
from scipy import ndimage


FILTER_SIZE = 5
ERODED_FILL = 0.95
MIN_COMPONENT_SIZE = 20


def foreground_mask(images: np.ndarray) -> np.ndarray:
    """Returns where there is tissue: any channel above 0.

    Args:
        images: (N, C, H, W), array or CPU tensor, background 0.

    Returns:
        bool (N, H, W).
    """
    return (np.asarray(images) > 0).any(axis=1)


def eroded_foreground_mask(images: np.ndarray) -> np.ndarray:
    """Returns the foreground without its rim: where the mean of `foreground_mask` over 5 x 5 pixels is above 0.95.

    One pixel of the 25 may be background, so a single hole inside the tissue erodes nothing. Beyond the frame the
    border pixel is repeated: an image that fills its frame keeps its border.

    Args:
        images: (N, C, H, W), array or CPU tensor, background 0.

    Returns:
        bool (N, H, W).
    """
    foreground = foreground_mask(images)
    # An exact sum: a running mean in floating point could fall on either side of the limit.
    filled = foreground.astype(np.int32)
    for axis in (1, 2):
        filled = ndimage.correlate1d(filled, np.ones(FILTER_SIZE), axis=axis, mode="nearest")
    return foreground & (filled > ERODED_FILL * FILTER_SIZE**2)


def postprocess_maps(maps: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Clears a map outside the eroded foreground, then median filters it over 5 x 5 pixels, slice by slice.

    Changes AUPRC, ideal Dice, slice AUROC and Dice at a threshold alike. Cleared pixels get 0, which is the lowest score
    of a heatmap; a map with negative scores gets its lowest score in the foreground of all slices given, so give all of
    a patient's slices at once. Without negative scores every slice's result depends on that slice only.

    Args:
        maps: (N, H, W), higher = more lesion.
        images: (N, C, H, W) of the same height and width, background 0.

    Returns:
        float32 (N, H, W), cleared outside the foreground.
    """
    maps = np.asarray(maps, dtype=np.float32)
    foreground = foreground_mask(images)
    cleared = np.float32(min(0, maps.min(initial=0, where=foreground)))
    masked = np.where(eroded_foreground_mask(images), maps, cleared)
    filtered = ndimage.median_filter(masked, size=(1, FILTER_SIZE, FILTER_SIZE), mode="nearest")
    # The filter can carry scores back over the rim, so the plain foreground bounds them once more.
    return np.where(foreground, filtered, cleared)


def remove_small_components(
    masks: np.ndarray, slices: np.ndarray | None = None, min_size: int = MIN_COMPONENT_SIZE
) -> np.ndarray:
    """Removes connected components of fewer than `min_size` voxels from one patient's binary masks.

    Components are three-dimensional (26 neighbours) over slices that touch: a gap in the slice indices separates them,
    and a slice without neighbours counts for itself. Applies to thresholded maps, so to Dice at a threshold only.

    Args:
        masks: (S, H, W), nonzero = lesion.
        slices: (S,) axial index of each slice, in any order; the order given, without gaps, if None.
        min_size: Smallest component that stays, in voxels.

    Returns:
        bool (S, H, W), in the order given.
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
