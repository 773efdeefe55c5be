"""Slices from the arrays of an .npz file."""

import numpy as np
import pytest
from data_files import DATA, needs_data

from diffusers_cf.data.arrays import ArraysSource
from diffusers_cf.data.prepare import prepare
from diffusers_cf.data.scans import BratsSource
from diffusers_cf.errors import InputError


def arrays(**changes):
    """Arrays of two patients with three slices each; None removes an array."""
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 8, 8), dtype=np.uint8)
    masks[[1, 4], 2:6, 2:6] = 1
    content = {
        "images": rng.integers(0, 256, (6, 2, 8, 8)).astype(np.uint8),
        "masks": masks,
        "patient": np.array(["b", "b", "b", "a", "a", "a"]),
        "slice": np.array([7, 5, 6, 1, 2, 3], dtype=np.int16),
        "modalities": np.array(["T2w", "flair"]),
        "scale": np.float32(200),
    }
    return {name: value for name, value in (content | changes).items() if value is not None}


def test_arrays_can_be_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    source = ArraysSource(tmp_path / "x.npz", normalize="none")
    assert source.patients() == ["a", "b"] and source.modalities == ("flair", "t2") and source.size == 8
    assert (source.facts()["dtype"], source.facts()["scale"]) == ("uint8", 200)
    found = source.read("b")
    assert found.slices.tolist() == [5, 6, 7] and found.labels.tolist() == [1, 0, 0]
    stored = arrays()["images"][[1, 2, 0]][:, [1, 0]]
    np.testing.assert_array_equal(np.rint(found.images * 200), stored)
    np.testing.assert_array_equal(found.masks, arrays()["masks"][[1, 2, 0]])
    resized = ArraysSource(tmp_path / "x.npz", size=4, normalize="none")
    assert "dtype" not in resized.facts()
    small = resized.read("b")
    np.testing.assert_allclose(small.images, found.images.reshape(3, 2, 4, 2, 4, 2).mean(axis=(3, 5)), atol=1e-6)
    assert small.masks[0].sum() == 4 and small.masks.dtype == np.uint8


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_arrays_are_scaled_patient_by_patient(tmp_path, dtype):
    images = arrays()["images"].astype(dtype)
    np.savez(tmp_path / "x.npz", **arrays(images=images))
    source = ArraysSource(tmp_path / "x.npz")
    assert source.normalize == "median" and "dtype" not in source.facts()
    for patient, rows in (("a", [3, 4, 5]), ("b", [1, 2, 0])):
        t2, flair = images[rows].swapaxes(0, 1)
        found = source.read(patient).images
        np.testing.assert_allclose(found[:, 0], flair / (2.5 * np.median(flair[flair > 0])), rtol=1e-5)
        np.testing.assert_allclose(found[:, 1], t2 / (2.5 * np.median(t2[t2 > 0])), rtol=1e-5)
    bright = ArraysSource(tmp_path / "x.npz", normalize="p99").read("a").images
    assert np.isclose(np.percentile(bright[:, 0][bright[:, 0] > 0], 99), 1)


def test_patients_that_lack_a_modality_are_left_out(tmp_path, caplog):
    has = np.array([True, True, True, False, False, False])
    np.savez(tmp_path / "x.npz", **arrays(has_T2w=has))
    both = ArraysSource(tmp_path / "x.npz")
    assert both.patients() == ["b"] and both.left_out == {"a": "no t2"}
    assert ArraysSource(tmp_path / "x.npz", modalities=["flair"]).patients() == ["a", "b"]
    kept = ArraysSource(tmp_path / "x.npz", allow_missing_modalities=True)
    assert kept.patients() == sorted(set(arrays()["patient"].tolist())) and not kept.left_out
    lacking = set(arrays()["patient"][~has].tolist())
    for patient in kept.patients():
        images = kept.read(patient).images
        assert ((images[:, 1] > 0).any(), (images[:, 0] > 0).any()) == (patient not in lacking, True)
    np.savez(tmp_path / "z.npz", **arrays(has_T2w=has, has_flair=has))
    assert set(ArraysSource(tmp_path / "z.npz", allow_missing_modalities=True).left_out) == lacking
    np.savez(tmp_path / "y.npz", **arrays(has_T2w=np.zeros(6, dtype=bool)))
    with pytest.raises(InputError, match="no patient has all of flair, t2"):
        ArraysSource(tmp_path / "y.npz")
    (tmp_path / "s.json").write_text('{"train": ["b"], "test": ["a"]}')
    preprocessing = prepare(both, tmp_path / "set", split_file=tmp_path / "s.json")
    assert preprocessing["skipped"] == ["a"] and preprocessing["splits"]["test"]["patients"] == 0
    assert "left out a: no t2" in caplog.text


