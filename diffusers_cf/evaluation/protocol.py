"""One protocol for every method: pixel measures of anomaly maps over a split of a slice data set.

The paper's measures (Sec. 4) are the area under the precision-recall curve and the best Dice over all thresholds, both
over the pixels of the whole test set. `PixelCounts` counts these pixels in constant memory.
"""

import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.batching import map_in_batches
from diffusers_cf.evaluation.pixel_counts import CHAINS, REGIONS, PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask, remove_small_components
from diffusers_cf.evaluation.processes import Share
from diffusers_cf.files import new_file, read_json, write_json
from diffusers_cf.images import resize_images


# Lesion size as a share of the patient's foreground. The limits are fixed, so that results of different data sets
# compare; on TCGA-LGG each size holds about a third of the patients.
LESION_SIZES = {"small": (0.0, 0.03), "medium": (0.03, 0.08), "large": (0.08, 1.0)}


def evaluate(
    anomaly_map: Callable[[torch.Tensor], torch.Tensor], dataset, *, batch_size: int | None = 32,
    whole_patients: bool = False, device: str | torch.device = "cpu",
    threshold: float | dict[str, float] | None = None, indices: Sequence[int] | None = None,
    network_evaluations_per_slice: float = 0, counts_path: str | Path | None = None, seed: int = 0,
    progress: bool = True, parts: str | Path | None = None, share: Share | None = None,
    chain: PostProcessing | None = None,
) -> dict | None:  # fmt: skip
    """Measure one method on a split: the same pixels, resolution and post-processing for every method.

    Each patient's counts go to a file, so memory does not grow with the split. Without a threshold the files also hold
    the maps (8 bytes per pixel) until the ideal threshold is known.

    Args:
        anomaly_map (`Callable`): images float32 `(N, C, H, W)` -> maps `(N, h, w)`, higher = more lesion, any range.
            Maps smaller than the masks are upsampled bilinearly.
        dataset (`SliceDataset`): a split with slices and masks, as from `inputs.open_split`.
        batch_size (`int`, *optional*): slices per call, of several patients. None means as many as fit into memory.
        whole_patients (`bool`): each call gets all slices of one patient instead, also those not in `indices`.
        device (`str` or `torch.device`): where the method computes.
        threshold (`float` or `dict`, *optional*): for Dice per patient, chosen on other patients; a dict has one for
            each chain (`raw`, `postprocessed`). None means the ideal threshold of this split, an upper bound.
        indices (`Sequence[int]`, *optional*): rows of the data set to measure; all by default.
        network_evaluations_per_slice (`float`): NFE of the method, for the result.
        counts_path (`str` or `Path`, *optional*): .npz file for each patient's counts, which
            `bootstrap.read_patient_counts` reads.
        seed (`int`): seed of the bootstrap.
        progress (`bool`): whether to show a progress bar.
        parts (`str` or `Path`, *optional*): folder for the patients' files, temporary by default. Patients found there
            are not measured again, so a stopped run continues.
        share (`Share`, *optional*): which patients this process measures, all by default. All processes need the same
            `parts`.
        chain (`PostProcessing`, *optional*): of the post-processed maps; the paper's by default.

    Returns:
        `dict` or `None`: the fields of RESULT.json, fractions from 0 to 1, None for a measure that is not defined.
        `auprc`, `ideal_dice`, `ideal_threshold` are over all pixels, `foreground_*` over pixels where any channel is
        above 0; `slice_auroc` is of the map's mean over a slice's foreground; `per_patient_dice` and
        `per_patient_auprc` are of the patients with a lesion, `per_slice_dice` of the slices with one;
        `by_lesion_size` are the same for small, medium and large lesions. `postprocessed` repeats all of them. Shards,
        and all processes of a launcher but the first, return None.

    Raises:
        InputError: a map holds NaN or infinite values.
        ValueError: a map has a wrong shape.
    """
    share, all_rows = share or Share(), np.arange(len(dataset))
    measured = rows_by_patient(dataset, all_rows if indices is None else np.asarray(indices, dtype=np.int64))
    read = rows_by_patient(dataset, all_rows) if whole_patients else measured
    thresholds = threshold if isinstance(threshold, dict) else dict.fromkeys(CHAINS, threshold)
    shows_bar = progress and (share.is_main or share.is_shard)
    with nullcontext(parts) if parts else TemporaryDirectory(dir=counts_path and Path(counts_path).parent) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = {name: Path(folder, f"{number:06d}.npz") for number, name in enumerate(measured)}
        mine = share.of(list(files), [len(read[name]) for name in files])
        left = [name for name in mine if not files[name].exists()]
        with tqdm(total=sum(len(read[name]) for name in left), unit="slice", disable=not shows_bar) as bar:
            patients = (Patient(dataset, name, read[name], measured[name]) for name in left)
            options = {"batch_size": batch_size, "device": device, "progress": bar}
            for patient, maps, seconds in maps_of_patients(anomaly_map, patients, whole_patients, options):
                with new_file(files[patient.name]) as temporary, open(temporary, "wb") as file:
                    np.savez(
                        file, seconds=seconds, **_measure_patient(patient, maps, thresholds, chain or PostProcessing())
                    )
        share.wait()
        if share.is_shard or not share.is_main:
            return None
        raw, postprocessed = (_result_of_chain(chain, files, thresholds[chain], seed) for chain in CHAINS)
        seconds = 0.0
        for path in files.values():
            with np.load(path) as part:
                seconds, size = seconds + float(part["seconds"]), part["size"].tolist()
        if counts_path:
            _write_counts(files, counts_path)
    n_slices = sum(map(len, measured.values()))
    return raw | {
        "postprocessed": postprocessed,
        "n_slices": n_slices,
        "n_patients": len(measured),
        "seconds_per_slice": seconds / n_slices,
        "network_evaluations_per_slice": network_evaluations_per_slice,
        "protocol": _protocol(size, threshold, seed, chain or PostProcessing()),
    }


