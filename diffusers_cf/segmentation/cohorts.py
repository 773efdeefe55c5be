"""Find the patients in a cohort's folder, in BraTS, BIDS or any other nesting."""

import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_cf.data.nifti import canonical_modality, nifti_suffix
from diffusers_cf.errors import InputError, in_one_line
from diffusers_cf.segmentation.dicom import is_series


DEPTH = 5  # levels of folders below the given one: site, subject, session, anat, and one spare
NOT_RAW = {"code", "derivatives", "sourcedata", "stimuli"}  # BIDS folders without raw scans
UNNAMED = {"anat"}  # BIDS folders that are no part of a patient's name
RESULT = {"report.json", "heatmap.nii.gz"}  # written by `segment`


def scans_among(paths: Sequence[Path], modalities: Sequence[str]) -> dict[str, list[Path]]:
    """Sort the content of a folder by modality.

    Args:
        paths (`Sequence[Path]`): the files and folders in it.
        modalities (`Sequence[str]`): modalities to look for, or `seg`.

    Returns:
        `dict[str, list[Path]]`: by modality the NIfTI files whose names end in it, or else the folders of DICOM series
        that are named after it. A modality without any is left out.

    Raises:
        InputError: a file in a folder of DICOM files can't be read.
    """
    files, folders = {}, {}
    for path in paths:
        files.setdefault(canonical_modality(nifti_suffix(path.name)), []).append(path)
        folders.setdefault(canonical_modality(path.name), []).append(path)
    found = {}
    for modality in modalities:
        name = canonical_modality(modality)
        found[modality] = files.get(name) or [path for path in folders.get(name, ()) if is_series(path)]
    return {modality: scans for modality, scans in found.items() if scans}


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
        `tuple`: the patients' names and folders, in the order of their paths; and by path one line for each folder that
        can't be read and each link whose target is missing.

    Raises:
        InputError: there is no such folder, or no patient in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        reason = "a file; give the folder that holds it" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {reason}")
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
    own_name = Path(os.path.abspath(folder)).name  # the folder may be given as `.` or by a path that ends in `..`
    parts = {
        path: [part for part in path.relative_to(folder).parts if part not in UNNAMED] for path in sorted(patients)
    }
    return [("_".join(names) or own_name, path) for path, names in parts.items()], problems
