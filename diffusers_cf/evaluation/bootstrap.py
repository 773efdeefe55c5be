"""How sure a score is, and a difference of two: a bootstrap over runs and patients, paired between methods.

Pixels of a patient are far from independent, so patients are drawn, with replacement, and their pixel counts added up.
Runs (seeds, splits) are drawn, too: three trainings are a sample of all trainings. Two methods are compared on the same
draws: what makes a patient or a split hard for both cancels out.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import CHAINS, PixelCounts, read_counts


# A patient's counts and those of all patients have at most so many bins; `tests/test_bootstrap.py` bounds the error.
COMMON_BINS = 2**14
# Draws at a time: a few arrays of BLOCK x COMMON_BINS.
BLOCK = 8


def read_patient_counts(path: str | Path, chain: str = "raw") -> dict[str, PixelCounts]:
    """Reads each patient's counts of all pixels, in at most `COMMON_BINS` bins, from a file of `evaluate`.

    Args:
        path: The .npz file.
        chain: `raw` or `postprocessed`.

    Raises:
        InputError: The file holds no counts of this chain.
    """
    counts = {}
    for patient, found in read_counts(path):
        if f"{chain}/foreground" not in found:
            raise InputError(f"{path}: no counts of the {chain} maps of patient {patient}")
        both = found[f"{chain}/foreground"] + found[f"{chain}/background"]
        counts[patient] = both.coarsened(COMMON_BINS)
    return counts


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Returns average precision as scikit-learn defines it, sum of (R_n - R_{n-1}) P_n, of many histograms at once.

    Args:
        positives: (..., B), lesion pixels a bin, the bin of the highest scores first.
        negatives: (..., B), other pixels a bin.

    Returns:
        float64 (...), NaN without any lesion pixel.
    """
    true = np.cumsum(positives, axis=-1, dtype=np.float64)
    above = true + np.cumsum(negatives, axis=-1, dtype=np.float64)
    precision = np.divide(true, above, out=np.zeros_like(true), where=above > 0)
    total = true[..., -1]
    gained = (positives * precision).sum(axis=-1)
    return np.divide(gained, total, out=np.full_like(total, np.nan), where=total > 0)


def bootstraps_of_file(path: str | Path, samples: int = 1000) -> dict[str, dict]:
    """Returns for each chain of a file of `evaluate` what a result keeps: `Bootstrap.to_json`."""
    return {chain: bootstrap_auprc(read_patient_counts(path, chain), samples=samples).to_json() for chain in CHAINS}


@dataclass(frozen=True)
class Bootstrap:
    """A score of a method on runs and patients as they are and on draws of them.

    Attributes:
        values: of each run on its patients as they are, None without any lesion pixel.
        samples: float64 (samples,), of the draws, NaN for a draw without a lesion pixel for one of the runs.
        test_sets: for each run its patients, with their lesion pixels and all their pixels.
        seed: of the draws.
    """

    values: Sequence[float | None]
    samples: np.ndarray
    test_sets: Sequence[Mapping[str, tuple[int, int]]]
    seed: int

    @property
    def value(self) -> float | None:
        """Mean of the runs; None where one of them is not defined."""
        return None if None in self.values else float(np.mean(self.values))

    def interval(self) -> list[float] | None:
        """Returns the percentile 95 % interval, [low, high]; None for fewer than two patients or without lesions."""
        return _interval(self.samples, self.test_sets)

    def minus(self, other: "Bootstrap") -> dict:
        """Compares the pooled AUPRC of two methods on the same draws of patients.

        Returns:
            `difference`, self - other on the patients as they are; `by_run` the same for each run where both have as
            many; `interval`, its percentile 95 % interval [low, high]; `p_worse`, the share of draws in which self is
            not ahead. None where they are not defined.

        Raises:
            InputError: The test sets differ.
            ValueError: The draws differ.
        """
        _check_same_test_sets(self.test_sets, other.test_sets)
        if (self.seed, len(self.samples)) != (other.seed, len(other.samples)):
            raise ValueError("draws must have the same seed and number to be paired")
        differences = self.samples - other.samples
        interval = _interval(differences, self.test_sets)
        defined = differences[np.isfinite(differences)]
        pairs = zip(self.values, other.values, strict=True) if len(self.values) == len(other.values) else ()
        return {
            "difference": None if self.value is None else self.value - other.value,
            "by_run": [None if None in pair else pair[0] - pair[1] for pair in pairs],
            "interval": interval,
            "p_worse": None if interval is None else float(np.mean(defined <= 0)),
        }

    def to_json(self) -> dict:
        """Returns what `from_json` takes of one run: small enough to keep with every result, pairs need no counts."""
        samples = [None if np.isnan(sample) else round(float(sample), 6) for sample in self.samples]
        test_sets = [{patient: list(pixels) for patient, pixels in found.items()} for found in self.test_sets]
        return {"value": self.value, "seed": self.seed, "test_sets": test_sets, "samples": samples}

    @classmethod
    def from_json(cls, facts: Mapping) -> "Bootstrap":
        """Returns the bootstrap that `to_json` gave, draws rounded to 6 digits."""
        samples = np.array([np.nan if sample is None else sample for sample in facts["samples"]])
        test_sets = [{patient: tuple(pixels) for patient, pixels in found.items()} for found in facts["test_sets"]]
        return cls([facts["value"]], samples, test_sets, facts["seed"])


