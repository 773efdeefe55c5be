"""Labels from a CSV file: for scans without masks, which is what the method is made for.

Columns `patient,slice,label`: an empty `slice` (or no such column) labels the whole patient, a number one axial slice
of it, counted from 0 at the inferior end. `label` is the name of a class. A slice's own row wins over its patient's.
"""

import csv
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError


CLASS_NAMES = ("healthy", "unhealthy")


@dataclass
class LabelTable:
    """Labels by patient and by (patient, slice), as class indices; `digest` is the SHA-256 of the file."""

    path: Path
    digest: str
    patients: dict[str, int] = field(default_factory=dict)
    slices: dict[str, dict[int, int]] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Every patient that the file mentions."""
        return set(self.patients) | set(self.slices)

    def lookup(self, patient: str, slices: np.ndarray) -> np.ndarray:
        """Class index (S,) of each slice of a patient; -1 where the file says nothing."""
        default, own = self.patients.get(patient, -1), self.slices.get(patient, {})
        return np.array([own.get(int(index), default) for index in slices], dtype=np.int64)


def read_labels(path: str | Path, class_names) -> LabelTable:
    """Reads a labels file.

    Raises:
        InputError: The file is missing, lacks a column, or a row has an unknown label, a slice that is no number, or
            contradicts another row; the message names the line.
    """
    path = Path(path)
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark in front of the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            absent = {"patient", "label"} - set(rows.fieldnames or ())
            if absent:
                raise InputError(
                    f"{path}: column missing: {', '.join(sorted(absent))} (needed: patient, slice, label)"
                )
            table = LabelTable(path, hashlib.sha256(path.read_bytes()).hexdigest())
            for row in rows:
                _add_row(table, row, rows.line_num, tuple(class_names))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from None
    return table


def _add_row(table: LabelTable, row: dict, line: int, class_names: tuple[str, ...]) -> None:
    patient, index, label = ((row.get(name) or "").strip() for name in ("patient", "slice", "label"))
    if not patient:
        raise InputError(f"{table.path}: line {line}: patient is empty")
    if label not in class_names:
        raise InputError(f"{table.path}: line {line}: unknown label {label!r} (one of {', '.join(class_names)})")
    if index and not index.isdecimal():
        raise InputError(f"{table.path}: line {line}: slice {index!r} is no whole number")
    known, key = (table.slices.setdefault(patient, {}), int(index)) if index else (table.patients, patient)
    if known.setdefault(key, class_names.index(label)) != class_names.index(label):
        raise InputError(f"{table.path}: line {line}: contradicts an earlier label of {patient}")


def apply_labels(slices: PatientSlices, table: LabelTable) -> PatientSlices:
    """Sets the labels of the file; a slice that it doesn't label keeps its mask's label, or goes if there is no mask.

    Raises:
        InputError: No slice of the patient is left.
    """
    given = table.lookup(slices.patient, slices.slices)
    keep = given >= 0
    if slices.masks is not None:
        given, keep = np.where(keep, given, slices.labels), np.ones_like(keep)
    if not keep.any():
        raise InputError(f"{table.path}: no label for any slice of {slices.patient}")
    masks = None if slices.masks is None else slices.masks[keep]
    return replace(slices, images=slices.images[keep], labels=given[keep], slices=slices.slices[keep], masks=masks)
