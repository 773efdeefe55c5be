"""Preparing a data set: what is written, restarts, bad patients, and the command."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import nibabel
import numpy as np
import pytest
from data_files import DATA, MadeSource, needs_data, write_brats
from segmentation_files import SETTINGS, make_pipe

import diffusers_cf.data.prepare
from diffusers_cf.cli import main
from diffusers_cf.data.prepare import check, prepare
from diffusers_cf.data.scans import BratsSource
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.data.splits import SPLITS, seeded_splits
from diffusers_cf.errors import BusyError, InputError
from diffusers_cf.files import alone_at, remove_empty_folders
from diffusers_cf.segmentation.cohorts import patient_files
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts
from diffusers_cf.segmentation.volumes import network_slices, read_volumes


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def patients_by_split(folder, cache) -> dict[str, set[str]]:
    opened = datasets.load_dataset(str(folder), cache_dir=str(cache))
    return {name: set(split["patient"]) for name, split in opened.items()}


def test_written_scans_become_a_data_set(tmp_path):
    for i, axes in enumerate(("RAS", "LPS", "LAS", "PSR")):
        write_brats(tmp_path / "scans", f"P_{i}", axes, seed=i)
    source = BratsSource(tmp_path / "scans", size=16)
    preprocessing = prepare(source, tmp_path / "set", seed=5)
    patients = patients_by_split(tmp_path / "set", tmp_path / "cache")
    assert sorted(set.union(*patients.values())) == source.patients() and sum(map(len, patients.values())) == 4
    for name in SPLITS:
        dataset = SliceDataset(tmp_path / "set", name, cache_dir=tmp_path / "cache")
        batch = dataset.collate(dataset.__getitems__(list(range(len(dataset)))))
        expected = [source.read(patient) for patient in sorted(patients[name])]
        for key in ("images", "masks", "labels", "slices"):
            np.testing.assert_allclose(batch[key], np.concatenate([getattr(e, key) for e in expected]), atol=1e-3)
        counts = {"patients": len(expected), "slices": len(dataset), "unhealthy": int(dataset.labels.sum())}
        classes = {"patients": len(expected), "slices": counts["unhealthy"]}
        assert counts.items() <= preprocessing["splits"][name].items()
        assert preprocessing["splits"][name]["classes"]["unhealthy"] == classes
    assert list(preprocessing["value_range"]) == ["flair", "t1", "t1ce", "t2"]
    facts = {"version": 1, "modalities": ["flair", "t1", "t1ce", "t2"], "size": 16, "channels": 4, "source": "brats"}
    facts |= {"dtype": "float16", "scale": 1, "field_mm": 240.0, "normalize": "median", "seed": 5, "has_masks": True}
    assert facts.items() <= preprocessing.items()
    assert json.loads((tmp_path / "set" / "preprocessing.json").read_text()) == preprocessing
    opened = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"), split="train")
    assert opened.features["label"].names == ["healthy", "unhealthy"] and isinstance(opened[0]["image"], bytes)
    shards = {f"data/{name}-00000-of-00001.parquet" for name in SPLITS}
    assert set(content(tmp_path / "set")) == {"preprocessing.json", *shards}


@pytest.mark.slow
def test_number_of_workers_does_not_change_a_byte(tmp_path):
    prepare(MadeSource(5), tmp_path / "one")
    prepare(MadeSource(5), tmp_path / "two", num_workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    problems = ["p01: p01.nii.gz: broken", "p01: p01: twice", "p03: p03.nii.gz: broken", "p03: p03: twice"]
    assert check(MadeSource(5, bad=("p01", "p03")), num_workers=2)[0] == problems
    with pytest.raises(InputError, match="p01.nii.gz: broken"):
        prepare(MadeSource(5, bad=("p01",)), tmp_path / "three", num_workers=2)


def test_large_data_sets_have_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_cf.data.prepare, "SHARD_BYTES", 2 * 3 * 8 * 8 * 5)
    prepare(MadeSource(10), tmp_path / "set")
    names = [name for name in content(tmp_path / "set") if "train" in name]
    assert names == [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)]
    patients = patients_by_split(tmp_path / "set", tmp_path / "cache")
    assert [len(patients[name]) for name in SPLITS] == [6, 1, 3]


@pytest.mark.slow
def test_killed_run_continues_where_it_stopped(tmp_path):
    script = """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        from data_files import MadeSource
        from diffusers_cf.data.prepare import prepare

        class Slow(MadeSource):
            def load(self, patient, problems):
                time.sleep(0.3)
                return super().load(patient, problems)

        prepare(Slow(6), sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "set"), str(Path(__file__).parent)]
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("set/.prepare-*/p*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.stem for path in tmp_path.glob("set/.prepare-*/p*.json")}
    assert 2 <= len(done) < 6
    with pytest.raises(InputError, match="is no finished slice data set"):
        SliceDataset(tmp_path / "set", "train")
    source = MadeSource(6)
    prepare(source, tmp_path / "set")
    assert set(source.was_read) == set(source.patients()) - done
    prepare(MadeSource(6), tmp_path / "undisturbed")
    assert content(tmp_path / "set") == content(tmp_path / "undisturbed")


def test_patients_of_other_options_are_not_reused(tmp_path):
    with pytest.raises(InputError):
        prepare(MadeSource(4, bad=("p02",)), tmp_path / "set")
    assert len(list(tmp_path.glob("set/.prepare-*/p*.parquet"))) == 3
    source = MadeSource(4, size=4)
    prepare(source, tmp_path / "set")
    assert sorted(source.was_read) == source.ids
    prepare(MadeSource(4, size=4), tmp_path / "fresh")
    assert content(tmp_path / "set") == content(tmp_path / "fresh")


def test_finished_data_set_is_kept_or_refused(tmp_path):
    first = prepare(MadeSource(4), tmp_path / "set")
    before, source = content(tmp_path / "set"), MadeSource(4)
    assert prepare(source, tmp_path / "set") == first and source.was_read == []
    for other, options, reason in (
        (MadeSource(4, size=4), {}, "size is 8 there, 4 here"),
        (MadeSource(4), {"seed": 1}, "seed is 0 there, 1 here"),
        (MadeSource(5), {}, "split_sha256"),
    ):
        with pytest.raises(InputError, match=f"made with other options .*{reason}"):
            prepare(other, tmp_path / "set", **options)
    assert content(tmp_path / "set") == before


def test_bad_patients_stop_the_run_or_are_skipped(tmp_path):
    with pytest.raises(InputError, match="^p01.nii.gz: broken"):
        prepare(MadeSource(6, bad=("p01",)), tmp_path / "set")
    with pytest.raises(InputError, match="2 of 6 patients can't be used: .*p0[14], p0[14]: p0[14].nii.gz: broken"):
        prepare(MadeSource(6, bad=("p01", "p04")), tmp_path / "two")
    assert not (tmp_path / "set" / "preprocessing.json").exists() and not (tmp_path / "set" / "data").exists()
    source = MadeSource(6, bad=("p01",))
    preprocessing = prepare(source, tmp_path / "set", skip_bad=True)
    assert source.was_read == ["p01"] and preprocessing["skipped"] == ["p01"]
    whole = seeded_splits(source.ids, 0)
    patients = patients_by_split(tmp_path / "set", tmp_path / "cache")
    assert patients == {name: set(whole[name]) - {"p01"} for name in patients}
    assert set.union(*patients.values()) == set(source.ids) - {"p01"}


def test_nothing_is_left_behind_if_every_patient_is_bad(tmp_path):
    with pytest.raises(InputError, match="3 of 3 patients can't be used"):
        prepare(MadeSource(3, bad=("p00", "p01", "p02")), tmp_path / "set", skip_bad=True)
    remove_empty_folders()  # as every command does at its end
    assert not (tmp_path / "set").exists()


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and no slice data set \(data\)"):
        prepare(MadeSource(3), tmp_path / "set")
    assert content(tmp_path / "set") == {"data/precious.txt": b"mine"}


def test_two_runs_do_not_mix(tmp_path):
    with alone_at(tmp_path / "set"), pytest.raises(BusyError, match="set: another process"):
        prepare(MadeSource(3), tmp_path / "set")


def test_limit_of_patients(tmp_path):
    source = MadeSource(9)
    prepare(source, tmp_path / "set", patients=3)
    assert sorted(source.was_read) == ["p00", "p01", "p02"]
    (tmp_path / "splits.json").write_text('{"train": ["p00"]}')
    with pytest.raises(InputError, match="can't be limited"):
        prepare(source, tmp_path / "other", patients=3, split_file=tmp_path / "splits.json")
    assert check(MadeSource(3, bad=("p01",)), patients=1, allow_missing_classes=True)[0] == []
    with pytest.raises(InputError, match="train has 0 patients and no healthy slice"):  # the only one is for the test
        prepare(MadeSource(1), tmp_path / "one")


def command(*arguments) -> int:
    return main(["prepare", *map(str, arguments)])


def test_command_line(tmp_path, capsys):
    for i in range(3):
        write_brats(tmp_path / "scans", f"P_{i}", seed=i)
    scans = ("--source", "brats", "--input", tmp_path / "scans")
    (tmp_path / "s.json").write_text(json.dumps({"a": {"train": ["P_0"], "validation": ["P_2"], "test": ["P_1"]}}))
    chosen = ("--split-file", f"{tmp_path / 's.json'}:a", "--size", 16, "--field-mm", 200, "--modalities", "t2", "T1C")
    assert command(*scans, "--output", tmp_path / "set", *chosen) == 0
    assert "train: 1 patients, 7 slices, 4 unhealthy" in capsys.readouterr().out
    dataset = SliceDataset(tmp_path / "set", "validation", cache_dir=tmp_path / "cache")
    assert set(dataset.patients) == {"P_2"}
    facts = {"size": 16, "field_mm": 200.0, "modalities": ["t2", "t1ce"], "input": "scans"}
    assert facts.items() <= dataset.preprocessing.items()
    before = content(tmp_path)
    assert command(*scans, "--check", "--patients", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["no problem", "healthy class: healthy"] and "1 patients, 7 slices, 4 " in lines[2]
    assert lines[-1].startswith("value range before scaling (median): flair 0 to ") and content(tmp_path) == before
    (tmp_path / "scans" / "P_1" / "P_1_t1.nii.gz").unlink()
    assert command(*scans, "--check") == 2
    output = capsys.readouterr()
    assert "P_1: " in output.out and "modality missing: t1" in output.out and "1 problems" in output.err
    skipping = ("--output", tmp_path / "other", "--size", 16, "--skip_bad")
    assert command(*scans, *skipping) == 0 and "skipped: P_1" in capsys.readouterr().err


BAD_COMMANDS = {
    "no output": ("brats --input .", "--output is needed"),
    "no input": ("folder --output x", "--source folder needs --input"),
    "foreign option": ("arrays --input x --class_names a --lenient --output y", "takes no --class_names, --lenient"),
    "size": ("phantom --size 0", "size must be at least 1, not 0"),
    "field": ("phantom --field_mm -3", "field_mm must be above 0, not -3.0"),
    "scale": ("phantom --normalize max", "normalize is 'max'"),
    "seed": ("phantom --seed -1", "--seed must be at least 0, not -1"),
    "patients": ("brats --input . --patients 0", "--patients must be at least 1, not 0"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_command(case, tmp_path, monkeypatch, capsys):
    arguments, reason = BAD_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    assert command("--source", *arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["median", "p99"])
def test_prepare_and_segment_see_the_same_slices(normalize, tmp_path):
    pipe = make_pipe(normalize=normalize, evaluation_size=128, settings=SETTINGS | {"strength": 0.0})
    modalities = pipe.preprocessing["modalities"]
    prepare(BratsSource(DATA / "volumes", normalize=normalize, modalities=modalities), tmp_path / "set")
    prepared = {}
    for split in SPLITS:
        dataset = SliceDataset(tmp_path / "set", split, cache_dir=tmp_path / "cache")
        for patient in np.unique(dataset.patients):
            rows = np.flatnonzero(dataset.patients == patient).tolist()
            prepared[str(patient)] = dataset.collate(dataset.__getitems__(rows))
    assert sorted(prepared) == ["BraTS2021_00006", "MS19"]
    for patient, batch in prepared.items():
        volumes = read_volumes(patient, patient_files(DATA / "volumes" / patient, modalities))
        shown = network_slices(volumes, segmentation_facts(pipe))
        np.testing.assert_array_equal(batch["slices"], shown.slices)
        # float16 keeps them within 1e-3 up to a value of 4, four times the brightest that the network sees
        np.testing.assert_allclose(batch["images"].numpy().clip(max=4), shown.images.clip(max=4), rtol=0, atol=1e-3)
        segment_patient(pipe, DATA / "volumes" / patient, tmp_path / "out", progress=False)
        for modality in modalities:
            scan = nibabel.load(next((DATA / "volumes" / patient).glob(f"*_{modality}.nii.gz")))
            written = nibabel.load(tmp_path / "out" / patient / f"counterfactual_{modality}.nii.gz")
            np.testing.assert_array_equal(written.affine, scan.affine)
            np.testing.assert_allclose(written.get_fdata(), scan.get_fdata().clip(min=0), rtol=1e-6)
