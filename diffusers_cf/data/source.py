"""The interface between `prepare` and a kind of data, and labels from a CSV file for images without masks.

The columns of the file are `patient,slice,label`. A row whose `slice` is empty, or a file without that column, labels
whole patients. A number labels one axial slice, counted from 0 at the inferior end; it overrides the label of the
patient. `label` is the name of a class.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, check_geometry
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError, reading
from diffusers_cf.loading import sha256_of


CLASS_NAMES = ("healthy", "unhealthy")


@dataclass
class LabelTable:
    """Class indices by patient and slice number; None stands for the whole patient."""

    path: Path
    classes: dict[tuple[str, int | None], int]


def read_labels(path: str | Path, class_names: Sequence[str]) -> LabelTable:
    """Read a CSV file of labels, whose class indices follow the order of `class_names`.

    Raises:
        InputError: the file is missing or lacks a column, or a row has an unknown label, has a slice that is not a
            number, or contradicts another row; the message names the line.
    """
    path, names, classes = Path(path), list(class_names), {}
    # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name.
    with reading(path, "CSV file"), open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        if absent := {"patient", "label"} - set(rows.fieldnames or ()):
            raise InputError(f"{path}: column missing: {', '.join(sorted(absent))} (columns: patient, slice, label)")
        for row in rows:
            patient, index, label = ((row.get(name) or "").strip() for name in ("patient", "slice", "label"))
            where = f"{path}: line {rows.line_num}"
            if not patient:
                raise InputError(f"{where}: patient is empty")
            if label not in names:
                raise InputError(f"{where}: unknown label {label!r} (one of {', '.join(names)})")
            if index and not index.isdecimal():
                raise InputError(f"{where}: slice {index!r} is not a whole number")
            given = names.index(label)
            if classes.setdefault((patient, int(index) if index else None), given) != given:
                raise InputError(f"{where}: contradicts an earlier label of {patient}")
    return LabelTable(path, classes)


def apply_labels(slices: PatientSlices, table: LabelTable) -> PatientSlices:
    """Set the labels of the file; a slice without one keeps its mask's label, or is dropped if there is no mask.

    Raises:
        InputError: no slice of the patient is left, or the file has a label for a slice that the patient has not.
    """
    of_patient = {index: label for (name, index), label in table.classes.items() if name == slices.patient}
    known = slices.slices.tolist() if slices.depth is None else range(slices.depth)
    if unknown := sorted(of_patient.keys() - {None, *known}):
        raise InputError(
            f"{table.path}: {slices.patient} has no slice {unknown[0]}: its slices are {min(known)} to {max(known)},"
            " from 0 at the inferior end"
        )
    given = np.array([of_patient.get(i, of_patient.get(None, -1)) for i in slices.slices.tolist()], dtype=np.int64)
    keep = given >= 0
    if slices.masks is not None:
        return replace(slices, labels=np.where(keep, given, slices.labels))
    if not keep.any():
        raise InputError(f"{table.path}: no label for any slice of {slices.patient}")
    return replace(slices, images=slices.images[keep], labels=given[keep], slices=slices.slices[keep])


class Source:
    """A kind of data. A subclass implements `patients` and `load`.

    Args:
        path (`str` or `Path`): the input.
        size (`int`): pixels along each side of a slice.
        field_mm (`float`): side of the square field that a slice shows, in mm.
        normalize (`str`): intensity scale (`intensity.py`).
        labels (`str` or `Path`, *optional*): CSV file of labels.

    Attributes:
        name (`str`): value of `--source`.
        modalities (`tuple[str, ...]`): names of the channels.
        class_names (`tuple[str, ...]`): names of the classes, in the order of the labels.
        has_masks (`bool`): whether every patient has lesion masks.
        left_out (`dict[str, str]`): patients that the source can't use, with the reason.
        unused (`list[str]`): files and rows of the labels file that it does not use.
        summary (`list[str]`): lines that say what it found.

    Raises:
        InputError: the input, the labels file or an option can't be used. Subclasses raise it, too.
    """

    name = ""
    modalities: tuple[str, ...] = ()
    class_names: tuple[str, ...] = CLASS_NAMES
    has_masks = True
    left_out: dict[str, str] = {}

    def __init__(
        self, path: str | Path, size: int = 128, field_mm: float = FIELD_MM, normalize: str = DEFAULT_NORMALIZE,
        labels: str | Path | None = None,
    ):  # fmt: skip
        check_geometry(size, field_mm, normalize)
        self.unused, self.summary = [], []
        self.path, self.size, self.field_mm, self.normalize = Path(path), size, field_mm, normalize
        self.labels = None if labels is None else read_labels(labels, self.class_names)

    def check_labels(self) -> None:
        """Note the rows of the labels file whose patient there is not; raise `InputError` if that is every row."""
        if self.labels is None:
            return
        known, named = {*self.patients(), *self.left_out}, {patient for patient, _ in self.labels.classes}
        if not named & known:
            examples = f"{min(named, default='no row')}, and the patients are {', '.join(sorted(known)[:3])}, .."
            raise InputError(f"{self.labels.path}: no row is about a patient of {self.path}: it names {examples}")
        self.unused += [f"{self.labels.path.name}: rows of {patient}" for patient in sorted(named - known)]

    def patients(self) -> list[str]:
        """Return the sorted ids of all patients."""
        raise NotImplementedError

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        """Read a patient without the labels file; return None if there is a problem.

        Every problem is appended to `problems`, one line each, except an `InputError` that the method raises.
        """
        raise NotImplementedError

    def examine(self, patient: str) -> tuple[PatientSlices | None, list[str]]:
        """Return the slices of a patient and its problems; the slices are usable only if there is no problem."""
        slices, problems = None, []
        with noting_errors(problems):
            slices = self.load(patient, problems)
            if slices is not None and self.labels is not None:
                slices = apply_labels(slices, self.labels)
            if slices is not None and not self.has_masks:
                slices = replace(slices, masks=None)
        return slices, problems

    def read(self, patient: str) -> PatientSlices:
        """Return the slices of a patient, or raise `InputError` for its first problem."""
        slices, problems = self.examine(patient)
        if problems:
            raise InputError(in_brief(problems))
        return slices

    def strata(self) -> dict[str, list[str]]:
        """Return groups of patients that a seeded split divides one by one, so that each split has all of them."""
        return {"all": self.patients()}

    def fixed_splits(self) -> dict[str, list[str]] | None:
        """Return the patients of each split, or None if a seed or a file decides."""
        return None

    def facts(self) -> dict:
        """Return what the source adds to preprocessing.json."""
        return {"labels_sha256": None if self.labels is None else sha256_of(self.labels.path)}


def in_brief(problems: list[str]) -> str:
    """Return the first problem of a patient, and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more; --check lists all)" if problems[1:] else "")


@contextmanager
def noting_errors(problems: list[str]) -> Iterator[None]:
    """Append the message of an `InputError` of the block to `problems`."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))
