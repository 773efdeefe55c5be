"""Count pixels by score: a streaming histogram without a fixed range."""

from collections.abc import Mapping

import numpy as np


# Every measure is computed for the map as it is and for the post-processed map.
CHAINS = ("raw", "postprocessed")
REGIONS = ("foreground", "background")


class PixelCounts:
    """Count lesion and other pixels by score, in one pass and constant memory, for scores of any range.

    A bin holds all float32 numbers that share their leading bits, so its relative width is the same for scores of 1e-6
    and 1e6. Each distinct score has its own bin until more than `max_bins` are in use; then neighbours merge in pairs,
    which costs one bit of precision. The result does not depend on the order of the pixels, so the counts of patients
    add up to the counts of the data set.

    Args:
        max_bins (`int`): largest number of bins in use; 24 bytes each.

    Attributes:
        bins (`np.ndarray`): uint32 `(B,)`, ascending: the leading bits of the scores in each bin that is in use.
        positives (`np.ndarray`): int64 `(B,)`, number of lesion pixels.
        negatives (`np.ndarray`): int64 `(B,)`, number of other pixels.
        shift (`int`): number of bits by which scores are shortened; 0 while they are exact.
    """

    def __init__(self, max_bins: int = 2**18):
        self.max_bins = max_bins
        self.shift = 0
        self.bins = np.zeros(0, dtype=np.uint32)
        self.positives = np.zeros(0, dtype=np.int64)
        self.negatives = np.zeros(0, dtype=np.int64)

    def update(self, scores: np.ndarray, masks: np.ndarray) -> None:
        """Add pixels.

        Args:
            scores (`np.ndarray`): any shape, read as float32, higher = more lesion.
            masks (`np.ndarray`): the same number of pixels, nonzero = lesion.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        scores, lesion = np.asarray(scores, dtype=np.float32).ravel(), np.asarray(masks).ravel() != 0
        if not np.isfinite(scores).all():
            raise ValueError("scores must be finite, but some are NaN or infinite")
        for is_lesion in (True, False):
            bins, counts = np.unique(_order_key(scores[lesion == is_lesion]) >> self.shift, return_counts=True)
            self._merge(bins, counts * is_lesion, counts * (not is_lesion))

    def _merge(self, bins: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> None:
        bins = np.concatenate([self.bins, bins])
        order = np.argsort(bins, kind="stable")
        bins = bins[order]
        positives = np.concatenate([self.positives, positives])[order]
        negatives = np.concatenate([self.negatives, negatives])[order]
        while True:
            starts = np.flatnonzero(np.diff(bins, prepend=~bins[:1]))
            if len(starts) < len(bins):
                bins = bins[starts]
                positives, negatives = np.add.reduceat(positives, starts), np.add.reduceat(negatives, starts)
            if len(bins) <= self.max_bins:
                break
            bins, self.shift = bins >> 1, self.shift + 1
        self.bins, self.positives, self.negatives = bins, positives, negatives

    def __add__(self, other: "PixelCounts") -> "PixelCounts":
        """Return the sum of both, with `max_bins` of the first: `PixelCounts(4096) + counts` has at most 4,096 bins."""
        total = PixelCounts(self.max_bins)
        total.shift = max(self.shift, other.shift)
        for part in (self, other):
            total._merge(part.bins >> (total.shift - part.shift), part.positives, part.negatives)
        return total

    @property
    def scores(self) -> np.ndarray:
        """Lowest score of each bin, float32 `(B,)`, ascending: `map >= score` selects whole bins."""
        return _order_score(self.bins << self.shift)

    @property
    def prevalence(self) -> float | None:
        """Share of lesion pixels; None without pixels."""
        pixels = int(self.positives.sum() + self.negatives.sum())
        return int(self.positives.sum()) / pixels if pixels else None

    def average_precision(self) -> float | None:
        """Return the average precision, the paper's AUPRC; None without lesion pixels.

        A constant map scores the prevalence.
        """
        if not self.positives.any():
            return None
        return float(average_precision(self.positives[::-1], self.negatives[::-1]))

    def ideal_dice(self) -> tuple[float, float] | tuple[None, None]:
        """Return the best Dice over all thresholds of `map >= threshold`, and the lowest threshold that reaches it.

        (None, None) without lesion pixels.
        """
        lesion = int(self.positives.sum())
        if not lesion:
            return None, None
        found = np.cumsum(self.positives[::-1])[::-1]  # lesion pixels above each bin's lower edge
        marked = found + np.cumsum(self.negatives[::-1])[::-1]
        dice = 2 * found / (marked + lesion)
        best = int(np.argmax(dice))
        return float(dice[best]), float(self.scores[best])

    def dice(self, threshold: float) -> float | None:
        """Return Dice of `map >= threshold`, to the precision of the bins; None without lesion pixels."""
        above, lesion = self.scores >= threshold, self.positives.sum()
        found, wrong = self.positives[above].sum(), self.negatives[above].sum()
        return float(2 * found / (found + wrong + lesion)) if lesion else None

    def to_arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return arrays for an .npz file, in small types: `shift`, differences of `bins`, `positives`, `negatives`."""
        arrays = {f"{prefix}shift": np.uint8(self.shift), f"{prefix}bins": np.diff(self.bins, prepend=np.uint32(0))}
        for name in ("positives", "negatives"):
            array = getattr(self, name)
            arrays[f"{prefix}{name}"] = array.astype(np.min_scalar_type(array.max(initial=0)))
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> "PixelCounts":
        """Return the counts that `to_arrays` stored."""
        counts = cls()
        counts.shift = int(arrays[f"{prefix}shift"])
        positives, negatives = (arrays[f"{prefix}{name}"].astype(np.int64) for name in ("positives", "negatives"))
        counts._merge(np.cumsum(arrays[f"{prefix}bins"], dtype=np.uint32), positives, negatives)
        return counts


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Return average precision as scikit-learn defines it, sum of (R_n - R_{n-1}) P_n, of many histograms at once.

    Args:
        positives (`np.ndarray`): `(..., B)`, lesion pixels per bin, the bin of the highest scores first.
        negatives (`np.ndarray`): `(..., B)`, other pixels per bin.

    Returns:
        `np.ndarray`: float64 `(...)`, NaN without lesion pixels.
    """
    true = np.cumsum(positives, axis=-1, dtype=np.float64)
    above = true + np.cumsum(negatives, axis=-1, dtype=np.float64)
    precision = np.divide(true, above, out=np.zeros_like(true), where=above > 0)
    total = true[..., -1]
    gained = (positives * precision).sum(axis=-1)
    return np.divide(gained, total, out=np.full_like(total, np.nan), where=total > 0)


def _order_key(scores: np.ndarray) -> np.ndarray:
    """Return uint32 keys that order like finite float32 scores; -0 and 0 get the same key."""
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _order_score(keys: np.ndarray) -> np.ndarray:
    """Return the float32 scores of keys: the inverse of `_order_key`."""
    return np.where(keys >> 31, keys ^ np.uint32(1 << 31), ~keys).view(np.float32)
