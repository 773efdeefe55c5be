"""The volumes of one patient: read scans, run the pipeline on all slices, and bring its maps back to the scans' grid."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel
import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_cf.data.geometry import display, from_ras, resample_slices, slices_from_volume, volume_from_slices
from diffusers_cf.data.intensity import unit_in_words, unit_intensity
from diffusers_cf.data.nifti import MAX_BYTES, Scan, check_same_grid, read_nifti, to_canonical
from diffusers_cf.data.scans import field_warnings, scan_warnings, seg_problems
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError, in_one_line
from diffusers_cf.evaluation.batching import map_in_batches
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import MIN_COMPONENT_SIZE, PostProcessing, remove_small_components
from diffusers_cf.evaluation.protocol import dice
from diffusers_cf.loading import sha256_of
from diffusers_cf.plots import plot_slices
from diffusers_cf.segmentation.dicom import read_series, series_sha256, write_dicom
from diffusers_cf.segmentation.skull import brain_mask


logger = logging.getLogger(__name__)

# Label ids of BraTS, up to 2021 and since 2023. Any other id above 0 counts as lesion, too, with a warning.
KNOWN_IDS = frozenset(range(5))


@dataclass
class PatientVolumes:
    """The scans of one patient on one grid."""

    patient: str
    volume: np.ndarray  # float32 (C, X, Y, Z), RAS, scanner units, channels in the model's order
    seg: np.ndarray | None  # bool (X, Y, Z), RAS, the expert's lesion; None without a seg file
    spacing_mm: np.ndarray  # (3,), voxel size along x, y and z
    files: dict[str, Scan]  # by modality the affine and header of its file, without voxels
    warnings: list[str] = field(default_factory=list)  # what is doubtful about the scans, one line each

    @property
    def foreground(self) -> np.ndarray:
        """Where any channel is above 0, bool `(X, Y, Z)`."""
        return (self.volume > 0).any(axis=0)


@dataclass
class SliceMaps:
    """The pipeline's output for the slices of one patient, in display orientation over the in-plane field."""

    found: PatientSlices  # the slices that the pipeline was given
    heatmaps: np.ndarray  # float32 (S, H, W), on the model's intensity scale
    changes: (
        np.ndarray | None
    )  # float32 (S, C, H, W), counterfactual minus input, on the same scale; None: no such thing


def scan_sha256(path: Path) -> str:
    """Return the SHA-256 of a NIfTI file or of the DICOM series in a folder."""
    return series_sha256(path) if path.is_dir() else sha256_of(path)


def read_scan(path: Path, **limits) -> Scan:
    """Read a NIfTI file, with limits as in [`read_nifti`], or the DICOM series in a folder."""
    return read_series(path) if path.is_dir() else read_nifti(path, **limits)


def read_volumes(
    patient: str, files: dict[str, Path], max_bytes: int = MAX_BYTES, max_voxels: int | None = None,
    skull_strip: bool = False,
) -> PatientVolumes:  # fmt: skip
    """Read a patient's scans and check that they can be used together.

    Args:
        patient (`str`): name of the patient.
        files (`dict[str, Path]`): scans by modality, from [`patient_files`].
        max_bytes (`int`): limit for the decompressed size of a NIfTI file.
        max_voxels (`int`, *optional*): limit for the number of voxels of a NIfTI file.
        skull_strip (`bool`): set everything but the brain to 0, in all scans, as found in the first.

    Raises:
        InputError: a scan is damaged, empty, not on a raw intensity scale, no segmentation, or on another grid.
    """
    originals, scans, doubts = {}, {}, []
    for name, path in files.items():
        scan = read_scan(path, max_bytes=max_bytes, max_voxels=max_voxels)
        originals[name], scans[name] = replace(scan, data=None), to_canonical(scan)
        errors, warnings = seg_problems(scan, KNOWN_IDS) if name == "seg" else ([], [])
        if errors:
            raise InputError(errors[0])
        doubts += warnings
    check_same_grid(list(scans.values()))
    brain = brain_mask(next(iter(scans.values()))) if skull_strip else None
    for name in [name for name in scans if name != "seg"]:
        if brain is not None:
            scans[name].data[~brain] = 0
        doubts += scan_warnings(name, scans[name])
    for doubt in doubts:
        logger.warning(doubt)
    originals.pop("seg", None)
    seg = np.rint(scans.pop("seg").data) > 0 if "seg" in scans else None
    volume = np.stack([scan.data for scan in scans.values()], dtype=np.float32)
    return PatientVolumes(patient, volume, seg, next(iter(scans.values())).spacing_mm, originals, doubts)


