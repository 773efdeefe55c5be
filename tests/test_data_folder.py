"""Images in class folders, or in one folder with labels."""

import numpy as np
import pytest
from PIL import Image

from diffusers_cf.data.folder import FolderSource
from diffusers_cf.data.prepare import prepare
from diffusers_cf.errors import InputError


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
    with pytest.raises(InputError, match="which class is healthy.*--class_names bird cat dog"):
        FolderSource(tmp_path, size=10)
    source = FolderSource(tmp_path, size=10, class_names=("dog", "bird", "cat"), modalities=("r", "g", "b"))
    assert source.class_names == ("dog", "bird", "cat") and source.read("1").labels.tolist() == [2]
    found = source.read("2").images[0]
    pixels = np.moveaxis(np.asarray(Image.open(tmp_path / "dog/2.png")), -1, 0) / 255
    np.testing.assert_allclose(found[:, 2:8], pixels, atol=1e-6)
    assert not found[:, :2].any() and not found[:, 8:].any()


@pytest.mark.parametrize("names", [("abnormal", "Normal"), ("glioma", "no tumor", "pituitary")])
def test_the_healthy_class_is_known_by_its_name(names, tmp_path):
    write_images(tmp_path, [f"{name}/{i}.png" for i, name in enumerate(names)])
    assert FolderSource(tmp_path).class_names == (names[1], *(name for name in names if name != names[1]))


def test_kinds_of_images(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    grey = write_images(tmp_path, ["normal/1.png", "normal/5.jpg", "normal/6.TIFF", "normal/7.bmp"], shape=(4, 4))
    (tmp_path / "b").mkdir()
    Image.fromarray(values).save(tmp_path / "b/2.png")
    np.save(tmp_path / "b/3.npy", values.astype(np.float64) / 10000)
    Image.fromarray(values > 30000).save(tmp_path / "b/4.png")
    (tmp_path / "b/notes.txt").touch()
    source = FolderSource(tmp_path, size=4)
    np.testing.assert_allclose(source.read("2").images[0, 0], values / 65535, atol=1e-6)
    np.testing.assert_allclose(source.read("3").images[0, 0], values / 10000, rtol=1e-6)
    np.testing.assert_array_equal(source.read("4").images[0, 0], values > 30000)
    for name in ("1.png", "5.jpg", "6.TIFF", "7.bmp"):
        expected = np.asarray(Image.open(grey / "normal" / name)) / 255
        np.testing.assert_allclose(source.read(name[0]).images[0, 0], expected, atol=1e-6)
    assert source.unused == ["b/notes.txt"] and source.summary[0].startswith("7 images: 3 .png, 1 .jpg, 1 .tiff")


def test_an_alpha_channel_is_no_channel(tmp_path):
    grey = np.random.default_rng(0).integers(1, 256, (4, 4), dtype=np.uint8)
    alpha = np.full((4, 4), 255, np.uint8)
    alpha[0] = 0
    write_images(tmp_path, ["a/1.png"], shape=(4, 4))
    (tmp_path / "normal").mkdir()
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "normal/2.png")
    image = FolderSource(tmp_path, size=4).read("2").images[0]
    np.testing.assert_allclose(image, np.where(alpha == 0, 0, grey)[None] / 255, atol=1e-6)
    Image.fromarray(np.dstack([grey, grey, grey, alpha])).save(tmp_path / "normal/2.png")
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "a/1.png")
    assert FolderSource(tmp_path, size=4).read("2").images.shape == (1, 3, 4, 4)


def test_patients_and_slices_from_names(tmp_path):
    write_images(tmp_path / "a", ["healthy/p0_slice9.png", "healthy/p0_slice10.png", "unhealthy/p0_slice11.png"])
    source = FolderSource(tmp_path / "a", size=12)
    assert source.patients() == ["p0"] and source.read("p0").slices.tolist() == [9, 10, 11]

    write_images(tmp_path / "b", ["healthy/p1_left.png", "unhealthy/p2.png"])
    with pytest.raises(InputError, match="p1_left.png: its name does not say patient and slice .*--patient_pattern"):
        FolderSource(tmp_path / "b")
    source = FolderSource(tmp_path / "b", patient_pattern="(?P<patient>p[0-9]+).*")
    assert source.patients() == ["p1", "p2"]
    with pytest.raises(InputError, match=r"it has no group \(\?P<patient>"):
        FolderSource(tmp_path / "b", patient_pattern=".*")

    write_images(tmp_path / "c", ["healthy/image (1).png", "unhealthy/image (1).png"])
    source = FolderSource(tmp_path / "c", one_image_per_patient=True)
    assert source.patients() == ["healthy_image__1_", "unhealthy_image__1_"]
    assert source.read("unhealthy_image__1_").labels.tolist() == [1]


