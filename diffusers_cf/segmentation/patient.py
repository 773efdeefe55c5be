"""Segment one patient: from a folder of scans to heatmap, mask and counterfactuals on the scans' own grid."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.data.scans import check_patient_id
from diffusers_cf.errors import InputError, in_one_line
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.protocol import dice
from diffusers_cf.files import alone_at, new_folder, write_json
from diffusers_cf.inference import computing_dtype, usable_facts
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.provenance import model_fingerprint
from diffusers_cf.segmentation.cohorts import patient_files
from diffusers_cf.segmentation.dicom import write_dicom
from diffusers_cf.segmentation.results import REPORT, read_report
from diffusers_cf.segmentation.volumes import (
    PatientVolumes,
    SliceMaps,
    counterfactual_volume,
    heat_volume,
    lesion_mask,
    map_slices,
    read_volumes,
    scan_sha256,
    write_preview,
    write_volume,
)


# Entries of report.json that must agree for a finished patient to be skipped, and how messages name them.
_MUST_AGREE = {
    "model_sha256": "another model", "dtype": "another dtype", "preprocessing": "another preprocessing",
    "settings": "other settings", "postprocessed": "other post-processing", "inputs": "other scans",
}  # fmt: skip
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
    """Segment one patient and write the folder `output/PATIENT`, as a whole or not at all.

    The folder holds `heatmap.nii.gz` (float32, on the model's intensity scale, 0 outside the foreground, before any
    post-processing), `mask.nii.gz` (uint8, 1 for lesion), `counterfactual_<modality>.nii.gz` (float32, in the scan's
    units), `preview.png` and `report.json`. Heatmap and mask have the shape, axes and affine of the first modality's
    scan, each counterfactual those of its own scan. A patient that was finished with the same model, settings, dtype and
    scans is skipped.

    Args:
        pipe (`CounterfactualDDIMPipeline`): a pipeline whose `preprocessing` names its modalities.
        folder (`str` or `Path`): folder with a NIfTI file for each modality, whose name ends in it, and optionally a seg
            file. Each file may instead be a DICOM series in a folder named after its modality. If the first modality is
            a series, mask and heatmap are also written as DICOM.
        output (`str` or `Path`): folder that gets a sub-folder named after the patient.
        model (`str`): name of the model for the report; by default the folder that it was loaded from.
        patient (`str`): name of the patient; by default that of `folder`.
        batch_size (`int`, *optional*): slices in a batch; by default 64 on a CPU, and the largest that fits on a GPU.
        overwrite (`bool`): replace existing results, also those of another model, settings, dtype or scans.
        progress (`bool` or `Callable`): whether to show a bar of slices, or a function that is called after each step
            with the finished share of all steps, in (0, 1].
        **settings: `guidance_scale`, `strength`, `num_inference_steps`, `map` and `threshold`, by default those that the
            model recommends; `settings="paper"` selects the paper's.

    Returns:
        `dict`: the content of report.json. With a seg file it has `dice` of the mask and `auprc` of the heatmap over all
        voxels, None if that file is empty. `seconds` is the duration for the whole patient. If mask and heatmap could
        not be written as DICOM, `dicom_error` is the reason.

    Raises:
        InputError: model, settings, scans or output can't be used, or a batch does not fit into the device's memory.
        BusyError: another process is writing this patient.
        OSError: the results can't be written.
    """
    start = time.perf_counter()
    facts = segmentation_facts(pipe, model=model, **settings)
    patient = check_patient_id(patient or Path(os.path.abspath(folder)).name)  # `folder` may be `.` or end in `..`
    files = patient_files(Path(folder), facts["preprocessing"]["modalities"])
    facts["inputs"] = {name: scan_sha256(path) for name, path in files.items()}
    target = Path(output) / patient
    with alone_at(target, timeout=1):  # another process may hold it for a moment to see that the patient is finished
        if finished := _finished_report(target, facts, overwrite):
            return finished
        volumes = read_volumes(patient, files)
        maps = map_slices(pipe, volumes, facts, batch_size, progress)
        with new_folder(target) as temporary:
            measured = _write_results(temporary, volumes, maps, facts)
            seconds = round(time.perf_counter() - start, 3)
            report = {"patient": patient, **facts, **measured, "warnings": volumes.warnings, "seconds": seconds}
            write_json(report, temporary / REPORT)
    return report


def segmentation_facts(
    pipe: CounterfactualDDIMPipeline, model: str = "", needs_threshold: bool = True, **settings
) -> dict:
    """Return everything that a segmentation depends on besides the scans: model, dtype, preprocessing and settings.

    Args:
        pipe (`CounterfactualDDIMPipeline`): the pipeline.
        model (`str`): name of the model for the report; by default the folder that it was loaded from.
        needs_threshold (`bool`): whether a missing threshold is an error.
        **settings: as in [`segment_patient`].

    Raises:
        InputError: the model does not state its modalities, a setting is out of range, or there is no threshold.
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


