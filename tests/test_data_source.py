"""Labels from a CSV file."""

import pytest

from diffusers_cf.data.source import read_labels
from diffusers_cf.errors import InputError


def test_rows_label_patients_or_slices(tmp_path):
    rows = "patient, slice, label\na, 4, unhealthy\na, , healthy\nb, 2, healthy\n"
    (tmp_path / "labels.csv").write_text(rows, "utf-8-sig")
    table = read_labels(tmp_path / "labels.csv", ("healthy", "unhealthy"))
    assert table.classes == {("a", 4): 1, ("a", None): 0, ("b", 2): 0}


BAD_LABELS = {
    "no column": ("patient,slice\nP_01,3\n", "column missing: label"),
    "empty file": ("", "column missing: label, patient"),
    "unknown label": ("patient,label\nP_01,healthy\nP_02,sick\n", r"line 3: unknown label 'sick' \(one of healthy"),
    "number as label": ("patient,label\nP_01,1\n", "line 2: unknown label '1'"),
    "no patient": ("patient,label\n,healthy\n", "line 2: patient is empty"),
    "slice no number": ("patient,slice,label\nP_01,3.5,healthy\n", "line 2: slice '3.5' is not a whole number"),
    "contradiction": ("patient,label\nP_01,healthy\nP_01,unhealthy\n", "line 3: contradicts"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_file(case, tmp_path):
    text, reason = BAD_LABELS[case]
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=f"labels.csv: {reason}"):
        read_labels(tmp_path / "labels.csv", ("healthy", "unhealthy"))


def test_labels_file_that_is_no_text(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00patient")
    with pytest.raises(InputError, match="labels.csv: not a readable CSV file"):
        read_labels(tmp_path / "labels.csv", ("healthy", "unhealthy"))
