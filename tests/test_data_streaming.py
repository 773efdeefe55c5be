"""A split read on demand, and training from it."""

import itertools
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
import torch
from test_data_slices import made, write_dataset
from training_data import write_training_set

from diffusers_cf.data import SliceDataset, SliceStream
from diffusers_cf.errors import InputError
from diffusers_cf.training.loop import PositionBatches
from diffusers_cf.training.stream import TrainingStream


class CountedStream:
    """`n` rows in groups of 4, every `rare`-th of class 1; notes which groups were read."""

    folder, class_names = "made", ("healthy", "unhealthy")

    def __init__(self, n=400, rare=8):
        self.n, self.all = n, [{"id": i, "label": int(i % rare == 0)} for i in range(n)]
        sick = sum(row["label"] for row in self.all)
        self.preprocessing = {"splits": {"train": {"slices": n, "unhealthy": sick}}}
        self.skips = []

    def __len__(self):
        return self.n

    def endless_rows(self, seed, rank=0, world_size=1, skip=0):
        self.skips.append(skip)
        return itertools.islice(itertools.cycle(self.all), rank + skip * world_size, None, world_size)


class IdsOfRows(TrainingStream):
    """Gives the rows that were drawn, in the place of batches of images."""

    def collate_parts(self, items):
        return [(position, row["id"], row["label"]) for position, row in items]


def drawn(stream, steps, buffer_size=64, first=0, rank=0, world_size=1):
    training = IdsOfRows(stream, 3, (8, 8), buffer_size=buffer_size)
    positions = PositionBatches(first, first + steps, 10, 1, rank, world_size)
    return [item for batch in training.batches(positions) for item in batch]


@pytest.fixture
def data(tmp_path):
    """Three patients of 5, 3 and 300 slices: the last one has two row groups."""
    patients = [made("a"), made("b", n=3, seed=1), made("c", n=300, seed=2)]
    return write_dataset(tmp_path / "set", {"train": patients, "test": [made("d")]})


def test_a_stream_gives_the_rows_of_the_data_set(data, tmp_path):
    dataset, stream = SliceDataset(data, "train", cache_dir=tmp_path / "cache"), SliceStream(data, "train")
    assert len(stream) == len(dataset) == 308 and stream.group_sizes.tolist() == [5, 3, 256, 44]
    for name in ("labels", "patients", "slices"):
        found, expected = getattr(stream, name), getattr(dataset, name)
        assert found.dtype == expected.dtype and found.tolist() == expected.tolist()
    chosen = [307, 0, 8, 7, 263, 264]
    batch, expected = (source.collate(source.__getitems__(chosen)) for source in (stream, dataset))
    assert torch.equal(batch["images"], expected["images"]) and torch.equal(batch["masks"], expected["masks"])
    assert batch["patients"] == expected["patients"] == ["c", "a", "c", "b", "c", "c"]
    assert len(SliceStream(data, "validation")) == 0 and SliceStream(data, "validation").patients.tolist() == []


def test_a_patient_is_read_once(data, monkeypatch):
    stream, read = SliceStream(data, "train"), []
    original = stream.read_group
    monkeypatch.setattr(stream, "read_group", lambda number: read.append(number) or original(number))
    for index in (0, 4, 2, 5, 1, 20):
        stream.__getitems__([index])
    assert read == [0, 1, 2]


def test_each_pass_has_every_row_once_in_another_order(data):
    stream = SliceStream(data, "train")
    rows = [(row["patient"], row["slice"]) for row in itertools.islice(stream.endless_rows(seed=0), 3 * 308)]
    passes = [rows[start : start + 308] for start in (0, 308, 616)]
    assert all(len(set(one)) == 308 for one in passes)
    firsts = [tuple(dict.fromkeys(patient for patient, _ in one)) for one in passes]
    assert len(set(firsts)) > 1