def _finished_report(target: Path, facts: dict, overwrite: bool) -> dict | None:
    """Return the report of a patient that was finished with the same facts; None if there is work to do.

    Raises:
        InputError: the target holds something else, which is not replaced, or not without `overwrite`.
    """
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        raise InputError(f"{target}: not a folder that segment has written; choose another output folder")
    names = {path.name for path in target.iterdir()}
    if foreign := sorted(name for name in names if not _OWN_FILES.fullmatch(name)):
        raise InputError(f"{target}: holds {foreign[0]}, which segment did not write; choose another output folder")
    if overwrite:
        return None
    try:
        report = read_report(target)
    except InputError as error:
        raise InputError(f"{error}; --overwrite replaces the folder") from None
    if differing := [text for key, text in _MUST_AGREE.items() if report.get(key) != facts[key]]:
        raise InputError(f"{target}: finished with {' and '.join(differing)}; --overwrite replaces it")
    volumes = ("heatmap", "mask", *(f"counterfactual_{name}" for name in facts["preprocessing"]["modalities"]))
    if missing := [f"{name}.nii.gz" for name in volumes if f"{name}.nii.gz" not in names]:
        raise InputError(f"{target}: {missing[0]} is missing; --overwrite replaces the folder")
    return report


def _write_results(folder: Path, volumes: PatientVolumes, maps: SliceMaps, facts: dict) -> dict:
    """Write volumes and preview, and return the entries of the report that are measured on them."""
    field_mm, normalize = facts["preprocessing"]["field_mm"], facts["preprocessing"]["normalize"]
    first = next(iter(volumes.files.values()))
    heat = heat_volume(volumes, maps, maps.heatmaps, field_mm)
    mask = lesion_mask(volumes, maps, heat, facts)
    write_volume(folder / "heatmap.nii.gz", heat, first, np.float32)
    write_volume(folder / "mask.nii.gz", mask, first, np.uint8)
    for channel, (modality, like) in enumerate(volumes.files.items()):
        counterfactual = counterfactual_volume(volumes, maps, channel, field_mm, normalize)
        write_volume(folder / f"counterfactual_{modality}.nii.gz", counterfactual, like, np.float32)
    millilitres = float(mask.sum() * abs(np.linalg.det(first.affine[:3, :3])) / 1000)
    title = f"{volumes.patient}: {millilitres:.1f} ml above {facts['threshold']:.3g}"
    measured = {"lesion_volume_ml": millilitres, "n_slices": len(maps.found.slices)}
    if first.path.is_dir():
        try:
            write_dicom(folder, mask, heat, first, volumes.patient, unit_in_words(normalize))
        except InputError as error:  # the NIfTI files stay
            measured["dicom_error"] = in_one_line(error)
    if volumes.seg is not None:
        counts = PixelCounts()
        counts.update(heat, volumes.seg)
        measured |= {"dice": dice(mask, volumes.seg), "auprc": counts.average_precision()}
        title += "" if measured["dice"] is None else f", Dice {measured['dice']:.2f}"
    write_preview(folder / "preview.png", volumes, maps, mask, facts, title)
    return measured
