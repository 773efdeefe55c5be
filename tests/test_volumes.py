import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from data_files import SPACING_MM, save, write_brats
from filelock import FileLock
from segmentation_files import MODALITIES, SETTINGS, make_pipe, voxels

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.commands.segment import add_segment_arguments, run_segment
from diffusers_cf.data.geometry import slices_from_volume, to_ras, volume_from_slices
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation import patient as volumes
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts


FILES = ["counterfactual_flair.nii.gz", "counterfactual_t1.nii.gz", "heatmap.nii.gz", "mask.nii.gz"]


def run(*arguments):
    """Exit code of `diffusers-cf segment ARGUMENTS`."""
    parser = ArgumentParser()
    add_segment_arguments(parser)
    return run_command(lambda: run_segment(parser.parse_args([str(argument) for argument in arguments])))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than all the rest; the test of the preview draws."""
    monkeypatch.setattr("diffusers_cf.segmentation.patient.write_preview", lambda path, *_: path.touch())


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def patient(tmp_path):
    return write_brats(tmp_path / "data", "P_01", "LPS")


@pytest.fixture
def segmented(pipe, patient, tmp_path):
    report = segment_patient(pipe, patient, tmp_path / "out", model="MODEL", progress=False)
    return report, tmp_path / "out" / "P_01"


def test_zero_steps_give_the_scan_and_no_lesion(pipe, patient, tmp_path):
    report = segment_patient(pipe, patient, tmp_path / "out", strength=0, progress=False)
    for modality in MODALITIES:
        written = voxels(tmp_path / "out" / "P_01" / f"counterfactual_{modality}.nii.gz")
        np.testing.assert_array_equal(written, voxels(patient / f"P_01_{modality}.nii.gz"))
    assert not voxels(tmp_path / "out" / "P_01" / "heatmap.nii.gz").any()
    assert report["lesion_volume_ml"] == 0 and report["network_evaluations_per_slice"] == 0


def test_the_papers_settings_by_name(model, patient, tmp_path, capsys):
    options = ["--model", model, "--output", tmp_path / "out", "--settings", "paper", "--strength", 0]
    assert run(patient, *options) == 2  # the model's threshold belongs to its own settings
    assert "recommends no threshold for the map counterfactual: give one by --threshold" in capsys.readouterr().err
    assert run(patient, *options, "--threshold", 0.5) == 0
    report = json.loads((tmp_path / "out" / "P_01" / "report.json").read_text())
    paper = {"guidance_scale": 3.0, "num_inference_steps": 100, "map": "counterfactual"}
    assert report["settings"] == paper | {"strength": 0.0, "threshold": 0.5}


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


def test_no_scores_without_a_seg_file_and_none_where_it_is_empty(pipe, patient, tmp_path):
    seg = nib.load(patient / "P_01_seg.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(seg.shape, np.uint8), seg.affine), patient / "P_01_seg.nii.gz")
    report = segment_patient(pipe, patient, tmp_path / "empty", progress=False)
    assert report["dice"] is None and report["auprc"] is None
    (patient / "P_01_seg.nii.gz").unlink()
    assert not {"dice", "auprc"} & set(segment_patient(pipe, patient, tmp_path / "none", progress=False))


def test_batch_size_does_not_matter(pipe, patient, segmented, tmp_path):
    segment_patient(pipe, patient, tmp_path / "other", batch_size=3, progress=False)
    for name in FILES[:3]:
        expected, actual = voxels(segmented[1] / name), voxels(tmp_path / "other" / "P_01" / name)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * expected.max())


def test_scaled_voxels_a_display_window_and_a_single_fourth_dimension(pipe, patient, tmp_path):
    for modality in MODALITIES:
        path = patient / f"P_01_{modality}.nii.gz"
        scan = nib.load(path)
        image = nib.Nifti1Image(np.asarray(scan.dataobj)[..., None] / np.float32(7), scan.affine)
        image.header.set_data_dtype(np.int16)
        image.header["cal_max"] = 1000
        nib.save(image, path)
        assert nib.load(path).dataobj.slope != 1
    segment_patient(pipe, patient, tmp_path / "out", strength=0, progress=False)
    for modality in MODALITIES:
        written = nib.load(tmp_path / "out" / "P_01" / f"counterfactual_{modality}.nii.gz")
        np.testing.assert_allclose(written.get_fdata(), voxels(patient / f"P_01_{modality}.nii.gz"), rtol=1e-6)
        assert written.shape == (26, 32, 12, 1) and written.dataobj.slope == 1
    assert nib.load(tmp_path / "out" / "P_01" / "mask.nii.gz").header["cal_max"] == 0


def test_a_finished_patient_is_skipped_and_never_overwritten_unasked(model, patient, tmp_path, capsys):
    options = (patient, "--model", model, "--output", tmp_path / "out")
    report = tmp_path / "out" / "P_01" / "report.json"
    assert run(*options) == 0
    written = report.stat().st_mtime_ns
    assert "skipped" not in capsys.readouterr().out
    assert run(*options, "--batch-size", 2) == 0
    assert report.stat().st_mtime_ns == written and "P_01: " in (out := capsys.readouterr().out) and "skipped" in out

    assert run(*options, "--strength", "0.1") == 2
    assert "P_01: finished with other settings: --overwrite replaces it" in capsys.readouterr().err
    assert run(*options, "--dtype", "float16") == 2
    assert "P_01: finished with another dtype: --overwrite replaces it" in capsys.readouterr().err
    other = tmp_path / "other"
    make_pipe(seed=1).save_pretrained(other)
    assert run(patient, "--model", other, "--output", tmp_path / "out") == 2
    assert "finished with another model: --overwrite" in capsys.readouterr().err
    make_pipe(settings=SETTINGS | {"postprocess": True}, normalize="p98").save_pretrained(other)
    assert run(patient, "--model", other, "--output", tmp_path / "out") == 2
    assert "finished with another preprocessing and other post-processing" in capsys.readouterr().err
    assert report.stat().st_mtime_ns == written

    assert run(*options, "--strength", "0.1", "--overwrite") == 0
    assert json.loads(report.read_text())["settings"]["strength"] == 0.1
    save(patient / "P_01_t1.nii.gz", np.ones((26, 32, 12), np.int16), "LPS")
    assert run(*options, "--strength", "0.1") == 2
    assert "finished with other scans" in capsys.readouterr().err
    (report.parent / "mask.nii.gz").unlink()
    assert run(*options, "--strength", "0.1") == 2
    assert "mask.nii.gz is missing: --overwrite" in capsys.readouterr().err
    report.write_text("{}")
    assert run(*options, "--strength", "0.1") == 2
    assert "holds no readable report.json" in capsys.readouterr().err


def test_a_patient_that_another_process_is_at_is_left_to_it(pipe, patient, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".P_01.lock"):
        with pytest.raises(InputError, match="P_01: another process is writing it"):
            segment_patient(pipe, patient, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / ".P_01.lock"]
    read, first = volumes.read_volumes, {}

    def overtaken(*args):
        monkeypatch.setattr(volumes, "read_volumes", read)
        first.update(segment_patient(pipe, patient, tmp_path / "out", progress=False))
        return read(*args)

    monkeypatch.setattr(volumes, "read_volumes", overtaken)
    report = segment_patient(pipe, patient, tmp_path / "out", progress=False)
    # not done again: another run would have taken another time
    assert report == first == json.loads((tmp_path / "out" / "P_01" / "report.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["P_01"]


def test_what_a_killed_process_left_goes_with_a_finished_patient_too(pipe, patient, segmented, tmp_path):
    (tmp_path / "out" / ".P_01.lock").touch()
    (tmp_path / "out" / ".P_01.old").mkdir()
    segment_patient(pipe, patient, tmp_path / "out", model="MODEL", progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["P_01"]


def test_a_report_too_deep_to_read_is_no_report(pipe, patient, segmented, tmp_path):
    (segmented[1] / "report.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(InputError, match="holds no readable report.json: --overwrite"):
        segment_patient(pipe, patient, tmp_path / "out", model="MODEL", progress=False)


def test_files_that_segment_did_not_write_are_never_replaced(pipe, patient, tmp_path):
    before = sorted(patient.iterdir())
    with pytest.raises(InputError, match="would replace what segment did not write"):
        segment_patient(pipe, patient, patient.parent, overwrite=True, progress=False)
    assert sorted(patient.iterdir()) == before
    (tmp_path / "out" / "P_01").mkdir(parents=True)
    (tmp_path / "out" / "P_01" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds notes.txt, which segment did not write"):
        segment_patient(pipe, patient, tmp_path / "out", overwrite=True, progress=False)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "P_01").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="would replace what segment did not write"):
        segment_patient(pipe, patient, tmp_path / "links", overwrite=True, progress=False)


def test_outputs_are_whole_or_not_there(pipe, patient, segmented, tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in segmented[1].iterdir()}
    monkeypatch.setattr("diffusers_cf.segmentation.patient.write_preview", full_disk)
    for output in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(InputError, match=r"P_01: can't be written \(No space left on device\)"):
            segment_patient(pipe, patient, output, overwrite=True, strength=0.1, progress=False)
    assert {path.name: path.read_bytes() for path in segmented[1].iterdir()} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["P_01"]
    assert list((tmp_path / "new").iterdir()) == []


def test_one_bad_patient_does_not_stop_the_others(model, tmp_path, capsys):
    folders = [write_brats(tmp_path, name, seed=seed) for seed, name in enumerate(("A", "B", "C", "D"))]
    path = folders[0] / "A_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    (folders[1] / "B_t1.nii.gz").unlink()
    save(folders[3] / "D_seg.nii.gz", np.zeros((26, 32, 11), np.uint8))
    assert run(*folders, tmp_path / "E", "--model", model, "--output", tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert "A_t1.nii.gz: truncated" in errors[0]
    assert f"{folders[1]}: modality missing: t1 (" in errors[1]
    assert f"{folders[3]}: shape or geometry differ: D_flair" in errors[2]
    assert f"{tmp_path / 'E'}: no such folder" in errors[3]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["C", "summary.json"]
    assert len(list((tmp_path / "out" / "C").iterdir())) == 6


@pytest.mark.parametrize(
    ("modality", "data", "message"),
    [
        ("t1", np.zeros((26, 32, 12)), "t1 is empty"),
        ("flair", np.full((26, 32, 12), np.nan), "are NaN or infinite"),
        ("t1", np.ones((26, 32, 11)), "P_01: shape or geometry differ"),
        ("seg", np.full((26, 32, 12), 0.5), "labels must be whole numbers"),
    ],
)
def test_scans_that_cannot_be_used(pipe, patient, tmp_path, modality, data, message):
    save(patient / f"P_01_{modality}.nii.gz", data.astype(np.float32), "LPS")
    with pytest.raises(InputError, match=message):
        segment_patient(pipe, patient, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_intensities_that_overflow_in_units_of_their_scale(pipe, patient, tmp_path):
    scan = np.full((26, 32, 12), 1e-40, np.float32)
    scan[5, 5, 5] = 3e38
    save(patient / "P_01_t1.nii.gz", scan, "LPS")
    with pytest.raises(InputError, match="P_01: intensities lie too far apart"):
        segment_patient(pipe, patient, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_doubtful_scans_are_segmented_with_a_warning(pipe, patient, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for modality in MODALITIES:
        save(patient / f"P_01_{modality}.nii.gz", rng.uniform(1, 9, (26, 32, 12)).astype(np.float32), "LPS")
    save(patient / "P_01_seg.nii.gz", np.full((26, 32, 12), 7, np.uint8), "LPS")
    segment_patient(pipe, patient, tmp_path / "out", strength=0, progress=False)
    assert "seems not to be skull-stripped" in caplog.text and "unknown label ids 7" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", "2"], "strength is 2.0: it must lie in [0, 1]"),
        (["--num_inference_steps", "7"], "num_inference_steps is 7"),
        (["--num_inference_steps", "0"], "num_inference_steps is 0"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0"),
        (["--threshold", "nan"], "threshold is nan: it must be above 0"),
        (["--threshold", "0"], "threshold is 0.0: it must be above 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--device", "nonsense"], "--device nonsense can't be used"),
        (["--model", "DATA"], "model_index.json: no such file"),
        (["TWIN"], "two patients are called P_01"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(model, patient, tmp_path, capsys, options, message):
    twin = tmp_path / "other" / "P_01"
    shutil.copytree(patient, twin)
    paths = {"DATA": str(patient), "TWIN": f"{twin}/"}
    options = [paths.get(option, option) for option in options]
    options += [] if "--model" in options else ["--model", str(model)]
    assert run(patient, *options, "--output", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(model, patient, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run(patient, "--model", model, "--output", tmp_path / "out") == 2
    assert "out: the output folder can't be made (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"settings": {}}, "MODEL recommends no threshold for the map counterfactual: give one by --threshold"),
        ({"modalities": None}, "MODEL: its preprocessing.json does not name the modalities"),
        ({"modalities": ["flair", "../../t1"]}, "MODEL: its modality '../../t1' can't be a part of a file's name"),
        ({"modalities": ["flair"]}, "MODEL: takes 2 channels, but names the modalities flair$"),
        ({"field_mm": -1}, "field_mm must be above 0"),
        ({"normalize": "mean"}, "normalize is 'mean': it must be median, p99"),
        ({"normalize": "none"}, "MODEL: takes images as they are, so that no scan can be brought to its scale"),
        ({"settings": SETTINGS | {"strength": "high"}}, "MODEL: preprocessing.json holds a value of a wrong type"),
    ],
)
def test_models_that_do_not_say_what_segmentation_needs(facts, message):
    with pytest.raises(InputError, match=message):
        segmentation_facts(make_pipe(**facts), model="MODEL")


def test_a_patient_given_as_a_dot_or_a_file(pipe, patient, tmp_path, monkeypatch):
    monkeypatch.chdir(patient)
    assert segment_patient(pipe, ".", tmp_path / "out", progress=False)["patient"] == "P_01"
    with pytest.raises(InputError, match="P_01_t1.nii.gz: a file; give the folder"):
        segment_patient(pipe, "P_01_t1.nii.gz", tmp_path / "out", progress=False)
    shutil.copytree(patient, tmp_path / "a b")
    with pytest.raises(InputError, match="'a b' can't be a patient's id"):
        segment_patient(pipe, tmp_path / "a b", tmp_path / "out", progress=False)
