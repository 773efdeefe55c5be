"""`segment_patient`: what it writes, when it skips, and what it refuses."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from data_files import SPACING_MM, save, write_brats
from segmentation_files import CUBE, MODALITIES, SETTINGS, BrightnessPipeline, make_pipe, voxels, write_cube

from diffusers_cf.baselines.student import Student
from diffusers_cf.data.geometry import from_ras, slices_from_volume, to_ras, volume_from_slices
from diffusers_cf.errors import InputError
from diffusers_cf.inference import compute_in
from diffusers_cf.segmentation import volumes as volumes_module
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts


FILES = ["counterfactual_flair.nii.gz", "counterfactual_t1.nii.gz", "heatmap.nii.gz", "mask.nii.gz"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than everything else."""
    monkeypatch.setattr(volumes_module, "write_preview", lambda path, *_: path.touch())


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def bright():
    return make_pipe(BrightnessPipeline, settings=SETTINGS | {"threshold": 0.5})


@pytest.fixture
def patient(tmp_path):
    return write_brats(tmp_path / "data", "P_01", "LPS")


@pytest.fixture
def segmented(pipe, patient, tmp_path):
    report = segment_patient(pipe, patient, tmp_path / "out", model="MODEL", progress=False)
    return report, tmp_path / "out" / "P_01"


def test_zero_steps_give_the_scan_and_no_lesion(pipe, patient, tmp_path):
    """Also for a file with scaled voxels, a display window and a fourth dimension of length 1."""
    flair = nib.load(patient / "P_01_flair.nii.gz")
    image = nib.Nifti1Image(np.asarray(flair.dataobj)[..., None] / np.float32(7), flair.affine)
    image.header.set_data_dtype(np.int16)
    image.header["cal_max"] = 1000
    nib.save(image, patient / "P_01_flair.nii.gz")
    assert nib.load(patient / "P_01_flair.nii.gz").dataobj.slope != 1
    report, folder = segment_patient(pipe, patient, tmp_path, strength=0, progress=False), tmp_path / "P_01"
    for modality, shape in (("flair", (26, 32, 12, 1)), ("t1", (26, 32, 12))):
        written = nib.load(folder / f"counterfactual_{modality}.nii.gz")
        assert written.shape == shape and written.dataobj.slope == 1
        np.testing.assert_allclose(written.get_fdata(), voxels(patient / f"P_01_{modality}.nii.gz"), rtol=1e-6)
    assert nib.load(folder / "mask.nii.gz").header["cal_max"] == 0
    assert not voxels(folder / "heatmap.nii.gz").any()
    assert report["lesion_volume_ml"] == 0 and report["network_evaluations_per_slice"] == 0


def test_the_heatmap_is_that_of_the_pipeline(patient, tmp_path):
    pipe = make_pipe(field_mm=220.0, normalize="p90", evaluation_size=64)
    segment_patient(pipe, patient, tmp_path / "out", progress=False)
    affine = nib.load(patient / "P_01_flair.nii.gz").affine
    scans = np.stack([to_ras(voxels(patient / f"P_01_{modality}.nii.gz"), affine) for modality in MODALITIES])
    found = slices_from_volume("P", scans.astype(np.float32), None, SPACING_MM, 64, 220.0, "p90")
    expected = pipe(torch.from_numpy(found.images)).heatmaps.numpy()
    expected = volume_from_slices(expected, found.slices, scans.shape[1:], SPACING_MM, 220.0)
    heat = to_ras(voxels(tmp_path / "out" / "P_01" / "heatmap.nii.gz"), affine)
    np.testing.assert_allclose(heat, np.where((scans > 0).any(axis=0), expected, 0), atol=1e-5 * expected.max())


def test_report(segmented, patient):
    from sklearn.metrics import average_precision_score

    report, folder = segmented
    assert json.loads((folder / "report.json").read_text()) == report
    assert (report["patient"], report["model"], report["threshold"]) == ("P_01", "MODEL", 0.05)
    assert report["settings"] == SETTINGS | {"map": "counterfactual"} and report["postprocessed"] is False
    assert report["network_evaluations_per_slice"] == 2 + 2 * 2 and report["seconds"] > 0
    geometry = {"size": 128, "field_mm": 240.0, "normalize": "p99"}
    assert report["preprocessing"] == {"modalities": MODALITIES} | geometry
    scans = np.stack([voxels(patient / f"P_01_{modality}.nii.gz") for modality in MODALITIES])
    assert report["n_slices"] == np.count_nonzero((scans > 0).any(axis=(0, 1, 2)))
    heat, mask, seg = (voxels(path) for path in (folder / FILES[2], folder / FILES[3], patient / "P_01_seg.nii.gz"))
    np.testing.assert_array_equal(mask, (heat >= np.float32(0.05)) & (scans > 0).any(axis=0))
    assert 0 < mask.sum() < mask.size
    assert report["lesion_volume_ml"] == pytest.approx(mask.sum() * np.prod(SPACING_MM) / 1000)
    assert report["auprc"] == pytest.approx(average_precision_score(seg.ravel() > 0, heat.ravel()))
    assert report["dice"] == pytest.approx(2 * (mask & (seg > 0)).sum() / (mask.sum() + (seg > 0).sum()))
    assert sorted(path.name for path in folder.iterdir()) == [*FILES, "preview.png", "report.json"]


