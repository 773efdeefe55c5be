"""`diffusers-cf bids`: from a BIDS dataset to a derivative dataset, as a BIDS-App is called."""

import json
import os
import re

import numpy as np
import pytest
from data_files import write_brats
from segmentation_files import cli, error_lines, voxels

from diffusers_cf.segmentation import volumes as volumes_module
from diffusers_cf.segmentation.cohorts import read_summary


# names of the specification's templates for masks and preprocessed scans, and what .bidsignore has
SPECIFIED = re.compile(
    r"sub-[a-zA-Z0-9]+(_ses-[a-zA-Z0-9]+)?(_ce-[a-zA-Z0-9]+)?(_space-[a-zA-Z0-9]+)?"
    r"(_label-lesion_mask|_desc-counterfactual_(FLAIR|T1w))\.(nii\.gz|json)"
)
IGNORED = re.compile(r".+_(heatmap\.(nii\.gz|json)|preview\.png)")
MORE = {"License": "CC0", "DatasetDOI": "doi:10.1/x"}


def write_bids(root, *names, space=""):
    """A BIDS dataset of participants such as `sub-01_ses-1`, each with four modalities."""
    for seed, name in enumerate(names):
        suffixes = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "seg": "seg"}
        files = {modality: f"{name}_{space}{suffix}.nii.gz" for modality, suffix in suffixes.items()}
        folder = write_brats(root.joinpath(*name.split("_")), "anat", seed=seed, names=files)
        (folder / files["seg"]).unlink()  # raw datasets have no masks
    description = {"Name": "Phantoms", "BIDSVersion": "1.10.0", "DatasetType": "raw"} | MORE
    (root / "dataset_description.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def bids(tmp_path, model, monkeypatch):
    monkeypatch.setattr(volumes_module, "write_preview", lambda path, *_: path.touch())
    write_bids(tmp_path / "in", "sub-01", "sub-02_ses-a", "sub-02_ses-b")
    return lambda level, *more: cli(
        "bids",
        tmp_path / "in",
        tmp_path / "out",
        level,
        *(("--model", model) if level == "participant" else ()),
        *more,
    )


def files_of(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_participants_become_a_derivative_dataset(bids, tmp_path, capsys):
    assert bids("participant") == 0
    out, capsys_out = tmp_path / "out", capsys.readouterr().out
    assert "3 done, 0 finished before, 0 failed" in capsys_out and str(out / "sub-02/ses-a/anat") in capsys_out
    found = {name for name in files_of(out) if not name.startswith("sourcedata/")}
    assert {name for name in found if "/" not in name} == {"dataset_description.json", ".bidsignore", "README.md"}
    for name in {name for name in found if "/" in name}:
        folder, _, file = name.rpartition("/")
        assert folder in {"sub-01/anat", "sub-02/ses-a/anat", "sub-02/ses-b/anat"}
        assert file.startswith(folder.removesuffix("/anat").replace("/", "_") + "_")
        assert SPECIFIED.fullmatch(file) or IGNORED.fullmatch(file), file
    stems = ("label-lesion_mask", "label-lesion_heatmap", "desc-counterfactual_FLAIR", "desc-counterfactual_T1w")
    expected = {f"{stem}.{kind}" for stem in stems for kind in ("nii.gz", "json")} | {"label-lesion_preview.png"}
    assert {name.rpartition("/")[2] for name in found if name.startswith("sub-01/")} == {
        f"sub-01_{e}" for e in expected
    }

    described = json.loads((out / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative" and described["GeneratedBy"][0]["Name"] == "diffusers_cf"
    source = {"URL": (tmp_path / "in").as_uri(), "DOI": "doi:10.1/x"}
    assert described["SourceDatasets"] == [source] and described["License"] == "CC0" and described["BIDSVersion"]
    sidecar = json.loads((out / "sub-02/ses-b/anat/sub-02_ses-b_label-lesion_mask.json").read_text())
    folder = "bids:source:sub-02/ses-b/anat"
    assert sidecar["Sources"] == [f"{folder}/sub-02_ses-b_{suffix}.nii.gz" for suffix in ("FLAIR", "T1w")]
    assert sidecar["Type"] == "Lesion" and sidecar["Report"]["patient"] == "sub-02_ses-b"
    mask = voxels(out / "sub-02/ses-b/anat/sub-02_ses-b_label-lesion_mask.nii.gz")
    np.testing.assert_array_equal(mask, voxels(out / "sourcedata/diffusers_cf/sub-02_ses-b/mask.nii.gz"))
    assert mask.dtype == np.uint8


def test_labels_choose_and_finished_participants_are_skipped(bids, tmp_path, capsys):
    assert bids("participant", "--participant_label", "sub-02", "--session_label", "a") == 0
    assert set(read_summary(tmp_path / "out/sourcedata/diffusers_cf")) == {"sub-02_ses-a"}
    capsys.readouterr()
    mask = tmp_path / "out/sub-02/ses-a/anat/sub-02_ses-a_label-lesion_mask.nii.gz"
    mask.unlink()
    assert bids("participant", "--participant-label", "01", "02", "03") == 2
    printed = capsys.readouterr()
    assert "2 done, 1 finished before, 1 failed" in printed.out and mask.exists()
    (line,) = error_lines(printed)
    assert "sub-03 has no scan (names end in flair, t1)" in line


def test_entities_of_a_derivative_are_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(volumes_module, "write_preview", lambda path, *_: path.touch())
    write_bids(tmp_path / "in", "sub-01", space="space-MNI_desc-brain_")

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert cli("bids", tmp_path / "in", tmp_path / "out", "participant", "--model", model) == 0
    names = {path.name for path in (tmp_path / "out/sub-01/anat").glob("*.nii.gz")}
    assert "sub-01_space-MNI_label-lesion_mask.nii.gz" in names
    assert "sub-01_space-MNI_desc-counterfactual_FLAIR.nii.gz" in names


def test_the_group_level_writes_the_report(bids, tmp_path, capsys):
    assert bids("group") == 2
    assert "no participant is segmented yet" in error_lines(capsys.readouterr())[0]
    assert bids("participant", "--participant_label", "01") == 0 and bids("group") == 0
    assert "sub-01" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("in", "in", "participant", "--model", "MODEL"), "in: a dataset of another kind"),
        (("in", "used", "participant", "--model", "MODEL"), "used: a dataset of another kind"),
        (("in", "out", "participant"), "needs --model"),
        (("used", "out", "participant", "--model", "MODEL"), "dataset_description.json: can't be read"),
    ],
)
def test_bad_datasets_are_one_line(bids, model, tmp_path, capsys, arguments, reason):
    (tmp_path / "used" / "sub-01").mkdir(parents=True)
    before = files_of(tmp_path)
    paths = {name: tmp_path / name for name in ("in", "used", "out")} | {"MODEL": model}
    assert cli("bids", *(paths.get(argument, argument) for argument in arguments)) == 2
    (line,) = error_lines(capsys.readouterr())
    assert reason in line and files_of(tmp_path) == before
