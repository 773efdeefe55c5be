"""Uploads: what becomes a patient's, what is refused, and that nothing of the rest is left."""

import asyncio
import os
import time

import pytest

from diffusers_cf.app.uploads import (
    FORM_BYTES,
    LONGEST_SECONDS,
    MAX_FILES,
    ORPHAN_SECONDS,
    LimitedUploads,
    Limits,
    take_uploads,
)
from diffusers_cf.errors import InputError


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


def test_too_many_or_too_large_files_are_one_line_and_gone(upload, tmp_path):
    folder = tmp_path / "uploads"
    paths = [upload("t1.nii", "a")]
    with pytest.raises(InputError, match=f"{MAX_FILES + 1} files: more than the limit of {MAX_FILES} at a time"):
        take_uploads(paths * (MAX_FILES + 1), folder, ["t1"], tmp_path / "scans")
    paths = [upload("t1.nii", "c"), upload("flair.nii", "d")]
    for path in paths:
        os.truncate(path, 3 << 19)
    with pytest.raises(InputError, match="^3 MB in all: larger than the limit of 2 MB$"):
        take_uploads(paths, folder, ["t1", "flair"], tmp_path / "scans", max_mb=2)
    assert not list(folder.iterdir()) and not list((tmp_path / "scans").iterdir())


@pytest.fixture
def uploads(tmp_path):
    (tmp_path / "uploads").mkdir()
    return LimitedUploads(tmp_path / "uploads", Limits(file_mb=1, patient_mb=2, all_mb=4))


def request(uploads, length, path="/gradio_api/upload", method="POST", behind=None):
    """Status and text of a request's answer; 200 without text where it has passed."""
    sent = []

    async def passed(scope, receive, send):
        await (behind or (lambda: asyncio.sleep(0)))()
        await send({"status": 200, "body": b""})

    async def send(message):
        sent.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(uploads(passed)(scope, None, send))
    return sent[0]["status"], sent[-1]["body"].decode()


def test_what_is_too_large_is_refused_before_it_is_written(uploads):
    assert request(uploads, (2 << 20) + FORM_BYTES) == (200, "")
    assert request(uploads, (2 << 20) + FORM_BYTES + 1) == (413, "3 MB in all: larger than the limit of 2 MB")
    assert request(uploads, None) == (411, "a request must say how long it is")
    assert request(uploads, None, method="GET") == (200, "")
    assert request(uploads, FORM_BYTES, "/gradio_api/other") == (200, "")
    assert request(uploads, FORM_BYTES + 1, "/gradio_api/other")[0] == 413


def test_all_uploads_together_have_a_limit(uploads):
    kept = uploads.folder / (64 * "a") / "t1.nii"
    kept.parent.mkdir()
    kept.write_bytes(bytes(3 << 20))
    assert request(uploads, 1 << 20) == (200, "")
    status, line = request(uploads, (1 << 20) + 1)
    assert status == 503 and line == "too many uploads at the moment: try again in some minutes"


def put(path, seconds):
    """A file that grew last so many seconds ago."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("voxels")
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_what_broke_off_is_swept_away(uploads):
    folder = uploads.folder
    young, old = put(folder / "young", ORPHAN_SECONDS - 60), put(folder / "old", ORPHAN_SECONDS + 60)
    begun = folder / "begun"
    begun.touch()
    patient = put(folder / (64 * "a") / "t1.nii", ORPHAN_SECONDS + 60)
    uploads.sweep()
    assert not old.exists() and young.exists() and begun.exists() and patient.exists()


def test_an_upload_under_way_keeps_its_files_but_not_for_ever(uploads):
    during, before = uploads.folder / "during", put(uploads.folder / "before", 9)

    async def behind():
        during.touch()
        later = time.time() + ORPHAN_SECONDS + 60
        uploads.sweep(later)
        assert during.exists() and not before.exists()
        uploads.sweep(later + LONGEST_SECONDS)
        assert not during.exists()
        during.touch()

    assert request(uploads, 1, behind=behind)[0] == 200
    uploads.sweep(time.time() + ORPHAN_SECONDS + 60)
    assert not during.exists()
