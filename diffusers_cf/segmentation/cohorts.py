"""Patients below a folder: in BraTS, BIDS or any other nesting, a patient is a folder that holds scans."""

import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_cf.data.nifti import canonical_modality, nifti_suffix
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.dicom import is_series


DEPTH = 5  # folders below the one given: site, subject, session, anat and one to spare
NOT_RAW = {"code", "derivatives", "sourcedata", "stimuli"}  # of BIDS
WITHOUT_A_NAME = {"anat"}  # says the same of every patient
RESULT = {"report.json", "heatmap.nii.gz"}  # what `segment` has written


def find_patients(
    folder: str | Path, modalities: Sequence[str], output: str | Path | None = None
) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """The patients of a cohort by name, or the one patient whose folder this is; and what could not be looked into.

    A patient is called like its folder; where it lies deeper, like all folders on the way, `sub-01_ses-1` for
    `sub-01/ses-1/anat`. Links to folders are followed; a folder that is reached twice counts once, under its own name.

    Args:
        folder: a cohort's or a patient's.
        modalities: a folder with a NIfTI file of any of them, or a DICOM series called like one, is a patient.
        output: where results go; what lies in there is no patient.

    Returns:
        Names and folders; and by path a line for each folder that can't be read and each link that leads nowhere.

    Raises:
        InputError: there is no such folder, or no patient in it.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        is_file = os.path.exists(folder)
        raise InputError(f"{folder}: {'a file; give the folder that holds it' if is_file else 'no such folder'}")
    search = _Search({canonical_modality(modality) for modality in modalities}, output)
    search.walk(folder)
    if not search.found:
        nothing = f"{folder}: neither it nor a folder in it holds a scan (names end in {', '.join(modalities)})"
        raise InputError("; ".join(search.problems.values()) or nothing)
    return [(_name(path, folder), path) for path in sorted(search.found)], search.problems


class _Search:
    """A walk through a cohort's folders."""

    def __init__(self, wanted: set[str], output: str | Path | None):
        self.wanted, self.seen = wanted, {os.path.realpath(output)} if output else set()
        self.found: list[Path] = []
        self.problems: dict[str, str] = {}
        self.links: list[tuple[Path, int]] = []

    def walk(self, folder: Path) -> None:
        self.enter(folder, DEPTH)
        while self.links:  # last, so that what also lies in the cohort itself is known by its own name
            self.enter(*self.links.pop(0))

    def enter(self, folder: Path, depth: int) -> None:
        if os.path.realpath(folder) in self.seen:  # also the end of links that lead in circles
            return
        self.seen.add(os.path.realpath(folder))
        try:
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            names = {entry.name for entry in entries if not entry.is_dir()}
            if RESULT <= names:
                return
            if self.is_patient(names, entries):
                self.found.append(folder)
                return
        except OSError as error:
            self.problems[str(folder)] = f"{folder}: can't be read ({error.strerror or error})"
            return
        except InputError as error:
            self.problems[str(folder)] = str(error)
            return
        self.go_on(entries, depth)

    def is_patient(self, names: set[str], entries: list[os.DirEntry]) -> bool:
        series = (Path(entry.path) for entry in entries if canonical_modality(entry.name) in self.wanted)
        is_scan = any(canonical_modality(nifti_suffix(name)) in self.wanted for name in names)
        return is_scan or any(map(is_series, series))

    def go_on(self, entries: list[os.DirEntry], depth: int) -> None:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in NOT_RAW:
                continue
            if not entry.is_dir():
                # a patient who is gone; a file by its name is nobody
                if entry.is_symlink() and not os.path.exists(entry.path) and not Path(entry.name).suffix:
                    self.problems[entry.path] = f"{entry.path}: a link that leads nowhere"
            elif depth and entry.is_symlink():
                self.links.append((Path(entry.path), depth - 1))
            elif depth:
                self.enter(Path(entry.path), depth - 1)


def _name(path: Path, cohort: Path) -> str:
    parts = [part for part in path.relative_to(cohort).parts if part not in WITHOUT_A_NAME]
    # also where the folder is given as `.` or by a path that ends in `..`
    return "_".join(parts) or Path(os.path.abspath(cohort)).name
