"""Confidence intervals of a score, and of the difference of two methods: a bootstrap over runs and patients.

Pixels of one patient are not independent, so patients are drawn with replacement and their pixel counts are added up.
Runs (seeds, splits) are drawn as well. Two methods are compared on the same draws (paired), so the difficulty of a
patient or a split cancels out.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import CHAINS, REGIONS, PixelCounts, average_precision


SEED = 0  # of all draws, so that any two methods can be compared
# Largest number of bins of a patient's counts, and of the bins that all patients share.
COMMON_BINS = 2**14
# Draws computed at a time; each needs a few arrays of COMMON_BINS numbers.
BLOCK = 8


@dataclass(frozen=True)
class Bootstrap:
    """A method's score on its runs and patients, and on random draws of them.

    Attributes:
        values (`Sequence[float | None]`): score of each run on its own patients, None without lesion pixels.
        samples (`np.ndarray`): float64 `(samples,)`, score of each draw, NaN if a drawn run has no lesion.
        test_sets (`Sequence[Mapping]`): for each run, patient -> (lesion pixels, all pixels).
    """

    values: Sequence[float | None]
    samples: np.ndarray
    test_sets: Sequence[Mapping[str, tuple[int, int]]]

    @property
    def value(self) -> float | None:
        """Mean over the runs; None if a run has no value."""
        return None if None in self.values else float(np.mean(self.values))

    def interval(self) -> list[float] | None:
        """Return the percentile 95 % interval, [low, high]; None for fewer than two patients or without lesions."""
        defined = self.samples[np.isfinite(self.samples)]
        if len({patient for pixels in self.test_sets for patient in pixels}) < 2 or not len(defined):
            return None
        return [float(limit) for limit in np.percentile(defined, [2.5, 97.5])]

    def minus(self, other: "Bootstrap") -> dict:
        """Compare two methods on the same draws of patients.

        Returns:
            `dict`: `difference`, self - other; `by_run`, the same for each run if both have equally many; `interval`,
            the percentile 95 % interval of the difference; `p_worse`, the share of draws in which self is not better.
            Undefined values are None.

        Raises:
            InputError: the test sets differ; any number of runs may share a single one.
        """
        first, second = (sorted(sorted(pixels.items()) for pixels in of.test_sets) for of in (self, other))
        if first != second and any(pixels != first[0] for pixels in [*first, *second]):
            raise InputError("two methods were not measured on the same pixels of the same patients")
        pairs = list(zip(self.values, other.values, strict=True)) if len(self.values) == len(other.values) else []
        by_run = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        difference = Bootstrap(by_run, self.samples - other.samples, self.test_sets)
        interval, defined = difference.interval(), difference.samples[np.isfinite(difference.samples)]
        return {
            "difference": None if self.value is None else self.value - other.value,
            "by_run": by_run,
            "interval": interval,
            "p_worse": None if interval is None else float(np.mean(defined <= 0)),
        }

    def to_json(self) -> dict:
        """Return the bootstrap of one run as JSON values."""
        samples = [None if np.isnan(sample) else round(float(sample), 6) for sample in self.samples]
        test_sets = [{patient: list(pixels) for patient, pixels in found.items()} for found in self.test_sets]
        return {"value": self.value, "seed": SEED, "test_sets": test_sets, "samples": samples}

    @classmethod
    def from_json(cls, stored: Mapping) -> "Bootstrap":
        """Return the bootstrap that `to_json` stored; its draws are rounded to 6 digits."""
        samples = np.array([np.nan if sample is None else sample for sample in stored["samples"]])
        test_sets = [{patient: tuple(pixels) for patient, pixels in found.items()} for found in stored["test_sets"]]
        return cls([stored["value"]], samples, test_sets)


def bootstrap_auprc(run: Mapping[str, PixelCounts], samples: int = 1000) -> Bootstrap:
    """Draw patients with replacement and compute the pooled AUPRC of one run on each draw.

    Runs on the same patients share their draws; runs on other patients get their own.

    Args:
        run (`Mapping[str, PixelCounts]`): each patient's counts of all pixels.
        samples (`int`): number of draws.
    """
    patients = sorted(run)
    weights = _weights(patients, samples)
    positives, negatives = _common_bins([run[patient] for patient in patients])
    blocks = np.array_split(weights, -(-len(weights) // BLOCK))
    value, *drawn = np.concatenate([average_precision(block @ positives, block @ negatives) for block in blocks])
    lesion = {patient: int(run[patient].positives.sum()) for patient in patients}
    pixels = {patient: (lesion[patient], lesion[patient] + int(run[patient].negatives.sum())) for patient in patients}
    return Bootstrap([None if np.isnan(value) else float(value)], np.array(drawn), [pixels])


def bootstrap_mean(run: Mapping[str, float], samples: int = 1000) -> Bootstrap:
    """Draw patients with replacement and compute the mean of their scores; `run` maps each patient to its score."""
    patients = sorted(run)
    value, *drawn = _weights(patients, samples) @ np.array([run[patient] for patient in patients]) / len(run)
    return Bootstrap([float(value)], np.array(drawn), [dict.fromkeys(patients, (0, 0))])


def mean_of_runs(runs: Sequence[Bootstrap]) -> Bootstrap:
    """Return the mean over the runs (seeds, splits) of a method; runs are drawn with replacement, too.

    Two methods with equally many runs share their draws of runs.
    """
    samples = np.array([run.samples for run in runs])
    random = np.random.default_rng([SEED, len(runs)])
    drawn = random.integers(len(runs), size=(len(runs), samples.shape[1]))
    return Bootstrap(
        [value for run in runs for value in run.values],
        np.take_along_axis(samples, drawn, axis=0).mean(axis=0),
        [test_set for run in runs for test_set in run.test_sets],
    )


def read_patient_counts(path: str | Path, chain: str = "raw") -> dict[str, PixelCounts]:
    """Return each patient's counts of all pixels, in at most `COMMON_BINS` bins, from a .counts.npz file of `evaluate`.

    Args:
        path (`str` or `Path`): the file.
        chain (`str`): `raw` or `postprocessed`.
    """
    found = {}
    with np.load(path) as file:
        for patient in dict.fromkeys(name.split("/")[0] for name in file.files):
            regions = (PixelCounts.from_arrays(file, f"{patient}/{chain}/{region}/") for region in REGIONS)
            found[patient] = sum(regions, PixelCounts(COMMON_BINS))
    return found


def bootstraps_of_file(path: str | Path, samples: int = 1000) -> dict[str, dict]:
    """Return `Bootstrap.to_json` of each chain of a .counts.npz file."""
    return {chain: bootstrap_auprc(read_patient_counts(path, chain), samples).to_json() for chain in CHAINS}


def _weights(patients: Sequence[str], samples: int) -> np.ndarray:
    """Return how often each draw takes each patient, `(1 + samples, P)`; the first row takes each once."""
    random = np.random.default_rng([SEED, zlib.crc32("\n".join(patients).encode())])
    draws = random.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=samples)
    return np.concatenate([np.ones((1, len(patients))), draws.astype(np.float64)])


def _common_bins(counts: Sequence[PixelCounts]) -> tuple[np.ndarray, np.ndarray]:
    """Return lesion and other pixels, float64 `(P, B)`, in bins shared by all patients, the highest scores first."""
    total = sum(counts, PixelCounts(COMMON_BINS))
    positives, negatives = np.zeros((2, len(counts), len(total.bins)))
    for row, patient in enumerate(counts):
        columns = np.searchsorted(total.bins, patient.bins >> (total.shift - patient.shift))
        np.add.at(positives[row], columns, patient.positives)
        np.add.at(negatives[row], columns, patient.negatives)
    return positives[:, ::-1], negatives[:, ::-1]