def test_no_scores_without_a_seg_file_and_none_if_it_is_empty(pipe, patient, tmp_path):
    save(patient / "P_01_seg.nii.gz", np.zeros((26, 32, 12), np.uint8), "LPS")
    report = segment_patient(pipe, patient, tmp_path / "empty", progress=False)
    assert report["dice"] is None and report["auprc"] is None
    (patient / "P_01_seg.nii.gz").unlink()
    assert not {"dice", "auprc"} & set(segment_patient(pipe, patient, tmp_path / "none", progress=False))


@pytest.mark.parametrize(("flair_axes", "t1_axes"), [("RAS", "RAS"), ("LPS", "LPS"), ("LAS", "LAS"), ("PSR", "RAS")])
def test_the_lesion_is_found_where_it_is_in_any_orientation(bright, tmp_path, flair_axes, t1_axes):
    folder = write_cube(tmp_path / "P", flair_axes, t1_axes)
    report = segment_patient(bright, folder, tmp_path / "out", progress=False)
    flair, t1 = nib.load(folder / "P_flair.nii.gz"), nib.load(folder / "P_T1n.nii.gz")
    grids = {"heatmap": flair, "mask": flair, "counterfactual_flair": flair, "counterfactual_t1": t1}
    for name, scan in grids.items():
        written = nib.load(tmp_path / "out" / "P" / f"{name}.nii.gz")
        assert written.shape == scan.shape and written.header.get_zooms() == scan.header.get_zooms()
        np.testing.assert_array_equal(written.affine, scan.affine)
        for code in ("sform_code", "qform_code"):
            assert written.header[code] == scan.header[code]
        assert written.get_data_dtype() == (np.uint8 if name == "mask" else np.float32)
    mask = voxels(tmp_path / "out" / "P" / "mask.nii.gz")
    np.testing.assert_array_equal(mask, np.asarray(flair.dataobj) > 500)
    in_ras = to_ras(mask, flair.affine)
    assert in_ras[CUBE].all() and in_ras.sum() == in_ras[CUBE].size
    assert report["lesion_volume_ml"] == pytest.approx(in_ras[CUBE].size * np.prod(SPACING_MM) / 1000)
    heat = to_ras(voxels(tmp_path / "out" / "P" / "heatmap.nii.gz"), flair.affine)
    assert heat[5, 25, 8] == pytest.approx(1, abs=1e-5) and heat[15, 12, 5] == pytest.approx(0.1, abs=1e-5)
    assert not heat[:2].any() and not heat[..., 0].any()


@pytest.mark.parametrize(("modality", "gain"), [("flair", 1), ("t1", 3)])
@pytest.mark.parametrize("factor", [0.5, 3.0, -1.0])
def test_counterfactuals_have_their_scans_units_and_no_negatives(tmp_path, monkeypatch, modality, gain, factor):
    monkeypatch.setattr(BrightnessPipeline, "factor", factor)
    folder = write_cube(tmp_path / "P", "LAS", "LAS")
    segment_patient(make_pipe(BrightnessPipeline, normalize="p50"), folder, tmp_path / "out", progress=False)
    affine = nib.load(folder / "P_flair.nii.gz").affine
    written = to_ras(voxels(tmp_path / "out" / "P" / f"counterfactual_{modality}.nii.gz"), affine)
    for voxel, brightness in (((5, 25, 8), 1000), ((15, 12, 5), 100)):
        assert written[voxel] == pytest.approx(max(0, factor) * brightness * gain, rel=1e-5)
    assert not written[:2].any() and not written[:, 30:].any() and written.min() >= 0


