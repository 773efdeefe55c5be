"""What a saved model folder holds beside diffusers' own files: preprocessing.json and checksums, but no trace of this machine."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from diffusers_cf.files import make_folder, write_json
from diffusers_cf.loading import CHECKSUMS, MODEL_INDEX, PREPROCESSING, WEIGHTS, checksums_name, sha256_of


def forget_origin(folder: str | os.PathLike) -> None:
    """Takes out of the configurations of a model folder where the model was loaded from.

    diffusers writes that path of the machine into each of them (`_name_or_path`), and it would be published.
    """
    for path in (Path(folder) / MODEL_INDEX, *Path(folder).glob("*/*config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_json(config, path)


def write_preprocessing(folder: str | os.PathLike, facts: Mapping) -> Path:
    """Writes preprocessing.json in one step, so that no reader ever sees half of it, and returns its path.

    Raises:
        ValueError: if a value is NaN or infinite, which JSON can't hold.
    """
    path = Path(folder) / PREPROCESSING
    make_folder(path.parent)
    write_json(facts, path)
    return path


def write_checksums(folder: str | os.PathLike) -> dict[str, str]:
    """Lists the SHA-256 of every weight file of a model folder in checksums.json.

    Weights of a variant have a list of their own (checksums.fp16.json): pushing one leaves the others' standing.

    Returns:
        `dict[str, str]`: file name relative to the folder to hexadecimal SHA-256, all variants together.
    """
    folder = Path(folder)
    lists = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        if WEIGHTS.fullmatch(path.name):
            sums = lists.setdefault(checksums_name(path.name), {})
            sums[f"{path.parent.name}/{path.name}"] = sha256_of(path)
    for path in folder.iterdir():
        if CHECKSUMS.fullmatch(path.name) and path.name not in lists:
            path.unlink()
    for name, sums in lists.items():
        write_json(sums, folder / name)
    return {name: value for sums in lists.values() for name, value in sums.items()}