def begin_parts(folder: Path, facts: Mapping) -> None:
    """Make a folder for patients' files, which depend on `facts`; raise `InputError` if it holds files of other facts."""
    path, wanted = folder / "facts.json", json.loads(json.dumps(facts))
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(wanted, path)
    found = read_json(path)
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise InputError(f"{folder}: holds patients measured with other {', '.join(other)}: remove it to start again")


def rows_by_patient(dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return each patient's rows in the order of the slices, patients in alphabetical order."""
    rows = rows[np.lexsort((dataset.slices[rows], dataset.patients[rows]))]
    names, starts = np.unique(dataset.patients[rows], return_index=True)
    return {str(name): found for name, found in zip(names, np.split(rows, starts[1:]), strict=False)}


class Patient:
    """The images that a method sees (`seen_images`, float32), and `rows`, `images`, `labels`, `slices` of those measured.

    `masks` are theirs, too, or None without any. Of the `rows` given, `measured` are measured, all by default.
    """

    def __init__(self, dataset, name: str, rows: np.ndarray, measured: np.ndarray | None = None):
        batch = dataset.collate(dataset.__getitems__(rows.tolist()))
        self.name, self.is_measured = name, np.isin(rows, rows if measured is None else measured)
        self.rows, self.seen_images = rows[self.is_measured], np.asarray(batch["images"], dtype=np.float32)
        self.images, self.labels, self.slices = (
            np.asarray(batch[key])[self.is_measured] for key in ("images", "labels", "slices")
        )
        self.masks = np.asarray(batch["masks"])[self.is_measured] if dataset.has_masks else None


def maps_of_patients(
    anomaly_map: Callable, patients: Iterable[Patient], whole_patients: bool, options: dict
) -> Iterator[tuple[Patient, np.ndarray, float]]:
    """Yield each patient with its maps `(S, H, W)` at the size of the images, and their computing time in seconds.

    Arguments are as in [`evaluate`]; `options` are `batch_size`, `device` and `progress` of [`batching.map_in_batches`].

    Raises:
        InputError: a map holds NaN or infinite values.
        ValueError: a map has a wrong shape.
    """
    if whole_patients:
        options = options | {"batch_size": sys.maxsize}
    for group in ([patient] for patient in patients) if whole_patients else [patients]:
        volumes = ((patient, patient.seen_images) for patient in group)
        found = map_in_batches(lambda images: torch.as_tensor(anomaly_map(images)), volumes, **options)
        for patient, (maps,), seconds in found:
            size, count = patient.images.shape[2:], len(patient.seen_images)
            if maps.ndim != 3 or maps.shape[1] > size[0] or maps.shape[2] > size[1]:
                raise ValueError(f"anomaly_map must return ({count}, <= {size[0]}, <= {size[1]}), not {maps.shape}")
            if not np.isfinite(maps).all():
                raise InputError(f"patient {patient.name}: the anomaly map holds NaN or infinite values")
            maps = maps_at_size(torch.from_numpy(maps[patient.is_measured]), size)
            yield patient, maps, seconds * len(maps) / count


def maps_at_size(maps: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return maps `(N, h, w)` as float32 `(N, H, W)` on the CPU, upsampled bilinearly if smaller than `size`."""
    return resize_images(maps.detach().to("cpu", torch.float32)[:, None], size)[:, 0].numpy()


def _measure_patient(
    patient: Patient, maps: np.ndarray, thresholds: Mapping[str, float | None], postprocessing: PostProcessing
) -> dict[str, np.ndarray]:
    """Return a patient's part of a result.

    It holds `slices`, `labels`, `size`, and for each chain `CHAIN/slice_scores`, the counts `CHAIN/foreground/*` and
    `CHAIN/background/*`. For Dice it holds `CHAIN/dice` and `CHAIN/slice_dice`, or without a threshold `CHAIN/maps` and
    `masks`.
    """
    part = {"slices": patient.slices, "labels": patient.labels, "size": np.array(patient.masks.shape[1:])}
    inside = foreground_mask(patient.images)
    if None in thresholds.values():
        part["masks"] = patient.masks
    for chain, threshold in thresholds.items():
        maps_of_chain = (
            postprocessing.apply(maps, patient.images, patient.slices) if chain == "postprocessed" else maps
        )
        sums = np.where(inside, maps_of_chain, 0).sum((1, 2), dtype=np.float64)
        part[f"{chain}/slice_scores"] = sums / np.maximum(inside.sum((1, 2)), 1)
        for region, pixels in zip(REGIONS, (inside, ~inside), strict=True):
            counts = PixelCounts()
            counts.update(maps_of_chain[pixels], patient.masks[pixels])
            part |= counts.to_arrays(f"{chain}/{region}/")
        if threshold is None:
            part[f"{chain}/maps"] = maps_of_chain
        elif patient.masks.any():
            found = _dice_of_patient(maps_of_chain, patient.masks, patient.slices, threshold, chain)
            part[f"{chain}/dice"], part[f"{chain}/slice_dice"] = found
    return part


def dice(prediction: np.ndarray, masks: np.ndarray) -> float | None:
    """Return Dice of two binary arrays, None if `masks` is empty."""
    prediction, masks = np.asarray(prediction) > 0, np.asarray(masks) > 0
    if not masks.any():
        return None
    return 2 * int((prediction & masks).sum()) / (int(prediction.sum()) + int(masks.sum()))


def _dice_of_patient(maps, masks, slices, threshold: float, chain: str) -> tuple[float, list[float]]:
    """Return Dice of a patient with a lesion, and of each slice with one."""
    prediction = maps >= threshold
    if chain == "postprocessed":
        prediction = remove_small_components(prediction, slices)
    of_slices = (dice(*pair) for pair in zip(prediction, masks, strict=True))
    return dice(prediction, masks), [value for value in of_slices if value is not None]


def _write_counts(files: Mapping[str, Path], path: str | Path) -> None:
    """Copy the pixel counts of all patients' parts into one .npz file, as `PATIENT/CHAIN/REGION/NAME`."""
    with new_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for patient, file in files.items():
            with zipfile.ZipFile(file) as part:
                for name in part.namelist():
                    if name.count("/") == 2:  # CHAIN/REGION/NAME
                        archive.writestr(f"{patient}/{name}", part.read(name))


def _result_of_chain(chain: str, files: Mapping[str, Path], threshold: float | None, seed: int) -> dict:
    """Add up one chain of processing, `raw` or `postprocessed`, over all patients; return its fields of RESULT.json."""
    from sklearn.metrics import roc_auc_score

    pixels, foreground = PixelCounts(), PixelCounts()
    sizes = {name: PixelCounts() for name in LESION_SIZES}
    labels, slice_scores, auprc, size_of = [], [], {}, {}
    for patient, path in files.items():
        with np.load(path) as part:
            labels.extend(part["labels"] != 0)
            slice_scores.extend(part[f"{chain}/slice_scores"])
            inside, outside = (PixelCounts.from_arrays(part, f"{chain}/{region}/") for region in REGIONS)
        both, foreground = inside + outside, foreground + inside
        pixels += both
        if lesion := int(both.positives.sum()):
            share = lesion / max(1, int(inside.positives.sum() + inside.negatives.sum()))
            size = next(name for name, (_, below) in LESION_SIZES.items() if share < below or name == "large")
            sizes[size] += both
            auprc[patient], size_of[patient] = both.average_precision(), size
    ideal_dice, ideal_threshold = pixels.ideal_dice()
    threshold = ideal_threshold if threshold is None else threshold
    dice_of, slice_dice = _dice_of_chain(chain, {patient: files[patient] for patient in auprc}, threshold)
    by_size = {name: [patient for patient, size in size_of.items() if size == name] for name in LESION_SIZES}
    return {
        "auprc": pixels.average_precision(),
        "ideal_dice": ideal_dice,
        "ideal_threshold": ideal_threshold,
        "prevalence": pixels.prevalence,
        "foreground_auprc": foreground.average_precision(),
        "foreground_ideal_dice": foreground.ideal_dice()[0],
        "foreground_prevalence": foreground.prevalence,
        "slice_auroc": float(roc_auc_score(labels, slice_scores)) if len(set(labels)) == 2 else None,
        "per_patient_dice": _of_patients(dice_of, seed) | {"threshold": threshold},
        "per_slice_dice": _mean(slice_dice),
        "per_patient_auprc": _of_patients(auprc, seed),
        "by_lesion_size": {
            name: {
                "share_of_foreground": list(LESION_SIZES[name]),
                "patients": patients,
                "auprc": sizes[name].average_precision(),
                "ideal_dice": sizes[name].ideal_dice()[0],
                "per_patient_auprc": _mean([auprc[patient] for patient in patients]),
                "per_patient_dice": _mean([dice_of[patient] for patient in patients]),
            }
            for name, patients in by_size.items()
        },
    }


def _dice_of_chain(
    chain: str, files: Mapping[str, Path], threshold: float | None
) -> tuple[dict[str, float], list[float]]:
    """Return Dice of each patient, and of all their slices with a lesion, from the parts or from the maps in them."""
    dice_of, slice_dice = {}, []
    for patient, path in files.items():
        with np.load(path) as part:
            if f"{chain}/maps" in part:
                arrays = (part[name] for name in (f"{chain}/maps", "masks", "slices"))
                whole, slices = _dice_of_patient(*arrays, threshold, chain)
            else:
                whole, slices = part[f"{chain}/dice"], part[f"{chain}/slice_dice"]
        dice_of[patient] = float(whole)
        slice_dice.extend(slices)
    return dice_of, slice_dice


def _of_patients(values: Mapping[str, float], seed: int) -> dict:
    found = list(values.values())
    interval = bootstrap_interval(found, seed)
    return {"patients": list(values), "values": found, "mean": _mean(found), "interval": interval}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float] | None:
    """Return the percentile bootstrap 95 % interval of the mean, [low, high]; None for fewer than two values."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None
    options = {"method": "percentile", "n_resamples": 10_000, "batch": 100}  # batches bound the memory
    return list(map(float, bootstrap((values,), np.mean, rng=seed, **options).confidence_interval))


def _protocol(size: tuple[int, int], threshold, seed: int, chain: PostProcessing) -> dict[str, str]:
    """Describe in words how the numbers were computed."""
    ideal = "ideal threshold of this split, chosen on its own masks: an upper bound"
    cleared = "eroded foreground (5 x 5 mean > 0.95)" if chain.clear_rim else "foreground"
    bright = f"weighted by brightness of channel {chain.bright_channel}, " if chain.bright_channel is not None else ""
    median = f"{chain.median_size} x {chain.median_size} median filter"
    median += f", Gaussian of {chain.slice_sigma:g} slices" if chain.slice_sigma else ""
    return {
        "resolution": f"{size[0]} x {size[1]}, the data set's; smaller maps upsampled bilinearly",
        "pixels": "all pixels of all slices pooled; foreground_*: pixels where any channel is above 0",
        "counts": f"histogram of float32 scores, up to {PixelCounts().max_bins} bins in use; AUPRC: average precision",
        "ideal_threshold": "best Dice over all thresholds on this split's own masks: an upper bound",
        "per_patient_dice": ideal if threshold is None else "at the given threshold, chosen before the evaluation",
        "per_patient_auprc": "all pixels of each patient with a lesion; does not depend on the patient's intensity scale",
        "by_lesion_size": "share of the foreground, medium: {:g} to {:g}".format(*LESION_SIZES["medium"]),
        "per_slice_dice": "at the same threshold, mean over the slices with a lesion",
        "patients_without_lesion": "no Dice of their own; their pixels count in every pooled measure",
        "interval": f"95 % percentile bootstrap of the mean over patients, 10000 samples, seed {seed}",
        "slice_auroc": "score = mean of the map over the slice's foreground; positive = any class but the first",
        "postprocessed": f"map {bright}cleared outside the {cleared}, {median}; for Dice per "
        "patient components under 20 voxels are removed, too (26 neighbours, contiguous slices)",
    }
