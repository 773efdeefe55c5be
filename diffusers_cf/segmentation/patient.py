"""Segment one patient: from a folder of scans to heatmap, mask and counterfactuals on the scans' own grid."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.data.scans import check_patient_id
from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, new_folder, read_json, write_json
from diffusers_cf.inference import computing_dtype, usable_facts
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.provenance import model_fingerprint
from diffusers_cf.segmentation.cohorts import patient_files
from diffusers_cf.segmentation.skull import skull_stripper
from diffusers_cf.segmentation.volumes import map_slices, read_volumes, scan_sha256, write_results


# Entries of report.json that must agree for a finished patient to be skipped, and how messages name them.
_MUST_AGREE = {
    "model_sha256": "another model", "dtype": "another dtype", "preprocessing": "another preprocessing",
    "settings": "other settings", "postprocessed": "other post-processing", "inputs": "other scans",
    "skull_strip": "other skull-stripping",
}  # fmt: skip
_OWN_FILES = re.compile(
    r"(heatmap|mask|(counterfactual|filled)_.+)\.nii\.gz|(heatmap|mask)\.dcm|preview\.png|report\.json"
)


def segment_patient(
    pipe: CounterfactualDDIMPipeline, folder: str | Path, output: str | Path, *, model: str = "", patient: str = "",
    batch_size: int | None = None, overwrite: bool = False, fill: bool = False, skull_strip: bool = False,
    convention: str = "radiological", progress: bool | Callable[[float], None] = True, **settings,
) -> dict:  # fmt: skip
    """Segment one patient and write the folder `output/PATIENT`, as a whole or not at all.

    The folder holds `heatmap.nii.gz` (float32, on the model's intensity scale, 0 outside the foreground, before any
    post-processing), `mask.nii.gz` (uint8, 1 for lesion), `counterfactual_<modality>.nii.gz` (float32, in the scan's
    units), `preview.png` and `report.json`, and with `fill` the scans without their lesion, `filled_<modality>.nii.gz`.
    Heatmap and mask have the shape, axes and affine of the first modality's scan, each other volume those of its own
    scan. A patient that was finished with the same model, settings, dtype and scans is skipped.

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
        fill (`bool`): also write each scan with the mask's voxels replaced by the counterfactual's, for tools that measure
            healthy anatomy. A lower threshold makes the step at the border of the mask smaller. With the map `student` the
            model itself makes the counterfactual, for more passes a slice.
        convention (`str`): `radiological`, the patient's right at the left of preview.png, or `neurological`.
        progress (`bool` or `Callable`): whether to show a bar of slices, or a function that is called after each step
            with the finished share of all steps, in (0, 1].
        skull_strip (`bool`): find the brain in the first scan, and take everything else for background. Counterfactuals
            then show the brain alone.
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
    facts = segmentation_facts(pipe, model=model, fill=fill, **settings)
    patient = check_patient_id(patient or Path(os.path.abspath(folder)).name)  # `folder` may be `.` or end in `..`
    facts["skull_strip"] = skull_stripper() if skull_strip else None
    files = patient_files(Path(folder), facts["preprocessing"]["modalities"])
    facts["inputs"] = {name: scan_sha256(path) for name, path in files.items()}
    target = Path(output) / patient
    with alone_at(target, timeout=1):  # another process may hold it for a moment to see that the patient is finished
        if finished := _finished_report(target, facts, overwrite):
            return finished
        volumes = read_volumes(patient, files, skull_strip=skull_strip)
        maps = map_slices(pipe, volumes, facts, batch_size, progress)
        with new_folder(target) as temporary:
            measured = write_results(temporary, volumes, maps, facts, convention)
            seconds = round(time.perf_counter() - start, 3)
            report = {"patient": patient, **facts, **measured, "warnings": volumes.warnings, "seconds": seconds}
            write_json(report, temporary / "report.json")
    return report


def segmentation_facts(
    pipe: CounterfactualDDIMPipeline, model: str = "", needs_threshold: bool = True, fill: bool = False, **settings
) -> dict:
    """Return everything that a segmentation depends on besides the scans: model, dtype, preprocessing and settings.

    Args:
        pipe (`CounterfactualDDIMPipeline`): the pipeline.
        model (`str`): name of the model for the report; by default the folder that it was loaded from.
        needs_threshold (`bool`): whether a missing threshold is an error.
        fill (`bool`): as in [`segment_patient`].
        **settings: as in [`segment_patient`].

    Raises:
        InputError: the model does not state its modalities, a setting is out of range, or there is no threshold.
    """
    model = model or str(pipe.config.get("_name_or_path") or "pipeline")
    usable = usable_facts(pipe, model, **settings)
    threshold = usable["settings"]["threshold"]
    if threshold is None and needs_threshold:
        kind, unit = (
            usable["settings"]["map"],
            unit_in_words(usable["preprocessing"]["normalize"], usable["settings"]["map"]),
        )
        raise InputError(f"{model} recommends no threshold for the map {kind}: give one by --threshold ({unit})")
    evaluations = pipe.network_evaluations(**usable["settings"])
    if fill and usable["settings"]["map"] == "student":
        evaluations += pipe.network_evaluations(**usable["settings"] | {"map": "counterfactual"})
    return {
        "model": model,
        "model_sha256": model_fingerprint(pipe),
        "dtype": computing_dtype(pipe.unet),
        **usable,
        "threshold": threshold,
        "postprocessed": pipe.preprocessing.get("settings", {}).get("postprocess", False),
        "network_evaluations_per_slice": evaluations,
        "fill": fill,
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
    if foreign := sorted(path.name for path in target.iterdir() if not _OWN_FILES.fullmatch(path.name)):
        raise InputError(f"{target}: holds {foreign[0]}, which segment did not write; choose another output folder")
    if overwrite:
        return None
    report = read_json(target / "report.json")
    if facts["fill"] and not report.get("fill"):
        raise InputError(f"{target}: finished without filled scans; --overwrite replaces it")
    if differing := [text for key, text in _MUST_AGREE.items() if report.get(key) != facts[key]]:
        raise InputError(f"{target}: finished with {' and '.join(differing)}; --overwrite replaces it")
    return report