def test_processes_share_the_rows_and_a_skip_lands_where_it_should(data):
    stream = SliceStream(data, "train")

    def ids(rank, count, skip=0):
        rows = stream.endless_rows(seed=1, rank=rank, world_size=2, skip=skip)
        return [(row["patient"], row["slice"]) for row in itertools.islice(rows, count)]

    sizes = [stream.group_sizes[np.random.default_rng([1, 0]).permutation(4)[rank::2]].sum() for rank in (0, 1)]
    one, two = ids(0, sizes[0]), ids(1, sizes[1])
    assert not set(one) & set(two) and len(set(one) | set(two)) == 308
    for skip in (1, 4, 6, 200, 400):
        assert ids(0, 20, skip) == ids(0, 420)[skip : skip + 20]
    with pytest.raises(InputError, match="4 row groups are too few for 5 processes"):
        next(stream.endless_rows(seed=0, rank=0, world_size=5))


def test_skipped_groups_are_not_read(data, monkeypatch):
    stream, read = SliceStream(data, "train"), []
    original = stream.read_group
    monkeypatch.setattr(stream, "read_group", lambda number: read.append(number) or original(number))
    next(stream.endless_rows(seed=0, skip=308 * 5))
    assert len(read) <= 3


def damaged(data, how):
    shard = data / "data" / "train-00000-of-00001.parquet"
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif how == "short":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(shard)[:-1], shard)
    elif how == "renamed":
        table = pyarrow.parquet.read_table(shard)
        pyarrow.parquet.write_table(table.rename_columns(["picture", *table.column_names[1:]]), shard)
    else:
        shard.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "its Parquet files can't be read"),
        ("short", "307 of the 308 slices of its split train are there"),
        ("renamed", "its Parquet files can't be read .*image"),
        ("gone", r"no data/train-\*.parquet"),
    ],
)
def test_a_damaged_set_is_refused(data, how, message):
    damaged(data, how)
    with pytest.raises(InputError, match=message):
        stream = SliceStream(data, "train")
        stream.collate(stream.__getitems__([0]))


@pytest.mark.parametrize(
    "buffer_size", [64, 400]
)  # with 400 the pool of the rare class is long smaller than the other
def test_classes_are_balanced_and_slices_drawn_as_often_on_average(buffer_size):
    counts = Counter(row for _, row, _ in drawn(CountedStream(), 400, buffer_size))
    sick, halves = np.array([counts[row] for row in range(0, 400, 8)]), [0, 0]
    assert abs(sick.sum() - 2000) < 150  # 3 standard deviations of 4000 draws are 95
    assert (
        sick.min() > 10 and len(counts) > 380
    )  # by chance a usual slice is never drawn in ten passes once in a hundred
    for row, count in counts.items():
        halves[row // 200] += count
    assert abs(halves[0] - halves[1]) < 600


def test_every_position_is_trained_once_on_several_processes():
    taken = [
        [position for position, *_ in drawn(CountedStream(rare=7), 6, rank=rank, world_size=2)] for rank in (0, 1)
    ]
    assert sorted(taken[0] + taken[1]) == list(range(120))


def test_a_pool_forgets_what_was_read_long_ago():
    late = [row for _, row, label in drawn(CountedStream(n=4000), 100, buffer_size=64) if not label][250:]
    assert len(late) > 200 and min(late) > 300


def test_a_resumed_run_goes_on_at_the_row_where_it_was():
    stream = CountedStream(n=4000)
    late = [row for _, row, label in drawn(stream, 1, first=100) if not label]
    assert stream.skips == [1000] and min(late) >= 1000 and max(late) < 1100


def test_a_class_that_is_rare_is_waited_for_and_one_that_is_missing_named():
    assert {label for *_, label in drawn(CountedStream(rare=399), 20, buffer_size=4)} == {0, 1}
    stream = CountedStream(rare=10**6)
    stream.all[0]["label"] = 0
    with pytest.raises(InputError, match="made: no slice to train on is labelled unhealthy"):
        drawn(stream, 1)


def test_batches_of_a_stream_are_those_of_training(tmp_path):
    stream = SliceStream(write_training_set(tmp_path / "set"), "train")
    training = TrainingStream(stream, 0, (8, 8), augment=True)
    assert training.classes() == {0, 1} and training.num_slices == 16
    first, second = (list(training.batches(PositionBatches(0, 3, 4, 1, 0, 1))) for _ in range(2))
    assert [batch[0]["images"].shape for batch in first] == [(4, 2, 8, 8)] * 3
    assert all(torch.equal(one[key], two[key]) for (one,), (two,) in zip(first, second, strict=True) for key in one)
    assert first[0][0]["images"].min() == -1 and first[0][0]["images"].max() > 0
