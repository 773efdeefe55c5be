"""Learning curves: values at rising steps in a JSON file, with which a resumed training goes on."""

import json
from pathlib import Path

from diffusers_cf.errors import InputError, reading
from diffusers_cf.files import write_json


LOSSES = "losses.json"  # in the folder of a training: `step`, `loss`, `lr`, `images_per_second`
SCORES = "validation/scores.json"  # `step`, `images` and the scores of `Validation`


def read_curve(path: Path) -> list[dict]:
    """Return the rows of a curve, each with `step`; [] if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return []
    with reading(path, "learning curve"):
        rows = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(rows, list) and all(isinstance(row, dict) and "step" in row for row in rows)):
        raise InputError(f"{path}: not a learning curve")
    return rows


def add_to_curve(path: Path, row: dict) -> None:
    """Add a row to a curve. Rows of this and later steps, from before a resume, are replaced."""
    write_json([before for before in read_curve(path) if before["step"] < row["step"]] + [row], path)
