"""A split read from where it lies, patient by patient, without a download or a copy of the whole.

`prepare` gives every patient row groups of its own in the Parquet files, and a row group can be read by itself: from
the Hub by requests for those bytes. So a stream has random access by patient, which is more than
`datasets.load_dataset(.., streaming=True)` offers: that opens the file anew, with 5 MB of read-ahead, for each row
group, and shares out whole files to processes where there are only a few.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HTTPError

from diffusers_cf.data.download import dataset_folder
from diffusers_cf.data.preprocessing import collate_rows, read_preprocessing, shards_of
from diffusers_cf.data.slices import check_count, check_split, missing_split, slice_features
from diffusers_cf.errors import InputError


# Of the three small columns a row group has some kB, which lie together: one request each.
BLOCK_BYTES = 2**14
KEPT_GROUPS = 4


class SliceStream:
    """One split of a slice data set, read on demand; takes the place of a `SliceDataset`.

    Args:
        folder: A folder written by `diffusers-cf prepare`, or a data set on the Hub, `user/name[@revision]`.
        split: `train`, `validation` or `test`.

    Attributes:
        folder, split, commit, preprocessing, class_names, has_masks: As in `SliceDataset`.
        group_sizes: int64 (G,), rows of each row group; a group holds slices of one patient.

    Raises:
        InputError: It is no finished slice data set, a file of it is damaged or missing, or the Hub can't be reached.
        ValueError: `split` is unknown.
    """

    def __init__(self, folder: str | Path, split: str):
        check_split(split)
        self.folder, self.split = str(folder), split
        path, self.commit = dataset_folder(folder, split)
        files = shards_of(path, split)
        self.preprocessing = read_preprocessing(path)
        self.class_names = tuple(self.preprocessing["class_names"])
        self.has_masks = self.preprocessing["has_masks"]
        count = self.preprocessing["splits"][split]["slices"]
        if count and not files:
            raise InputError(missing_split(self.folder, split, self.commit))
        self._schema = slice_features(self.class_names).arrow_schema
        with self._refusals():
            open_file = open
            # Arrow's own threads are left out: they outlive an error and bring the process down at its end.
            shards = [pyarrow.parquet.ParquetFile(open_file(file, "rb"), pre_buffer=False) for file in files]
        self._groups = [(shard, number) for shard in shards for number in range(shard.num_row_groups)]
        sizes = [shard.metadata.row_group(number).num_rows for shard, number in self._groups]
        self.group_sizes = np.array(sizes, dtype=np.int64)
        check_count(self.folder, split, int(self.group_sizes.sum()), count)
        self._ends = np.cumsum(self.group_sizes)
        self._kept: OrderedDict[int, list[dict]] = OrderedDict()

    @cached_property
    def _index(self) -> pyarrow.Table:
        """The small columns of the whole split; some kB a patient."""
        names = ["label", "patient", "slice"]
        tables = [self._read(number, names) for number in range(len(self._groups))]
        return pyarrow.concat_tables([self._schema.empty_table().select(names), *tables])

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), class index of every slice."""
        return self._index["label"].to_numpy().astype(np.int64)

    @property
    def patients(self) -> np.ndarray:
        """str (N,), patient of every slice."""
        return self._index["patient"].to_numpy().astype(str)

    @property
    def slices(self) -> np.ndarray:
        """int64 (N,), axial index of every slice."""
        return self._index["slice"].to_numpy().astype(np.int64)

    def __len__(self) -> int:
        """Returns the number of slices."""
        return int(self.group_sizes.sum())

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Returns several rows, undecoded; reads the row groups that they are in, if they aren't the last ones read."""
        groups = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - self.group_sizes
        return [self._kept_group(int(g))[int(i) - int(starts[g])] for i, g in zip(indices, groups, strict=True)]

    def collate(self, rows: list[dict]) -> dict:
        """Decodes rows to a batch, see `collate_rows`."""
        return collate_rows(rows, self.preprocessing)

    def read_group(self, number: int) -> list[dict]:
        """Returns the rows of one row group, undecoded."""
        return self._read(number, self._schema.names).to_pylist()

    def _read(self, number: int, names: list[str]) -> pyarrow.Table:
        shard, group = self._groups[number]
        with self._refusals():
            table = shard.read_row_group(group, columns=names, use_threads=False)
            return table.select(names).cast(pyarrow.schema([self._schema.field(name) for name in names]))

    def endless_rows(self, seed: int, rank: int = 0, world_size: int = 1, skip: int = 0) -> Iterator[dict]:
        """Yields this process's rows for ever, row groups in a new random order on every pass; reads one ahead.

        Args:
            seed: Of the order.
            rank: Of the process: on each pass it has every `world_size`-th group of the order, from this one on.
            world_size: How many processes there are.
            skip: Begin so many rows later; groups that lie before are not read.

        Raises:
            InputError: There are fewer row groups than processes, or a group can't be read.
        """
        if len(self._groups) < world_size:
            raise InputError(f"{self.folder}: {len(self._groups)} row groups are too few for {world_size} processes")
        with ThreadPoolExecutor(1) as reader:
            following = self._order(seed, rank, world_size, skip)
            ahead = [(reader.submit(self.read_group, group), first) for group, first in [next(following)]]
            while True:
                group, first = next(following)
                ahead.append((reader.submit(self.read_group, group), first))
                rows, begin = ahead.pop(0)
                yield from rows.result()[begin:]

    def _order(self, seed: int, rank: int, world_size: int, skip: int) -> Iterator[tuple[int, int]]:
        """Yields row groups and the first row that is wanted of each."""
        epoch = 0
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(self._groups))
            for group in order[rank::world_size].tolist():
                if skip < self.group_sizes[group]:
                    yield group, skip
                skip = max(0, skip - int(self.group_sizes[group]))
            epoch += 1

    def _kept_group(self, number: int) -> list[dict]:
        if number not in self._kept:
            self._kept[number] = self.read_group(number)
            if len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _refusals(self) -> "_Refusals":
        return _Refusals(self.folder)


class _Refusals:
    """Within this context what Parquet files or the network refuse becomes InputError."""

    def __init__(self, folder: str):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if (
            isinstance(error, (OSError, ValueError, KeyError, HTTPError, pyarrow.ArrowException))
            and kind is not InputError
        ):
            reason = (str(error).splitlines() or [kind.__name__])[0]
            raise InputError(f"{self.folder}: its Parquet files can't be read ({reason})") from error
