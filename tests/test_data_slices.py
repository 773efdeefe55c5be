"""The slice data set: a round trip through its files, and folders that are no data set."""

import json

import numpy as np
import pytest
import torch

from diffusers_cf.data.slices import PatientSlices, SliceDataset, slices_to_table, write_tables
from diffusers_cf.errors import InputError


NAMES = ("healthy", "unhealthy")


def made(patient="a", n=5, masks=True, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 2, (n, 8, 8)).astype(np.uint8)
    images = rng.random((n, 2, 8, 8)).astype(np.float32)
    return PatientSlices(patient, images, np.arange(n) % 2, np.arange(n) + 10, drawn if masks else None)


def write_dataset(folder, parts, dtype="float16", scale=1, **changes):
    (folder / "data").mkdir(parents=True)
    for split, patients in parts.items():
        tables = [slices_to_table(patient, NAMES, dtype, scale) for patient in patients]
        write_tables(folder / "data" / f"{split}-00000-of-00001.parquet", tables, NAMES)
    splits = {s: {"slices": sum(len(p.labels) for p in parts.get(s, []))} for s in ("train", "validation", "test")}
    facts = {"version": 1, "class_names": NAMES, "size": 8, "channels": 2, "dtype": dtype, "scale": scale}
    facts |= {"has_masks": True, "splits": splits} | changes
    (folder / "preprocessing.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(("dtype", "scale", "error"), [("float16", 1, 2.5e-4), ("uint8", 200, 2.5e-3 + 1e-6)])
def test_round_trip(dtype, scale, error, tmp_path):
    first, second = made("a"), made("b", n=3, seed=1)
    write_dataset(tmp_path / "set", {"train": [first, second], "test": [second]}, dtype, scale)
    dataset = SliceDataset(tmp_path / "set", "train", cache_dir=tmp_path / "cache")
    assert len(dataset) == 8 and dataset.class_names == NAMES
    batch = dataset.collate(dataset.__getitems__([7, 0]))
    assert batch["images"].dtype == torch.float32 and batch["masks"].dtype == torch.uint8
    np.testing.assert_allclose(batch["images"], np.stack([second.images[2], first.images[0]]), rtol=0, atol=error)
    np.testing.assert_array_equal(batch["masks"], np.stack([second.masks[2], first.masks[0]]))
    assert batch["labels"].tolist() == [0, 0] and batch["labels"].dtype == torch.int64
    assert batch["patients"] == ["b", "a"] and batch["slices"].tolist() == [12, 10]
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert dataset.patients.tolist() == ["a"] * 5 + ["b"] * 3
    assert dataset.slices.tolist() == [10, 11, 12, 13, 14, 10, 11, 12]
    assert len(SliceDataset(tmp_path / "set", "test", cache_dir=tmp_path / "cache")) == 3
    assert len(SliceDataset(tmp_path / "set", "validation", cache_dir=tmp_path / "cache")) == 0


def test_without_masks(tmp_path):
    write_dataset(tmp_path / "set", {"train": [made(masks=False)]}, has_masks=False)
    dataset = SliceDataset(tmp_path / "set", "train", cache_dir=tmp_path / "cache")
    assert not dataset.has_masks and dataset.collate([dataset[0]])["masks"] is None


def test_uint8_is_rounded_and_clipped_and_exact_where_it_can_be():
    stored = np.arange(256, dtype=np.uint8)
    images = stored.reshape(1, 1, 16, 16).astype(np.float32) / np.float32(200)
    table = slices_to_table(PatientSlices("a", images, np.zeros(1), np.zeros(1)), NAMES, "uint8", 200)
    assert table["image"].to_pylist() == [stored.tobytes()]
    images[0, 0, 0, :3] = -1.0, 9.0, 0.0029
    table = slices_to_table(PatientSlices("a", images, np.zeros(1), np.zeros(1)), NAMES, "uint8", 200)
    assert list(table["image"].to_pylist()[0][:3]) == [0, 255, 1]


def test_unusable_folders(tmp_path):
    with pytest.raises(InputError, match="is no finished slice data set"):
        SliceDataset(tmp_path, "train")
    write_dataset(tmp_path / "set", {"train": [made()]})
    with pytest.raises(ValueError, match="split must be one of train, validation, test, not 'val'"):
        SliceDataset(tmp_path / "set", "val")
    shard = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match="train-00000-of-00001.parquet: "):
        SliceDataset(tmp_path / "set", "train", cache_dir=tmp_path / "cache")
    write_dataset(tmp_path / "newer", {"train": [made()]}, version=2)
    with pytest.raises(InputError, match="not a slice data set of version 1"):
        SliceDataset(tmp_path / "newer", "train")
    (tmp_path / "newer" / "preprocessing.json").write_text("{")
    with pytest.raises(InputError, match="not a readable JSON file"):
        SliceDataset(tmp_path / "newer", "train")


@pytest.mark.parametrize("name", ["run[1]", "a*b", "q?", "two::colons", "dollar$HOME", "{a,b}", "~", "ü (1)"])
def test_a_path_is_no_pattern(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "run1", {"train": [made("another")]})
    write_dataset(tmp_path / name, {"train": [made("own")]})
    assert set(SliceDataset(name, "train", cache_dir=tmp_path / "cache").patients) == {"own"}


def test_a_rewritten_file_is_read_again(tmp_path):
    folder = write_dataset(tmp_path / "set", {"train": [made("a")]})
    assert set(SliceDataset(folder, "train", cache_dir=tmp_path / "cache").patients) == {"a"}
    write_tables(folder / "data" / "train-00000-of-00001.parquet", [slices_to_table(made("b"), NAMES)], NAMES)
    assert set(SliceDataset(folder, "train", cache_dir=tmp_path / "cache").patients) == {"b"}


@pytest.mark.parametrize("changes", [{"size": 4}, {"channels": 3}])
def test_rows_that_do_not_fit_preprocessing(changes, tmp_path):
    write_dataset(tmp_path / "set", {"train": [made()]}, **changes)
    dataset = SliceDataset(tmp_path / "set", "train", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="patient a, slice 11: its image, mask or label does not fit"):
        dataset.collate([dataset[1]])