def test_filled_scans_differ_from_the_scans_in_the_mask_alone(bright, tmp_path):
    """Stored voxels are compared: of a scaled file with a trailing axis, and of a plain one."""
    folder = write_cube(tmp_path / "P", "LAS", "PSR")
    flair = nib.load(folder / "P_flair.nii.gz")
    scaled = nib.Nifti1Image((np.asarray(flair.dataobj) + 6)[..., None].astype(np.int16), flair.affine)
    scaled.header.set_slope_inter(0.5, -3)
    scaled.header["cal_max"] = 99
    nib.save(scaled, folder / "P_flair.nii.gz")
    report = segment_patient(bright, folder, tmp_path / "out", fill=True, threshold=0.5, progress=False)
    out, affine = tmp_path / "out" / "P", flair.affine
    mask = to_ras(voxels(out / "mask.nii.gz")[..., 0], affine) > 0
    assert report["fill"] is True and mask[CUBE].all() and mask.sum() == mask[CUBE].size
    for modality, name in (("flair", "flair"), ("t1", "T1n")):
        scan, filled = nib.load(folder / f"P_{name}.nii.gz"), nib.load(out / f"filled_{modality}.nii.gz")
        for entry in ("datatype", "scl_slope", "scl_inter", "cal_max", "sform_code", "dim"):
            assert np.array_equal(filled.header[entry], scan.header[entry], equal_nan=True)
        assert (filled.dataobj.slope, filled.dataobj.inter) == (scan.dataobj.slope, scan.dataobj.inter)
        inside = from_ras(mask, scan.affine)
        stored, before = (image.dataobj.get_unscaled().reshape(inside.shape) for image in (filled, scan))
        np.testing.assert_array_equal(stored[~inside], before[~inside])
        counterfactual = voxels(out / f"counterfactual_{modality}.nii.gz").reshape(inside.shape)
        found = stored * filled.dataobj.slope + filled.dataobj.inter
        np.testing.assert_allclose(found[inside], counterfactual[inside], atol=0.51 * filled.dataobj.slope)
        assert (stored[inside] < before[inside]).all()


def test_a_student_is_joined_by_the_model_to_fill(patient, tmp_path):
    pipe = make_pipe(settings=SETTINGS | {"map": "student"})
    pipe.register_modules(student=Student(2, 16, (8, 16)).network)
    plain = segment_patient(pipe, patient, tmp_path / "plain", progress=False)
    with pytest.raises(InputError, match="P_01: finished without filled scans; --overwrite"):
        segment_patient(pipe, patient, tmp_path / "plain", fill=True, progress=False)
    filled = segment_patient(pipe, patient, tmp_path / "out", fill=True, progress=False)
    assert plain["network_evaluations_per_slice"] == 1 and filled["network_evaluations_per_slice"] == 1 + 2 + 2 * 2
    names = [*(f"counterfactual_{name}" for name in MODALITIES), *(f"filled_{name}" for name in MODALITIES)]
    written = {path.name.split(".")[0] for path in (tmp_path / "out" / "P_01").iterdir()}
    assert written == {*names, "heatmap", "mask", "preview", "report"}
    np.testing.assert_array_equal(*(voxels(tmp_path / name / "P_01" / "mask.nii.gz") for name in ("plain", "out")))
    assert segment_patient(pipe, patient, tmp_path / "out", progress=False) == filled  # it has more than is asked for


def test_postprocessing_if_the_model_asks_for_it(tmp_path):
    folder = write_cube(tmp_path / "P", "LPS", "LPS")
    settings = SETTINGS | {"threshold": 0.5, "postprocess": True}
    pipe = make_pipe(BrightnessPipeline, settings=settings, evaluation_size=32)
    report = segment_patient(pipe, folder, tmp_path / "out", progress=False)
    assert report["postprocessed"] is True and report["preprocessing"]["size"] == 32
    affine = nib.load(folder / "P_flair.nii.gz").affine
    mask = to_ras(voxels(tmp_path / "out" / "P" / "mask.nii.gz"), affine)
    assert 0 < mask.sum() < mask[CUBE].size and mask[5, 25, 8]  # the median filter removes the cube's corners
    heat = to_ras(voxels(tmp_path / "out" / "P" / "heatmap.nii.gz"), affine)
    assert (heat[CUBE] > 0.5).all()  # the heatmap is not post-processed


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"settings": SETTINGS | {"strength": 0.1}}, "", "P_01: finished with other settings"),
        ({"seed": 1}, "", "finished with another model"),
        ({"normalize": "p98"}, "", "finished with another preprocessing"),
        ({"settings": SETTINGS | {"postprocess": True}}, "", "finished with other post-processing"),
        ({}, "dtype", "finished with another dtype"),
        ({}, "scan", "finished with other scans"),
    ],
)
def test_results_of_something_else_need_overwrite(segmented, patient, tmp_path, options, change, message):
    pipe = make_pipe(**options)
    if change == "dtype":
        compute_in(pipe.unet, torch.float16)
    elif change == "scan":
        save(patient / "P_01_t1.nii.gz", np.ones((26, 32, 12), np.int16), "LPS")
    with pytest.raises(InputError, match=f"{message}.*; --overwrite"):
        segment_patient(pipe, patient, tmp_path / "out", progress=False)


