"""The slice data set: what `prepare` writes and what training and evaluation read.

`DATASET/data/*.parquet` holds one row per axial slice, opened by `datasets.load_dataset(DATASET)`;
`DATASET/preprocessing.json` holds the facts that Parquet does not keep: shape, dtype, scale, modality order.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from diffusers_cf.errors import InputError


VERSION = 1
SPLITS = ("train", "validation", "test")
PREPROCESSING_FILE = "preprocessing.json"
ORIENTATION = "anterior up, patient's left at the image's left"
# Rows per row group: small enough that a reader never holds much more than a patient at a time.
ROW_GROUP_SIZE = 256


@dataclass
class PatientSlices:
    """Axial slices of one patient, ready for the network.

    Attributes:
        patient: Id of the patient.
        images: float32 (S, C, H, W), intensity / 99th percentile of the scan's foreground, background exactly 0.
        labels: int64 (S,), index into the class names.
        slices: int64 (S,), axial index in the scan, counted from its inferior end.
        masks: uint8 {0, 1} (S, H, W), 1 = lesion, or None where the source has no masks.
    """

    patient: str
    images: np.ndarray
    labels: np.ndarray
    slices: np.ndarray
    masks: np.ndarray | None = None


def slice_features(class_names: Iterable[str]) -> datasets.Features:
    """Returns the columns of the data set; `image` and `mask` are raw bytes (see `SliceDataset.collate`)."""
    return datasets.Features(
        {
            "image": datasets.Value("binary"),
            "mask": datasets.Value("binary"),
            "label": datasets.ClassLabel(names=list(class_names)),
            "patient": datasets.Value("string"),
            "slice": datasets.Value("int32"),
        }
    )


def encode_images(images: np.ndarray, dtype: str, scale: float) -> np.ndarray:
    """Converts float32 intensities to the stored form: value = stored / scale, rounded and clipped for integers."""
    stored = images.astype(np.float32) * np.float32(scale)
    if np.issubdtype(np.dtype(dtype), np.integer):
        limits = np.iinfo(dtype)
        stored = np.clip(np.rint(stored), limits.min, limits.max)
    return np.ascontiguousarray(stored.astype(dtype))


def slices_to_table(
    patient: PatientSlices, class_names: Iterable[str], dtype: str = "float16", scale: float = 1
) -> pyarrow.Table:
    """Converts one patient to an Arrow table with the columns of `slice_features`."""
    images = encode_images(patient.images, dtype, scale)
    masks = [None] * len(images) if patient.masks is None else [m.astype(np.uint8).tobytes() for m in patient.masks]
    columns = {
        "image": [image.tobytes() for image in images],
        "mask": masks,
        "label": np.asarray(patient.labels, dtype=np.int64),
        "patient": [patient.patient] * len(images),
        "slice": np.asarray(patient.slices, dtype=np.int32),
    }
    return pyarrow.table(columns, schema=slice_features(class_names).arrow_schema)


def write_patient(
    path: str | Path, patient: PatientSlices, class_names: Iterable[str], dtype: str = "float16", scale: float = 1
) -> None:
    """Writes one patient as a Parquet file. Rename it into place afterwards: a kill may leave it half written."""
    write_tables(path, [slices_to_table(patient, class_names, dtype, scale)], class_names)


def write_tables(path: str | Path, tables: Iterable[pyarrow.Table], class_names: Iterable[str]) -> None:
    """Writes tables one after the other into one Parquet file; stops where a table has other columns."""
    schema = slice_features(class_names).arrow_schema
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=ROW_GROUP_SIZE)


def read_preprocessing(folder: str | Path) -> dict:
    """Reads DATASET/preprocessing.json.

    Raises:
        InputError: The folder is missing, is no finished data set, or was written by a newer version.
    """
    path = Path(folder) / PREPROCESSING_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no finished slice data set: {path.name} is missing (diffusers-cf prepare)")
    try:
        preprocessing = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(preprocessing, dict) or preprocessing.get("version") != VERSION:
        raise InputError(f"{path}: not a slice data set of version {VERSION}")
    return preprocessing


class SliceDataset(torch.utils.data.Dataset):
    """One split of a slice data set.

    Use it with `DataLoader(dataset, collate_fn=dataset.collate)`: bytes stay bytes until `collate`, which decodes a
    whole batch at once. A split without patients has length 0.

    Args:
        folder: A folder written by `diffusers-cf prepare`.
        split: `train`, `validation` or `test`.
        cache_dir: Where `datasets` keeps its memory-mapped copy; its own default if None.

    Attributes:
        preprocessing: The parsed preprocessing.json.
        class_names: Names of the classes, in the order of the labels.
        labels: int64 (N,), class index of every slice.
        patients: str (N,), patient of every slice.
        slices: int64 (N,), axial index of every slice.
        has_masks: Whether lesion masks are there, which evaluation needs.

    Raises:
        InputError: The folder is no finished slice data set, or a file of it is damaged.
        ValueError: `split` is unknown.
    """

    def __init__(self, folder: str | Path, split: str, cache_dir: str | Path | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.folder, self.split = str(folder), split
        self.preprocessing = read_preprocessing(folder)
        self.class_names = tuple(self.preprocessing["class_names"])
        self.has_masks = self.preprocessing["has_masks"]
        self.rows = self._load(cache_dir)
        # Straight from Arrow: row by row it takes a minute for the slices of a thousand patients.
        self.labels = self.rows.data.column("label").to_numpy().astype(np.int64)
        self.patients = self.rows.data.column("patient").to_numpy().astype(str)
        self.slices = self.rows.data.column("slice").to_numpy().astype(np.int64)

    def _load(self, cache_dir) -> datasets.Dataset:
        if not self.preprocessing["splits"][self.split]["slices"]:
            # A split without patients has no file: `datasets` refuses to read a split of zero rows.
            features = slice_features(self.class_names)
            return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        cache_dir = None if cache_dir is None else str(cache_dir)
        try:
            return datasets.load_dataset(self.folder, split=self.split, cache_dir=cache_dir)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.folder}: the Parquet files can't be read ({reason})") from None

    def __len__(self) -> int:
        """Returns the number of slices."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """Returns one row, undecoded."""
        return self.rows[int(index)]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Returns several rows in one read, undecoded."""
        return self.rows.__getitems__([int(i) for i in indices])

    def collate(self, rows: list[dict]) -> dict:
        """Decodes rows to a batch.

        Returns:
            `images` float32 (N, C, H, W); `masks` uint8 (N, H, W), or None without masks; `labels` int64 (N,);
            `patients` list of str; `slices` int64 (N,).
        """
        size, channels = self.preprocessing["size"], self.preprocessing["channels"]
        dtype, scale = np.dtype(self.preprocessing["dtype"]), self.preprocessing["scale"]
        stored = np.frombuffer(b"".join(row["image"] for row in rows), dtype=dtype)
        images = torch.from_numpy(stored.astype(np.float32).reshape(len(rows), channels, size, size))
        masks = None
        if self.has_masks:
            stored = bytearray().join(row["mask"] for row in rows)
            masks = torch.from_numpy(np.frombuffer(stored, dtype=np.uint8).reshape(len(rows), size, size))
        return {
            "images": images if scale == 1 else images / scale,
            "masks": masks,
            "labels": torch.tensor([row["label"] for row in rows], dtype=torch.int64),
            "patients": [row["patient"] for row in rows],
            "slices": torch.tensor([row["slice"] for row in rows], dtype=torch.int64),
        }


def batches_of(dataset, indices: Sequence[int], batch_size: int) -> Iterator[dict]:
    """Yields chosen rows of a `SliceDataset` in their order as collated batches, the last one maybe smaller."""
    for start in range(0, len(indices), batch_size):
        yield dataset.collate(dataset.__getitems__([int(index) for index in indices[start : start + batch_size]]))
