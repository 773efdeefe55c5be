"""Thresholds from the labels of slices alone, for data without masks. Maps are those of `postprocess_maps`."""

from collections.abc import Iterable, Mapping

import numpy as np

from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import MIN_COMPONENT_SIZE, foreground_mask


# Share of healthy pixels below the threshold, as in Baur et al. 2021, "Autoencoders for unsupervised anomaly
# segmentation in brain MR images: a comparative study" (there of healthy training data).
HEALTHY_QUANTILE = 0.98


def thresholds_of_labels(
    maps: Iterable[tuple[np.ndarray, Mapping]], quantile: float = HEALTHY_QUANTILE
) -> dict[str, float]:
    """Return the threshold of each rule; masks are not used.

    Args:
        maps (`Iterable`): post-processed maps `(N, H, W)` with their batches (`images`, `labels`).
        quantile (`float`): for the rule `healthy-quantile`, in (0, 1).

    Raises:
        ValueError: all slices have the same label.
    """
    healthy, scores, labels = PixelCounts(), [], []
    for heat, batch in maps:
        inside, sick = foreground_mask(batch["images"]), np.asarray(batch["labels"]) != 0
        pixels = heat[~sick][inside[~sick]]
        healthy.update(pixels, np.zeros_like(pixels))
        scores.append(slice_scores(heat))
        labels.append(sick)
    split = best_split(np.concatenate(scores), np.concatenate(labels))
    return {"slice-labels": split, "healthy-quantile": healthy_quantile(healthy, quantile)}


def dice_of_thresholds(
    maps: Iterable[tuple[np.ndarray, Mapping]], thresholds: Mapping[str, float]
) -> dict[str, float | None]:
    """Return Dice over all foreground pixels at each threshold, and at the `ideal` one for these masks.

    Args:
        maps (`Iterable`): post-processed maps `(N, H, W)` with their batches (`images`, `masks`).
        thresholds (`Mapping`): rule -> threshold, as from [`thresholds_of_labels`].
    """
    found, counts = {name: PixelCounts() for name in thresholds}, PixelCounts()
    for heat, batch in maps:
        inside, masks = foreground_mask(batch["images"]), np.asarray(batch["masks"])
        counts.update(heat[inside], masks[inside])
        for name, threshold in thresholds.items():
            found[name].update((heat >= threshold)[inside], masks[inside])
    return {name: marked.dice_at(1.0) for name, marked in found.items()} | {"ideal": counts.ideal_dice()[0]}


def healthy_quantile(healthy: PixelCounts, quantile: float = HEALTHY_QUANTILE) -> float:
    """Return the lowest threshold for which `map >= threshold` leaves this share of healthy pixels unmarked.

    Args:
        healthy (`PixelCounts`): scores in the foreground of healthy slices, all counted as negatives.
        quantile (`float`): the share, in (0, 1).

    Raises:
        ValueError: there are no pixels.
    """
    if not healthy.negatives.any():
        raise ValueError("there are no pixels of healthy slices")
    spared = np.concatenate([[0], np.cumsum(healthy.negatives)]) >= quantile * healthy.negatives.sum()
    edges = np.append(healthy.scores, np.nextafter(healthy.scores[-1:], np.float32(np.inf)))
    return float(edges[np.argmax(spared)])


def slice_scores(maps: np.ndarray) -> np.ndarray:
    """Return the score of each slice `(N,)`: the highest threshold that marks as many pixels as a component needs.

    Args:
        maps (`np.ndarray`): `(N, H, W)`, 0 outside the foreground.
    """
    rank = min(MIN_COMPONENT_SIZE, maps[0].size)
    return np.partition(maps.reshape(len(maps), -1), -rank, axis=1)[:, -rank]


def best_split(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold of `score >= threshold` with the highest sensitivity + specificity (Youden's J).

    anomalib's adaptive threshold uses labels of images in the same way, with F1 instead of J.

    Args:
        scores (`np.ndarray`): `(N,)`.
        labels (`np.ndarray`): `(N,)`, 0 = healthy.

    Raises:
        ValueError: all labels are the same.
    """
    from sklearn.metrics import roc_curve

    sick = np.asarray(labels) != 0
    if sick.all() or not sick.any():
        raise ValueError("the slices all have the same label: a threshold needs healthy and unhealthy ones")
    false, true, thresholds = roc_curve(sick, scores, drop_intermediate=False)
    return float(thresholds[1:][np.argmax((true - false)[1:])])
