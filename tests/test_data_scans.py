"""Sources of NIfTI scans: BraTS and Decathlon, labels instead of masks, and bad patients."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_files import MODALITIES, brain, ras_affine, save, write_brats
from model_files import edit_json

from diffusers_cf.data.prepare import check
from diffusers_cf.data.scans import BratsSource, DecathlonSource
from diffusers_cf.errors import InputError


def same(found, expected):
    for name in ("images", "masks", "labels", "slices"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)


def write_decathlon(folder: Path, axes: str = "RAS", order=("flair", "t1", "t1ce", "t2")) -> Path:
    volume, mask = brain()
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    channels = np.stack([volume[MODALITIES.index(name)] for name in order], axis=-1)
    save(folder / "imagesTr" / "P_01.nii.gz", channels.astype(np.int16), axes)
    save(folder / "labelsTr" / "P_01.nii.gz", mask, axes)
    spelled = {"flair": "FLAIR", "t1": "T1w", "t1ce": "t1gd", "t2": "T2w"}
    entry = {"image": "./imagesTr/P_01.nii.gz", "label": "./labelsTr/P_01.nii.gz"}
    modality, labels = {str(i): spelled[name] for i, name in enumerate(order)}, {"0": "background", "1": "edema"}
    (folder / "dataset.json").write_text(json.dumps({"modality": modality, "labels": labels, "training": [entry]}))
    return folder


@pytest.mark.parametrize("axes", ["LPS", "LAS", "PSR", "IRA"])
def test_orientation_does_not_change_the_slices(axes, tmp_path):
    write_brats(tmp_path / "ras")
    write_brats(tmp_path / "turned", axes=axes)
    expected = BratsSource(tmp_path / "ras", size=32).read("P_01")
    assert expected.labels.sum() == 4 and expected.masks.any()
    same(BratsSource(tmp_path / "turned", size=32).read("P_01"), expected)
    write_decathlon(tmp_path / "task", axes, order=("t2", "flair", "t1", "t1ce"))
    same(DecathlonSource(tmp_path / "task", size=32).read("P_01"), expected)


def test_brats_names_of_2023_and_a_choice_of_modalities(tmp_path):
    suffixes = {"flair": "t2f", "t1": "t1n", "t1ce": "T1C", "t2": "t2w", "seg": "seg"}
    patient = "BraTS-GLI-00001-000"
    write_brats(tmp_path, patient, names={m: f"{patient}-{suffix}.nii.gz" for m, suffix in suffixes.items()})
    source = BratsSource(tmp_path, size=16)
    assert source.patients() == [patient] and source.examine(patient)[1] == []
    chosen = BratsSource(tmp_path, size=16, modalities=("T1Gd", "flair"))
    assert chosen.modalities == ("t1ce", "flair")
    np.testing.assert_array_equal(chosen.read(patient).images, source.read(patient).images[:, [2, 0]])


def resave(path, change):
    volume, mask = brain()
    data = mask if "seg" in path.name else volume[MODALITIES.index(path.name.split("_")[-1].split(".")[0])]
    save(path, np.asarray(change(data.astype(np.float32)), dtype=np.float32))


def with_noise(data):
    return data + np.random.default_rng(0).integers(1, 5, data.shape)


def with_shell(data):
    data[0], data[-1], data[:, 0], data[:, -1] = 9, 9, 9, 9
    return data


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def shift(path):
    affine = ras_affine()
    affine[2, 3] += 1
    save(path, brain()[0][1].astype(np.int16), affine=affine)


# file of the patient, what is done to it, what the problem says
BAD_PATIENTS = {
    "missing modality": ("t1ce", Path.unlink, "modality missing: t1ce (names end in t1ce, t1gd, t1c)"),
    "missing segmentation": ("seg", Path.unlink, "no segmentation, and no labels file"),
    "two files": ("t1ce", lambda p: (p.parent / "x_t1gd.nii").touch(), "are t1ce: P_01_t1ce.nii.gz, x_t1gd.nii"),
    "truncated": ("t2", truncate, "truncated"),
    "empty": ("t1", lambda p: resave(p, np.zeros_like), "t1: empty: no value above 0"),
    "z-scored": ("t1", lambda p: resave(p, lambda d: np.where(d > 0, d - 400, 0)), "are negative"),
    "other shape": ("t1", lambda p: resave(p, lambda d: d[..., :-1]), "P_01_t1.nii.gz is 26x32x11"),
    "other affine": ("t1", shift, "origin (-90, -126, -39)"),
    "segmentation of other shape": ("seg", lambda p: resave(p, lambda d: d[1:]), "P_01_seg.nii.gz is 25x32x12"),
    "fractions": ("seg", lambda p: resave(p, lambda d: d * 0.5), "whole numbers from 0 up, found 0.5"),
    "negative label": ("seg", lambda p: resave(p, lambda d: -d), "whole numbers from 0 up, found -1"),
    "unknown label": ("seg", lambda p: resave(p, lambda d: d * 7), "unknown label ids 7 (known: 0, 1, 2, 3, 4)"),
    "noise outside": ("t2", lambda p: resave(p, with_noise), "t2 seems not to be skull-stripped"),
    "filled sides": ("t2", lambda p: resave(p, with_shell), "t2 seems not to be skull-stripped"),
}


@pytest.mark.parametrize("case", BAD_PATIENTS)
def test_bad_patient_is_described_in_one_line(case, tmp_path):
    name, spoil, words = BAD_PATIENTS[case]
    folder = write_brats(tmp_path)
    assert BratsSource(tmp_path).examine("P_01")[1] == []
    spoil(folder / f"P_01_{name}.nii.gz")
    (problem,) = BratsSource(tmp_path).examine("P_01")[1]
    assert words in problem and "P_01" in problem and "\n" not in problem
    with pytest.raises(InputError) as error:
        BratsSource(tmp_path, size=16).read("P_01")
    assert str(error.value) == problem


def test_all_problems_of_a_patient_are_listed(tmp_path):
    folder = write_brats(tmp_path)
    (folder / "P_01_t1.nii.gz").unlink()
    truncate(folder / "P_01_flair.nii.gz")
    resave(folder / "P_01_t2.nii.gz", with_noise)
    source = BratsSource(tmp_path)
    words = ["truncated", "modality missing: t1", "skull-stripped"]
    assert all(word in problem for word, problem in zip(words, source.examine("P_01")[1], strict=True))
    with pytest.raises(InputError, match=r"truncated.* \(and 2 more; --check lists all\)"):
        source.read("P_01")


def test_lenient_takes_what_is_only_doubtful(tmp_path):
    folder = write_brats(tmp_path)
    resave(folder / "P_01_t2.nii.gz", with_noise)
    resave(folder / "P_01_seg.nii.gz", lambda d: d * 7)
    source = BratsSource(tmp_path, size=16, lenient=True)
    assert source.examine("P_01")[1] == [] and source.read("P_01").labels.sum() == 4
    (folder / "P_01_t1.nii.gz").unlink()
    assert len(source.examine("P_01")[1]) == 1


def test_a_brain_outside_the_field_is_only_taken_on_purpose(tmp_path):
    write_brats(tmp_path)
    (problem,) = BratsSource(tmp_path, field_mm=20).examine("P_01")[1]
    assert "P_01: " in problem and "% of the foreground lies outside the central field of 20 mm" in problem
    assert BratsSource(tmp_path, field_mm=20, lenient=True).examine("P_01")[1] == []


def test_healthy_patient(tmp_path):
    folder = write_brats(tmp_path)
    resave(folder / "P_01_seg.nii.gz", np.zeros_like)
    found = BratsSource(tmp_path, size=16).read("P_01")
    assert found.labels.sum() == 0 and not found.masks.any()


def test_folders_that_hold_no_patients(tmp_path):
    with pytest.raises(InputError, match="absent: can't be read .No such file"):
        BratsSource(tmp_path / "absent").patients()
    with pytest.raises(InputError, match="no folder per patient"):
        BratsSource(tmp_path).patients()
    folder = write_brats(tmp_path / "a")
    with pytest.raises(InputError, match="give the folder above it"):
        BratsSource(folder).patients()
    (tmp_path / "b" / "one two").mkdir(parents=True)
    with pytest.raises(InputError, match="'one two' can't be a patient's id"):
        check(BratsSource(tmp_path / "b"))
    with pytest.raises(InputError, match="--normalize none: scanner"):
        BratsSource(tmp_path, normalize="none")


def unlabelled(tmp_path, text):
    """A BraTS patient without segmentation and a labels file."""
    folder = write_brats(tmp_path / "scans")
    (folder / "P_01_seg.nii.gz").unlink()
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig")
    return BratsSource(tmp_path / "scans", size=16, labels=tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("rows", "slices", "labels"),
    [
        ("P_01, , unhealthy", range(2, 9), [1] * 7),
        ("P_01, 4, healthy\nP_01, 5, unhealthy", [4, 5], [0, 1]),  # slices without a label are left out
        ("P_01, 4, healthy\nP_01, , unhealthy", range(2, 9), [1, 1, 0, 1, 1, 1, 1]),
    ],
)
def test_labels_instead_of_masks(rows, slices, labels, tmp_path):
    source = unlabelled(tmp_path, f"patient, slice, label\n{rows}\n")
    found = source.read("P_01")
    assert not source.has_masks and found.masks is None
    assert found.slices.tolist() == list(slices) and found.labels.tolist() == labels


def test_labels_beside_masks(tmp_path):
    write_brats(tmp_path / "scans")
    (tmp_path / "labels.csv").write_text("patient,slice,label\nP_01,2,unhealthy\n")
    source = BratsSource(tmp_path / "scans", size=16, labels=tmp_path / "labels.csv")
    found, plain = source.read("P_01"), BratsSource(tmp_path / "scans", size=16).read("P_01")
    assert source.has_masks and plain.labels[plain.slices == 2] == 0
    np.testing.assert_array_equal(found.labels, np.where(plain.slices == 2, 1, plain.labels))
    np.testing.assert_array_equal(found.masks, plain.masks)
    write_brats(tmp_path / "scans", "P_02")
    (tmp_path / "scans" / "P_02" / "P_02_seg.nii.gz").unlink()
    mixed = BratsSource(tmp_path / "scans", size=16, labels=tmp_path / "labels.csv")
    assert not mixed.has_masks and mixed.read("P_01").masks is None
    np.testing.assert_array_equal(mixed.read("P_01").labels, found.labels)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("patient,label\nP_02,healthy\n", "no label for any slice of P_01"),
        ("patient,slice,label\nP_01,12,healthy\n", "P_01 has no slice 12: its slices are 0 to 11"),
    ],
)
def test_labels_that_do_not_fit_a_patient(text, reason, tmp_path):
    (problem,) = unlabelled(tmp_path, text).examine("P_01")[1]
    assert f"labels.csv: {reason}" in problem


def test_labels_of_empty_slices_are_no_problem(tmp_path):
    source = unlabelled(tmp_path, "patient,slice,label\n" + "".join(f"P_01,{i},healthy\n" for i in range(12)))
    slices, problems = source.examine("P_01")
    assert problems == [] and len(slices.labels) < slices.depth == 12


def test_patients_of_the_labels_file_that_there_are_not(tmp_path):
    with pytest.raises(InputError, match="labels.csv: no row is about a patient .* names P_1.nii.gz, and .* P_01"):
        check(unlabelled(tmp_path / "none", "patient,label\nP_1.nii.gz,healthy\n"))
    source = unlabelled(tmp_path, "patient,label\nP_01,healthy\nP_99,healthy\n")
    _, lines = check(source, allow_missing_classes=True)
    assert lines[-1] == "not used: labels.csv: rows of P_99"


def test_masks_may_be_rounded(tmp_path):
    folder = write_brats(tmp_path)
    before = BratsSource(tmp_path).read("P_01").masks
    resave(folder / "P_01_seg.nii.gz", lambda data: data.astype(np.float32) * np.float32(1.0000001))
    np.testing.assert_array_equal(BratsSource(tmp_path).read("P_01").masks, before)
    resave(folder / "P_01_seg.nii.gz", lambda data: data * 1.01)
    assert "found 1.01" in BratsSource(tmp_path).examine("P_01")[1][0]


def test_decathlon_problems(tmp_path):
    folder = write_decathlon(tmp_path)
    assert DecathlonSource(folder).examine("P_01")[1] == []
    assert DecathlonSource(folder, modalities=("t1gd",)).modalities == ("t1ce",)
    with pytest.raises(InputError, match=r"no modality pet \(there are flair, t1, t1ce, t2\)"):
        DecathlonSource(folder, modalities=("pet",))
    edit_json(folder / "dataset.json", modality={"0": "FLAIR", "1": "T1w"})
    (problem,) = DecathlonSource(folder).examine("P_01")[1]
    assert "P_01.nii.gz: 4 volumes, but dataset.json names 2 modalities (flair, t1)" in problem
    edit_json(write_decathlon(tmp_path / "b") / "dataset.json", labels={"0": "background", "2": "core"})
    assert "unknown label ids 1 (known: 0, 2)" in DecathlonSource(tmp_path / "b").examine("P_01")[1][0]
    (tmp_path / "b" / "labelsTr" / "P_01.nii.gz").unlink()
    (problem,) = DecathlonSource(tmp_path / "b").examine("P_01")[1]
    assert "labelsTr/P_01.nii.gz: can't be read" in problem


def test_decathlon_index_is_not_trusted(tmp_path):
    with pytest.raises(InputError, match="dataset.json: can't be read"):
        DecathlonSource(tmp_path)
    for text in ("{", "[]", "{}", '{"modality": {"x": "T1"}, "training": []}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match="dataset.json: not a"):
            DecathlonSource(tmp_path)
    folder = write_decathlon(tmp_path / "a")
    edit_json(folder / "dataset.json", training=[{"image": "../P_01.nii.gz", "label": "./labelsTr/P_01.nii.gz"}])
    with pytest.raises(InputError, match="lies outside"):
        DecathlonSource(folder).read("P_01")


def test_decathlon_without_masks_takes_labels(tmp_path):
    folder = write_decathlon(tmp_path)
    edit_json(folder / "dataset.json", training=[{"image": "./imagesTr/P_01.nii.gz"}])
    assert "no segmentation, and no labels file" in DecathlonSource(folder).examine("P_01")[1][0]
    (tmp_path / "labels.csv").write_text("patient,label\nP_01,unhealthy\n")
    source = DecathlonSource(folder, size=16, labels=tmp_path / "labels.csv")
    assert not source.has_masks and source.read("P_01").labels.all()
