"""`diffusers-cf segment` on one patient and on cohorts."""

import csv
import json

import numpy as np
import pytest
from data_files import save, write_brats
from filelock import FileLock
from segmentation_files import cli, error_lines

from diffusers_cf.segmentation import patient as patient_module
from diffusers_cf.segmentation import volumes as volumes_module
from diffusers_cf.segmentation.cohorts import add_to_summary, read_summary


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than everything else."""
    monkeypatch.setattr(volumes_module, "write_preview", lambda path, *_: path.touch())


@pytest.fixture
def patient(tmp_path):
    return write_brats(tmp_path / "data", "P_01", "LPS")


@pytest.fixture
def cohort(tmp_path, model):
    """Runs `segment` on sites below `tmp_path`: site1 has patient A, site2 has A and B."""
    for seed, name in enumerate(("site1/A", "site2/A", "site2/B")):
        write_brats((tmp_path / name).parent, name[-1], seed=seed)

    def run(*folders, options=()):
        options = (*options, "--model", model, "--output", tmp_path / "out")
        return cli("segment", *(tmp_path / folder for folder in folders), *options)

    return run


def test_the_papers_settings_by_name(model, patient, tmp_path, capsys):
    options = ["--model", model, "--output", tmp_path / "out", "--settings", "paper", "--strength", 0]
    assert cli("segment", patient, *options) == 2  # the model's threshold belongs to its own settings
    assert "recommends no threshold for the map counterfactual" in capsys.readouterr().err
    assert cli("segment", patient, *options, "--threshold", 0.5) == 0
    report = json.loads((tmp_path / "out" / "P_01" / "report.json").read_text())
    paper = {"guidance_scale": 3.0, "num_inference_steps": 100, "map": "counterfactual"}
    assert report["settings"] == paper | {"strength": 0.0, "threshold": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_inference_steps", "7"], "num_inference_steps is 7"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0"),
        (["--threshold", "nan"], "threshold is nan"),
        (["--batch_size", "0"], "--batch_size"),
        (["--model", "DATA"], "model_index.json"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(model, patient, tmp_path, capsys, options, message):
    options = ["--model", model, *(str(patient) if option == "DATA" else option for option in options)]
    assert cli("segment", patient, *options, "--output", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not (tmp_path / "out").exists()


def test_bad_patients_do_not_stop_the_others(model, tmp_path, capsys):
    folders = [write_brats(tmp_path, name, seed=seed) for seed, name in enumerate(("A", "B", "C", "D"))]
    path = folders[0] / "A_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    (folders[1] / "B_t1.nii.gz").unlink()
    save(folders[3] / "D_seg.nii.gz", np.zeros((26, 32, 11), np.uint8))
    options = ("--model", model, "--output", tmp_path / "out")
    assert cli("segment", *folders, tmp_path / "E", "x" * 300, *options) == 2
    errors = error_lines(capsys.readouterr())
    reasons = ("A_t1.nii.gz: truncated", "modality missing: t1", "shape or geometry differ", "E: No such file")
    assert len(errors) == 5 and all(reason in line for reason, line in zip(reasons, errors, strict=False))
    assert "x: File name too long" in errors[4]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["C", "summary.csv", "summary.json"]
    assert len(list((tmp_path / "out" / "C").iterdir())) == 6


def test_a_cohort_goes_on_where_it_ended(cohort, tmp_path, capsys):
    damaged = tmp_path / "site2" / "B" / "B_t1.nii.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    assert cohort("site2", "none") == 2
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 0 finished before, 2 failed"
    damaged.write_bytes(whole)
    assert cohort("site2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 1 finished before, 0 failed"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    failure = summary["patients"].pop(str(tmp_path / "none"))  # of the first run
    assert failure["state"] == "failed" and "none: No such file" in failure["reason"]
    states = {"A": {"state": "skipped"}, "B": {"state": "done"}}
    with open(tmp_path / "out" / "summary.csv", newline="", encoding="utf-8") as file:
        rows = {row.pop("patient"): row for row in csv.DictReader(file)}
    assert rows.keys() == {"A", "B", str(tmp_path / "none")}
    assert rows[str(tmp_path / "none")] == dict.fromkeys(rows["A"], "") | failure
    for name, state in states.items():
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert rows[name].pop("reason") == "" and rows[name].pop("state") == state["state"]
        assert rows[name] == {key: str(report[key]) for key in ("lesion_volume_ml", "dice", "auprc", "seconds")}
    assert summary == {"done": 1, "skipped": 1, "failed": 1, "patients": states}


def test_two_patients_of_one_name_are_named_and_the_others_are_done(cohort, tmp_path, capsys):
    assert cohort("site1/A", "site2", "site2/B") == 2
    printed = capsys.readouterr()
    (line,) = error_lines(printed)
    assert "two patients are called A: " in line and all(str(tmp_path / s / "A") in line for s in ("site1", "site2"))
    assert printed.out.splitlines()[-1] == "1 done, 0 finished before, 1 failed"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["B", "summary.csv", "summary.json"]


def test_the_process_that_writes_a_patient_reports_its_outcome(cohort, tmp_path, capsys):
    add_to_summary(tmp_path / "out", {"A": {"state": "done"}})
    with FileLock(tmp_path / "out" / ".A.lock"):
        assert cohort("site2") == 2
    printed = capsys.readouterr()
    assert "A: another process is writing it" in printed.err and "1 done, 0 finished before, 1 failed" in printed.out
    assert read_summary(tmp_path / "out") == {"A": {"state": "done"}, "B": {"state": "done"}}


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 GiB"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["map_slices", "read_volumes", "write_results"])
def test_errors_of_the_machine_do_not_stop_the_others(cohort, tmp_path, capsys, monkeypatch, where, error):
    original = getattr(patient_module, where)

    def call(*args, **options):
        if "A" in (args[0], getattr(args[1], "patient", "")):
            raise error
        return original(*args, **options)

    monkeypatch.setattr(patient_module, where, call)
    assert cohort("site2") == 2
    (line,) = error_lines(capsys.readouterr())
    reason = "out of memory (Unable to allocate 9 GiB)" if isinstance(error, MemoryError) else error.strerror
    assert line == f"error: {tmp_path / 'out' / 'A'}: {reason}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["B", "summary.csv", "summary.json"]
