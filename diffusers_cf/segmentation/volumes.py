"""One patient from NIfTI to NIfTI: reading, anomaly maps of all slices, and back to the voxels of the scan's own files."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_cf.data.geometry import (
    display,
    from_ras,
    resample_slices,
    slices_from_volume,
    volume_from_slices,
)
from diffusers_cf.data.intensity import unit_in_words, unit_intensity
from diffusers_cf.data.nifti import (
    MAX_BYTES,
    Scan,
    check_same_grid,
    find_file,
    find_modality_files,
    read_nifti,
    to_canonical,
)
from diffusers_cf.data.scans import scan_errors, seg_problems, skull_warnings
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.batching import map_in_batches
from diffusers_cf.evaluation.postprocessing import MIN_COMPONENT_SIZE, postprocess_maps, remove_small_components
from diffusers_cf.plots import plot_slices
from diffusers_cf.segmentation.dicom import find_series, read_series


logger = logging.getLogger(__name__)

# Label ids that are known, of BraTS up to 2021 and from 2023; any other id above 0 is lesion too, with a warning.
KNOWN_IDS = frozenset(range(5))
PREVIEW_ROWS = 6


@dataclass
class PatientVolumes:
    """The scans of one patient on one grid.

    Attributes:
        patient: Id.
        volume: float32 (C, X, Y, Z), RAS-canonical, scanner units, channels in the model's order.
        seg: bool (X, Y, Z), RAS-canonical, the expert's lesion; None where no seg file lies beside the scans.
        spacing_mm: (3,) voxel size along x, y, z.
        files: Modality to its file's own path, affine and header, without voxels.
    """

    patient: str
    volume: np.ndarray
    seg: np.ndarray | None
    spacing_mm: np.ndarray
    files: dict[str, Scan]

    @property
    def foreground(self) -> np.ndarray:
        """Where any channel is above 0, bool (X, Y, Z)."""
        return (self.volume > 0).any(axis=0)


@dataclass
class SliceMaps:
    """What the pipeline says about the slices of one patient, all in display orientation over the field.

    Attributes:
        found: The slices that it was given.
        heatmaps: float32 (S, H, W), in input units.
        changes: float32 (S, C, H, W), counterfactual minus input, in input units.
    """

    found: PatientSlices
    heatmaps: np.ndarray
    changes: np.ndarray


def patient_files(folder: Path, modalities: Sequence[str]) -> dict[str, Path]:
    """Files of a patient: one for each modality, NIfTI or the folder of a DICOM series, and `seg` where there is one.

    Raises:
        InputError: A modality is missing (the message names it) or several files fit.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file; give the folder that holds the patient's scans")
    files = {name: find_file(folder, name) or find_series(folder, name) for name in modalities}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        find_modality_files(folder, missing)  # says how files may be called
    seg = find_file(folder, "seg")
    return files if seg is None else files | {"seg": seg}


def read_volumes(
    patient: str, files: dict[str, Path], max_bytes: int = MAX_BYTES, max_voxels: int | None = None
) -> PatientVolumes:
    """Reads a patient's scans strictly and checks that they can be used together.

    Args:
        patient: Id.
        files: As from `patient_files`.
        max_bytes: Limit for the decompressed size of a NIfTI file.
        max_voxels: Limit for the voxels of one.

    Raises:
        InputError: A file is damaged, empty, no raw intensities, no segmentation, or on another grid.
    """
    originals, scans = {}, {}
    for name, path in files.items():
        scan = read_series(path) if path.is_dir() else read_nifti(path, max_bytes=max_bytes, max_voxels=max_voxels)
        originals[name], scans[name] = replace(scan, data=None), to_canonical(scan)
        if name == "seg":
            errors, warnings = seg_problems(scan, KNOWN_IDS)
        else:
            errors, warnings = scan_errors(name, scan), skull_warnings(name, scans[name])
        if errors:
            raise InputError(errors[0])
        for warning in warnings:
            logger.warning(warning)
    check_same_grid(list(scans.values()))
    seg = scans.pop("seg").data > 0 if "seg" in scans else None
    originals.pop("seg", None)
    spacing_mm = next(iter(scans.values())).spacing_mm
    return PatientVolumes(
        patient, np.stack([scan.data for scan in scans.values()], dtype=np.float32), seg, spacing_mm, originals
    )


