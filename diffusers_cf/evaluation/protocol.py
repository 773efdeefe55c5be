"""One protocol for every method: streaming pixel measures of anomaly maps over a split of a slice data set.

The paper's measures (Sec. 4) are the area under the precision-recall curve and the best Dice over all thresholds, both
over the pixels of the whole test set: counted in constant memory (`pixel_counts.py`), scikit-learn does the arithmetic.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.measuring import (
    REGIONS,
    Patient,
    counts_of_part,
    dice,
    dice_of_patient,
    maps_at_size,
    maps_of_patients,
    measure_patient,
    read_part,
    rows_by_patient,
    write_part,
)
from diffusers_cf.evaluation.pixel_counts import CHAINS, PixelCounts, counts_file, read_counts
from diffusers_cf.evaluation.processes import WHOLE, Share
from diffusers_cf.files import write_json


__all__ = ["PixelCounts", "bootstrap_interval", "dice", "evaluate", "maps_at_size", "read_counts", "write_result"]

# Bins a count in the file of per-patient counts: about 80 kB each.
FILE_BINS = 2**16
# A lesion is small, medium or large by its share of the patient's foreground: fixed limits, so that results compare. They
# cut the patients of TCGA-LGG into thirds.
LESION_SIZES = {"small": (0.0, 0.03), "medium": (0.03, 0.08), "large": (0.08, 1.0)}


def bootstrap_interval(values: Sequence[float], seed: int = 0, samples: int = 10_000) -> list[float] | None:
    """Returns the percentile bootstrap 95 % interval of the mean, [low, high]; None for fewer than two values."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    # In blocks: fast, and small however many patients there are.
    means = [rng.choice(values, (100, len(values))).mean(axis=1) for _ in range(samples // 100)]
    return [float(limit) for limit in np.percentile(np.concatenate(means), [2.5, 97.5])]


class _Chain:
    """What one chain of processing, `raw` or `postprocessed`, adds up over the parts of patients."""

    def __init__(self, name: str, threshold: float | None):
        self.name, self.threshold, self.is_ideal = name, threshold, threshold is None
        self.counts = {region: PixelCounts() for region in REGIONS}
        self.labels, self.slice_scores = [], []
        self.dice_patients, self.dice_values, self.slice_dice = [], [], []
        self.patient_auprc, self.lesion_share = {}, {}
        self.counts_of_size = {name: PixelCounts() for name in LESION_SIZES}

    def add(self, patient: str, part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds a patient's part and returns what goes to the file of per-patient counts."""
        kept = {"slice_scores": part[f"{self.name}/slice_scores"]}
        self.slice_scores.extend(kept["slice_scores"])
        self.labels.extend(part["labels"] != 0)
        found = {region: counts_of_part(part, self.name, region) for region in REGIONS}
        for region, counts in found.items():
            self.counts[region] += counts
            kept |= {f"{region}/{k}": v for k, v in counts.coarsened(FILE_BINS).to_arrays().items()}
        self._add_patient(patient, found["foreground"], found["background"])
        if not self.is_ideal:
            self._add_dice(patient, part[f"{self.name}/dice"], part[f"{self.name}/slice_dice"])
        return {f"{patient}/{self.name}/{key}": array for key, array in kept.items()}

    def _add_patient(self, patient: str, foreground: PixelCounts, background: PixelCounts) -> None:
        """AUPRC of a patient with a lesion, and its pixels to those of lesions of this size."""
        counts = foreground + background
        lesion = int(counts.positives.sum())
        if not lesion:
            return
        self.patient_auprc[patient] = counts.average_precision()
        share = lesion / max(1, int(foreground.positives.sum() + foreground.negatives.sum()))
        self.lesion_share[patient] = share
        self.counts_of_size[_lesion_size(share)] += counts

    def add_ideal_dice(self, patient: str, part: Mapping[str, np.ndarray]) -> None:
        """Adds a patient's Dice at the ideal threshold, once all parts are added."""
        if self.threshold is None:
            self.threshold = sum(self.counts.values(), PixelCounts()).ideal_dice()[1]
        if self.threshold is not None:
            maps = part[f"{self.name}/maps"]
            self._add_dice(patient, *dice_of_patient(maps, part["masks"], part["slices"], self.threshold, self.name))

    def _add_dice(self, patient: str, whole: Sequence[float], slices: Sequence[float]) -> None:
        self.dice_patients.extend([patient] * len(whole))
        self.dice_values.extend(map(float, whole))
        self.slice_dice.extend(slices)

    def result(self, seed: int) -> dict:
        from sklearn.metrics import roc_auc_score

        foreground = self.counts["foreground"]
        everything = foreground + self.counts["background"]
        ideal_dice, ideal_threshold = everything.ideal_dice()
        both = len(set(self.labels)) == 2
        return {
            "auprc": everything.average_precision(),
            "ideal_dice": ideal_dice,
            "ideal_threshold": ideal_threshold,
            "prevalence": everything.prevalence,
            "foreground_auprc": foreground.average_precision(),
            "foreground_ideal_dice": foreground.ideal_dice()[0],
            "foreground_prevalence": foreground.prevalence,
            "slice_auroc": float(roc_auc_score(self.labels, self.slice_scores)) if both else None,
            "per_patient_dice": {
                "patients": self.dice_patients,
                "values": self.dice_values,
                "mean": _mean(self.dice_values),
                "interval": bootstrap_interval(self.dice_values, seed),
                "threshold": self.threshold,
            },
            "per_slice_dice": _mean(self.slice_dice),
            "per_patient_auprc": {
                "patients": list(self.patient_auprc),
                "values": list(self.patient_auprc.values()),
                "mean": _mean(list(self.patient_auprc.values())),
                "interval": bootstrap_interval(list(self.patient_auprc.values()), seed),
            },
            "by_lesion_size": {name: self._of_size(name) for name in LESION_SIZES},
        }

    def _of_size(self, name: str) -> dict:
        """What is measured of the patients whose lesions have a size: pixels pooled, and means of the patients."""
        patients = [patient for patient, share in self.lesion_share.items() if _lesion_size(share) == name]
        dice_of = dict(zip(self.dice_patients, self.dice_values, strict=True))
        return {
            "share_of_foreground": list(LESION_SIZES[name]),
            "patients": patients,
            "auprc": self.counts_of_size[name].average_precision(),
            "ideal_dice": self.counts_of_size[name].ideal_dice()[0],
            "per_patient_auprc": _mean([self.patient_auprc[patient] for patient in patients]),
            "per_patient_dice": _mean([dice_of[patient] for patient in patients]),
        }


def _lesion_size(share: float) -> str:
    return next(name for name, (_, below) in LESION_SIZES.items() if share < below or name == "large")


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def evaluate(
    anomaly_map: Callable[[torch.Tensor], torch.Tensor],
    dataset,
    *,
    batch_size: int | None = 32,
    whole_patients: bool = False,
    device: str | torch.device = "cpu",
    threshold: float | dict[str, float] | None = None,
    postprocess: bool = True,
    indices: Sequence[int] | None = None,
    network_evaluations_per_slice: float = 0,
    counts_path: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    parts: str | Path | None = None,
    share: Share = WHOLE,
) -> dict | None:
    """Measures one method on a split: the same pixels, resolution and post-processing for every method.

    Works patient by patient, and keeps of each a file until all are measured, so memory does not grow with the split.
    Without a threshold the files hold the maps until the ideal one is known (4 bytes a pixel, twice with post-processing).

    Args:
        anomaly_map: images float32 (N, C, H, W) -> (N, h, w), higher = more lesion, any range. A map smaller than the
            masks is upsampled bilinearly.
        dataset: A `SliceDataset` with masks.
        batch_size: Slices a call, of several patients; None = as many as fit into memory ([`map_in_batches`]).
        whole_patients: A call gets all slices that the split has of one patient instead, those not in `indices` among
            them: for methods that look at the whole scan.
        device: Where the method computes, for a `batch_size` of None.
        threshold: Where `map >= threshold` is lesion for Dice per patient, chosen beforehand on other patients; one for
            both chains, or one for each (`raw`, `postprocessed`). None = the ideal one of this very split, an upper
            bound.
        postprocess: Whether to give every measure a second time after `postprocessing.py`.
        indices: Rows of the data set to use, all if None.
        network_evaluations_per_slice: What the method costs, for the result.
        counts_path: An .npz file to write each patient's counts to (`read_counts`).
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        parts: Folder for the files of measured patients, which are taken as they are if a run was stopped; it stays
            when all is done. A temporary one if None.
        share: Which patients this process measures, split evenly by slices. The files of all must come to one folder.

    Returns:
        None where another process puts all together: in a shard, and in all but the first process of a launcher. Else
        The fields of RESULT.json, fractions from 0 to 1. `auprc`, `ideal_dice`, `ideal_threshold` over all pixels,
        `foreground_*` where any channel is above 0, `slice_auroc` of the map's mean over a slice's foreground,
        `per_patient_dice` over patients with a lesion (`patients` names them), `per_slice_dice` the mean over slices
        with a lesion at the same threshold, `per_patient_auprc` of all pixels of each patient with a lesion,
        `by_lesion_size` the same for small, medium and large lesions, all of them again under `postprocessed`. What is not defined, for want of
        lesions or of a second class, is None.

    Raises:
        InputError: The data set has no masks or no slices, or a map holds NaN or infinite values.
        ValueError: The map has a wrong shape, or `parts` is missing where several processes work.
    """
    rows = _chosen_rows(dataset, indices)
    limits = threshold if isinstance(threshold, dict) else dict.fromkeys(CHAINS, threshold)
    limits = {chain: limits[chain] for chain in CHAINS[: 1 + postprocess]}
    with _folder_of_parts(parts, counts_path, share) as folder:
        paths = {name: folder / f"{number:06d}.npz" for number, name in enumerate(rows)}
        mine = share.of(list(rows), [len(found) for found in rows.values()])
        sizes = [len(rows[name]) for name in mine]
        with tqdm(total=sum(sizes), unit="slice", disable=not (progress and (share.is_main or share.is_shard))) as bar:
            left = [name for name in mine if not paths[name].exists()]
            bar.update(sum(sizes) - sum(len(rows[name]) for name in left))
            patients = (Patient(dataset, name, rows[name]) for name in left)
            call = (batch_size, whole_patients, device, bar)
            for patient, maps, seconds in maps_of_patients(anomaly_map, patients, *call):
                part = measure_patient(patient, maps, limits) | {"seconds": np.array(seconds)}
                write_part(paths[patient.name], part)
        share.wait()
        if share.is_shard or not share.is_main:
            return None
        result, size = _put_together(paths, limits, counts_path, seed)
    result["network_evaluations_per_slice"] = network_evaluations_per_slice
    return result | {"protocol": _protocol(size, threshold, postprocess, seed)}


@contextmanager
def _folder_of_parts(parts: str | Path | None, counts_path: str | Path | None, share: Share) -> Iterator[Path]:
    if parts is not None:
        Path(parts).mkdir(parents=True, exist_ok=True)
        yield Path(parts)
        return
    if share.count > 1:
        raise ValueError("parts is None: several processes need one folder for what they measure")
    with tempfile.TemporaryDirectory(dir=counts_path and Path(counts_path).parent) as folder:
        yield Path(folder)


def _put_together(
    paths: Mapping[str, Path], thresholds: Mapping[str, float | None], counts_path: str | Path | None, seed: int
) -> tuple[dict, list[int]]:
    """Adds up the parts of all patients, one after the other; returns the result and the size of the masks."""
    chains, n_slices, seconds = [_Chain(*item) for item in thresholds.items()], 0, 0.0
    with counts_file(counts_path) as write_counts:
        for name, path in paths.items():
            with read_part(path) as part:
                write_counts({f"{name}/{key}": part[key] for key in ("slices", "labels")})
                for chain in chains:
                    write_counts(chain.add(name, part))
                n_slices, seconds = n_slices + len(part["slices"]), seconds + float(part["seconds"])
                size = part["size"].tolist()
    ideal = [chain for chain in chains if chain.is_ideal]
    for name, path in paths.items() if ideal else ():
        with read_part(path) as part:
            for chain in ideal:
                chain.add_ideal_dice(name, part)
    raw, *postprocessed = [chain.result(seed) for chain in chains]
    result = raw | ({"postprocessed": postprocessed[0]} if postprocessed else {})
    facts = {"n_slices": n_slices, "n_patients": len(paths), "seconds_per_slice": seconds / n_slices}
    return result | facts, size


def _chosen_rows(dataset, indices: Sequence[int] | None) -> dict[str, np.ndarray]:
    if not dataset.has_masks:
        raise InputError("the data set has no lesion masks: it trains a model, but can't be evaluated")
    rows = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(rows):
        raise InputError("there are no slices to evaluate: the split is empty")
    return rows_by_patient(dataset, rows)


def _protocol(size: tuple[int, int], threshold, postprocess: bool, seed: int) -> dict[str, str]:
    """Returns in words how the figures were made."""
    chain = "map cleared outside the eroded foreground (5 x 5 mean > 0.95), 5 x 5 median filter; for Dice per patient "
    small, large = LESION_SIZES["medium"]
    chain += "also components under 20 voxels removed (26 neighbours, contiguous slices)"
    return {
        "resolution": f"{size[0]} x {size[1]}, the data set's; smaller maps upsampled bilinearly",
        "pixels": "all pixels of all slices pooled; foreground_*: pixels where any channel is above 0",
        "counts": f"histogram of float32 scores, up to {PixelCounts().max_bins} bins in use; scikit-learn on the counts",
        "ideal_threshold": "best Dice over all thresholds on this split's own masks: an upper bound",
        "per_patient_dice": "ideal threshold of this split, chosen on its own masks: an upper bound"
        if threshold is None
        else "at the given threshold, chosen before the evaluation",
        "per_patient_auprc": "all pixels of a patient with a lesion; a scale of its intensities can't change it",
        "by_lesion_size": f"lesion's share of the foreground: small below {small:g}, large from {large:g} on",
        "per_slice_dice": "at the same threshold, mean over the slices with a lesion",
        "patients_without_lesion": "no Dice of their own; their pixels count in every pooled measure",
        "interval": f"95 % percentile bootstrap of the mean over patients, 10000 samples, seed {seed}",
        "slice_auroc": "score = mean of the map over the slice's foreground; positive = any class but the first",
        "postprocessed": chain if postprocess else "not done",
    }


def write_result(result: dict, path: str | Path) -> None:
    """Writes RESULT.json, whole or not at all."""
    write_json(result, path)
