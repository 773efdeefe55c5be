"""The slice data set: a round trip through its files, and folders that are no data set."""

import numpy as np
import pytest
import torch
from model_files import edit_json
from training_data import made_patient, write_training_set

from diffusers_cf.data.slices import PatientSlices, SliceDataset, slices_to_table, write_tables
from diffusers_cf.errors import InputError


NAMES = ("healthy", "unhealthy")
SHARD = "data/train-00000-of-00001.parquet"


@pytest.mark.parametrize(("dtype", "scale", "error"), [("float16", 1, 5e-4), ("uint8", 200, 2.5e-3 + 1e-6)])
def test_round_trip(dtype, scale, error, tmp_path):
    first, second = (made_patient(index, channels=2, masks=True, size=16) for index in range(2))
    folder = write_training_set(tmp_path / "set", dtype=dtype, scale=scale)
    write_tables(folder / SHARD, [slices_to_table(part, NAMES, dtype, scale) for part in (first, second)], NAMES)
    dataset = SliceDataset(folder, "train", cache_dir=tmp_path / "cache")
    assert len(dataset) == 16 and dataset.class_names == NAMES
    batch = dataset.collate(dataset.__getitems__([15, 0]))
    assert batch["images"].dtype == torch.float32 and batch["masks"].dtype == torch.uint8
    np.testing.assert_allclose(batch["images"], np.stack([second.images[7], first.images[0]]), rtol=0, atol=error)
    np.testing.assert_array_equal(batch["masks"], np.stack([second.masks[7], first.masks[0]]))
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert batch["patients"] == ["p1", "p0"] and batch["slices"].tolist() == [37, 30]
    assert dataset.labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1] * 2
    assert dataset.patients.tolist() == ["p0"] * 8 + ["p1"] * 8
    assert dataset.slices.tolist() == [*range(30, 38)] * 2
    assert len(SliceDataset(folder, "validation", cache_dir=tmp_path / "cache")) == 8
    assert len(SliceDataset(folder, "test", cache_dir=tmp_path / "cache")) == 0


def test_without_masks(tmp_path):
    dataset = SliceDataset(write_training_set(tmp_path / "set", masks=False), "train", cache_dir=tmp_path / "cache")
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
    write_training_set(tmp_path / "set")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, not 'val'"):
        SliceDataset(tmp_path / "set", "val")
    shard = tmp_path / "set" / SHARD
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match="train-00000-of-00001.parquet: "):
        SliceDataset(tmp_path / "set", "train", cache_dir=tmp_path / "cache")
    write_training_set(tmp_path / "newer", version=2)
    with pytest.raises(InputError, match="not a slice data set of version 1"):
        SliceDataset(tmp_path / "newer", "train")
    (tmp_path / "newer" / "preprocessing.json").write_text("{")
    with pytest.raises(InputError, match="not a readable JSON file"):
        SliceDataset(tmp_path / "newer", "train")


@pytest.mark.parametrize("name", ["run[1]", "a*b", "q?", "two::colons", "dollar$HOME", "{a,b}", "~", "ü (1)"])
def test_a_path_is_no_pattern(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_training_set(tmp_path / "run1", test=(3,))
    write_training_set(tmp_path / name, test=(4,))
    assert set(SliceDataset(name, "test", cache_dir=tmp_path / "cache").patients) == {"p4"}


def test_a_rewritten_file_is_read_again(tmp_path):
    folder = write_training_set(tmp_path / "set")
    assert set(SliceDataset(folder, "train", cache_dir=tmp_path / "cache").patients) == {"p0", "p1"}
    write_tables(folder / SHARD, [slices_to_table(made_patient(i, 2, True, 16), NAMES) for i in (3, 4)], NAMES)
    assert set(SliceDataset(folder, "train", cache_dir=tmp_path / "cache").patients) == {"p3", "p4"}


@pytest.mark.parametrize("changes", [{"size": 4}, {"channels": 3, "modalities": list("abc")}])
def test_rows_that_do_not_fit_preprocessing(changes, tmp_path):
    edit_json(write_training_set(tmp_path / "set") / "preprocessing.json", **changes)
    dataset = SliceDataset(tmp_path / "set", "train", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="patient p0, slice 31: its image, mask or label does not fit"):
        dataset.collate([dataset[1]])
