"""Whose patient is whose, and that nothing outlasts its user."""

from pathlib import Path

import pytest

from diffusers_cf.app.sessions import Sessions
from diffusers_cf.errors import InputError


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