def network_slices(volumes: PatientVolumes, facts: dict) -> PatientSlices:
    """Cut a patient into the pipeline's inputs: axial slices from the first to the last one with content."""
    geometry = {name: value for name, value in facts["preprocessing"].items() if name != "modalities"}
    found = field_warnings(volumes.patient, volumes.foreground, volumes.spacing_mm, geometry["field_mm"])
    for warning in set(found) - set(volumes.warnings):
        logger.warning(warning)
        volumes.warnings.append(warning)
    return slices_from_volume(volumes.patient, volumes.volume, volumes.seg, volumes.spacing_mm, **geometry)


def map_slices(
    pipe, volumes: PatientVolumes, facts: dict, batch_size: int | None, progress: bool | Callable[[float], None]
) -> SliceMaps:
    """Run the pipeline on every axial slice from the first to the last one with content.

    Args:
        pipe (`CounterfactualDDIMPipeline`): the pipeline.
        volumes (`PatientVolumes`): the patient.
        facts (`dict`): from [`segmentation_facts`].
        batch_size (`int` or `None`): slices in a batch; None for as many as fit. The result does not depend on it.
        progress (`bool` or `Callable`): as in [`segment_patient`].

    Raises:
        InputError: the model yields NaN or infinite values, or a batch does not fit into the device's memory.
    """
    found = network_slices(volumes, facts)
    settings = {name: value for name, value in facts["settings"].items() if name != "threshold"}
    walks = {"student": 2 * facts["fill"], "forward": 1, "delta": 1, "counterfactual": 2}.get(settings["map"], 3)
    total, done = len(found.images) * walks * round(settings["num_inference_steps"] * settings["strength"]), 0

    def count(_, step, timestep, tensors):
        nonlocal done
        done += len(tensors["latents"])
        progress(min(1.0, done / total))  # empty slices take no steps
        return {}

    def call(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = settings | {"callback_on_step_end": count if callable(progress) else None}
        out = pipe(images, **options)
        if facts["fill"] and out.counterfactuals is None:
            return out.heatmaps, pipe(images, **options | {"map": "counterfactual"}).counterfactuals
        return out[:2]  # heatmaps and, if the map has them, counterfactuals

    # `leave=None` removes the bar at its end if it is shown below a bar of patients
    bar = tqdm(total=len(found.images), desc=volumes.patient, unit="slice", disable=progress is not True, leave=None)
    with bar:
        patient = [(volumes.patient, found.images)]
        ((_, (heatmaps, *counterfactuals), _),) = map_in_batches(call, patient, batch_size, pipe.device, bar)
    maps = SliceMaps(found, heatmaps, counterfactuals[0] - found.images if counterfactuals else None)
    if not (np.isfinite(maps.heatmaps).all() and (maps.changes is None or np.isfinite(maps.changes).all())):
        raise InputError(f"{facts['model']}: the model yields NaN or infinite values on {volumes.patient}")
    return maps


def heat_volume(volumes: PatientVolumes, maps: SliceMaps, heatmaps: np.ndarray, field_mm: float) -> np.ndarray:
    """Resample heatmaps `(S, H, W)` to the scan's grid: float32 `(X, Y, Z)`, RAS, exactly 0 outside the foreground."""
    heat = volume_from_slices(heatmaps, maps.found.slices, volumes.volume.shape[1:], volumes.spacing_mm, field_mm)
    heat[~volumes.foreground] = 0
    return heat


def lesion_mask(
    volumes: PatientVolumes, maps: SliceMaps, heat: np.ndarray, facts: dict, patient: np.ndarray | None = None
) -> np.ndarray:
    """Threshold the heat inside the foreground: bool `(X, Y, Z)`, RAS.

    If the model's settings ask for post-processing, the heatmaps are first post-processed at the resolution of
    evaluation, and small components are removed. The smallest size, a number of evaluation's pixels, is converted to
    voxels.

    Args:
        volumes (`PatientVolumes`): the patient.
        maps (`SliceMaps`): heatmaps of the patient's slices.
        heat (`np.ndarray`): float32 `(X, Y, Z)`, from [`heat_volume`].
        facts (`dict`): from [`segmentation_facts`].
        patient (`np.ndarray`, *optional*): `(S, C, H, W)`, all slices of the patient where `maps` has some of them.
    """
    if not (chain := PostProcessing.of({"postprocess": facts["postprocessed"]})):
        return volumes.foreground & (heat >= facts["threshold"])
    size, field_mm = facts["preprocessing"]["size"], facts["preprocessing"]["field_mm"]
    heatmaps = chain.apply(maps.heatmaps, maps.found.images, maps.found.slices, patient)
    heat = heat_volume(volumes, maps, heatmaps, field_mm)
    mask = volumes.foreground & (heat >= facts["threshold"])
    voxels_per_pixel = (field_mm / size) ** 2 / (volumes.spacing_mm[0] * volumes.spacing_mm[1])
    return remove_small_components(mask, min_size=max(1, round(MIN_COMPONENT_SIZE * voxels_per_pixel)))


def counterfactual_volume(
    volumes: PatientVolumes, maps: SliceMaps, channel: int, field_mm: float, normalize: str
) -> np.ndarray:
    """Add the change to one modality's scan: float32 `(X, Y, Z)`, RAS, in the scan's own units.

    Only the change is resampled, so the scan keeps its resolution. Only the foreground changes. Values stay above 0.
    """
    scan, changes = volumes.volume[channel], maps.changes[:, channel]
    change = volume_from_slices(changes, maps.found.slices, scan.shape, volumes.spacing_mm, field_mm)
    change *= np.float32(unit_intensity(scan, normalize))
    return np.clip(np.where(volumes.foreground, scan + change, scan), 0, None)


def write_volume(path: Path, volume: np.ndarray, like: Scan, dtype: type) -> None:
    """Write an RAS volume with the shape, axes, affine and header of a patient's file.

    Args:
        path (`Path`): a name that ends in .nii.gz.
        volume (`np.ndarray`): `(X, Y, Z)`, RAS.
        like (`Scan`): affine and header of the patient's file.
        dtype (`type`): type of the stored voxels, which are not rescaled.
    """
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window does not apply to a map
    nibabel.save(nifti_image(from_ras(volume, like.affine).astype(dtype), like.affine, header), path)


def nifti_image(voxels: np.ndarray, affine: np.ndarray, header) -> nibabel.Nifti1Image:
    """Return an image, NIfTI-1 or 2 as its header, of voxels in the file's own axes."""
    image_class = nibabel.Nifti1Image if header["sizeof_hdr"] == 348 else nibabel.Nifti2Image
    return image_class(voxels.reshape(header.get_data_shape()), affine, header)


def write_filled(path: Path, counterfactual: np.ndarray, mask: np.ndarray, like: Scan) -> None:
    """Write a scan whose voxels in the mask are those of its counterfactual, stored as in the patient's file.

    Outside the mask every stored voxel is that of the file; in it whole numbers are rounded. A DICOM series, which is
    no NIfTI file, becomes float32.

    Args:
        path (`Path`): a name that ends in .nii.gz.
        counterfactual (`np.ndarray`): `(X, Y, Z)`, RAS, in the scan's units.
        mask (`np.ndarray`): bool `(X, Y, Z)`, RAS.
        like (`Scan`): path, affine and header of the patient's file.
    """
    if like.path.is_dir():
        scan = to_canonical(read_scan(like.path)).data  # with its skull
        return write_volume(path, np.where(mask, counterfactual, scan), like, np.float32)
    stored, inside = read_nifti(like.path, stored=True), from_ras(mask, like.affine)
    slope, intercept = (given or usual for given, usual in zip(like.header.get_slope_inter(), (1, 0), strict=True))
    voxels, values = stored.data.copy(), (from_ras(counterfactual, like.affine)[inside] - intercept) / slope
    if voxels.dtype.kind in "ui":
        limits = np.iinfo(voxels.dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    voxels[inside] = values
    image = nifti_image(voxels, like.affine, stored.header)
    image.header.set_slope_inter(slope, intercept)  # else nibabel would choose others
    nibabel.save(image, path)


def most_suspicious(heatmaps: np.ndarray, masks: np.ndarray, count: int = 6) -> list[int]:
    """Return indices of slices, by area of the mask and then by heat, largest first, but no close neighbours.

    Args:
        heatmaps (`np.ndarray`): `(S, H, W)`, 0 outside the foreground.
        masks (`np.ndarray`): `(S, ..)` with two axes of any size, above 0 for lesion.
        count (`int`): the highest number of slices.
    """
    order = np.lexsort((heatmaps.sum(axis=(1, 2)), (masks > 0).sum(axis=(1, 2))))[::-1]
    gap, chosen = max(1, len(order) // (4 * count)), []
    for index in order.tolist():
        if len(chosen) < count and all(abs(index - other) >= gap for other in chosen):
            chosen.append(index)
    return chosen


def write_preview(
    path: Path, volumes: PatientVolumes, maps: SliceMaps, mask: np.ndarray, facts: dict, title: str, convention: str
) -> None:
    """Write a picture of the most suspicious slices: scan, counterfactual, heatmap, and mask with the expert's."""
    images, slices, preprocessing = maps.found.images, maps.found.slices, facts["preprocessing"]
    inside = (images > 0).any(axis=1)
    heatmaps = np.where(inside, maps.heatmaps, 0)
    geometry = volumes.spacing_mm, images.shape[-1], preprocessing["field_mm"]
    lesion = display(mask)[slices]
    rows = most_suspicious(heatmaps, lesion)
    shown = resample_slices(lesion[rows], *geometry) >= 0.5
    counterfactuals = None if maps.changes is None else np.clip(images + inside[:, None] * maps.changes, 0, None)[rows]
    plot_slices(
        path, images[rows], counterfactuals, heatmaps[rows], masks=shown,
        references=None if volumes.seg is None else maps.found.masks[rows],
        channel_names=list(volumes.files), row_names=[f"axial slice {slices[row]}" for row in rows],
        kind=facts["settings"]["map"], title=title, convention=convention,
        unit=unit_in_words(preprocessing["normalize"], facts["settings"]["map"]),
    )  # fmt: skip


def write_results(folder: Path, volumes: PatientVolumes, maps: SliceMaps, facts: dict, convention: str) -> dict:
    """Write volumes and preview, and return the entries of the report that are measured on them."""
    field_mm, normalize = facts["preprocessing"]["field_mm"], facts["preprocessing"]["normalize"]
    first = next(iter(volumes.files.values()))
    heat = heat_volume(volumes, maps, maps.heatmaps, field_mm)
    mask = lesion_mask(volumes, maps, heat, facts)
    write_volume(folder / "heatmap.nii.gz", heat, first, np.float32)
    write_volume(folder / "mask.nii.gz", mask, first, np.uint8)
    for channel, (modality, like) in enumerate(volumes.files.items()) if maps.changes is not None else ():
        counterfactual = counterfactual_volume(volumes, maps, channel, field_mm, normalize)
        write_volume(folder / f"counterfactual_{modality}.nii.gz", counterfactual, like, np.float32)
        if facts["fill"]:
            path = folder / f"filled_{modality}.nii.gz"
            write_filled(path, counterfactual, mask, like)
    millilitres = float(mask.sum() * abs(np.linalg.det(first.affine[:3, :3])) / 1000)
    title = f"{volumes.patient}: {millilitres:.1f} ml above {facts['threshold']:.3g}"
    measured = {"lesion_volume_ml": millilitres, "n_slices": len(maps.found.slices)}
    if first.path.is_dir():
        try:
            write_dicom(folder, mask, heat, first, volumes.patient, unit_in_words(normalize, facts["settings"]["map"]))
        except InputError as error:  # the NIfTI files stay
            measured["dicom_error"] = in_one_line(error)
    if volumes.seg is not None:
        counts = PixelCounts()
        counts.update(heat, volumes.seg)
        measured |= {"dice": dice(mask, volumes.seg), "auprc": counts.average_precision()}
        title += "" if measured["dice"] is None else f", Dice {measured['dice']:.2f}"
    write_preview(folder / "preview.png", volumes, maps, mask, facts, title, convention)
    return measured
