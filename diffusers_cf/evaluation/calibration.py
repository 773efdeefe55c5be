"""Choose thresholds of post-processed maps from the labels of slices, for data without masks."""

from collections.abc import Iterable, Mapping

import numpy as np

from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import MIN_COMPONENT_SIZE, foreground_mask


# Share of healthy pixels below the threshold, as in Baur et al. 2021, "Autoencoders for unsupervised anomaly
# segmentation in brain MR images: a comparative study" (who use healthy training data).
HEALTHY_QUANTILE = 0.98


def thresholds_of_labels(
    maps: Iterable[tuple[np.ndarray, Mapping]], quantile: float = HEALTHY_QUANTILE
) -> dict[str, float]:
    """Return the threshold of each rule.

    Args:
        maps (`Iterable`): post-processed maps `(N, H, W)` with their batches (`images`, `labels`), of both labels.
        quantile (`float`): for the rule `healthy-quantile`, in (0, 1).
    """
    healthy, scores, labels = [], [], []
    for heat, batch in maps:
        unhealthy = np.asarray(batch["labels"]) != 0
        healthy.append(heat[foreground_mask(batch["images"]) & ~unhealthy[:, None, None]])
        scores.append(slice_scores(heat))
        labels.append(unhealthy)
    split = best_split(np.concatenate(scores), np.concatenate(labels))
    return {"slice-labels": split, "healthy-quantile": healthy_quantile(np.concatenate(healthy), quantile)}


def dice_of_thresholds(
    maps: Iterable[tuple[np.ndarray, Mapping]], thresholds: Mapping[str, float]
) -> dict[str, float | None]:
    """Return Dice over all foreground pixels at each threshold, and at the `ideal` one for these masks.

    Args:
        maps (`Iterable`): post-processed maps `(N, H, W)` with their batches (`images`, `masks`).
        thresholds (`Mapping`): rule -> threshold, as from [`thresholds_of_labels`].
    """
    counts = PixelCounts()
    for heat, batch in maps:
        inside = foreground_mask(batch["images"])
        counts.update(heat[inside], np.asarray(batch["masks"])[inside])
    dice = {name: counts.dice(threshold) for name, threshold in thresholds.items()}
    return dice | {"ideal": counts.ideal_dice()[0]}


def healthy_quantile(scores: np.ndarray, quantile: float = HEALTHY_QUANTILE) -> float:
    """Return the lowest threshold for which `score >= threshold` leaves a share of `quantile` unmarked."""
    return float(np.nextafter(np.quantile(scores, quantile, method="inverted_cdf"), np.float32(np.inf)))


def slice_scores(maps: np.ndarray) -> np.ndarray:
    """Return `(N,)` scores of slices from maps `(N, H, W)`: the highest threshold that marks 20 pixels or more.

    Post-processing removes components of fewer pixels.
    """
    rank = min(MIN_COMPONENT_SIZE, maps[0].size)
    return np.partition(maps.reshape(len(maps), -1), -rank, axis=1)[:, -rank]


def best_split(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold of `score >= threshold` with the highest sensitivity + specificity (Youden's J).

    Args:
        scores (`np.ndarray`): `(N,)`.
        labels (`np.ndarray`): `(N,)`, 0 = healthy; both kinds.
    """
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(np.asarray(labels) != 0, scores, drop_intermediate=False)
    return float(thresholds[1:][np.argmax((true - false)[1:])])
