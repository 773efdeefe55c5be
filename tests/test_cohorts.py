"""Which folders of a cohort are patients, and how they are called."""

import json

import pytest
from data_files import write_brats
from segmentation_files import MODALITIES, make_pipe
from test_volumes import run

from diffusers_cf.cohorts import find_patients
from diffusers_cf.data.nifti import canonical_modality, nifti_suffix
from diffusers_cf.errors import InputError


NAMES = ["flair", "t1", "t1ce", "t2"]


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def found(root, **options):
    return [(name, str(path.relative_to(root))) for name, path in find_patients(root, NAMES, **options)]


def test_brats_bids_and_deeper_nestings(tmp_path):
    touch(
        tmp_path,
        "BraTS-1/BraTS-1-t2f.nii.gz", "BraTS-1/BraTS-1-seg.nii.gz",
        "sub-01/anat/sub-01_FLAIR.nii", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz", "sub-02/ses-2/anat/x_T2w.nii.gz",
        "sub-02/ses-2/dwi/x_dwi.nii.gz",
        "site a/p_t1.nii.gz",
    )  # fmt: skip
    assert found(tmp_path) == [
        ("BraTS-1", "BraTS-1"), ("site a", "site a"), ("sub-01", "sub-01/anat"),
        ("sub-02_ses-1", "sub-02/ses-1/anat"), ("sub-02_ses-2", "sub-02/ses-2/anat"),
    ]  # fmt: skip


def test_what_is_no_scan_of_a_patient_is_left_alone(tmp_path):
    touch(
        tmp_path,
        "A/a_flair.nii.gz", "derivatives/A/a_flair.nii.gz", ".hidden/a_flair.nii.gz", "B/notes.txt", "C/c_seg.nii.gz",
        "D/.d_flair.nii.gz", "out/A/x_flair.nii.gz",
        "old/A/report.json", "old/A/heatmap.nii.gz", "old/A/counterfactual_flair.nii.gz",
        "1/2/3/4/5/6/deep_flair.nii.gz",
    )  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path)
    assert found(tmp_path, output=tmp_path / "out") == [("A", "A")]


def test_a_patients_own_folder_is_one_patient_whatever_lies_below(tmp_path, monkeypatch):
    touch(tmp_path, "P/p_flair.nii.gz", "P/other/q_flair.nii.gz")
    assert [name for name, _ in find_patients(tmp_path / "P", NAMES)] == ["P"]
    monkeypatch.chdir(tmp_path / "P")
    assert [name for name, _ in find_patients(".", NAMES)] == ["P"]


def test_folders_without_patients_say_so(tmp_path):
    touch(tmp_path, "A/a_adc.nii.gz", "file.nii.gz")
    with pytest.raises(
        InputError, match=r"neither it nor a folder in it holds a scan \(names end in flair, t1, t1ce, t2"
    ):
        find_patients(tmp_path, NAMES)
    with pytest.raises(InputError, match="no such folder"):
        find_patients(tmp_path / "B", NAMES)
    with pytest.raises(InputError, match="a file; give the folder that holds it"):
        find_patients(tmp_path / "file.nii.gz", NAMES)


@pytest.mark.parametrize(
    ("name", "modality"),
    [("sub-01_ce-gadolinium_T1w.nii.gz", "t1ce"), ("sub-01_T1w.nii.gz", "t1"), ("x_ce-gd_FLAIR.nii", "flair"),
     ("advance-t1w.nii.gz", "t1")],
)  # fmt: skip
def test_bids_tells_a_contrast_agent_by_an_entity(name, modality):
    assert canonical_modality(nifti_suffix(name)) == modality


def test_a_cohort_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers_cf.volumes.write_preview", lambda path, *_: path.touch())
    make_pipe().save_pretrained(tmp_path / "model")
    cohort = tmp_path / "cohort"
    for seed, name in enumerate("ABC"):
        write_brats(cohort, name, seed=seed)
    damaged = cohort / "B" / "B_t1.nii.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    options = (cohort, tmp_path / "none", "--model", tmp_path / "model", "--output", cohort / "results")
    assert run(*options) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "2 done, 0 finished before, 2 failed"
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "B_t1.nii.gz: truncated" in errors[0] and "none: no such folder" in errors[1]
    damaged.write_bytes(whole)
    assert run(cohort, *options[2:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 2 finished before, 0 failed"
    assert sorted(path.name for path in (cohort / "results").iterdir()) == ["A", "B", "C"]
    report = json.loads((cohort / "results" / "B" / "report.json").read_text())
    assert report["patient"] == "B" and report["preprocessing"]["modalities"] == MODALITIES
