"""Whose patient is whose: the explorers of all users at work, each with a folder of its own that goes when they go."""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

from diffusers_cf.app.explorer import Explorer
from diffusers_cf.errors import InputError


NO_PATIENT = "no patient is loaded (or the session has ended): drop the files of one, or pick a phantom patient"


class Sessions:
    """Explorers by the key of the page that uses them.

    Args:
        folder: Gets a folder with a name that can't be guessed for each patient.
        limit: How many patients are kept at most; the one that was idle for longest makes room.
        idle_seconds: After which time without use a patient is forgotten.
    """

    def __init__(self, folder: Path, limit: int = 8, idle_seconds: float = 1800.0) -> None:
        self.folder, self.limit, self.idle_seconds = folder, limit, idle_seconds
        self._lock = threading.Lock()
        self._explorers: dict[Hashable, Explorer] = {}
        self._used: dict[Hashable, float] = {}

    def open(self, key: Hashable, fill: Callable[[Path], None], make: Callable[[Path], Explorer]) -> Explorer:
        """Makes an explorer in a new folder; an earlier one of the same key ends, and on any error nothing is kept.

        Args:
            key: Of the page.
            fill: Puts scans into the folder that it is given.
            make: Makes an explorer of the folder above it.
        """
        self.close(key)
        folder = self.folder / secrets.token_hex(16)
        try:
            (folder / "scans").mkdir(parents=True, mode=0o700)
            fill(folder / "scans")
            explorer = make(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            idlest = sorted(self._used, key=self._used.get)[: max(0, len(self._used) + 1 - self.limit)]
            replaced = [self._forget(other) for other in {*idlest, key} if other in self._explorers]
            self._explorers[key], self._used[key] = explorer, time.monotonic()
        for other in replaced:
            other.close()
        return explorer

    def get(self, key: Hashable) -> Explorer:
        """The explorer of a page.

        Raises:
            InputError: There is none, or none any more.
        """
        with self._lock:
            if key not in self._explorers:
                raise InputError(NO_PATIENT)
            self._used[key] = time.monotonic()
            return self._explorers[key]

    def close(self, key: Hashable) -> None:
        """Forgets the patient of a page; nothing happens where there is none."""
        with self._lock:
            explorer = self._forget(key) if key in self._explorers else None
        if explorer:
            explorer.close()

    def close_idle(self) -> None:
        """Forgets patients that were not used for `idle_seconds`."""
        with self._lock:
            latest = time.monotonic() - self.idle_seconds
            idle = [self._forget(key) for key, used in list(self._used.items()) if used <= latest]
        for explorer in idle:
            explorer.close()

    def close_all(self) -> None:
        """Forgets everybody."""
        for key in list(self._explorers):
            self.close(key)

    def _forget(self, key: Hashable) -> Explorer:
        del self._used[key]
        return self._explorers.pop(key)
