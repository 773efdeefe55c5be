"""The slice data set, which `prepare` writes and training and evaluation read.

`DATASET/data/*.parquet` has one row per axial slice; `datasets.load_dataset(DATASET)` opens it.
`DATASET/preprocessing.json` has the shape, dtype and scale of the images and the order of the modalities.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from diffusers_cf.data.preprocessing import collate_rows, dataset_folder, read_preprocessing, shards_of
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError, reading


# Rows per row group: a reader that loads one at a time needs memory for little more than a patient.
ROW_GROUP_SIZE = 256


@dataclass
class PatientSlices:
    """Axial slices of one patient, ready for the network.

    Attributes:
        patient (`str`): id of the patient.
        images (`np.ndarray`): float32 `(S, C, H, W)`, on the intensity scale of the data set (`intensity.py`),
            background exactly 0.
        labels (`np.ndarray`): int64 `(S,)`, index into the class names.
        slices (`np.ndarray`): int64 `(S,)`, axial index in the scan, counted from its inferior end.
        masks (`np.ndarray`, *optional*): uint8 {0, 1} `(S, H, W)`, 1 = lesion; None where the source has no masks.
        value_range (`list`, *optional*): least and greatest intensity of each channel before scaling.
        depth (`int`, *optional*): number of axial slices of the scan, empty ones included; None if it is unknown.
    """

    patient: str
    images: np.ndarray
    labels: np.ndarray
    slices: np.ndarray
    masks: np.ndarray | None = None
    value_range: list[tuple[float, float]] | None = None
    depth: int | None = None


def slice_features(class_names: Iterable[str]) -> datasets.Features:
    """Return the columns of the data set; `image` and `mask` are raw bytes, decoded by `SliceDataset.collate`."""
    label, binary = datasets.ClassLabel(names=list(class_names)), datasets.Value("binary")
    text, number = datasets.Value("string"), datasets.Value("int32")
    return datasets.Features({"image": binary, "mask": binary, "label": label, "patient": text, "slice": number})


def slices_to_table(
    patient: PatientSlices, class_names: Iterable[str], dtype: str = "float16", scale: float = 1
) -> pyarrow.Table:
    """Convert one patient to an Arrow table with the columns of `slice_features`.

    Intensities are stored as intensity x `scale`, rounded and clipped where `dtype` is an integer type.

    Raises:
        InputError: an intensity is too large for a float `dtype`.
    """
    images = patient.images.astype(np.float32) * np.float32(scale)
    if np.issubdtype(np.dtype(dtype), np.integer):
        limits = np.iinfo(dtype)
        images = np.clip(np.rint(images), limits.min, limits.max)
    elif (most := float(np.abs(images).max(initial=0))) > np.finfo(dtype).max:
        raise InputError(f"{patient.patient}: an intensity of {most:g} can't be stored as {dtype}: choose --normalize")
    masks = [None] * len(images) if patient.masks is None else [m.astype(np.uint8).tobytes() for m in patient.masks]
    columns = {
        "image": [image.tobytes() for image in images.astype(dtype)],
        "mask": masks,
        "label": np.asarray(patient.labels, dtype=np.int64),
        "patient": [patient.patient] * len(images),
        "slice": np.asarray(patient.slices, dtype=np.int32),
    }
    return pyarrow.table(columns, schema=slice_features(class_names).arrow_schema)


def write_tables(path: str | Path, tables: Iterable[pyarrow.Table], class_names: Iterable[str]) -> None:
    """Write tables to one Parquet file; raise ValueError if one has other columns."""
    schema = slice_features(class_names).arrow_schema
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=ROW_GROUP_SIZE)


def read_rows(shards: list[tuple[str, int, int]]) -> Iterator[dict]:
    """Yield the rows of Parquet files, each given as path, modification time and size.

    With time and size, a changed file has another entry in the cache of `datasets`.
    """
    for path, *_ in shards:
        with reading(path, "Parquet file"), pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                # Arrow's own threads outlive an error and crash the process at its end.
                yield from file.read_row_group(group, use_threads=False).to_pylist()


class SliceDataset(torch.utils.data.Dataset):
    """One split of a slice data set.

    Use it with `DataLoader(dataset, collate_fn=dataset.collate)`: `collate` decodes the bytes of a whole batch at once.
    A split without patients has length 0.

    Args:
        folder (`str` or `Path`): a folder written by `diffusers-cf prepare`, or else `user/name[@revision]` on the Hub,
            of which the files of this split are downloaded to the local cache.
        split (`str`): `train`, `validation` or `test`.
        cache_dir (`str` or `Path`, *optional*): where `datasets` keeps its memory-mapped copy; None for its default.

    Attributes:
        folder (`str`): as given.
        commit (`str`, *optional*): the commit that was downloaded from the Hub, None for a folder.
        preprocessing (`dict`): the content of preprocessing.json.
        class_names (`tuple[str, ...]`): names of the classes, in the order of the labels.
        labels, patients, slices (`np.ndarray`): `(N,)`, class index, patient and axial index of every slice.
        has_masks (`bool`): whether there are lesion masks, which evaluation needs.

    Raises:
        InputError: the folder is not a finished slice data set, or one of its files is damaged or missing.
        ValueError: `split` is unknown.
    """

    def __init__(self, folder: str | Path, split: str, cache_dir: str | Path | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.folder, self.split = str(folder), split
        path, self.commit = dataset_folder(folder, split)
        self.preprocessing = read_preprocessing(path)
        self.class_names = tuple(self.preprocessing["class_names"])
        self.has_masks = self.preprocessing["has_masks"]
        self.rows = self._open(path, cache_dir)
        # Straight from Arrow: reading row by row takes a minute for a thousand patients.
        self.labels = self.rows.data.column("label").to_numpy().astype(np.int64)
        self.patients = self.rows.data.column("patient").to_numpy().astype(str)
        self.slices = self.rows.data.column("slice").to_numpy().astype(np.int64)

    def _open(self, path: Path, cache_dir: str | Path | None) -> datasets.Dataset:
        features, count = slice_features(self.class_names), self.preprocessing["splits"][self.split]["slices"]
        shards = [(str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in shards_of(path, self.split)]
        if not shards:  # a split without patients has no file, and `datasets` can't read zero rows
            check_count(self.folder, self.split, 0, count)
            return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        with reading(self.folder, "slice data set"):
            try:
                # Not `load_dataset`, which treats a path as a pattern: it expands `*`, `[1]` and `$VAR`, splits at
                # `::`, and may read the files of another data set.
                rows = datasets.Dataset.from_generator(
                    read_rows, features=features, cache_dir=cache_dir, gen_kwargs={"shards": shards}, split=self.split
                )
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ from None
        check_count(self.folder, self.split, len(rows), count)
        return rows

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """Return one row, undecoded."""
        return self.rows[int(index)]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Return several rows in one read, undecoded."""
        return self.rows.__getitems__([int(i) for i in indices])

    def collate(self, rows: list[dict]) -> dict:
        """Decode rows to a batch, see `collate_rows`."""
        return collate_rows(rows, self.preprocessing)


def check_count(folder: str, split: str, found: int, expected: int) -> None:
    """Raise `InputError` unless a split holds as many slices as preprocessing.json says."""
    if found != expected:
        raise InputError(f"{folder}: incomplete copy: {found} of the {expected} slices of its split {split} are there")


def batches_of(dataset, indices: Sequence[int], batch_size: int) -> Iterator[dict]:
    """Yield rows of a `SliceDataset` as collated batches, in the order of `indices`; the last may be smaller."""
    for start in range(0, len(indices), batch_size):
        yield dataset.collate(dataset.__getitems__([int(index) for index in indices[start : start + batch_size]]))
