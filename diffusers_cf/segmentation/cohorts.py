"""Cohorts: find the patients in a folder of any nesting and the scans of each, and keep OUT/summary.json."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_cf.data.nifti import ALIASES, canonical_modality, nifti_suffix
from diffusers_cf.errors import InputError, in_one_line
from diffusers_cf.files import alone_at, new_file, read_json, write_json
from diffusers_cf.segmentation.dicom import is_series


DEPTH = 5  # levels of folders below the given one: site, subject, session, anat, and one spare
NOT_RAW = {"code", "derivatives", "sourcedata", "stimuli"}  # BIDS folders without raw scans
UNNAMED = {"anat"}  # BIDS folders that are no part of a patient's name
RESULT = {"report.json", "heatmap.nii.gz"}  # written by `segment`
SUMMARY, TABLE = "summary.json", "summary.csv"
COLUMNS = ("patient", "state", "lesion_volume_ml", "dice", "auprc", "seconds", "reason")  # of the table
ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files may hold bytes that are no UTF-8
STATES = ("done", "skipped", "failed")


def scans_among(paths: Sequence[Path], modalities: Sequence[str]) -> dict[str, list[Path]]:
    """Return by modality the NIfTI files whose names end in it, or else the DICOM series in folders named after it.

    Modalities without any are left out.
    """
    found = {}
    for modality in modalities:
        name = canonical_modality(modality)
        files = [path for path in paths if canonical_modality(nifti_suffix(path.name)) == name]
        found[modality] = files or [p for p in paths if canonical_modality(p.name) == name and is_series(p)]
    return {modality: scans for modality, scans in found.items() if scans}


def patient_files(folder: Path, modalities: Sequence[str]) -> dict[str, Path]:
    """List a patient's folder and return the scan of each modality, and the expert's segmentation if there is one.

    Args:
        folder (`Path`): the patient's folder.
        modalities (`Sequence[str]`): the modalities that a model takes.

    Returns:
        `dict[str, Path]`: by modality, in the given order, a NIfTI file or the folder of a DICOM series; then `seg`.

    Raises:
        InputError: a modality is missing, or there are several scans of one.
    """
    found = scans_among(sorted(folder.iterdir()), [*modalities, "seg"])
    if missing := [name for name in modalities if name not in found]:
        spellings = {name: ALIASES.get(canonical_modality(name), (name,)) for name in missing}
        accepted = "; ".join(f"{name}: {', '.join(known)}" for name, known in spellings.items())
        raise InputError(f"{folder}: modality missing: {', '.join(missing)} (names end in {accepted})")
    for name, paths in found.items():
        if len(paths) > 1:
            raise InputError(f"{folder}: several scans are {name}: {', '.join(path.name for path in paths)}")
    return {name: path for name, (path,) in found.items()}


def find_patients(
    folder: str | Path, modalities: Sequence[str], output: str | Path | None = None
) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """Find the patients of a cohort. A folder that holds scans is a patient, whatever else lies below it.

    A patient is named after the folders that lead to it, such as `sub-01_ses-1` for `sub-01/ses-1/anat`. Links to
    folders are followed. A folder that can be reached in two ways counts once, under its own name.

    Args:
        folder (`str` or `Path`): the folder of a cohort or of one patient.
        modalities (`Sequence[str]`): a folder with a scan of any of them is a patient.
        output (`str` or `Path`, *optional*): a folder to leave out, where results are written.

    Returns:
        `tuple`: names and folders of the patients, sorted by path; and by path one line for each folder that can't be
        read and each link whose target is missing.

    Raises:
        InputError: the folder can't be read, or there is no patient in it.
    """
    folder = Path(folder)
    seen = {os.path.realpath(output)} if output else set()
    patients, problems = [], {}
    # Links are followed last, so that a folder in the cohort that a link leads to keeps its own name.
    folders, links = [(folder, DEPTH)], []
    while folders or links:
        path, depth = folders.pop(0) if folders else links.pop(0)
        if os.path.realpath(path) in seen:  # also ends links that lead in circles
            continue
        seen.add(os.path.realpath(path))
        try:
            paths = sorted(path.iterdir())
            if RESULT <= {below.name for below in paths}:
                continue
            if scans_among(paths, modalities):
                patients.append(path)
                continue
        except (InputError, OSError) as error:
            problems[str(path)] = in_one_line(error)
            continue
        for below in paths:
            if below.name.startswith(".") or below.name in NOT_RAW:
                continue
            if below.is_dir() and depth:
                (links if below.is_symlink() else folders).append((below, depth - 1))
            elif below.is_symlink() and not below.exists() and not below.suffix:  # named like a folder
                problems[str(below)] = f"{below}: a link whose target is missing"
    if not patients:
        nothing = f"{folder}: neither it nor a folder in it holds a scan (names end in {', '.join(modalities)})"
        raise InputError("; ".join(problems.values()) or nothing)
    own_name = Path(os.path.abspath(folder)).name  # `folder` may be `.` or end in `..`
    parts = [[part for part in path.relative_to(folder).parts if part not in UNNAMED] for path in sorted(patients)]
    names = ["_".join(part) or own_name for part in parts]
    return list(zip(names, sorted(patients), strict=True)), problems


def add_to_summary(output: Path, outcomes: dict[str, dict[str, str]]) -> None:
    """Add outcomes to OUT/summary.json, and write OUT/summary.csv, a row for each patient in it.

    The new outcome of a patient replaces the old one.

    Args:
        output (`Path`): OUT.
        outcomes (`dict`): by patient, or by path where there is no patient: `state`, one of `STATES`, and for a
            failure its `reason`.
    """
    with alone_at(output / SUMMARY, timeout=60):  # shards may end at the same time
        patients = read_summary(output) | outcomes
        counts = {state: sum(outcome["state"] == state for outcome in patients.values()) for state in STATES}
        patients = dict(sorted(patients.items()))
        write_json(counts | {"patients": patients}, output / SUMMARY)
        with new_file(output / TABLE) as temporary, open(temporary, "w", newline="", **ENCODING) as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            table.writeheader()
            for patient, outcome in patients.items():
                path = output / patient / "report.json"
                # a failure may have left an earlier report, of something else
                report = read_json(path) if outcome["state"] != "failed" and path.exists() else {}
                table.writerow({**report, "patient": patient, **outcome})


def read_summary(output: Path) -> dict[str, dict[str, str]]:
    """Return the outcomes in OUT/summary.json; an empty dict if there is no such file."""
    path = output / SUMMARY
    return read_json(path)["patients"] if path.exists() else {}