@pytest.mark.parametrize("names", [("healthy/王1_1.png", "b/李1_2.png"), ("healthy/p1.png", "b/healthy_p07.png")])
def test_names_that_do_not_tell_patients_apart_are_refused(names, tmp_path):
    with pytest.raises(InputError, match="can't be a patient's id|does not say patient and slice"):
        FolderSource(write_images(tmp_path, names))


def test_integers_beyond_16_bits_are_refused(tmp_path):
    write_images(tmp_path, ["a/1.png"], shape=(4, 4))
    (tmp_path / "normal").mkdir()
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "normal/2.tif")
    with pytest.raises(InputError, match="2.tif: 70000 to 70000: integers of 16 bits are required"):
        FolderSource(tmp_path)


def test_folder_with_labels(tmp_path):
    write_images(tmp_path / "images", ["p1_1.png", "p1_2.png", "p2_1.png"])
    (tmp_path / "labels.csv").write_text("patient,slice,label\np1,2,b\np1,,a\n")
    options = {"size": 12, "labels": tmp_path / "labels.csv", "class_names": ("a", "b")}
    source = FolderSource(tmp_path / "images", **options)
    assert source.read("p1").labels.tolist() == [0, 1] and source.class_names == ("a", "b")
    assert "no label for any slice of p2" in source.examine("p2")[1][0]
    with pytest.raises(InputError, match=r"labels.csv: labels slices, but .* has no group \(\?P<slice>"):
        FolderSource(tmp_path / "images", **options, patient_pattern="(?P<patient>p.).*")


def test_bad_image_folders(tmp_path):
    with pytest.raises(InputError, match="absent: can't be read"):
        FolderSource(tmp_path / "absent")
    write_images(tmp_path, ["healthy/1.png"])
    with pytest.raises(InputError, match="at least two sub-folders"):
        FolderSource(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="b: no image in it"):
        FolderSource(tmp_path)
    write_images(tmp_path, ["b/2.png"])
    with pytest.raises(InputError, match="the sub-folders are b, healthy, not a, c"):
        FolderSource(tmp_path, class_names=("a", "c"))
    with pytest.raises(InputError, match="1 channels, but modalities names 2"):
        FolderSource(tmp_path, modalities=("x", "y"))


def test_bad_images_are_named(tmp_path):
    write_images(tmp_path, ["normal/1.png", "b/1.png", "b/3.png", "b/4.png"])
    write_images(tmp_path, ["b/2.png"], shape=(12, 12, 3))
    (tmp_path / "b/3.png").write_bytes((tmp_path / "b/3.png").read_bytes()[:60])
    np.save(tmp_path / "b/5.npy", np.full((4, 4), np.nan))
    np.save(tmp_path / "b/6.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "b/7.npy", np.zeros((2, 2, 2, 2)))
    np.save(tmp_path / "b/8.npy", np.ones((24, 24, 3)))
    np.save(tmp_path / "b/9.npy", np.linspace(-1, 1, 16).reshape(4, 4))
    np.save(tmp_path / "b/0.npy", np.linspace(0, 255, 16).reshape(4, 4))
    source = FolderSource(tmp_path)
    words = {
        "1": "1: a slice occurs twice",
        "2": "2.png: 3 channels, but other images have 1",
        "3": "3.png: can't be read",
        "5": "5.npy: 16 values are NaN or infinite",
        "6": "6.npy: not a readable image",
        "7": r"7.npy: \(H, W\) or \(C, H, W\) numbers expected",
        "8": r"8.npy: shape \(24, 24, 3\) seems to be \(H, W, C\)",
        "9": "9.npy: channel0 of patient 9: 50 % of the values are negative",
        "0": "0.npy: channel0 of patient 0: values reach 23.*--normalize none",
    }
    assert source.examine("4")[1] == []
    for patient, reason in words.items():
        assert len(source.examine(patient)[1]) == 1
        with pytest.raises(InputError, match=reason):
            source.read(patient)


def test_every_split_has_every_class(tmp_path):
    names = [f"{name}/{name}_{i:02d}.png" for name in ("healthy", "glioma", "other") for i in range(7)]
    source = FolderSource(write_images(tmp_path / "in", names), size=12, one_image_per_patient=True)
    facts = prepare(source, tmp_path / "set")
    counts = {split: [c["patients"] for c in facts["splits"][split]["classes"].values()] for split in facts["splits"]}
    assert counts == {"train": [4] * 3, "validation": [1] * 3, "test": [2] * 3}
