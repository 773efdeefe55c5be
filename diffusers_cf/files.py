"""Write files and folders as a whole or not at all, one process at a time."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from diffusers_cf.errors import BusyError, InputError, reading


_UMASK = os.umask(0)
os.umask(_UMASK)
_made: list[Path] = []  # by make_folder; an outer folder comes before its inner ones


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder, which replaces `path` if the block ends without an error.

    Its name is random, so that nobody can plant a link there. Its mode is that of any new file.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_UMASK)
        _sync(Path(name))
        os.replace(name, path)
    except OSError as error:  # a failed write names no file, or the temporary one
        error.filename = str(path)
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(value: object, path: str | Path) -> None:
    """Write a value as JSON, as a whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, kind: type = dict) -> dict | list:
    """Read a JSON object, or a list.

    Raises:
        InputError: the file is missing, too large, no JSON, or of another kind.
    """
    path = Path(path)
    with reading(path, "JSON file"):
        if path.stat().st_size > 16 << 20:
            raise InputError(f"{path}: larger than 16 MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, kind):
        raise InputError(f"{path}: not a JSON {'object' if kind is dict else 'list'}")
    return value


def make_folder(path: str | Path) -> None:
    """Make an output folder, at a command's start so that a wrong path fails before any work is done."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    _made.extend(reversed(missing))


def remove_empty_folders() -> None:
    """Remove the folders of [`make_folder`] that are still empty, at a command's end."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()


@contextmanager
def alone_at(target: Path, timeout: float = 0) -> Iterator[None]:
    """Hold the lock of an output file or folder. Its parent folder is made if it is missing.

    The lock is a file beside the target, which is removed at the end. A lock that a killed process left is ignored.

    Args:
        target (`Path`): the output file or folder.
        timeout (`float`): seconds to wait for another process.

    Raises:
        BusyError: another process holds the lock.
    """
    path = target.with_name(f".{target.name}.lock")
    make_folder(target.parent)
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{target}: another process is writing it") from None
    try:
        _recover(target)
        yield
    finally:
        path.unlink(missing_ok=True)  # after the release it could be another process's lock
        lock.release()


def tidy(target: Path) -> None:
    """Remove what a killed process has left beside a target, unless another process is writing the target."""
    if _leftovers(target) or os.path.lexists(target.with_name(f".{target.name}.lock")):
        try:
            with alone_at(target):
                pass
        except BusyError:
            return


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` if the block ends without an error.

    Hold the lock [`alone_at`] the target meanwhile.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    os.chmod(temporary, 0o777 & ~_UMASK)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if target.exists():  # no rename replaces a folder that is not empty
            os.replace(target, target.with_name(f".{target.name}.old"))
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        _recover(target)


def _leftovers(target: Path) -> list[Path]:
    """Return the temporary folders of a target, and its old version if that was moved away."""
    names = glob.glob(f".{glob.escape(target.name)}.tmp-*", root_dir=target.parent, include_hidden=True)
    old = target.with_name(f".{target.name}.old")
    return [target.parent / name for name in names] + ([old] if os.path.lexists(old) else [])


def _recover(target: Path) -> None:
    """Move the old version back if there is no new one, and remove what is left beside the target."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not os.path.lexists(target):
        os.replace(old, target)
    for path in _leftovers(target):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
