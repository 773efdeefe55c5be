"""Splits by patient: by a seed or by a file."""

import json

import pytest

from diffusers_cf.data.splits import SPLITS, read_splits, seeded_splits
from diffusers_cf.errors import InputError


SIZES = {1: [0, 0, 1], 2: [1, 0, 1], 3: [1, 1, 1], 4: [2, 1, 1], 10: [6, 1, 3], 17: [11, 1, 5], 1251: [938, 62, 251]}


@pytest.mark.parametrize("n", SIZES)
def test_sizes_are_the_papers_and_few_patients_reach_every_split_if_they_can(n):
    splits = seeded_splits([f"p{i}" for i in range(n)], seed=3)
    assert [len(splits[name]) for name in SPLITS] == SIZES[n]


def test_splits_share_no_patient_and_depend_on_the_seed_alone():
    patients = [f"p{i:03d}" for i in range(100)]
    splits = seeded_splits(patients, seed=1)
    assert sorted(sum(splits.values(), [])) == patients
    assert seeded_splits(patients[::-1], seed=1) == splits
    assert seeded_splits(patients, seed=2) != splits
    assert splits["test"] != patients[-20:]


def test_visits_of_a_person_stay_together():
    visits = [f"BraTS-GLI-{person:05d}-{visit:03d}" for person in range(40) for visit in range(3)]
    splits = seeded_splits(visits, seed=0)
    people = [{patient[:-4] for patient in splits[name]} for name in SPLITS]
    assert [len(p) for p in people] == [30, 2, 8] and len(set.union(*people)) == 40
    assert [len(splits[name]) for name in SPLITS] == [90, 6, 24]


def test_split_file(tmp_path, caplog):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["c", "a"], "test": ["d"]}))
    assert read_splits(path, list("abcd")) == {"train": ["a", "c"], "validation": [], "test": ["d"]}
    assert "1 patients are in no split and left out: b" in caplog.text
    path.write_text(json.dumps({"split_1": {"train": ["a"]}, "split_2": {"train": ["b"], "validation": ["a"]}}))
    assert read_splits(f"{path}:split_2", list("ab"))["validation"] == ["a"]


BAD_SPLIT_FILES = {
    "no JSON": ("{", "", "not a readable JSON file"),
    "several": ('{"split_1": {"train": ["a"]}}', "", "but has split_1; for one of several splits, splits.json:NAME"),
    "unknown selection": ('{"split_1": {"train": ["a"]}}', ":split_9", r"no split named split_9 \(there are split_1"),
    "unknown split": ('{"train": ["a"], "val": ["b"]}', "", "must have .*, but has train, val"),
    "empty": ("{}", "", "must have .*, but has nothing"),
    "not a list": ('{"train": "a"}', "", "train must be a list of patient ids"),
    "in two splits": ('{"train": ["a", "b"], "test": ["b"]}', "", "in two splits or twice: b"),
    "unknown patient": ('{"train": ["a", "x"]}', "", "1 patients are not in the data: x"),
}


@pytest.mark.parametrize("case", BAD_SPLIT_FILES)
def test_bad_split_file(case, tmp_path):
    text, selection, reason = BAD_SPLIT_FILES[case]
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(InputError, match=f"splits.json: .*{reason}"):
        read_splits(f"{tmp_path / 'splits.json'}{selection}", ["a", "b"])
