"""Thresholds without masks: rules that need labels of slices alone. Maps come from `postprocessing.postprocess_maps`."""

from dataclasses import dataclass

import numpy as np

from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import MIN_COMPONENT_SIZE


# Share of healthy pixels below the threshold: Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in
# brain MR images: a comparative study", who take it of healthy training data.
HEALTHY_QUANTILE = 0.98
# AnoFPDM (Che et al. 2025): the quantile of a slice's own map, for the largest divergence and for none.
DIVERGENCE_QUANTILES = (0.90, 0.98)


def healthy_quantile(healthy: PixelCounts, quantile: float = HEALTHY_QUANTILE) -> float:
    """The lowest of the scores at which `map >= threshold` spares this share of healthy pixels.

    Args:
        healthy: scores in the foreground of healthy slices, all counted as negatives.
        quantile: the share, in (0, 1).

    Raises:
        ValueError: no pixel, or a share out of its range.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}: it must lie between 0 and 1")
    if not healthy.negatives.any():
        raise ValueError("there are no pixels of healthy slices")
    spared = np.concatenate([[0], np.cumsum(healthy.negatives)]) >= quantile * healthy.negatives.sum()
    edges = np.append(healthy.scores, np.nextafter(healthy.scores[-1:], np.float32(np.inf)))
    return float(edges[np.argmax(spared)])


def slice_scores(maps: np.ndarray) -> np.ndarray:
    """Score of each slice: the highest threshold that leaves as many pixels as a component must have to stay, (N,).

    Args:
        maps: (N, H, W), 0 outside the foreground.
    """
    rank = min(MIN_COMPONENT_SIZE, maps[0].size)
    return np.partition(maps.reshape(len(maps), -1), -rank, axis=1)[:, -rank]


def best_split(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of `score >= threshold` with the largest sensitivity + specificity (Youden's J).

    Choosing a threshold by labels of images is how anomalib's adaptive threshold works, there by F1.

    Args:
        scores: (N,).
        labels: (N,), 0 = healthy.

    Raises:
        ValueError: all labels are the same.
    """
    from sklearn.metrics import roc_curve

    sick = np.asarray(labels) != 0
    if sick.all() or not sick.any():
        raise ValueError("the slices all have the same label: a threshold needs healthy and other ones")
    false, true, thresholds = roc_curve(sick, scores, drop_intermediate=False)
    return float(thresholds[1:][np.argmax((true - false)[1:])])


def divergences(maps: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How far each slice is from its counterfactual: the mean square of the map in the foreground, (N,).

    AnoFPDM takes it between guided and null prediction, where it is largest along the encoding; a finished map has one.

    Args:
        maps: (N, H, W).
        inside: bool (N, H, W), the foreground.
    """
    sums = np.where(inside, maps, 0).astype(np.float64) ** 2
    return sums.sum(axis=(1, 2)) / np.maximum(inside.sum(axis=(1, 2)), 1)


@dataclass
class DivergenceRule:
    """AnoFPDM's threshold for each slice: a quantile of its own map, the lower the further it is from healthy.

    Attributes:
        least: divergence from which on a slice counts as unhealthy; below it nothing is marked.
        largest: divergence that gets the lower quantile.
        quantiles: lower and upper one.
    """

    least: float
    largest: float
    quantiles: tuple[float, float] = DIVERGENCE_QUANTILES

    @classmethod
    def of_labels(cls, values: np.ndarray, labels: np.ndarray) -> "DivergenceRule":
        """The rule that slices `(N,)` with labels `(N,)` teach; errors as in [`best_split`]."""
        return cls(best_split(values, labels), float(values[np.asarray(labels) != 0].max()))

    def thresholds(self, maps: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """`map >= threshold` for each slice, (N,), infinite for healthy ones; arguments as in [`divergences`]."""
        low, high = self.quantiles
        values, found = divergences(maps, inside), np.full(len(maps), np.inf)
        for index in np.flatnonzero(values >= self.least):
            quantile = high - (high - low) * min(1.0, values[index] / self.largest)
            found[index] = np.quantile(maps[index][inside[index]], quantile)
        return found
