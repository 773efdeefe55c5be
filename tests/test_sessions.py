"""Whose patient is whose, and that nothing outlasts its user."""

from pathlib import Path

import pytest

from diffusers_cf.errors import InputError
from diffusers_cf.sessions import Sessions, take_uploads


class Patient:
    """An explorer's place: a folder that `close` deletes."""

    def __init__(self, folder: Path):
        self.folder, self.closed = folder, False

    def close(self):
        self.closed = True


def fill(scans: Path) -> None:
    (scans / "scan").write_text("voxels")


@pytest.fixture
def sessions(tmp_path):
    return Sessions(tmp_path / "sessions", limit=2, idle_seconds=1000)


def test_each_page_has_its_own_patient(sessions):
    first, second = (sessions.open(key, fill, Patient) for key in "ab")
    assert sessions.get("a") is first and sessions.get("b") is second and first.folder != second.folder
    assert len(first.folder.name) == 32 and (first.folder / "scans" / "scan").exists()
    sessions.close("a")
    assert first.closed and not second.closed
    with pytest.raises(InputError, match="no patient is loaded"):
        sessions.get("a")
    assert sessions.get("b") is second
    sessions.close("a")


def test_another_patient_ends_the_one_before(sessions):
    first = sessions.open("a", fill, Patient)
    second = sessions.open("a", fill, Patient)
    assert first.closed and sessions.get("a") is second


def test_too_many_end_the_idlest(sessions):
    first, second = sessions.open("a", fill, Patient), sessions.open("b", fill, Patient)
    sessions.get("a")
    sessions.open("c", fill, Patient)
    assert second.closed and not first.closed


def test_the_idle_are_forgotten(sessions):
    patient = sessions.open("a", fill, Patient)
    sessions.close_idle()
    assert not patient.closed
    sessions.idle_seconds = 0
    sessions.close_idle()
    assert patient.closed


def test_everybody_is_forgotten_at_the_end(sessions):
    patients = [sessions.open(key, fill, Patient) for key in "ab"]
    sessions.close_all()
    assert all(patient.closed for patient in patients)


@pytest.mark.parametrize("part", ["fill", "make"])
def test_of_what_fails_nothing_is_kept(sessions, part):
    def fail(folder):
        (folder / "half").write_text("voxels")
        raise InputError("damaged")

    earlier = sessions.open("a", fill, Patient)
    with pytest.raises(InputError, match="damaged"):
        sessions.open("a", fail if part == "fill" else fill, fail if part == "make" else Patient)
    assert earlier.closed and list(sessions.folder.iterdir()) == [earlier.folder]
    with pytest.raises(InputError):
        sessions.get("a")


@pytest.fixture
def upload(tmp_path):
    """Function that stores a file as gradio does; gives its path."""
    (tmp_path / "scans").mkdir()

    def store(name: str, digit: str) -> str:
        folder = tmp_path / "uploads" / (64 * digit)
        folder.mkdir(parents=True)
        (folder / name).write_text("voxels")
        return str(folder / name)

    return store


def test_uploads_move_to_their_patient(upload, tmp_path):
    paths = [upload("P_FLAIR.nii.gz", "a"), upload("P-t1n.nii", "b"), upload("P_seg.nii.gz", "c")]
    take_uploads(paths, tmp_path / "uploads", ["flair", "t1"], tmp_path / "scans")
    assert {path.name for path in (tmp_path / "scans").iterdir()} == {"P_FLAIR.nii.gz", "P-t1n.nii", "P_seg.nii.gz"}
    assert not list((tmp_path / "uploads").iterdir())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["flair.nii.gz", "brain.png"], "brain.png: not a NIfTI file by its name"),
        (["P_adc.nii.gz"], "P_adc.nii.gz: its name ends in none of flair, t1, seg"),
        (["t1.nii", "t1.nii"], "t1.nii: there are two files of this name"),
    ],
)
def test_of_uploads_that_are_no_patient_nothing_is_kept(upload, tmp_path, names, message):
    paths = [upload(name, digit) for name, digit in zip(names, "ab", strict=False)]
    with pytest.raises(InputError, match=message):
        take_uploads(paths, tmp_path / "uploads", ["flair", "t1"], tmp_path / "scans")
    assert not list((tmp_path / "uploads").iterdir())


def test_what_was_never_uploaded_is_left_alone(upload, tmp_path):
    upload("t1.nii", "a")
    other = tmp_path / "sessions" / (64 * "b") / "t1.nii"
    other.parent.mkdir(parents=True)
    other.write_text("voxels")
    for path in (other, tmp_path / "uploads" / "t1.nii", tmp_path / "uploads" / "sessions" / "t1.nii"):
        with pytest.raises(InputError, match="the upload is gone"):
            take_uploads([str(path)], tmp_path / "uploads", ["t1"], tmp_path / "scans")
    assert other.exists() and list((tmp_path / "uploads").iterdir())
    gone = tmp_path / "uploads" / (64 * "c") / "t1.nii"
    with pytest.raises(InputError, match="the upload is gone"):
        take_uploads([str(gone)], tmp_path / "uploads", ["t1"], tmp_path / "scans")
    with pytest.raises(InputError, match="no files: drop one NIfTI file for each of t1"):
        take_uploads([], tmp_path / "uploads", ["t1"], tmp_path / "scans")
