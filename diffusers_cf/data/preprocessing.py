"""preprocessing.json of a slice data set, which says how to decode its rows.

A data set may come from somebody else, so every entry that decides how rows are read is checked.
"""

import json
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.files import read_json


VERSION = 1
PREPROCESSING_FILE = "preprocessing.json"
DTYPES = ("float16", "float32", "uint8", "uint16", "int16")


def read_preprocessing(folder: str | Path) -> dict:
    """Read DATASET/preprocessing.json.

    Raises:
        InputError: the folder is missing, unfinished or of a newer version, or an entry is missing or not valid.
    """
    path = Path(folder) / PREPROCESSING_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no finished slice data set: {path.name} is missing (diffusers-cf prepare)")
    facts = read_json(path)
    if facts.get("version") != VERSION:
        raise InputError(f"{path}: not a slice data set of version {VERSION}")
    size, channels, scale, splits = (facts.get(name) for name in ("size", "channels", "scale", "splits"))
    names, modalities = facts.get("class_names"), facts.get("modalities", [])
    counts = [splits.get(name) for name in SPLITS] if isinstance(splits, dict) else [None]
    checks = {
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
    for name, is_good in checks.items():
        if not is_good:
            raise InputError(f"{path}: {name} is {json.dumps(facts.get(name))[:60]}, which is not valid")
    return facts


def shards_of(folder: str | Path, split: str) -> list[Path]:
    """Return the Parquet files of a split, sorted by name."""
    return sorted((Path(folder) / "data").glob(f"{split}-*.parquet"))


def collate_rows(rows: list[dict], preprocessing: dict) -> dict:
    """Decode rows to a batch.

    Args:
        rows (`list[dict]`): rows with the columns of `slice_features`.
        preprocessing (`dict`): as `read_preprocessing` returns it.

    Returns:
        `dict`: `images` float32 `(N, C, H, W)`; `masks` uint8 `(N, H, W)`, or None without masks; `labels` int64
            `(N,)`; `patients` list of str; `slices` int64 `(N,)`.

    Raises:
        InputError: a row does not fit preprocessing.json.
    """
    size, channels, scale = (preprocessing[name] for name in ("size", "channels", "scale"))
    dtype, has_masks = np.dtype(preprocessing["dtype"]), preprocessing["has_masks"]
    image_bytes, num_classes = size**2 * channels * dtype.itemsize, len(preprocessing["class_names"])
    for row in rows:
        image, mask = (len(row[name] or b"") for name in ("image", "mask"))
        if image != image_bytes or (has_masks and mask != size**2) or row["label"] not in range(num_classes):
            raise InputError(
                f"patient {row['patient']}, slice {row['slice']}: its image, mask or label does not fit"
                f" {PREPROCESSING_FILE} ({image} bytes of {image_bytes}, {mask} of {size**2}, label {row['label']})"
            )
    stored = np.frombuffer(b"".join(row["image"] for row in rows), dtype=dtype)
    images = torch.from_numpy(stored.astype(np.float32).reshape(len(rows), channels, size, size))
    masks = None
    if has_masks:
        stored = bytearray().join(row["mask"] for row in rows)
        masks = torch.from_numpy(np.frombuffer(stored, dtype=np.uint8).reshape(len(rows), size, size))
    return {
        "images": images if scale == 1 else images / scale,
        "masks": masks,
        "labels": torch.tensor([row["label"] for row in rows], dtype=torch.int64),
        "patients": [row["patient"] for row in rows],
        "slices": torch.tensor([row["slice"] for row in rows], dtype=torch.int64),
    }
