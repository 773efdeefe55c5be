"""What users upload to `diffusers-cf app`: how much it may be, how it becomes a patient's, and that none of it is left."""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_cf.data.nifti import canonical_modality, nifti_suffix
from diffusers_cf.errors import InputError


MAX_FILES = 16  # at a time; a line about a few too many names them
ORPHAN_SECONDS, LONGEST_SECONDS = 120, 1800  # since a file grew last: without and with an upload under way
FORM_BYTES = 1 << 20  # of a request, beside its files
GONE = "the upload is gone: drop the files again"


@dataclass(frozen=True)
class Limits:
    """How much a user may upload.

    Attributes:
        file_mb: A file, packed and unpacked.
        patient_mb: All files of a patient, and the scans in memory.
        all_mb: What lies in the folder of uploads, of all users together.
    """

    file_mb: int
    patient_mb: int
    all_mb: int


class LimitedUploads:
    """ASGI middleware: refuses uploads above the limits before they are written, and knows which are under way.

    Args:
        folder: Where the server writes uploads: a temporary file for each, moved once its request is complete.
        limits: Of their sizes.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self._begun: dict[object, float] = {}

    def __call__(self, app: Callable) -> Callable:
        """The ASGI application, guarded."""

        async def guarded(scope, receive, send) -> None:
            if not (scope["type"] == "http" and scope["method"] == "POST"):
                return await app(scope, receive, send)
            length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
            refused = self.refusal(length, scope["path"].endswith("/upload"))
            if refused:
                return await _answer(send, *refused)
            from starlette.requests import ClientDisconnect

            upload = object()
            self._begun[upload] = time.time() - 1  # clocks of file systems are coarse
            try:
                with contextlib.suppress(ClientDisconnect):  # nobody is left to be told
                    await app(scope, receive, send)
            finally:
                del self._begun[upload]

        return guarded

    def refusal(self, length: str, is_upload: bool = True) -> tuple[int, str] | None:
        """Status and line for a request with so many bytes, as its header says; None where it may come."""
        limit_mb = self.limits.patient_mb if is_upload else 0
        if not length.isdecimal():
            return 411, "a request must say how long it is"
        if int(length) > (limit_mb << 20) + FORM_BYTES:
            return 413, f"{int(length) >> 20} MB in all: larger than the limit of {limit_mb} MB"
        if sum(size for _, size, _ in _files_of(self.folder)) + int(length) > self.limits.all_mb << 20:
            return 503, "too many uploads at the moment: try again in some minutes"
        return None

    def sweep(self, now: float | None = None) -> None:
        """Deletes what is left of uploads that broke off; those under way are younger than their request."""
        now = time.time() if now is None else now
        latest = min([now - ORPHAN_SECONDS, *self._begun.values()])
        for path, _, changed in _files_of(self.folder):
            if path.parent == self.folder and changed < max(latest, now - LONGEST_SECONDS):
                path.unlink(missing_ok=True)


def _files_of(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """Files anywhere in a folder with their sizes and times; they come and go meanwhile."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                yield path, facts.st_size, facts.st_mtime


async def _answer(send, status: int, line: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": line.encode()})


def take_uploads(
    paths: Sequence[str], uploads: Path, modalities: Sequence[str], target: Path, max_mb: int | None = None
) -> None:
    """Moves the files that a user has dropped into a folder, and deletes all of them where they can't be a patient.

    Args:
        paths: Each in a folder of its own in `uploads`, as gradio stores them.
        uploads: A browser may claim any path: what does not lie there is neither read nor deleted.
        modalities: What the model takes.
        target: The patient's folder of scans.
        max_mb: Limit for all files together.

    Raises:
        InputError: There is none, there are too many or too large ones, one is no NIfTI file by its name, or no modality
            of the model.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise InputError(f"no files: drop one NIfTI file for each of {', '.join(modalities)}")
    if not all(file.parent.parent == uploads and re.fullmatch("[0-9a-f]{64}", file.parent.name) for file in files):
        raise InputError(GONE)
    try:
        _check_amount(files, max_mb)
        for path in files:
            _check_name(path.name, [*modalities, "seg"])
            if (target / path.name).exists():
                raise InputError(f"{path.name}: there are two files of this name")
            os.replace(path, target / path.name)
    except FileNotFoundError:  # another page has dropped the same file at the same moment
        raise InputError(GONE) from None
    finally:
        for path in files:
            shutil.rmtree(path.parent, ignore_errors=True)


def _check_amount(files: Sequence[Path], max_mb: int | None) -> None:
    if len(files) > MAX_FILES:
        raise InputError(f"{len(files)} files: more than the limit of {MAX_FILES} at a time")
    total = sum(path.stat().st_size for path in files)
    if max_mb is not None and total > max_mb << 20:
        raise InputError(f"{total >> 20} MB in all: larger than the limit of {max_mb} MB")


def _check_name(name: str, known: Sequence[str]) -> None:
    suffix = nifti_suffix(name)
    if not suffix:
        raise InputError(f"{name}: not a NIfTI file by its name (.nii.gz or .nii)")
    if canonical_modality(suffix) not in map(canonical_modality, known):
        raise InputError(f"{name}: its name ends in none of {', '.join(known)}")
