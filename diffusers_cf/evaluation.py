"""One protocol for every method: streaming pixel measures of anomaly maps over a split of a slice data set.

The paper's measures (Sec. 4) are the area under the precision-recall curve and the best Dice over all thresholds, both
over the pixels of the whole test set: counted in constant memory (`pixel_counts.py`), scikit-learn does the arithmetic.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from diffusers_cf.errors import InputError
from diffusers_cf.pixel_counts import CHAINS, PixelCounts, counts_file, read_counts, renamed_when_whole
from diffusers_cf.postprocessing import foreground_mask, postprocess_maps, remove_small_components


__all__ = ["PixelCounts", "bootstrap_interval", "dice", "evaluate", "read_counts", "write_result"]

# Bins a count in the file of per-patient counts: about 80 kB each.
FILE_BINS = 2**16


def dice(prediction: np.ndarray, masks: np.ndarray) -> float | None:
    """Returns Dice of two binary arrays, None where `masks` is empty: there is nothing to find."""
    prediction, masks = np.asarray(prediction) > 0, np.asarray(masks) > 0
    if not masks.any():
        return None
    return 2 * int((prediction & masks).sum()) / (int(prediction.sum()) + int(masks.sum()))


def bootstrap_interval(values: Sequence[float], seed: int = 0, samples: int = 10_000) -> list[float] | None:
    """Returns the percentile bootstrap 95 % interval of the mean, [low, high]; None for fewer than two values."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    # In blocks: fast, and small however many patients there are.
    means = [rng.choice(values, (100, len(values))).mean(axis=1) for _ in range(samples // 100)]
    return [float(limit) for limit in np.percentile(np.concatenate(means), [2.5, 97.5])]


def maps_at_size(maps: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Returns maps (N, h, w) on any device as float32 (N, H, W), bilinear where they are smaller than `size`."""
    maps = maps.detach().to("cpu", torch.float32)
    if tuple(maps.shape[1:]) != tuple(size):
        maps = torch.nn.functional.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
    return maps.numpy()


class _Patient:
    """The wanted slices of one patient as arrays, with what every chain needs of them."""

    def __init__(self, dataset, name: str, rows: np.ndarray):
        batch = dataset.collate(dataset.__getitems__([int(row) for row in rows]))
        self.dataset, self.name, self.rows = dataset, name, rows
        self.images = np.asarray(batch["images"], dtype=np.float32)
        self.masks, self.labels, self.slices = (np.asarray(batch[key]) for key in ("masks", "labels", "slices"))
        self.foreground = foreground_mask(self.images)

    def maps(self, anomaly_map: Callable, batch_size: int | None, progress: tqdm) -> tuple[np.ndarray, float]:
        """Returns the maps (S, H, W) at the masks' size and the seconds that the method took."""
        if batch_size is None:
            return self._maps_of_whole_patient(anomaly_map, progress)
        seconds, maps = 0.0, []
        for images in torch.from_numpy(self.images).split(batch_size):
            start = time.perf_counter()
            # The copy to the CPU waits for an accelerator, so it belongs to the time measured.
            batch = torch.as_tensor(anomaly_map(images)).detach().to("cpu", torch.float32)
            seconds += time.perf_counter() - start
            maps.append(self._at_mask_size(batch, len(images)))
            progress.update(len(images))
        return np.concatenate(maps), seconds

    def _maps_of_whole_patient(self, anomaly_map: Callable, progress: tqdm) -> tuple[np.ndarray, float]:
        everything = _rows_by_patient(self.dataset, np.flatnonzero(np.asarray(self.dataset.patients) == self.name))
        whole = _Patient(self.dataset, self.name, everything[self.name])
        with tqdm(disable=True) as hidden:
            maps, seconds = whole.maps(anomaly_map, len(whole.rows), hidden)
        progress.update(len(self.rows))
        wanted = np.searchsorted(whole.slices, self.slices)
        return maps[wanted], seconds * len(wanted) / len(maps)

    def _at_mask_size(self, maps: torch.Tensor, n: int) -> np.ndarray:
        size = self.masks.shape[1:]
        if maps.ndim != 3 or len(maps) != n or maps.shape[1] > size[0] or maps.shape[2] > size[1]:
            raise ValueError(f"anomaly_map must return ({n}, <= {size[0]}, <= {size[1]}), not {tuple(maps.shape)}")
        if not maps.isfinite().all():
            raise InputError(f"patient {self.name}: the anomaly map holds NaN or infinite values")
        return maps_at_size(maps, size)


class _Chain:
    """What one chain of processing, `raw` or `postprocessed`, adds up over patients.

    Without a threshold the maps wait in the file `spool` until the ideal one is known.
    """

    def __init__(self, name: str, threshold: float | None, spool: IO[bytes]):
        self.name, self.threshold, self.spool = name, threshold, spool
        self.foreground, self.background = PixelCounts(), PixelCounts()
        self.labels, self.slice_scores = [], []
        self.dice_patients, self.dice_values, self.slice_dice = [], [], []

    def add(self, patient: _Patient, maps: np.ndarray) -> dict[str, np.ndarray]:
        """Measures a patient and returns what goes to the file of per-patient counts."""
        if self.name == "postprocessed":
            maps = postprocess_maps(maps, patient.images)
        if self.threshold is None:
            for array in (maps, patient.masks, patient.slices):
                np.save(self.spool, array)
        else:
            self._add_dice(patient.name, maps, patient.masks, patient.slices)
        inside, foreground, background = patient.foreground, PixelCounts(), PixelCounts()
        foreground.update(maps[inside], patient.masks[inside])
        background.update(maps[~inside], patient.masks[~inside])
        self.foreground, self.background = self.foreground + foreground, self.background + background
        slice_scores = np.where(inside, maps, 0).sum((1, 2), dtype=np.float64) / np.maximum(inside.sum((1, 2)), 1)
        self.slice_scores.extend(slice_scores)
        self.labels.extend(patient.labels != 0)
        arrays = {"slice_scores": slice_scores}
        for region, counts in (("foreground", foreground), ("background", background)):
            arrays.update({f"{region}/{k}": v for k, v in counts.coarsened(FILE_BINS).to_arrays().items()})
        return {f"{patient.name}/{self.name}/{key}": array for key, array in arrays.items()}

    def add_ideal_dice(self, patients: Sequence[str]) -> None:
        """Reads the maps back, now that the ideal threshold is known, and measures Dice per patient."""
        self.threshold = (self.foreground + self.background).ideal_dice()[1]
        self.spool.seek(0)
        for name in patients if self.threshold is not None else ():
            self._add_dice(name, *(np.load(self.spool) for _ in range(3)))

    def _add_dice(self, name: str, maps: np.ndarray, masks: np.ndarray, slices: np.ndarray) -> None:
        prediction = maps >= self.threshold
        if self.name == "postprocessed":
            prediction = remove_small_components(prediction, slices)
        value = dice(prediction, masks)
        if value is not None:
            self.dice_patients.append(name)
            self.dice_values.append(value)
            found = (dice(*pair) for pair in zip(prediction, masks, strict=True))
            self.slice_dice.extend(value for value in found if value is not None)

    def result(self, seed: int) -> dict:
        from sklearn.metrics import roc_auc_score

        everything = self.foreground + self.background
        ideal_dice, ideal_threshold = everything.ideal_dice()
        both = len(set(self.labels)) == 2
        return {
            "auprc": everything.average_precision(),
            "ideal_dice": ideal_dice,
            "ideal_threshold": ideal_threshold,
            "prevalence": everything.prevalence,
            "foreground_auprc": self.foreground.average_precision(),
            "foreground_ideal_dice": self.foreground.ideal_dice()[0],
            "foreground_prevalence": self.foreground.prevalence,
            "slice_auroc": float(roc_auc_score(self.labels, self.slice_scores)) if both else None,
            "per_patient_dice": {
                "patients": self.dice_patients,
                "values": self.dice_values,
                "mean": float(np.mean(self.dice_values)) if self.dice_values else None,
                "interval": bootstrap_interval(self.dice_values, seed),
                "threshold": self.threshold,
            },
            "per_slice_dice": float(np.mean(self.slice_dice)) if self.slice_dice else None,
        }


def evaluate(
    anomaly_map: Callable[[torch.Tensor], torch.Tensor],
    dataset,
    *,
    batch_size: int | None = 32,
    threshold: float | dict[str, float] | None = None,
    postprocess: bool = True,
    indices: Sequence[int] | None = None,
    network_evaluations_per_slice: float = 0,
    counts_path: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Measures one method on a split: the same pixels, resolution and post-processing for every method.

    Works patient by patient, so memory does not grow with the split. Without a threshold it keeps the maps in a
    temporary file until the ideal threshold is known (4 bytes a pixel, twice with post-processing).

    Args:
        anomaly_map: images float32 (N, C, H, W) -> (N, h, w), higher = more lesion, any range. A map smaller than the
            masks is upsampled bilinearly.
        dataset: A `SliceDataset` with masks.
        batch_size: Slices a call, all of one patient; None = all that the split has of a patient in one call, those
            not in `indices` among them: for methods that look at the whole scan.
        threshold: Where `map >= threshold` is lesion for Dice per patient, chosen beforehand on other patients; one for
            both chains, or one for each (`raw`, `postprocessed`). None = the ideal one of this very split, an upper
            bound.
        postprocess: Whether to give every measure a second time after `postprocessing.py`.
        indices: Rows of the data set to use, all if None.
        network_evaluations_per_slice: What the method costs, for the result.
        counts_path: An .npz file to write each patient's counts to (`read_counts`).
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The fields of RESULT.json, fractions from 0 to 1. `auprc`, `ideal_dice`, `ideal_threshold` over all pixels,
        `foreground_*` where any channel is above 0, `slice_auroc` of the map's mean over a slice's foreground,
        `per_patient_dice` over patients with a lesion (`patients` names them), `per_slice_dice` the mean over slices
        with a lesion at the same threshold, all of them again under `postprocessed`. What is not defined, for want of
        lesions or of a second class, is None.

    Raises:
        InputError: The data set has no masks or no slices, or a map holds NaN or infinite values.
        ValueError: The map has a wrong shape.
    """
    rows = _rows_by_patient(dataset, indices)
    n_slices, seconds = sum(map(len, rows.values())), 0.0
    with ExitStack() as stack:
        folder = counts_path and Path(counts_path).parent
        spools = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 + postprocess)]
        limits = threshold if isinstance(threshold, dict) else dict.fromkeys(CHAINS, threshold)
        chains = [_Chain(name, limits[name], spool) for name, spool in zip(CHAINS, spools, strict=False)]
        write_counts = stack.enter_context(counts_file(counts_path))
        bar = stack.enter_context(tqdm(total=n_slices, unit="slice", disable=not progress))
        for name in rows:
            patient = _Patient(dataset, name, rows[name])
            seconds += _measure_patient(patient, anomaly_map, batch_size, chains, write_counts, bar)
        if threshold is None:
            for chain in chains:
                chain.add_ideal_dice(list(rows))
    raw, *postprocessed = [chain.result(seed) for chain in chains]
    return {
        **raw,
        **({"postprocessed": postprocessed[0]} if postprocess else {}),
        "n_slices": n_slices,
        "n_patients": len(rows),
        "network_evaluations_per_slice": network_evaluations_per_slice,
        "seconds_per_slice": seconds / n_slices,
        "protocol": _protocol(patient.masks.shape[1:], threshold, postprocess, seed),
    }


def _measure_patient(
    patient: _Patient, anomaly_map: Callable, batch_size: int | None, chains: Sequence[_Chain], write_counts: Callable,
    progress: tqdm,
) -> float:  # fmt: skip
    """Adds one patient to every chain and to the file of counts; returns the seconds that its maps took."""
    maps, seconds = patient.maps(anomaly_map, batch_size, progress)
    write_counts({f"{patient.name}/slices": patient.slices, f"{patient.name}/labels": patient.labels})
    for chain in chains:
        write_counts(chain.add(patient, maps))
    return seconds


def _rows_by_patient(dataset, indices: Sequence[int] | None) -> dict[str, np.ndarray]:
    """Returns each patient's rows in the order of their slices, patients in alphabetical order."""
    if not dataset.has_masks:
        raise InputError("the data set has no lesion masks: it trains a model, but can't be evaluated")
    rows = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(rows):
        raise InputError("there are no slices to evaluate: the split is empty")
    patients, slices = np.asarray(dataset.patients)[rows], np.asarray(dataset.slices)[rows]
    rows_of = {str(name): np.flatnonzero(patients == name) for name in np.unique(patients)}
    return {name: rows[found[np.argsort(slices[found], kind="stable")]] for name, found in rows_of.items()}


def _protocol(size: tuple[int, int], threshold, postprocess: bool, seed: int) -> dict[str, str]:
    """Returns in words how the figures were made."""
    chain = "map cleared outside the eroded foreground (5 x 5 mean > 0.95), 5 x 5 median filter; for Dice per patient "
    chain += "also components under 20 voxels removed (26 neighbours, contiguous slices)"
    return {
        "resolution": f"{size[0]} x {size[1]}, the data set's; smaller maps upsampled bilinearly",
        "pixels": "all pixels of all slices pooled; foreground_*: pixels where any channel is above 0",
        "counts": f"histogram of float32 scores, up to {PixelCounts().max_bins} bins in use; scikit-learn on the counts",
        "ideal_threshold": "best Dice over all thresholds on this split's own masks: an upper bound",
        "per_patient_dice": "ideal threshold of this split, chosen on its own masks: an upper bound"
        if threshold is None
        else "at the given threshold, chosen before the evaluation",
        "per_slice_dice": "at the same threshold, mean over the slices with a lesion",
        "patients_without_lesion": "no Dice of their own; their pixels count in every pooled measure",
        "interval": f"95 % percentile bootstrap of the mean over patients, 10000 samples, seed {seed}",
        "slice_auroc": "score = mean of the map over the slice's foreground; positive = any class but the first",
        "postprocessed": chain if postprocess else "not done",
    }


def write_result(result: dict, path: str | Path) -> None:
    """Writes RESULT.json, whole or not at all."""
    with renamed_when_whole(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
