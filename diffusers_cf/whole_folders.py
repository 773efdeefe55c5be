"""Folders that are written whole or not at all, by one process at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from diffusers_cf.errors import InputError


class BusyError(InputError):
    """Another process is at the same work, and will say what became of it."""


@contextmanager
def alone_at(target: Path, timeout: float = 0) -> Iterator[None]:
    """Keeps other processes off a file or folder meanwhile; its own folder is made where it is missing.

    The lock file beside it goes at the end. One that a killed process has left locks nobody out.

    Args:
        target: What is written.
        timeout: Seconds to wait for another process.

    Raises:
        BusyError: Another process is at it.
        InputError: The folder can't be written.
    """
    path = _beside(target, "lock")
    lock = FileLock(path, timeout=timeout)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BusyError(f"{target}: another process is writing it") from None
    except OSError as error:
        raise InputError(f"{target}: can't be written ({error.strerror or error})") from None
    try:
        _recover(target)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: later, it could be another process's
        lock.release()


def tidy(target: Path) -> None:
    """Removes what a process that was killed has left beside a target, unless another is at it."""
    if any(os.path.lexists(_beside(target, kind)) for kind in ("lock", "tmp", "old")):
        try:
            with alone_at(target):
                pass
        except InputError:
            return


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that gets the target's name, and its place, when it is whole and on the disk.

    Only for a process that is `alone_at` the target.

    Raises:
        InputError: It can't be written.
    """
    temporary, old = _beside(target, "tmp"), _beside(target, "old")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if target.exists():  # it steps aside first, since no rename replaces a full folder
            os.replace(target, old)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise InputError(f"{target}: can't be written ({error.strerror or error})") from None
    finally:
        _recover(target)


def _recover(target: Path) -> None:
    """Leaves the target, new or old, and nothing beside it."""
    shutil.rmtree(_beside(target, "tmp"), ignore_errors=True)
    old = _beside(target, "old")
    if old.is_dir() and not os.path.lexists(target):
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
