"""Which folders of a cohort are patients, how they are called, and which files are their scans."""

from pathlib import Path

import pytest

from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.cohorts import find_patients, patient_files


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


def test_other_files_and_folders_are_left_out(tmp_path):
    touch(
        tmp_path,
        "A/a_flair.nii.gz", "derivatives/A/a_flair.nii.gz", ".hidden/a_flair.nii.gz", "B/notes.txt", "C/c_seg.nii.gz",
        "D/.d_flair.nii.gz", "out/A/x_flair.nii.gz",
        "old/A/report.json", "old/A/heatmap.nii.gz", "old/A/counterfactual_flair.nii.gz",
        "1/2/3/4/5/6/deep_flair.nii.gz",
    )  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path)
    assert found(tmp_path, output=tmp_path / "out") == [("A", "A")]


def test_links_are_followed_and_a_patient_counts_once_under_its_own_name(tmp_path):
    touch(tmp_path, "cohort/a/B/b_flair.nii.gz", "elsewhere/x/p_flair.nii.gz", "elsewhere/P/q_t1.nii.gz")
    for link, goal in (("P_01", "elsewhere/x"), ("a/all", "cohort"), ("0", "cohort/a"), ("more", "elsewhere")):
        (tmp_path / "cohort" / link).symlink_to(tmp_path / goal)
    assert found(tmp_path / "cohort") == [("P_01", "P_01"), ("a_B", "a/B"), ("more_P", "more/P")]


def test_folders_that_can_not_be_read_are_named(tmp_path, monkeypatch):
    touch(tmp_path, "A/a_flair.nii.gz", "locked/b_flair.nii.gz", "C/flair/1.dcm")
    (tmp_path / "P_05").symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")
    iterdir = Path.iterdir

    def refuse(path):
        if path.name in ("locked", "flair"):
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    patients, problems = find_patients(tmp_path, NAMES)
    assert [name for name, _ in patients] == ["A"]
    assert problems == {
        str(tmp_path / "C"): f"{tmp_path / 'C' / 'flair'}: Permission denied",
        str(tmp_path / "P_05"): f"{tmp_path / 'P_05'}: a link whose target is missing",
        str(tmp_path / "locked"): f"{tmp_path / 'locked'}: Permission denied",
    }
    with pytest.raises(InputError, match="locked: Permission denied"):
        find_patients(tmp_path / "locked", NAMES)


def test_a_patients_own_folder_is_one_patient_whatever_lies_below(tmp_path, monkeypatch):
    touch(tmp_path, "P/p_flair.nii.gz", "P/other/q_flair.nii.gz")
    assert [name for name, _ in find_patients(tmp_path / "P", NAMES)[0]] == ["P"]
    monkeypatch.chdir(tmp_path / "P")
    assert [name for name, _ in find_patients(".", NAMES)[0]] == ["P"]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("A", "holds a scan"), ("B", "No such file"), ("file.nii.gz", "Not a directory")],
)
def test_folders_without_patients(tmp_path, folder, reason):
    touch(tmp_path, "A/a_adc.nii.gz", "file.nii.gz")
    with pytest.raises(InputError, match=f"{folder}: .*{reason}"):
        find_patients(tmp_path / folder, NAMES)


def test_each_modality_has_one_file(tmp_path):
    touch(tmp_path, "P_T1n.nii.gz", "P-t2.nii", "P_FLAIR.nii.gz", "P_seg.nii.gz", "P_notes.txt", ".P_t1.nii")
    files = patient_files(tmp_path, ["t1", "t2w", "FLAIR"])
    assert list(files) == ["t1", "t2w", "FLAIR", "seg"]  # spelled and ordered as asked for
    assert [path.name for path in files.values()] == ["P_T1n.nii.gz", "P-t2.nii", "P_FLAIR.nii.gz", "P_seg.nii.gz"]
    with pytest.raises(InputError, match="modality missing: adc, t1ce .*adc: adc; t1ce: t1ce, t1gd, t1c"):
        patient_files(tmp_path, ["t1", "adc", "t1ce"])
    touch(tmp_path, "x-t1w.nii")
    with pytest.raises(InputError, match="several scans are t1: P_T1n.nii.gz, x-t1w.nii"):
        patient_files(tmp_path, ["t1"])


def test_bids_marks_a_contrast_agent_by_an_entity(tmp_path):
    touch(tmp_path, "sub-01_T1w.nii.gz", "sub-01_ce-gadolinium_T1w.nii.gz", "sub-01_ce-gd_FLAIR.nii")
    names = [path.name for path in patient_files(tmp_path, ["t1ce", "t1", "flair"]).values()]
    assert names == ["sub-01_ce-gadolinium_T1w.nii.gz", "sub-01_T1w.nii.gz", "sub-01_ce-gd_FLAIR.nii"]