def network_slices(volumes: PatientVolumes, facts: dict) -> PatientSlices:
    """Every axial slice of a patient from the first to the last one with content, as the pipeline takes it."""
    geometry = {name: facts["preprocessing"][name] for name in ("size", "field_mm", "normalize")}
    return slices_from_volume(volumes.patient, volumes.volume, volumes.seg, volumes.spacing_mm, **geometry)


def map_slices(
    pipe,
    volumes: PatientVolumes,
    facts: dict,
    batch_size: int | None,
    progress: bool | Callable[[float], None] = True,
) -> SliceMaps:
    """Runs the pipeline on every axial slice from the first to the last one with content.

    Args:
        pipe: A `CounterfactualDDIMPipeline`.
        volumes: The patient.
        facts: As from `volumes.segmentation_facts`.
        batch_size: Slices at a time, None = as many as fit; the outcome does not depend on it.
        progress: Whether to show a bar that counts slices, or what is told after each step which share is done.

    Raises:
        InputError: The model yields NaN or infinite values, or a batch does not fit the device's memory.
    """
    found = network_slices(volumes, facts)
    settings = {name: value for name, value in facts["settings"].items() if name != "threshold"}
    if callable(progress):
        settings["callback_on_step_end"] = _share_of_steps(progress, facts["settings"], len(found.images))

    def call(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = pipe(images, **settings)
        return out.heatmaps, out.counterfactuals

    # below a bar of patients it goes when it is full
    options = {"unit": "slice", "disable": progress is not True, "leave": None}
    with tqdm(total=len(found.images), desc=volumes.patient, **options) as bar:
        patient = [(volumes.patient, found.images)]
        ((_, (heatmaps, counterfactuals), _),) = map_in_batches(call, patient, batch_size, pipe.device, bar)
    maps = SliceMaps(found, heatmaps, counterfactuals - found.images)
    if not (np.isfinite(maps.heatmaps).all() and np.isfinite(maps.changes).all()):
        raise InputError(f"{facts['model']}: the model yields NaN or infinite values on {volumes.patient}")
    return maps


def _share_of_steps(tell: Callable[[float], None], settings: dict, n_slices: int) -> Callable:
    """A callback of the pipeline that tells the share of all steps of all slices; empty slices take none."""
    walks = {"forward": 1, "counterfactual": 2}.get(settings["map"], 3)
    total, done = n_slices * walks * round(settings["num_inference_steps"] * settings["strength"]), 0

    def count(_, step, timestep, tensors):
        nonlocal done
        done += len(tensors["latents"])
        tell(min(1.0, done / total))
        return {}

    return count


def heat_volume(volumes: PatientVolumes, maps: SliceMaps, heatmaps: np.ndarray, field_mm: float) -> np.ndarray:
    """Brings heatmaps (S, H, W) to the scan's grid: float32 (X, Y, Z), RAS, exactly 0 outside the foreground."""
    shape = volumes.volume.shape[1:]
    heat = volume_from_slices(heatmaps, maps.found.slices, shape, volumes.spacing_mm, field_mm)
    heat[~volumes.foreground] = 0
    return heat


def lesion_mask(volumes: PatientVolumes, maps: SliceMaps, heat: np.ndarray, facts: dict) -> np.ndarray:
    """The mask that a threshold makes of the heat: bool (X, Y, Z), RAS, inside the foreground.

    Where the model's settings ask for it the map goes through the chain of `postprocessing.py` first, at the
    resolution of evaluation, where the threshold was chosen; then components are removed that are smaller than
    evaluation's limit, which is so many of its own pixels, one slice thick.
    """
    size, field_mm = facts["preprocessing"]["size"], facts["preprocessing"]["field_mm"]
    if not facts["postprocessed"]:
        return volumes.foreground & (heat >= facts["threshold"])
    processed = postprocess_maps(maps.heatmaps, maps.found.images)
    mask = volumes.foreground & (heat_volume(volumes, maps, processed, field_mm) >= facts["threshold"])
    voxels_a_pixel = (field_mm / size) ** 2 / (volumes.spacing_mm[0] * volumes.spacing_mm[1])
    least = max(1, round(MIN_COMPONENT_SIZE * voxels_a_pixel))
    return remove_small_components(mask, min_size=least)


def counterfactual_volume(
    volumes: PatientVolumes, maps: SliceMaps, channel: int, field_mm: float, normalize: str
) -> np.ndarray:
    """One modality as it would look in the target class: float32 (X, Y, Z), RAS, in the scan's own units.

    The scan plus the change, so that it keeps its own resolution: only the change was resampled. Only the foreground
    changes, and nothing is negative.
    """
    scan = volumes.volume[channel]
    change = volume_from_slices(
        maps.changes[:, channel], maps.found.slices, scan.shape, volumes.spacing_mm, field_mm
    ) * np.float32(unit_intensity(scan, normalize))
    return np.clip(np.where(volumes.foreground, scan + change, scan), 0, None)


def write_volume(path: Path, volume: np.ndarray, like: Scan, dtype) -> None:
    """Writes an RAS volume with the shape, axes, affine and header of a patient's file.

    Args:
        path: A name that ends in .nii.gz.
        volume: (X, Y, Z), RAS-canonical.
        like: The file's own affine and header.
        dtype: In which voxels are stored, unscaled.
    """
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan means nothing for a map
    data = from_ras(volume, like.affine).astype(dtype).reshape(header.get_data_shape())
    image_class = nibabel.Nifti1Image if header["sizeof_hdr"] == 348 else nibabel.Nifti2Image
    nibabel.save(image_class(data, like.affine, header), path)


def most_suspicious(heatmaps: np.ndarray, masks: np.ndarray, count: int = PREVIEW_ROWS) -> list[int]:
    """Indices of slices, worst first: by area of the mask, then by heat; neighbours show the same, so they keep apart.

    Args:
        heatmaps: (S, H, W), 0 outside the foreground.
        masks: (S, H, W), above 0 = found.
        count: How many at most.
    """
    order = np.lexsort((heatmaps.sum(axis=(1, 2)), (masks > 0).sum(axis=(1, 2))))[::-1]
    gap, chosen = max(1, len(order) // (4 * count)), []
    for index in order.tolist():
        if len(chosen) < count and all(abs(index - other) >= gap for other in chosen):
            chosen.append(index)
    return chosen


def write_preview(
    path: Path, volumes: PatientVolumes, maps: SliceMaps, mask: np.ndarray, facts: dict, title: str
) -> None:
    """Writes a picture of the most suspicious slices: scan, counterfactual, heatmap, and mask beside the expert's."""
    images, slices, field_mm = maps.found.images, maps.found.slices, facts["preprocessing"]["field_mm"]
    inside = (images > 0).any(axis=1)
    heatmaps = np.where(inside, maps.heatmaps, 0)
    shown = resample_slices(display(mask)[slices], volumes.spacing_mm, images.shape[-1], field_mm) >= 0.5
    rows = most_suspicious(heatmaps, shown)
    plot_slices(
        path,
        images[rows],
        np.clip(images[rows] + inside[rows, None] * maps.changes[rows], 0, None),
        heatmaps[rows],
        masks=shown[rows],
        channel_names=list(volumes.files),
        title=f"{title}\nL, R: the patient's left and right",
        row_names=[f"axial slice {slices[row]}" for row in rows],
        mask_name="found (red)" if volumes.seg is None else "found (red), expert (green)",
        sides=True,
        unit=unit_in_words(facts["preprocessing"]["normalize"]),
        references=None if volumes.seg is None else maps.found.masks[rows],
    )
