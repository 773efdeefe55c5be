"""Messages and progress on stderr: bars in a terminal, else lines with a time stamp."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.std import tqdm


LEVELS = ("debug", "info", "warning", "error")
INTERVAL = 30  # seconds between two lines of a progress bar
_close = tqdm.close


@contextmanager
def log_to_stderr(level: str = "info") -> Iterator[None]:
    """Write log records and progress to stderr within this context.

    In a terminal, records are their message and bars stay bars. Elsewhere, as in a file or a pipe, a record is a line
    with a time stamp, and so is progress: every bar logs one each `INTERVAL` seconds, and a last one when it is full.

    Args:
        level (`str`): one of `LEVELS`. Records and progress (which is `info`) below it are dropped. Other packages
            write warnings and errors only, and `info` where this is `debug`.
    """
    root, own = logging.getLogger(), logging.getLogger("diffusers_cf")
    before, number = (root.level, own.level, logging.root.manager.disable), getattr(logging, level.upper())
    in_terminal = sys.stderr.isatty()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if in_terminal else "%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    own.setLevel(number)
    logging.disable(number - 1)  # diffusers, transformers and datasets have handlers and levels of their own
    logging.captureWarnings(True)
    originals = {name: tqdm.__dict__[name] for name in ("display", "clear", "close")}
    if not in_terminal or level in ("warning", "error"):
        # every bar's class derives from tqdm.std.tqdm, those of diffusers, datasets and the Hub client, too
        tqdm.display, tqdm.clear, tqdm.close = _log_progress, lambda *_, **__: None, _close_silently
    try:
        yield
    finally:
        for name, method in originals.items():
            setattr(tqdm, name, method)
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(before[0])
        own.setLevel(before[1])
        logging.disable(before[2])


def _log_progress(bar: tqdm, msg: str | None = None, pos: int | None = None) -> None:
    """Stand in for `tqdm.display`, which is called up to ten times a second and once when a bar that stays is closed."""
    closed, now = bar.disable, bar._time()
    full = closed and msg is None and bar.n >= (bar.total or 0) and vars(bar).get("logged_n") != bar.n
    if full or (not closed and now - vars(bar).setdefault("logged_at", now) >= INTERVAL):
        bar.logged_at, bar.logged_n = now, bar.n
        # without columns there is room for numbers only
        logging.getLogger(__name__).info(bar.format_meter(**bar.format_dict | {"ncols": 0}))


def _close_silently(bar: tqdm) -> None:
    bar.fp = io.StringIO()  # for line ends and carriage returns
    _close(bar)