def test_arrays_without_masks(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays(masks=None))
    with pytest.raises(InputError, match="x.npz: neither masks nor labels"):
        ArraysSource(tmp_path / "x.npz")
    (tmp_path / "labels.csv").write_text("patient,slice,label\na,,healthy\na,3,unhealthy\nb,6,unhealthy\n")
    source = ArraysSource(tmp_path / "x.npz", labels=tmp_path / "labels.csv")
    assert source.read("a").labels.tolist() == [0, 0, 1] and source.read("b").slices.tolist() == [6]
    assert not source.has_masks and source.read("a").masks is None
    np.savez(tmp_path / "y.npz", **arrays(masks=None, label=np.array(["unhealthy", "healthy"] * 3)))
    assert ArraysSource(tmp_path / "y.npz").read("b").labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("ids", [np.repeat([7, 9], 3), np.repeat([b"7", b"9"], 3)])
def test_patient_ids_become_text(ids, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays(patient=ids))
    assert ArraysSource(tmp_path / "x.npz").patients() == ["7", "9"]


def test_bad_patients_of_arrays(tmp_path):
    images = arrays()["images"].astype(np.float32)
    images[4, 0, 0, 0] = np.nan
    images[:3, 1] = 0
    np.savez(tmp_path / "x.npz", **arrays(images=images, slice=np.array([7, 5, 6, 1, 2, 2])))
    source = ArraysSource(tmp_path / "x.npz")
    words = ["1 values are NaN or infinite", "a slice index occurs twice"]
    assert all(word in problem for word, problem in zip(words, source.examine("a")[1], strict=True))
    with pytest.raises(InputError, match="x.npz: b: flair: empty"):
        source.read("b")


BAD_ARRAYS = {
    "array missing": (arrays(patient=None), "array missing: patient"),
    "no channels": (arrays(images=np.zeros((6, 8, 8))), r"images must be \(N, C, H, W\)"),
    "not square": (arrays(images=np.zeros((6, 2, 8, 9))), "H = W"),
    "no slices": (arrays(images=np.zeros((0, 2, 8, 8))), r"images must be \(N, C, H, W\)"),
    "masks of other size": (arrays(masks=np.zeros((6, 4, 4))), r"masks must have the shape \(6, 8, 8\)"),
    "complex": (arrays(images=np.zeros((6, 2, 8, 8), complex)), "must be numbers, not complex128"),
    "two scales": (arrays(scale=np.array([1.0, 2.0])), r"scale must have the shape \(\)"),
    "masks of text": (arrays(masks=np.full((6, 8, 8), "x")), "masks must be numbers"),
    "half a slice": (arrays(slice=np.arange(6) + 0.5), "slice must be whole numbers from 0 up, found 0.5"),
    "NaN as slice": (arrays(slice=np.array([0, 1, np.nan, 3, 4, 5])), "whole numbers from 0 up, found nan"),
    "huge slice": (arrays(slice=np.array([0, 1, 2, 3, 4, 2**40])), f"found {2**40}"),
    "negative slice": (arrays(slice=np.arange(6) - 1), "found -1"),
    "text as slice": (arrays(slice=np.array(list("abcdef"))), "slice must be numbers"),
    "same modality": (arrays(modalities=np.array(["t1", "t1"])), "modalities names one twice"),
    "scale 0": (arrays(scale=0), "scale must be above 0"),
    "has_NAME is no bool": (arrays(has_flair=np.ones(6)), "has_flair must be true or false, not float64"),
    "has_NAME too short": (arrays(has_flair=np.ones(2, dtype=bool)), r"has_flair must have the shape \(6,\)"),
    "unknown label": (arrays(label=np.array(["sick"] * 6)), "unknown label 'sick'"),
    "pickled objects": (arrays(patient=np.array([{}] * 6)), "not a readable .npz file"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_file(case, tmp_path):
    content, reason = BAD_ARRAYS[case]
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=f"x.npz: .*{reason}"):
        ArraysSource(tmp_path / "x.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_arrays_file(write, tmp_path):
    path = tmp_path / "x.npz"
    write(path, **arrays())
    content = path.read_bytes()
    flipped = [content[:i] + b"!!" + content[i + 2 :] for i in range(300, 900, 60)]
    for damaged in (content[:-100], content[:1000], b"", b"no zip at all", *flipped):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="x.npz: not a readable .npz file"):
            ArraysSource(path)


@needs_data
def test_scans_agree_with_the_stored_slices():
    found = BratsSource(DATA / "volumes", normalize="p99").read("MS19")
    stored = ArraysSource(DATA / "slices" / "ms_mni.npz", normalize="none").read("MS19")
    rows = np.searchsorted(found.slices, stored.slices)
    np.testing.assert_array_equal(found.slices[rows], stored.slices)
    # Stored in steps of 1/200, clipped at 1.275, and only where most of a pixel lies in the brain.
    brain = stored.images > 0
    ours = np.minimum(found.images[rows], 1.275)[brain]
    np.testing.assert_allclose(ours, stored.images[brain], rtol=0, atol=5.1e-3)
    np.testing.assert_array_equal(found.masks[rows], stored.masks)
    source = BratsSource(DATA / "volumes")
    assert [source.examine(patient)[1] for patient in source.patients()] == [[], []]
