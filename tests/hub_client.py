"""A process for each Hub (the Hub's client reads its environment when it is imported), and a RESULT.json."""

import contextlib
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from model_files import FACTS

from diffusers_cf.cli import main


MODEL_FACTS = FACTS | {"class_names": ["healthy", "unhealthy"], "source": "phantom", "size": 8}
RESULT = {
    "auprc": 0.625, "ideal_dice": 0.5, "slice_auroc": None, "n_patients": 4, "n_slices": 40,
    "postprocessed": {
        "auprc": 0.75, "ideal_dice": 0.5625, "slice_auroc": None,
        "per_patient_dice": {"mean": 0.5, "interval": [0.25, 0.625], "threshold": 0.125},
    },
    "dataset": {"source": "phantom", "split": "test"}, "protocol": {"pixels": "all of them"},
    "command": "diffusers-cf evaluate --model MODEL", "commit": "def",
}  # fmt: skip


@contextlib.contextmanager
def client_process(environment: dict[str, str | None]) -> Iterator:
    """Yield a function that calls another one in that process; None removes a variable from its environment."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name, value in environment.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(timeout=280)


def command_line(*arguments) -> tuple[int, str, str]:
    """Return exit code, output and errors of `diffusers-cf`; for the client's process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()
