"""Data to evaluate on: a data set in memory, and one on disk."""

import json

import numpy as np
import torch

from diffusers_cf.data.slices import PatientSlices, slices_to_table, write_tables


SIZE, MODALITIES = 32, ["flair", "t1"]


def write_dataset(folder, has_masks=True, patients=3, size=SIZE, modalities=MODALITIES):
    """A slice data set of discs with a bright square in FLAIR, all in the split `test`."""
    rng, facts = np.random.default_rng(0), {"dtype": "float16", "scale": 1}
    y, x = np.mgrid[:size, :size] - 15.5
    tables = []
    for i in range(patients):
        images = (x**2 + y**2 < 196) * rng.uniform(0.2, 0.8, (4, 2, size, size)).astype(np.float32)
        masks = np.zeros((4, size, size), dtype=np.uint8)
        masks[:2, 10:17, 12:19] = 1
        images[:, 0] += 0.3 * masks
        labels, slices = np.array([1, 1, 0, 0]), np.arange(4)
        found = PatientSlices(f"p{i}", images, labels, slices, masks if has_masks else None)
        tables.append(slices_to_table(found, ("healthy", "unhealthy"), **facts))
    (folder / "data").mkdir(parents=True)
    write_tables(folder / "data" / "test-00000-of-00001.parquet", tables, ("healthy", "unhealthy"))
    empty = {"patients": 0, "slices": 0, "unhealthy": 0}
    facts |= {"version": 1, "source": "arrays", "seed": 3, "size": size, "channels": 2, "modalities": modalities}
    facts |= {"class_names": ["healthy", "unhealthy"], "has_masks": has_masks}
    facts["splits"] = {"train": empty, "validation": empty, "test": {"patients": patients, "slices": 4 * patients}}
    (folder / "preprocessing.json").write_text(json.dumps(facts))
    return folder


class FakeDataset:
    """The interface of `SliceDataset` over arrays: discs of noise, some with a square lesion in the second channel."""

    has_masks = True

    def __init__(self, slices_of_patients=(5, 4, 6), seed=0, size=24):
        rng = np.random.default_rng(seed)
        n = sum(slices_of_patients)
        y, x = np.mgrid[:size, :size] - (size - 1) / 2
        radius = rng.uniform(0.3, 0.48, (n, 1, 1, 1)) * size
        self.images = ((x**2 + y**2 < radius**2) * rng.uniform(0.2, 0.8, (n, 2, size, size))).astype(np.float32)
        self.masks = np.zeros((n, size, size), dtype=np.uint8)
        for i in range(0, n, 2):
            row, column = rng.integers(5, size - 11, 2)
            self.masks[i, row : row + 6, column : column + 6] = 1
        self.images[:, 1] += 0.3 * self.masks
        self.masks[::2, 0, :4] = 1  # lesion pixels in the background, as at the edge of a scan
        self.labels = self.masks.any((1, 2)).astype(np.int64)
        names = [f"patient_{chr(97 + i)}" for i in range(len(slices_of_patients))]
        self.patients = np.repeat(names, slices_of_patients)
        self.slices = np.concatenate([np.arange(k) + 10 for k in slices_of_patients])

    def shuffled(self, seed=1):
        order = np.random.default_rng(seed).permutation(len(self))
        for name in ("images", "masks", "labels", "patients", "slices"):
            setattr(self, name, getattr(self, name)[order])
        return self

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        assert all(type(index) is int for index in indices)
        return indices

    def collate(self, rows):
        found = {name: torch.from_numpy(getattr(self, name)[rows]) for name in ("images", "masks", "labels", "slices")}
        return found | {"patients": [str(name) for name in self.patients[rows]]}