def bootstrap_auprc(run: Mapping[str, PixelCounts], seed: int = 0, samples: int = 1000) -> Bootstrap:
    """Draws patients with replacement and measures one run of a method on each draw.

    Runs on the same patients get the same draws, runs on others get draws of their own.

    Args:
        run: Each patient's counts of all pixels.
        seed: Of the draws.
        samples: Number of draws.
    """
    value, *drawn = _weighted_auprc(run, _weights(sorted(run), seed, samples))
    return Bootstrap([None if np.isnan(value) else float(value)], np.array(drawn), [_pixels(run)], seed)


def bootstrap_mean(run: Mapping[str, float], seed: int = 0, samples: int = 1000) -> Bootstrap:
    """The same for the mean of a score of each patient, such as its Dice, over the patients of one run."""
    weights = _weights(sorted(run), seed, samples)
    value, *drawn = weights @ np.array([run[patient] for patient in sorted(run)]) / len(run)
    return Bootstrap([float(value)], np.array(drawn), [dict.fromkeys(sorted(run), (0, 0))], seed)


def _weights(patients: Sequence[str], seed: int, samples: int) -> np.ndarray:
    """How often each patient counts, (1 + samples, P): in the first row, which is no draw, once."""
    random = np.random.default_rng([seed, zlib.crc32("\n".join(patients).encode())])
    draws = random.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=samples)
    return np.concatenate([np.ones((1, len(patients))), draws.astype(np.float64)])


def mean_of_runs(runs: Sequence[Bootstrap]) -> Bootstrap:
    """Returns the mean over the runs (seeds, splits) of a method: each draw takes as many runs, with replacement.

    Runs on one test set share their draws of patients; where each run has patients of its own, they are drawn within
    each run. Methods with as many runs share the draws of runs.

    Raises:
        ValueError: There is no run, or their draws differ in seed or number.
    """
    if len({(run.seed, len(run.samples)) for run in runs}) != 1:
        raise ValueError("runs must be one or more with draws of the same seed and number")
    samples = np.array([run.samples for run in runs])
    random = np.random.default_rng([runs[0].seed, len(runs)])
    drawn = random.integers(len(runs), size=(len(runs), samples.shape[1]))
    return Bootstrap(
        [value for run in runs for value in run.values],
        np.take_along_axis(samples, drawn, axis=0).mean(axis=0),
        [test_set for run in runs for test_set in run.test_sets],
        runs[0].seed,
    )


def _pixels(run: Mapping[str, PixelCounts]) -> dict[str, tuple[int, int]]:
    lesion = {patient: int(counts.positives.sum()) for patient, counts in run.items()}
    return {patient: (lesion[patient], lesion[patient] + int(run[patient].negatives.sum())) for patient in sorted(run)}


def _check_same_test_sets(first: Sequence[Mapping], second: Sequence[Mapping]) -> None:
    """Any number of runs on one test set can be compared, else each test set needs a run of both methods."""
    first, second = (sorted(sorted(pixels.items()) for pixels in sets) for sets in (first, second))
    if first == second or all(pixels == first[0] for pixels in [*first, *second]):
        return
    found = [{patient for pixels in sets for patient in pixels} for sets in (first, second)]
    for patient, _ in sorted(found[0] ^ found[1])[:1]:
        raise InputError(f"not measured on the same pixels: the counts of patient {patient} differ")
    raise InputError("not measured on the same pixels: runs differ in their test sets, and one method lacks a run")


def _weighted_auprc(run: Mapping[str, PixelCounts], weights: np.ndarray) -> np.ndarray:
    """Returns (S,): AUPRC of the patients in alphabetical order, counted as often as `weights` (S, P) says."""
    positives, negatives = _matrices([run[patient] for patient in sorted(run)])
    values = [average_precision(block @ positives, block @ negatives) for block in _blocks(weights)]
    return np.concatenate(values)


def _blocks(weights: np.ndarray) -> list[np.ndarray]:
    return np.array_split(weights, -(-len(weights) // BLOCK))


def _matrices(counts: Sequence[PixelCounts]) -> tuple[np.ndarray, np.ndarray]:
    """Returns lesion and other pixels, float64 (P, B), in bins common to all patients, the highest scores first."""
    total = PixelCounts(COMMON_BINS)
    for patient in counts:
        total = total + patient
    positives, negatives = np.zeros((2, len(counts), len(total.bins)))
    for row, patient in enumerate(counts):
        columns = np.searchsorted(total.bins, patient.bins >> (total.shift - patient.shift))
        np.add.at(positives[row], columns, patient.positives)
        np.add.at(negatives[row], columns, patient.negatives)
    return positives[:, ::-1], negatives[:, ::-1]


def _interval(samples: np.ndarray, test_sets: Sequence[Mapping]) -> list[float] | None:
    defined = samples[np.isfinite(samples)]
    if len({patient for pixels in test_sets for patient in pixels}) < 2 or not len(defined):
        return None
    return [float(limit) for limit in np.percentile(defined, [2.5, 97.5])]
