"""The files of a slice data set: find or download them, check preprocessing.json, and decode rows.

A data set may come from somebody else, so every entry that decides how rows are read is checked.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.files import read_json
from diffusers_cf.loading import PREPROCESSING, download


VERSION = 1
WITH_SIDES = "anterior up, patient's left at the image's left"  # the orientation of slices of scans
SPLITS_FILE = "splits.json"
DTYPES = ("float16", "float32", "uint8", "uint16", "int16")
_HUB_NAME = re.compile(r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>.+))?")


def convention_of(preprocessing: Mapping) -> str | None:
    """Return how pictures show slices of a data set: `radiological`, or None where columns are no sides of a patient."""
    return "radiological" if preprocessing.get("orientation") == WITH_SIDES else None


def dataset_folder(name: str | Path, split: str) -> tuple[Path, str | None]:
    """Return the folder of a data set, and the commit if it was downloaded.

    `name` is an existing folder, or else `user/name[@revision]` on the Hub, from which preprocessing.json and one split
    are downloaded.

    Raises:
        InputError: the repository, its revision or files of it are missing, or the download fails.
    """
    match = _HUB_NAME.fullmatch(str(name))
    if Path(name).is_dir() or isinstance(name, Path) or not match:
        return Path(name), None

    def choose(names: list[str], _: dict) -> list[str]:
        if PREPROCESSING not in names:
            raise InputError(f"{name}: the repository has no {PREPROCESSING}, so it is no slice data set")
        if SPLITS_FILE in names and not any(file.endswith(".parquet") for file in names):
            raise InputError(
                f"{name}: holds no images, because their license forbids it: prepare your own copy with its"
                f" {SPLITS_FILE}, as its README.md says"
            )
        return [PREPROCESSING, f"data/{split}-*.parquet"]

    folder = Path(download(match["repo_id"], choose, match["revision"], repo_type="dataset"))
    return folder, folder.name


def read_preprocessing(folder: str | Path) -> dict:
    """Read DATASET/preprocessing.json.

    Raises:
        InputError: the folder is missing, unfinished or of a newer version, or an entry is missing or not valid.
    """
    path = Path(folder) / PREPROCESSING
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
        "splits": all(isinstance(c, dict) and type(c.get("slices")) is int and c["slices"] >= 0 for c in counts),
    }
    if bad := [name for name, is_good in checks.items() if not is_good]:
        raise InputError(f"{path}: {bad[0]} is {json.dumps(facts.get(bad[0]))[:60]}, which is not valid")
    return facts


def shards_of(folder: str | Path, split: str) -> list[Path]:
    """Return the Parquet files of a split, sorted by name."""
    return sorted((Path(folder) / "data").glob(f"{split}-*.parquet"))


def collate_rows(rows: list[dict], preprocessing: dict) -> dict:
    """Decode rows with the columns of `slice_features` to a batch.

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
                f" {PREPROCESSING} ({image} bytes of {image_bytes}, {mask} of {size**2}, label {row['label']})"
            )
    images = np.frombuffer(b"".join(row["image"] for row in rows), dtype).astype(np.float32)
    images = torch.from_numpy(images.reshape(len(rows), channels, size, size))
    masks = np.frombuffer(bytearray().join(row["mask"] for row in rows), np.uint8) if has_masks else None
    return {
        "images": images if scale == 1 else images / scale,
        "masks": None if masks is None else torch.from_numpy(masks.reshape(len(rows), size, size)),
        "labels": torch.tensor([row["label"] for row in rows], dtype=torch.int64),
        "patients": [row["patient"] for row in rows],
        "slices": torch.tensor([row["slice"] for row in rows], dtype=torch.int64),
    }
