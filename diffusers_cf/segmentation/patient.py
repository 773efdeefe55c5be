"""A patient's folder to heatmap, mask and counterfactual as NIfTI in the scan's own geometry, whole or not at all."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import from_ras
from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.data.nifti import Scan
from diffusers_cf.data.scans import check_patient_id
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.protocol import dice
from diffusers_cf.files import alone_at, new_folder, tidy
from diffusers_cf.loading import sha256_of
from diffusers_cf.model_facts import usable_facts
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.precision import computing_dtype
from diffusers_cf.provenance import model_fingerprint
from diffusers_cf.segmentation.dicom import series_sha256, write_parametric_map, write_segmentation
from diffusers_cf.segmentation.results import REPORT, read_report
from diffusers_cf.segmentation.volumes import (
    PatientVolumes,
    SliceMaps,
    counterfactual_volume,
    heat_volume,
    lesion_mask,
    map_slices,
    patient_files,
    read_volumes,
    write_preview,
    write_volume,
)


# Facts of a finished patient that must agree for it to be skipped, and how to call them.
_MUST_AGREE = {
    "model_sha256": "another model",
    "dtype": "another dtype",
    "preprocessing": "another preprocessing",
    "settings": "other settings",
    "postprocessed": "other post-processing",
    "inputs": "other scans",
}
_OWN_FILES = re.compile(r"(heatmap|mask|counterfactual_.+)\.nii\.gz|(heatmap|mask)\.dcm|preview\.png|report\.json")


def segment_patient(
    pipe: CounterfactualDDIMPipeline,
    folder: str | Path,
    output: str | Path,
    *,
    model: str = "",
    patient: str = "",
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: bool | Callable[[float], None] = True,
    **settings,
) -> dict:
    """Segments one patient and writes `output/PATIENT/`, whole or not at all.

    Written are heatmap.nii.gz (float32, on the model's intensity scale, 0 outside the foreground, before any
    post-processing), mask.nii.gz (uint8, 1 = lesion), counterfactual_<modality>.nii.gz (float32, the scan's units),
    preview.png and report.json. Heatmap and mask have shape, axes and affine of the first modality's file, each
    counterfactual those of its own. A patient that is finished with the same model, settings, dtype and scans is left
    as it is.

    Args:
        pipe: The pipeline; `pipe.preprocessing` names its modalities.
        folder: Folder with one NIfTI file a modality (names end in the modality), and seg if there is one; or with a
            DICOM series a modality, in a folder called like it. Then mask and heatmap are written as DICOM, too.
        output: Folder that gets a sub-folder named like the patient.
        model: Name of the model for the report; the folder it was loaded from if empty.
        patient: Its name; that of `folder` if empty.
        batch_size: Slices at a time; None = 64 on a CPU, on an accelerator the largest that fits.
        overwrite: Replace what is there, which another model, settings, dtype or scans need.
        progress: Whether to show a progress bar, or what is told after each step which share of them is done.
        **settings: `guidance_scale`, `strength`, `num_inference_steps`, `map`, `threshold`; None = what the model
            recommends, or with `settings="paper"` the paper's.

    Returns:
        The content of report.json. `dice` (of the mask) and `auprc` (of the heatmap) over all voxels where a seg file
        lies beside the scans, None where that is empty; `lesion_volume_ml`; `seconds` of the whole patient;
        `dicom_error` where a DICOM series can't carry mask or heatmap, which are then written as NIfTI alone.

    Raises:
        InputError: Model, settings, scans or output can't be used, another process is at this patient, or memory does
            not suffice; the message names file and reason.
    """
    folder, patient = Path(folder), patient or patient_name(folder)
    facts = segmentation_facts(pipe, model=model, **settings)
    try:
        return _segment(pipe, folder, Path(output), patient, facts, overwrite, (batch_size, progress))
    except MemoryError as error:
        reason = " ".join(str(error).split()) or "its scans are too large"
        raise InputError(f"{folder}: not enough memory ({reason})") from None


def _segment(
    pipe, folder: Path, output: Path, patient: str, facts: dict, overwrite: bool, how: tuple[int | None, object]
) -> dict:
    start = time.perf_counter()
    target = output / check_patient_id(patient)
    files = patient_files(folder, facts["preprocessing"]["modalities"])
    facts["inputs"] = {name: _scan_sha256(path) for name, path in files.items()}
    if finished := _finished_report(target, files, facts, overwrite):
        tidy(target)
        return finished
    volumes = read_volumes(patient, files)
    with alone_at(target):
        if finished := _finished_report(target, files, facts, overwrite):  # by another process, meanwhile
            return finished
        maps = map_slices(pipe, volumes, facts, *how)
        with new_folder(target) as temporary:
            measured = _write_volumes(temporary, volumes, maps, facts)
            report = {"patient": patient, **facts, **measured, "seconds": round(time.perf_counter() - start, 3)}
            text = json.dumps(report, indent=2, allow_nan=False) + "\n"
            (temporary / REPORT).write_text(text, encoding="utf-8")
    return report


def patient_name(folder: str | Path) -> str:
    """The name of a patient's folder, also where it is given as `.` or by a path that ends in `..`."""
    return Path(os.path.abspath(folder)).name


def segmentation_facts(
    pipe: CounterfactualDDIMPipeline, model: str = "", needs_threshold: bool = True, **settings
) -> dict:
    """What a segmentation depends on besides the scans, checked: model, preprocessing, settings.

    Args:
        pipe: The pipeline.
        model: Its name for the report; the folder it was loaded from if empty.
        needs_threshold: Whether it is an error that there is none.
        **settings: As in `segment_patient`.

    Raises:
        InputError: The model does not say what it takes, a setting is out of range, or there is no threshold.
    """
    model = model or str(pipe.config.get("_name_or_path") or "pipeline")
    usable = usable_facts(pipe, model, **settings)
    threshold = usable["settings"]["threshold"]
    if threshold is None and needs_threshold:
        kind, unit = usable["settings"]["map"], unit_in_words(usable["preprocessing"]["normalize"])
        raise InputError(f"{model} recommends no threshold for the map {kind}: give one by --threshold ({unit})")
    return {
        "model": model,
        "model_sha256": model_fingerprint(pipe),
        "dtype": computing_dtype(pipe.unet),
        **usable,
        "threshold": threshold,
        "postprocessed": pipe.preprocessing.get("settings", {}).get("postprocess") is True,
        "network_evaluations_per_slice": pipe.network_evaluations(**usable["settings"]),
    }


def _scan_sha256(path: Path) -> str:
    try:
        return series_sha256(path) if path.is_dir() else sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from None


def _write_volumes(folder: Path, volumes: PatientVolumes, maps: SliceMaps, facts: dict) -> dict:
    """Writes volumes and preview, and returns what the report says about them."""
    field_mm, normalize = facts["preprocessing"]["field_mm"], facts["preprocessing"]["normalize"]
    first = next(iter(volumes.files.values()))
    heat = heat_volume(volumes, maps, maps.heatmaps, field_mm)
    write_volume(folder / "heatmap.nii.gz", heat, first, np.float32)
    mask = lesion_mask(volumes, maps, heat, facts)
    write_volume(folder / "mask.nii.gz", mask, first, np.uint8)
    written = _write_dicom(folder, heat, mask, first, volumes.patient, normalize) if first.path.is_dir() else {}
    for channel, (modality, like) in enumerate(volumes.files.items()):
        counterfactual = counterfactual_volume(volumes, maps, channel, field_mm, normalize)
        write_volume(folder / f"counterfactual_{modality}.nii.gz", counterfactual, like, np.float32)
    millilitres = float(mask.sum() * abs(np.linalg.det(first.affine[:3, :3])) / 1000)
    measured = {"lesion_volume_ml": millilitres, "n_slices": len(maps.found.slices), **written}
    title = f"{volumes.patient}: {millilitres:.1f} ml above {facts['threshold']:.3g}"
    if volumes.seg is not None:
        counts = PixelCounts()
        counts.update(heat, volumes.seg)
        measured |= {"dice": dice(mask, volumes.seg), "auprc": counts.average_precision()}
        title += "" if measured["dice"] is None else f", Dice {measured['dice']:.2f}"
    write_preview(folder / "preview.png", volumes, maps, mask, facts, title)
    return measured


def _write_dicom(folder: Path, heat: np.ndarray, mask: np.ndarray, like: Scan, patient: str, normalize: str) -> dict:
    """Mask and heatmap on the grid of the DICOM series that the first modality came from.

    Returns:
        `dicom_error`, why there are none: a series that can't carry them costs nobody the NIfTI files. Else {}.
    """
    written = []
    try:
        of_heat = (unit_in_words(normalize),)
        for name, values, write, words in (
            ("mask", mask, write_segmentation, ()), ("heatmap", heat, write_parametric_map, of_heat),
        ):  # fmt: skip
            description = f"{name} of {patient}, not for clinical use"
            written.append(folder / f"{name}.dcm")
            write(written[-1], from_ras(values, like.affine), like.affine, like.path, description, *words)
    except InputError as error:
        for path in written:
            path.unlink(missing_ok=True)
        return {"dicom_error": " ".join(str(error).split())}
    return {}


def _finished_report(target: Path, files: dict[str, Path], facts: dict, overwrite: bool) -> dict | None:
    """The report of a patient that is finished with just these facts; None if there is work to do.

    Raises:
        InputError: Something else is there that must not, or not without `overwrite`, be replaced.
    """
    folder = next(iter(files.values())).parent
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir() or target.resolve() == folder.resolve():
        raise InputError(f"{target}: the output would replace what segment did not write, choose another folder")
    names = [path.name for path in target.iterdir()]
    foreign = sorted(name for name in names if not _OWN_FILES.fullmatch(name))
    if foreign:
        raise InputError(f"{target}: holds {foreign[0]}, which segment did not write: choose another output folder")
    if overwrite:
        return None
    try:
        report = read_report(target)
    except InputError:
        raise InputError(f"{target}: holds no readable {REPORT}: --overwrite replaces the folder") from None
    differing = [text for key, text in _MUST_AGREE.items() if report.get(key) != facts[key]]
    volumes = ["heatmap", "mask", *(f"counterfactual_{name}" for name in facts["preprocessing"]["modalities"])]
    due = {"preview.png", *(f"{name}.nii.gz" for name in volumes)}
    if next(iter(files.values())).is_dir() and "dicom_error" not in report:
        due |= {"mask.dcm", "heatmap.dcm"}
    missing = sorted(due - set(names))
    if missing:
        raise InputError(f"{target}: {missing[0]} is missing: --overwrite makes all anew")
    if differing:
        raise InputError(f"{target}: finished with {' and '.join(differing)}: --overwrite replaces it")
    return report
