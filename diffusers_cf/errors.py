"""Errors of the user or the machine, which end a command with one line and exit code 2 instead of a traceback."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A file, folder, data set or option can't be used. The message is one line with its name and the reason."""


class BusyError(InputError):
    """Another process is writing the same output."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(error: BaseException) -> str | None:
    """Return one line about an error for the user, or None for an error that is a fault of this package."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or first_line(error)}"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r} can't be written as {error.encoding}: use names without such characters"
    if isinstance(error, MemoryError):
        return f"out of memory ({first_line(error)})"
    if isinstance(error, BrokenProcessPool):
        return "a worker process was killed, probably because memory ran out: use fewer --num_workers"
    return None


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever a reader raises into one `InputError` that names the file.

    Args:
        path (`str` or `Path`): the file or folder being read.
        kind (`str`): what it should be, such as "NIfTI file".

    Raises:
        InputError: the file is missing or unreadable, or its reader raised any exception.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or first_line(error)})") from None
    except Exception as error:  # decoders raise arbitrary exceptions
        raise InputError(f"{path}: not a readable {kind} ({first_line(error)})") from None
