"""What is measured of one patient; parts add up to a result, whoever measured them and in whatever order."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.batching import map_in_batches
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask, postprocess_maps, remove_small_components
from diffusers_cf.files import new_file, write_json


REGIONS = ("foreground", "background")


def dice(prediction: np.ndarray, masks: np.ndarray) -> float | None:
    """Returns Dice of two binary arrays, None where `masks` is empty: there is nothing to find."""
    prediction, masks = np.asarray(prediction) > 0, np.asarray(masks) > 0
    if not masks.any():
        return None
    return 2 * int((prediction & masks).sum()) / (int(prediction.sum()) + int(masks.sum()))


def maps_at_size(maps: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Returns maps (N, h, w) on any device as float32 (N, H, W), bilinear where they are smaller than `size`."""
    maps = maps.detach().to("cpu", torch.float32)
    if tuple(maps.shape[1:]) != tuple(size):
        maps = torch.nn.functional.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
    return maps.numpy()


def rows_by_patient(dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each patient's rows in the order of their slices, patients in alphabetical order."""
    patients, slices = np.asarray(dataset.patients)[rows], np.asarray(dataset.slices)[rows]
    rows_of = {str(name): np.flatnonzero(patients == name) for name in np.unique(patients)}
    return {name: rows[found[np.argsort(slices[found], kind="stable")]] for name, found in rows_of.items()}


class Patient:
    """The wanted slices of one patient as arrays, with what every chain needs of them."""

    def __init__(self, dataset, name: str, rows: np.ndarray):
        batch = dataset.collate(dataset.__getitems__([int(row) for row in rows]))
        self.dataset, self.name, self.rows = dataset, name, rows
        self.images = np.asarray(batch["images"], dtype=np.float32)
        self.masks, self.labels, self.slices = (np.asarray(batch[key]) for key in ("masks", "labels", "slices"))
        self.foreground = foreground_mask(self.images)

    def whole(self) -> "Patient":
        """The same with all slices that the split has of it."""
        everything = rows_by_patient(self.dataset, np.flatnonzero(np.asarray(self.dataset.patients) == self.name))
        return Patient(self.dataset, self.name, everything[self.name])

    def checked(self, maps: np.ndarray) -> np.ndarray:
        """Maps (S, h, w) of a method at the masks' size.

        Raises:
            InputError: they hold NaN or infinite values.
            ValueError: they have a wrong shape.
        """
        size, n = self.masks.shape[1:], len(self.masks)
        if maps.ndim != 3 or len(maps) != n or maps.shape[1] > size[0] or maps.shape[2] > size[1]:
            raise ValueError(f"anomaly_map must return ({n}, <= {size[0]}, <= {size[1]}), not {maps.shape}")
        if not np.isfinite(maps).all():
            raise InputError(f"patient {self.name}: the anomaly map holds NaN or infinite values")
        return maps_at_size(torch.from_numpy(maps), size)


def maps_of_patients(
    anomaly_map: Callable,
    patients: Iterable[Patient],
    batch_size: int | None,
    whole_patients: bool,
    device: str,
    progress: tqdm,
) -> Iterator[tuple[Patient, np.ndarray, float]]:
    """Yields each patient with its maps (S, H, W) at the masks' size and the seconds that the method took.

    Args:
        anomaly_map: as in [`evaluate`].
        patients: read one by one when they are needed.
        batch_size: slices a call, None = as many as fit.
        whole_patients: a call gets all of one patient instead.
        device: where the method computes.
        progress: a bar of slices.
    """

    def function(images: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(anomaly_map(images))

    if not whole_patients:
        volumes = ((patient, patient.images) for patient in patients)
        for patient, (maps,), seconds in map_in_batches(function, volumes, batch_size, device, progress):
            yield patient, patient.checked(maps), seconds
        return
    for patient in patients:
        whole = patient.whole()
        ((_, (maps,), seconds),) = map_in_batches(function, [(patient, whole.images)], len(whole.rows), device)
        wanted = np.searchsorted(whole.slices, patient.slices)
        yield patient, whole.checked(maps)[wanted], seconds * len(wanted) / len(maps)
        progress.update(len(wanted))


def measure_patient(
    patient: Patient, maps: np.ndarray, thresholds: Mapping[str, float | None]
) -> dict[str, np.ndarray]:
    """Returns a patient's part of a result as arrays by name.

    Args:
        patient: the slices.
        maps: (S, H, W), at the masks' size.
        thresholds: chain (`raw`, `postprocessed`) -> where `map >= threshold` is lesion. None = not known yet: the
            part then holds maps and masks, for [`dice_of_patient`] later.

    Returns:
        `slices`, `labels`, and for each chain `CHAIN/slice_scores`, the counts of `CHAIN/foreground` and
        `CHAIN/background`, and `CHAIN/dice`, `CHAIN/slice_dice` or else `CHAIN/maps`.
    """
    part = {"slices": patient.slices, "labels": patient.labels, "size": np.array(patient.masks.shape[1:])}
    if None in thresholds.values():
        part["masks"] = patient.masks
    for chain, threshold in thresholds.items():
        processed = postprocess_maps(maps, patient.images) if chain == "postprocessed" else maps
        part |= {f"{chain}/{name}": array for name, array in _counts_of_chain(patient, processed).items()}
        if threshold is None:
            part[f"{chain}/maps"] = processed
        else:
            found = dice_of_patient(processed, patient.masks, patient.slices, threshold, chain)
            part[f"{chain}/dice"], part[f"{chain}/slice_dice"] = map(np.array, found)
    return part


def _counts_of_chain(patient: Patient, maps: np.ndarray) -> dict[str, np.ndarray]:
    inside = patient.foreground
    arrays = {"slice_scores": np.where(inside, maps, 0).sum((1, 2), dtype=np.float64)}
    arrays["slice_scores"] /= np.maximum(inside.sum((1, 2)), 1)
    for region, pixels in zip(REGIONS, (inside, ~inside), strict=True):
        counts = PixelCounts()
        counts.update(maps[pixels], patient.masks[pixels])
        arrays |= {f"{region}/{name}": array for name, array in counts.to_arrays().items()}
    return arrays


def dice_of_patient(
    maps: np.ndarray, masks: np.ndarray, slices: np.ndarray, threshold: float, chain: str
) -> tuple[list[float], list[float]]:
    """Returns the Dice of the patient, and of each slice with a lesion; both empty without a lesion.

    Args:
        maps: (S, H, W).
        masks: (S, H, W), nonzero = lesion.
        slices: (S,), their numbers in the scan.
        threshold: `map >= threshold` is lesion.
        chain: `postprocessed` removes small components of it.
    """
    prediction = maps >= threshold
    if chain == "postprocessed":
        prediction = remove_small_components(prediction, slices)
    whole, found = dice(prediction, masks), [dice(*pair) for pair in zip(prediction, masks, strict=True)]
    return [whole] if whole is not None else [], [value for value in found if value is not None]


def begin_parts(folder: Path, facts: Mapping) -> None:
    """Makes a folder for the parts of a result, or finds one that was begun with the same facts.

    Args:
        folder: for the files of patients.
        facts: what every part depends on, as in JSON.

    Raises:
        InputError: the folder can't be made, or holds parts that depend on something else.
    """
    path, wanted = folder / "facts.json", json.loads(json.dumps(facts))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(wanted, path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder}: can't be used ({error.strerror or error})") from None
    except ValueError:
        found = {}
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise InputError(f"{folder}: holds patients measured with other {', '.join(other)}: remove it to begin anew")


def write_part(path: Path, part: Mapping[str, np.ndarray]) -> None:
    """Writes a part, whole or not at all."""
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **part)


def read_part(path: Path) -> Mapping[str, np.ndarray]:
    """Opens a part; arrays are read when they are asked for. Close it, or use it in a `with`."""
    return np.load(path)


def counts_of_part(part: Mapping[str, np.ndarray], chain: str, region: str) -> PixelCounts:
    """The counts of one chain and region of a part."""
    names = ("shift", "bins", "positives", "negatives")
    return PixelCounts.from_arrays({name: part[f"{chain}/{region}/{name}"] for name in names})
