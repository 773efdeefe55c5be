"""Learning curves: rows at rising steps in a JSON file, with which a resumed training goes on."""

from pathlib import Path

from diffusers_cf.files import read_json, write_json


LOSSES = "losses.json"  # in the folder of a training: `step`, `images`, `loss`, `lr`, `images_per_second`
SCORES = "validation/scores.json"  # `step`, `images` and the scores of `Validation`


def read_curve(path: Path) -> list[dict]:
    """Return the rows of a curve; [] if there is no such file."""
    return read_json(path, list) if path.is_file() else []


def add_to_curve(path: Path, row: dict) -> None:
    """Add a row to a curve. Rows of this and later steps, from before a resume, are replaced."""
    write_json([before for before in read_curve(path) if before["step"] < row["step"]] + [row], path)
