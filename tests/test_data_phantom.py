"""The phantom: the test set is frozen and hard for a threshold; confounders do not depend on the tumour."""

import functools
import hashlib

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score

from diffusers_cf.data import phantom
from diffusers_cf.data.phantom import MODALITIES, PhantomSource, make_patient, write_patient
from diffusers_cf.data.phantom_anatomy import SPACING_MM
from diffusers_cf.errors import InputError


pytest.importorskip("nilearn")

# SHA-256 of one patient of each split. Frozen: see the docstring of the module before a change.
FROZEN_SHA256 = {
    "phantom-s0-0000": "42ce60e7c6cd96451b985f63730eef0b1876881c23715f3797d7f7f7fc01941d",
    "phantom-s0-0300": "f4cfe17d75f2d159df1d6a970b4e1d599da5aba72891f5d8fb5296627b021d9a",
    "phantom-s0-0317": "e4fe915701c7a8526410730532015822c11e3a1f43373cae8d61979534de92ae",
}
HEALTHY, SICK = 330, 317


@functools.cache
def patient(index: int, tumour: bool = True) -> phantom.PhantomPatient:
    return make_patient(0, index, tumour)


def test_the_test_set_is_frozen():
    assert phantom.PHANTOM_VERSION == 1
    source = PhantomSource()
    found = {}
    for name in FROZEN_SHA256:
        slices = source.read(name)
        digest = hashlib.sha256(np.round(slices.images * 8).astype(np.uint8).tobytes())
        for exact in (slices.masks, slices.labels.astype(np.uint8), slices.slices.astype(np.uint8)):
            digest.update(exact.tobytes())
        found[name] = digest.hexdigest()
    assert found == FROZEN_SHA256


def test_another_index_or_seed_gives_another_brain():
    brains = [patient(SICK).volumes > 0, patient(HEALTHY).volumes > 0, make_patient(1, SICK).volumes > 0]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (brains[a] != brains[b]).sum() > 1000


def test_background_is_zero_and_scans_are_whole_positive_numbers():
    volumes = patient(SICK).volumes
    assert volumes.shape == (4, 128, 128, 48) and volumes.dtype == np.float32
    brain = volumes[0] > 0
    assert (volumes[1:] > 0).sum() == 3 * brain.sum() and ((volumes > 0) == brain).all()
    _, pieces = ndimage.label(brain.any(axis=2))
    assert pieces == 1 and not brain[[0, -1]].any() and not brain[:, [0, -1]].any()
    assert 1000 < brain.sum() * SPACING_MM.prod() / 1000 < 2500
    assert (volumes == np.round(volumes)).all() and volumes.min() == 0 and volumes.max() < 32767


def test_lesion_is_inside_the_brain_and_made_of_brats_labels():
    sick = patient(SICK)
    assert sick.mask.any() and sick.mask.dtype == np.uint8 and set(np.unique(sick.mask)) == {0, 1}
    assert set(np.unique(sick.labels)) <= {0, 1, 2, 4} and (sick.labels == 2).any()
    assert (sick.volumes[:, sick.mask > 0] > 0).all()
    assert 5 < sick.mask.sum() * SPACING_MM.prod() / 1000 < 450


def test_confounders_do_not_depend_on_the_tumour():
    sick, cured = patient(SICK), patient(SICK, tumour=False)
    assert not cured.labels.any()
    differs = (sick.volumes != cured.volumes).any(axis=0)
    from_lesion = ndimage.distance_transform_edt(sick.mask == 0, sampling=SPACING_MM)
    assert differs[sick.mask > 0].mean() > 0.99
    assert from_lesion[differs].max() < 45
    assert (~differs & (sick.volumes[0] > 0)).sum() > 0.5 * (sick.volumes[0] > 0).sum()
    np.testing.assert_array_equal(sick.volumes > 0, cured.volumes > 0)


@pytest.mark.slow
def test_a_flair_threshold_finds_it_hard():
    source = PhantomSource()
    parts = [source.read(f"phantom-s0-{index:04d}") for index in range(316, 322)]
    images, masks = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "masks"))
    brain = (images > 0).any(axis=1)
    lesion = masks[brain]
    auprc = {name: average_precision_score(lesion, images[:, i][brain]) for i, name in enumerate(MODALITIES)}
    assert 0.35 < auprc["flair"] < 0.7
    assert max(auprc["t1"], auprc["t1ce"], auprc["t2"]) < 0.35
    assert 0.01 < lesion.mean() < 0.10


def test_write_patient_makes_brats_files_without_loss(tmp_path):
    sick = patient(SICK)
    folder = write_patient(sick, tmp_path)
    assert folder == tmp_path / "phantom-s0-0317"
    assert len(list(folder.iterdir())) == 5
    for name, expected in zip((*MODALITIES, "seg"), (*sick.volumes, sick.labels), strict=True):
        image = nib.load(folder / f"phantom-s0-0317_{name}.nii.gz")
        np.testing.assert_array_equal(image.affine, sick.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.get_data_dtype() == (np.uint8 if name == "seg" else np.int16)
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
    assert np.allclose(nib.affines.apply_affine(sick.affine, (np.array([128, 128, 48]) - 1) / 2), 0)


@pytest.mark.parametrize(("count", "sizes"), [(340, (300, 16, 24)), (34, (30, 2, 2)), (10, (8, 1, 1)), (3, (1, 1, 1))])
def test_fixed_splits_follow_the_index(count, sizes):
    splits = PhantomSource(patients=count).fixed_splits()
    assert tuple(len(splits[name]) for name in ("train", "validation", "test")) == sizes
    ids = [f"phantom-s0-{index:04d}" for index in range(count)]
    assert splits["train"] + splits["validation"] + splits["test"] == ids == PhantomSource(patients=count).patients()


def test_three_splits_need_three_patients():
    with pytest.raises(InputError, match="at least 3 patients"):
        PhantomSource(patients=2)
