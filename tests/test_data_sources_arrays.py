"""Sources without scans: arrays in a .npz file, and folders of pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_cf.data import ArraysSource, BratsSource, FolderSource
from diffusers_cf.data.prepare import prepare
from diffusers_cf.errors import InputError


DATA = Path(os.environ.get("DIFFUSERS_CF_DATA", Path(__file__).parents[2] / "shared" / "data"))


def arrays(**changes):
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
    assert resized.facts()["dtype"] == "float16"
    small = resized.read("b")
    np.testing.assert_allclose(small.images, found.images.reshape(3, 2, 4, 2, 4, 2).mean(axis=(3, 5)), atol=1e-6)
    assert small.masks[0].sum() == 4 and small.masks.dtype == np.uint8


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_arrays_are_scaled_patient_by_patient(tmp_path, dtype):
    images = arrays()["images"].astype(dtype)
    np.savez(tmp_path / "x.npz", **arrays(images=images))
    source = ArraysSource(tmp_path / "x.npz")
    assert (source.normalize, source.facts()["dtype"], source.facts()["scale"]) == ("median", "float16", 1)
    for patient, rows in (("a", slice(3, 6)), ("b", slice(0, 3))):
        t2, flair = images[rows].swapaxes(0, 1)
        found = source.read(patient).images
        if patient == "b":
            t2, flair = t2[[1, 2, 0]], flair[[1, 2, 0]]
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
    np.savez(tmp_path / "y.npz", **arrays(has_T2w=np.zeros(6, dtype=bool)))
    with pytest.raises(InputError, match="no patient has all of flair, t2"):
        ArraysSource(tmp_path / "y.npz")
    (tmp_path / "s.json").write_text('{"train": ["b"], "test": ["a"]}')
    preprocessing = prepare(both, tmp_path / "set", split_file=tmp_path / "s.json")
    assert preprocessing["skipped"] == ["a"] and preprocessing["splits"]["test"]["patients"] == 0
    assert "left out a: no t2" in caplog.text


def test_arrays_without_masks(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays(masks=None))
    assert "neither masks nor labels" in ArraysSource(tmp_path / "x.npz").problems("a")[0]
    (tmp_path / "labels.csv").write_text("patient,slice,label\na,,healthy\na,3,unhealthy\nb,6,unhealthy\n")
    source = ArraysSource(tmp_path / "x.npz", labels=tmp_path / "labels.csv")
    assert source.read("a").labels.tolist() == [0, 0, 1] and source.read("b").slices.tolist() == [6]
    assert not source.has_masks and source.read("a").masks is None
    np.savez(tmp_path / "y.npz", **arrays(masks=None, label=np.array(["unhealthy", "healthy"] * 3)))
    assert ArraysSource(tmp_path / "y.npz").read("b").labels.tolist() == [0, 1, 1]


def test_bad_patients_of_arrays(tmp_path):
    images = arrays()["images"].astype(np.float32)
    images[4, 0, 0, 0] = np.nan
    images[:3, 1] = 0
    np.savez(tmp_path / "x.npz", **arrays(images=images, slice=np.array([7, 5, 6, 1, 2, 2])))
    source = ArraysSource(tmp_path / "x.npz")
    words = ["1 values are NaN or infinite", "a slice index occurs twice"]
    assert all(word in problem for word, problem in zip(words, source.problems("a"), strict=True))
    with pytest.raises(InputError, match="x.npz: b: flair is empty"):
        source.read("b")


BAD_ARRAYS = {
    "array missing": (arrays(patient=None), "array missing: patient"),
    "no channels": (arrays(images=np.zeros((6, 8, 8))), r"images must be \(N, C, H, W\)"),
    "not square": (arrays(images=np.zeros((6, 2, 8, 9))), "H = W"),
    "no slices": (arrays(images=np.zeros((0, 2, 8, 8))), r"images must be \(N, C, H, W\)"),
    "masks of other size": (arrays(masks=np.zeros((6, 4, 4))), r"masks must have the shape \(6, 8, 8\)"),
    "too few patients": (arrays(patient=np.array(["a"])), r"patient must have the shape \(6,\)"),
    "modalities": (arrays(modalities=np.array(["t1"])), r"modalities must have the shape \(2,\)"),
    "complex": (arrays(images=np.zeros((6, 2, 8, 8), complex)), "must be numbers, not complex128"),
    "scale 0": (arrays(scale=0), "scale must be above 0"),
    "modality there or not as a number": (
        arrays(has_flair=np.ones(6)),
        "has_flair must be true or false, not float64",
    ),
    "has for too few": (arrays(has_flair=np.ones(2, dtype=bool)), r"has_flair must have the shape \(6,\)"),
    "unknown label": (arrays(label=np.array(["sick"] * 6)), "unknown label 'sick'"),
    "pickled objects": (arrays(patient=np.array([{}] * 6)), "not a readable .npz file"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_file(case, tmp_path):
    content, reason = BAD_ARRAYS[case]
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=f"x.npz: .*{reason}"):
        ArraysSource(tmp_path / "x.npz")


def test_damaged_arrays_file(tmp_path):
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "x.npz", **arrays())
        content = (tmp_path / "x.npz").read_bytes()
        for damaged in (content[:-100], content[:1000], b"", b"no zip at all"):
            (tmp_path / "x.npz").write_bytes(damaged)
            with pytest.raises(InputError, match="x.npz: not a readable .npz file"):
                ArraysSource(tmp_path / "x.npz")
        for position in range(300, 900, 60):
            (tmp_path / "x.npz").write_bytes(content[:position] + b"!!" + content[position + 2 :])
            with pytest.raises(InputError, match="x.npz: not a readable .npz file"):
                ArraysSource(tmp_path / "x.npz")
    with pytest.raises(InputError, match="absent.npz: can't be read"):
        ArraysSource(tmp_path / "absent.npz")


def write_images(folder, names, shape=(12, 12), seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 256, shape).astype(np.uint8)
        if name.endswith(".npy"):
            np.save(folder / name, np.moveaxis(values, -1, 0) if values.ndim == 3 else values)
        else:
            Image.fromarray(values).save(folder / name)
    return folder


def test_folder_of_classes(tmp_path):
    names = ["unhealthy/p1_012.png", "healthy/p1_003.png", "healthy/p2.png", "healthy/a_b_1.npy", "healthy/notes.txt"]
    write_images(tmp_path, names[:-1])
    (tmp_path / names[-1]).touch()
    source = FolderSource(tmp_path, size=12)
    assert source.class_names == ("healthy", "unhealthy") and source.modalities == ("channel0",)
    assert source.patients() == ["a_b", "p1", "p2"]
    found = source.read("p1")
    assert found.slices.tolist() == [3, 12] and found.labels.tolist() == [0, 1] and found.masks is None
    pixels = np.asarray(Image.open(tmp_path / "unhealthy/p1_012.png"))
    np.testing.assert_allclose(found.images[1, 0], pixels / 255, atol=1e-6)
    np.testing.assert_allclose(source.read("a_b").images[0, 0], np.load(tmp_path / names[3]) / 255, atol=1e-6)


def test_folder_of_three_classes_and_colours(tmp_path):
    write_images(tmp_path, ["cat/1.png", "dog/2.png", "bird/3.npy"], shape=(6, 10, 3))
    source = FolderSource(tmp_path, size=10)
    assert source.class_names == ("bird", "cat", "dog") and len(source.modalities) == 3
    assert source.read("2").slices.tolist() == [0]
    assert source.read("2").slices.tolist() == [0]
    found = source.read("2").images[0]
    pixels = np.moveaxis(np.asarray(Image.open(tmp_path / "dog/2.png")), -1, 0) / 255
    np.testing.assert_allclose(found[:, 2:8], pixels, atol=1e-6)
    assert not found[:, :2].any() and not found[:, 8:].any()
    ordered = FolderSource(tmp_path, size=10, class_names=("dog", "bird", "cat"), modalities=("r", "g", "b"))
    assert ordered.class_names == ("dog", "bird", "cat") and ordered.read("1").labels.tolist() == [2]


def test_kinds_of_images(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    write_images(tmp_path, ["a/1.png"], shape=(4, 4))
    (tmp_path / "b").mkdir()
    Image.fromarray(values).save(tmp_path / "b/2.png")
    np.save(tmp_path / "b/3.npy", values.astype(np.float64) / 1000)
    Image.fromarray(values > 30000).save(tmp_path / "b/4.png")
    source = FolderSource(tmp_path, size=4)
    np.testing.assert_allclose(source.read("2").images[0, 0], values / 65535, atol=1e-6)
    np.testing.assert_allclose(source.read("3").images[0, 0], values / 1000, rtol=1e-6)
    np.testing.assert_array_equal(source.read("4").images[0, 0], values > 30000)


def test_folder_with_labels(tmp_path):
    write_images(tmp_path / "images", ["p1_1.png", "p1_2.png", "p2_1.png"])
    (tmp_path / "labels.csv").write_text("patient,slice,label\np1,2,b\np1,,a\n")
    source = FolderSource(tmp_path / "images", size=12, labels=tmp_path / "labels.csv", class_names=("a", "b"))
    assert source.read("p1").labels.tolist() == [0, 1] and source.class_names == ("a", "b")
    assert "no label for any image of p2" in source.problems("p2")[0]


def test_bad_image_folders(tmp_path):
    with pytest.raises(InputError, match="absent: can't be read"):
        FolderSource(tmp_path / "absent")
    write_images(tmp_path, ["a/1.png"])
    with pytest.raises(InputError, match="at least two sub-folders"):
        FolderSource(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="b: no .png or .npy file in it"):
        FolderSource(tmp_path)
    write_images(tmp_path, ["b/2.png"])
    with pytest.raises(InputError, match="the sub-folders are a, b, not a, c"):
        FolderSource(tmp_path, class_names=("a", "c"))
    with pytest.raises(InputError, match="1 channels, but modalities names 2"):
        FolderSource(tmp_path, modalities=("x", "y"))


def test_bad_images_are_named(tmp_path):
    write_images(tmp_path, ["a/1.png", "b/1.png", "b/3.png", "b/4.png"])
    write_images(tmp_path, ["b/2.png"], shape=(12, 12, 3))
    (tmp_path / "b/3.png").write_bytes((tmp_path / "b/3.png").read_bytes()[:60])
    np.save(tmp_path / "b/5.npy", np.full((4, 4), np.nan))
    np.save(tmp_path / "b/6.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "b/7.npy", np.zeros((2, 2, 2, 2)))
    source = FolderSource(tmp_path)
    words = {
        "1": "1: a slice occurs twice",
        "2": "2.png: 3 channels, but other images have 1",
        "3": "3.png: can't be read",
        "5": "5.npy: 16 values are NaN or infinite",
        "6": "6.npy: not a readable image",
        "7": r"7.npy: \(H, W\) or \(C, H, W\) numbers expected",
    }
    assert source.problems("4") == []
    for patient, reason in words.items():
        assert len(source.problems(patient)) == 1
        with pytest.raises(InputError, match=reason):
            source.read(patient)


needs_data = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} (DIFFUSERS_CF_DATA) is missing"),
]


class TestRealData:
    """Two real patients and the slices that were made from one of them by other code."""

    pytestmark = needs_data

    def test_scans_agree_with_the_stored_slices(self):
        found = BratsSource(DATA / "volumes", normalize="p99").read("MS19")
        stored = ArraysSource(DATA / "slices" / "ms_mni.npz", normalize="none").read("MS19")
        rows = np.searchsorted(found.slices, stored.slices)
        np.testing.assert_array_equal(found.slices[rows], stored.slices)
        # Stored in steps of 1/200, clipped at 1.275, and only where most of a pixel lies in the brain.
        brain = stored.images > 0
        ours = np.minimum(found.images[rows], 1.275)[brain]
        np.testing.assert_allclose(ours, stored.images[brain], rtol=0, atol=5.1e-3)
        np.testing.assert_array_equal(found.masks[rows], stored.masks)

    def test_both_patients_are_good(self):
        source = BratsSource(DATA / "volumes")
        assert source.patients() == ["BraTS2021_00006", "MS19"]
        assert [source.problems(patient) for patient in source.patients()] == [[], []]
