"""preprocessing.json of a slice data set, the facts that Parquet does not keep, and rows decoded by them.

A data set may come from somebody else: what is not as it must be is refused in words.
"""

import json
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.errors import InputError


VERSION = 1
SPLITS = ("train", "validation", "test")
PREPROCESSING_FILE = "preprocessing.json"
DTYPES = ("float16", "float32", "uint8", "uint16", "int16")
_MAX_JSON_BYTES = 16 * 2**20


def read_preprocessing(folder: str | Path) -> dict:
    """Reads DATASET/preprocessing.json.

    Raises:
        InputError: The folder is missing, is no finished data set, was written by a newer version, or the file lacks
            what reading the slices needs.
    """
    path = Path(folder) / PREPROCESSING_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no finished slice data set: {path.name} is missing (diffusers-cf prepare)")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"{path}: larger than {_MAX_JSON_BYTES // 2**20} MiB, refused")
    try:
        preprocessing = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(preprocessing, dict) or preprocessing.get("version") != VERSION:
        raise InputError(f"{path}: not a slice data set of version {VERSION}")
    for name, good in _checks(preprocessing).items():
        if not good:
            raise InputError(f"{path}: {name} is {json.dumps(preprocessing.get(name))[:60]}, which can't be")
    return preprocessing


def _checks(facts: dict) -> dict[str, bool]:
    """Whether each entry that decides how rows are read is what it must be."""
    size, channels, scale, splits = (facts.get(name) for name in ("size", "channels", "scale", "splits"))
    names, modalities = facts.get("class_names"), facts.get("modalities", [])
    counts = [splits.get(name) for name in SPLITS] if isinstance(splits, dict) else [None]
    return {
        "class_names": isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names),
        "size": type(size) is int and 0 < size <= 2**14,
        "channels": type(channels) is int and 0 < channels <= 2**10,
        "modalities": isinstance(modalities, list) and len(modalities) in (0, channels),
        "dtype": facts.get("dtype") in DTYPES,
        "scale": type(scale) in (int, float) and 0 < scale < float("inf"),
        "has_masks": isinstance(facts.get("has_masks"), bool),
        "splits": all(
            isinstance(count, dict) and type(count.get("slices")) is int and count["slices"] >= 0 for count in counts
        ),
    }


def shards_of(folder: str | Path, split: str) -> list[Path]:
    """Returns the Parquet files of a split, in the order of their names."""
    return sorted((Path(folder) / "data").glob(f"{split}-*.parquet"))


def collate_rows(rows: list[dict], preprocessing: dict) -> dict:
    """Decodes rows to a batch.

    Args:
        rows: Rows with the columns of `slice_features`.
        preprocessing: As `read_preprocessing` returns it.

    Returns:
        `images` float32 (N, C, H, W); `masks` uint8 (N, H, W), or None without masks; `labels` int64 (N,);
        `patients` list of str; `slices` int64 (N,).

    Raises:
        InputError: A row is not what preprocessing.json says.
    """
    size, channels = preprocessing["size"], preprocessing["channels"]
    dtype, scale = np.dtype(preprocessing["dtype"]), preprocessing["scale"]
    _check_rows(rows, preprocessing)
    stored = np.frombuffer(b"".join(row["image"] for row in rows), dtype=dtype)
    images = torch.from_numpy(stored.astype(np.float32).reshape(len(rows), channels, size, size))
    masks = None
    if preprocessing["has_masks"]:
        stored = bytearray().join(row["mask"] for row in rows)
        masks = torch.from_numpy(np.frombuffer(stored, dtype=np.uint8).reshape(len(rows), size, size))
    return {
        "images": images if scale == 1 else images / scale,
        "masks": masks,
        "labels": torch.tensor([row["label"] for row in rows], dtype=torch.int64),
        "patients": [row["patient"] for row in rows],
        "slices": torch.tensor([row["slice"] for row in rows], dtype=torch.int64),
    }


def _check_rows(rows: list[dict], preprocessing: dict) -> None:
    pixels = preprocessing["size"] ** 2
    image_bytes = pixels * preprocessing["channels"] * np.dtype(preprocessing["dtype"]).itemsize
    classes = range(len(preprocessing["class_names"]))
    for row in rows:
        wrong = None
        if len(row["image"] or b"") != image_bytes:
            wrong = f"its image has not {image_bytes} bytes"
        elif preprocessing["has_masks"] and len(row["mask"] or b"") != pixels:
            wrong = f"its mask has not {pixels} bytes"
        elif row["label"] not in classes:
            wrong = f"its label {row['label']} is none of {len(classes)} classes"
        if wrong:
            raise InputError(
                f"patient {row['patient']}, slice {row['slice']}: {wrong}, as {PREPROCESSING_FILE} has it"
            )
