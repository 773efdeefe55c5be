"""The slice data set: what `prepare` writes and what training and evaluation read.

`DATASET/data/*.parquet` holds one row per axial slice, opened by `datasets.load_dataset(DATASET)`;
`DATASET/preprocessing.json` holds the facts that Parquet does not keep: shape, dtype, scale, modality order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import torch

from diffusers_cf.data.download import dataset_folder
from diffusers_cf.data.preprocessing import SPLITS, collate_rows, read_preprocessing, shards_of
from diffusers_cf.errors import InputError


ORIENTATION = "anterior up, patient's left at the image's left"
# Rows per row group: small enough that a reader never holds much more than a patient at a time.
ROW_GROUP_SIZE = 256
# Row groups are read when they are wanted: read ahead, a small file is in memory as a whole.
FROM_DISK = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)


@dataclass
class PatientSlices:
    """Axial slices of one patient, ready for the network.

    Attributes:
        patient: Id of the patient.
        images: float32 (S, C, H, W), on the intensity scale of the data set (`intensity.py`), background exactly 0.
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


def check_split(split: str) -> None:
    """Raises ValueError unless it is the name of a split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")


class SliceDataset(torch.utils.data.Dataset):
    """One split of a slice data set.

    Use it with `DataLoader(dataset, collate_fn=dataset.collate)`: bytes stay bytes until `collate`, which decodes a
    whole batch at once. A split without patients has length 0.

    Args:
        folder: A folder written by `diffusers-cf prepare`, or a data set on the Hub, `user/name[@revision]`, of which
            the files of this split are downloaded to the local cache. A folder wins.
        split: `train`, `validation` or `test`.
        cache_dir: Where `datasets` keeps its memory-mapped copy; its own default if None.

    Attributes:
        folder: As given.
        commit: The commit of the Hub that was downloaded, None for a folder.
        preprocessing: The parsed preprocessing.json.
        class_names: Names of the classes, in the order of the labels.
        labels: int64 (N,), class index of every slice.
        patients: str (N,), patient of every slice.
        slices: int64 (N,), axial index of every slice.
        has_masks: Whether lesion masks are there, which evaluation needs.

    Raises:
        InputError: The folder is no finished slice data set, or a file of it is damaged or missing.
        ValueError: `split` is unknown.
    """

    def __init__(self, folder: str | Path, split: str, cache_dir: str | Path | None = None):
        check_split(split)
        self.folder, self.split = str(folder), split
        path, self.commit = dataset_folder(folder, split)
        self.preprocessing = read_preprocessing(path)
        self.class_names = tuple(self.preprocessing["class_names"])
        self.has_masks = self.preprocessing["has_masks"]
        self.rows = self._load(path, cache_dir)
        # Straight from Arrow: row by row it takes a minute for the slices of a thousand patients.
        self.labels = self.rows.data.column("label").to_numpy().astype(np.int64)
        self.patients = self.rows.data.column("patient").to_numpy().astype(str)
        self.slices = self.rows.data.column("slice").to_numpy().astype(np.int64)

    def _load(self, path: Path, cache_dir) -> datasets.Dataset:
        features, count = slice_features(self.class_names), self.preprocessing["splits"][self.split]["slices"]
        if not count:
            # A split without patients has no file: `datasets` refuses to read a split of zero rows.
            return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        files = [str(shard) for shard in shards_of(path, self.split)]
        if not files:
            raise InputError(missing_split(self.folder, self.split, self.commit))
        cache_dir = None if cache_dir is None else str(cache_dir)
        try:
            # The files by name: the front matter of a README.md beside them could name others, anywhere.
            rows = datasets.load_dataset(
                "parquet", data_files={self.split: files}, split=self.split, features=features, cache_dir=cache_dir,
                fragment_scan_options=FROM_DISK,
            )  # fmt: skip
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.folder}: the Parquet files can't be read ({reason})") from None
        check_count(self.folder, self.split, len(rows), count)
        return rows

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
        """Decodes rows to a batch, see `collate_rows`."""
        return collate_rows(rows, self.preprocessing)


def missing_split(folder: str, split: str, commit: str | None) -> str:
    """What to say where a split has slices and no file."""
    where = "" if commit is None else " in the repository or, without network, in the local cache"
    return f"{folder}: no data/{split}-*.parquet{where}"


def check_count(folder: str, split: str, found: int, expected: int) -> None:
    """Raises InputError where a split does not hold as many slices as preprocessing.json says."""
    if found != expected:
        raise InputError(
            f"{folder}: {found} of the {expected} slices of its split {split} are there: not copied or downloaded as a"
            " whole"
        )


def batches_of(dataset, indices: Sequence[int], batch_size: int) -> Iterator[dict]:
    """Yields chosen rows of a `SliceDataset` in their order as collated batches, the last one maybe smaller."""
    for start in range(0, len(indices), batch_size):
        yield dataset.collate(dataset.__getitems__([int(index) for index in indices[start : start + batch_size]]))
