"""A process of its own for each Hub stand-in: the Hub client reads its environment when it is imported."""

import contextlib
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from diffusers_cf.cli import main


@contextlib.contextmanager
def client_process(environment: dict[str, str | None]) -> Iterator:
    """Yields a function that calls another one in that process; None takes a variable out of its environment."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name, value in environment.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(timeout=280)


def command_line(*arguments) -> tuple[int, str, str]:
    """Exit code, output and errors of `diffusers-cf`; for the client's process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()
