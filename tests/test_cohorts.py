"""Which folders of a cohort are patients, and how they are called."""

import json
import os
from pathlib import Path

import pytest
from data_files import write_brats
from filelock import FileLock
from segmentation_files import MODALITIES, make_pipe
from test_volumes import run

from diffusers_cf.data.nifti import canonical_modality, nifti_suffix
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation import patient as volumes
from diffusers_cf.segmentation.cohorts import find_patients
from diffusers_cf.segmentation.results import add_to_summary, read_summary


NAMES = ["flair", "t1", "t1ce", "t2"]


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def found(root, **options):
    patients, problems = find_patients(root, NAMES, **options)
    assert problems == {}
    return [(name, str(path.relative_to(root))) for name, path in patients]


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


def test_links_are_followed_and_a_patient_counts_once_under_the_own_name(tmp_path):
    touch(tmp_path, "cohort/a/B/b_flair.nii.gz", "elsewhere/x/p_flair.nii.gz", "elsewhere/P/q_t1.nii.gz")
    for link, goal in (("P_01", "elsewhere/x"), ("a/all", "cohort"), ("0", "cohort/a"), ("more", "elsewhere")):
        (tmp_path / "cohort" / link).symlink_to(tmp_path / goal)
    expected = [("P_01", "P_01"), ("a_B", "a/B"), ("more_P", "more/P")]
    assert found(tmp_path / "cohort") == expected


def test_what_can_not_be_looked_into_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "A/a_flair.nii.gz", "locked/b_flair.nii.gz", "C/flair/1.dcm")
    (tmp_path / "P_05").symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")
    scandir, iterdir = os.scandir, Path.iterdir

    def forbid(original, name):
        def call(path):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        return call

    monkeypatch.setattr(os, "scandir", forbid(scandir, "locked"))
    monkeypatch.setattr(Path, "iterdir", forbid(iterdir, "flair"))
    patients, problems = find_patients(tmp_path, NAMES)
    assert [name for name, _ in patients] == ["A"]
    assert problems == {
        str(tmp_path / "C"): f"{tmp_path / 'C' / 'flair'}: can't be read (Permission denied)",
        str(tmp_path / "P_05"): f"{tmp_path / 'P_05'}: a link that leads nowhere",
        str(tmp_path / "locked"): f"{tmp_path / 'locked'}: can't be read (Permission denied)",
    }
    with pytest.raises(InputError, match=r"locked: can't be read \(Permission denied\)"):
        find_patients(tmp_path / "locked", NAMES)


def test_a_patients_own_folder_is_one_patient_whatever_lies_below(tmp_path, monkeypatch):
    touch(tmp_path, "P/p_flair.nii.gz", "P/other/q_flair.nii.gz")
    assert [name for name, _ in find_patients(tmp_path / "P", NAMES)[0]] == ["P"]
    monkeypatch.chdir(tmp_path / "P")
    assert [name for name, _ in find_patients(".", NAMES)[0]] == ["P"]


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
    monkeypatch.setattr("diffusers_cf.segmentation.patient.write_preview", lambda path, *_: path.touch())
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
    assert sorted(path.name for path in (cohort / "results").iterdir()) == ["A", "B", "C", "summary.json"]
    report = json.loads((cohort / "results" / "B" / "report.json").read_text())
    assert report["patient"] == "B" and report["preprocessing"]["modalities"] == MODALITIES
    summary = json.loads((cohort / "results" / "summary.json").read_text())
    states = {name: outcome["state"] for name, outcome in summary["patients"].items()}
    # the last word on each, also of an earlier run
    assert states == {"A": "skipped", "B": "done", "C": "skipped", str(tmp_path / "none"): "failed"}
    assert (summary["done"], summary["skipped"], summary["failed"]) == (1, 2, 1)
    assert "none: no such folder" in summary["patients"][str(tmp_path / "none")]["reason"]


@pytest.fixture
def three_patients(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_cf.segmentation.patient.write_preview", lambda path, *_: path.touch())
    make_pipe().save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("site1/A", "site2/A", "site2/B")):
        folder = tmp_path / name
        write_brats(folder.parent, folder.name, seed=seed)
    return tmp_path, ("--model", tmp_path / "model", "--output", tmp_path / "out")


def test_two_patients_of_one_name_are_named_and_the_others_are_done(three_patients, capsys):
    root, options = three_patients
    assert run(root / "site1" / "A", root / "site2", root / "site2" / "B", *options) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "two patients are called A: " in errors[0]
    assert all(str(root / site / "A") in errors[0] for site in ("site1", "site2"))
    assert printed.out.splitlines()[-1] == "1 done, 0 finished before, 1 failed"
    assert sorted(path.name for path in (root / "out").iterdir()) == ["B", "summary.json"]


def test_of_a_patient_that_another_process_is_at_that_one_has_the_last_word(three_patients, capsys):
    root, options = three_patients
    add_to_summary(root / "out", {"A": {"state": "done"}})
    with FileLock(root / "out" / ".A.lock"):
        assert run(root / "site2", *options) == 2
    printed = capsys.readouterr()
    assert "A: another process is writing it" in printed.err and "1 done, 0 finished before, 1 failed" in printed.out
    assert read_summary(root / "out") == {"A": {"state": "done"}, "B": {"state": "done"}}


def test_a_bar_counts_patients_and_one_below_it_slices(three_patients, capsys):
    root, options = three_patients
    assert run(root / "site2", *options, "--strength", 0) == 0
    printed = capsys.readouterr()
    assert "Patients: 100%" in printed.err and "2/2" in printed.err
    assert "\x1b[A" in printed.err  # the slices' bar has a line of its own, and goes back up
    assert run(root / "site1", *options, "--strength", 0, "--overwrite") == 0
    assert "Patients:" not in capsys.readouterr().err


@pytest.mark.parametrize("where", ["map_slices", "read_volumes"])
def test_a_patient_too_large_for_the_memory_does_not_stop_the_others(three_patients, capsys, monkeypatch, where):
    root, options = three_patients
    original = getattr(volumes, where)

    def call(*args):
        if "A" in (args[0], getattr(args[1], "patient", "")):
            raise MemoryError("Unable to allocate 9 GiB")
        return original(*args)

    monkeypatch.setattr(volumes, where, call)
    assert run(root / "site2", *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {root / 'site2' / 'A'}: not enough memory (Unable to allocate 9 GiB)"]
    assert sorted(path.name for path in (root / "out").iterdir()) == ["B", "summary.json"]
