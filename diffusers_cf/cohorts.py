"""Patients below a folder: in BraTS, BIDS or any other nesting, a patient is a folder that holds scans."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusers_cf.data.nifti import canonical_modality, nifti_suffix
from diffusers_cf.dicom import is_series
from diffusers_cf.errors import InputError


DEPTH = 5  # folders below the one given: site, subject, session, anat and one to spare
NOT_RAW = {"code", "derivatives", "sourcedata", "stimuli"}  # of BIDS
WITHOUT_A_NAME = {"anat"}  # says the same of every patient


def find_patients(
    folder: str | Path, modalities: Sequence[str], output: str | Path | None = None
) -> list[tuple[str, Path]]:
    """The patients of a cohort by name, or the one patient whose folder this is.

    A patient is called like its folder; where it lies deeper, like all folders on the way, `sub-01_ses-1` for
    `sub-01/ses-1/anat`.

    Args:
        folder: a cohort's or a patient's.
        modalities: a folder with a NIfTI file of any of them, or a DICOM series called like one, is a patient.
        output: where results go; what lies in there is no patient.

    Raises:
        InputError: there is no such folder, or no patient in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: a file; give the folder that holds it" if folder.exists() else f"{folder}: no such folder"
        )
    wanted = {canonical_modality(modality) for modality in modalities}
    skipped = Path(output).resolve() if output else None
    found = sorted(_folders_with_scans(folder, wanted, skipped, DEPTH))
    if not found:
        raise InputError(
            f"{folder}: neither it nor a folder in it holds a scan (names end in {', '.join(modalities)})"
        )
    return [(_name(path, folder), path) for path in found]


def _folders_with_scans(folder: Path, wanted: set[str], skipped: Path | None, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    names = {entry.name for entry in entries if not entry.is_dir()}
    if {"report.json", "heatmap.nii.gz"} <= names:  # what `segment` has written
        return
    series = (Path(entry.path) for entry in entries if canonical_modality(entry.name) in wanted)
    if any(canonical_modality(nifti_suffix(name)) in wanted for name in names) or any(map(is_series, series)):
        yield folder
        return
    for entry in entries if depth else ():
        # links could lead in circles
        if not entry.is_dir(follow_symlinks=False) or entry.name.startswith(".") or entry.name in NOT_RAW:
            continue
        if Path(entry.path).resolve() != skipped:
            yield from _folders_with_scans(Path(entry.path), wanted, skipped, depth - 1)


def _name(path: Path, cohort: Path) -> str:
    parts = [part for part in path.relative_to(cohort).parts if part not in WITHOUT_A_NAME]
    # also where the folder is given as `.` or by a path that ends in `..`
    return "_".join(parts) or Path(os.path.abspath(cohort)).name