def test_a_finished_patient_is_skipped_unless_overwrite_is_given(pipe, segmented, patient, tmp_path):
    (tmp_path / "out" / ".P_01.lock").touch()  # left by killed processes
    (tmp_path / "out" / ".P_01.old").mkdir()
    (tmp_path / "out" / ".P_01.tmp-x").mkdir()
    again = segment_patient(pipe, patient, tmp_path / "out", batch_size=2, progress=False)
    assert again == segmented[0]  # another run would have taken another time
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["P_01"]
    segment_patient(pipe, patient, tmp_path / "out", strength=0.1, overwrite=True, progress=False)
    assert json.loads((segmented[1] / "report.json").read_text())["settings"]["strength"] == 0.1


def test_files_that_segment_did_not_write_are_never_replaced(pipe, patient, tmp_path):
    before = sorted(patient.iterdir())
    with pytest.raises(InputError, match="holds P_01_flair.nii.gz, which segment did not write"):
        segment_patient(pipe, patient, patient.parent, overwrite=True, progress=False)
    assert sorted(patient.iterdir()) == before
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "P_01").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="links/P_01: not a folder that segment has written"):
        segment_patient(pipe, patient, tmp_path / "links", overwrite=True, progress=False)


@pytest.mark.parametrize(
    ("modality", "data", "message"),
    [
        ("t1", np.zeros((26, 32, 12)), "t1: empty"),
        ("t1", np.where(np.arange(9984).reshape(26, 32, 12) == 5000, 3e38, 1e-40), "P_01: the range of intensities"),
        ("seg", np.full((26, 32, 12), 0.5), "labels must be whole numbers"),
    ],
)
def test_scans_that_cannot_be_used(pipe, patient, tmp_path, modality, data, message):
    save(patient / f"P_01_{modality}.nii.gz", data.astype(np.float32), "LPS")
    with pytest.raises(InputError, match=message):
        segment_patient(pipe, patient, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_doubtful_scans_are_segmented_with_a_warning(patient, tmp_path, caplog):
    pipe = make_pipe()
    rng = np.random.default_rng(0)
    for modality in MODALITIES:
        save(patient / f"P_01_{modality}.nii.gz", rng.uniform(1, 9, (26, 32, 12)).astype(np.float32), "LPS")
    save(patient / "P_01_seg.nii.gz", np.full((26, 32, 12), 7, np.uint8), "LPS")
    pipe.preprocessing = pipe.preprocessing | {"field_mm": 60.0}
    report = segment_patient(pipe, patient, tmp_path / "out", strength=0, progress=False)
    for words in ("skull-stripped", "unknown label ids 7", "outside the central field of 60 mm"):
        assert words in caplog.text and any(words in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"settings": {}}, "MODEL recommends no threshold for the map counterfactual"),
        ({"modalities": None}, "MODEL: its preprocessing.json does not name the modalities"),
        ({"modalities": ["flair", "../../t1"]}, "MODEL: its modality '../../t1'"),
        ({"normalize": "none"}, "MODEL: takes images as they are"),
    ],
)
def test_models_that_do_not_say_what_segmentation_needs(preprocessing, message):
    with pytest.raises(InputError, match=message):
        segmentation_facts(make_pipe(**preprocessing), model="MODEL")


def test_a_model_that_yields_nan(bright, patient, tmp_path, monkeypatch):
    monkeypatch.setattr(BrightnessPipeline, "factor", np.nan)
    with pytest.raises(InputError, match="MODEL: the model yields NaN or infinite values on P_01"):
        segment_patient(bright, patient, tmp_path / "out", model="MODEL", progress=False)


def test_a_patient_given_as_a_dot_or_a_file(pipe, patient, tmp_path, monkeypatch):
    monkeypatch.chdir(patient)
    assert segment_patient(pipe, ".", tmp_path / "out", progress=False)["patient"] == "P_01"
    with pytest.raises(OSError, match="Not a directory: 'P_01_t1.nii.gz'"):
        segment_patient(pipe, "P_01_t1.nii.gz", tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="'a b' can't be a patient's id"):
        segment_patient(pipe, tmp_path / "a b", tmp_path / "out", progress=False)
