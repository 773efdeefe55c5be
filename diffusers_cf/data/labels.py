"""Labels from a CSV file, for images without masks.

The columns are `patient,slice,label`. A row whose `slice` is empty, or a file without that column, labels whole patients.
A number labels one axial slice, counted from 0 at the inferior end; it overrides the label of the patient. `label` is the
name of a class.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError, reading


CLASS_NAMES = ("healthy", "unhealthy")


@dataclass
class LabelTable:
    """Class indices by patient and slice number; None stands for the whole patient."""

    path: Path
    classes: dict[tuple[str, int | None], int]


def read_labels(path: str | Path, class_names: Sequence[str]) -> LabelTable:
    """Read a labels file.

    Args:
        path (`str` or `Path`): the CSV file.
        class_names (`Sequence[str]`): the classes, in the order of their indices.

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
