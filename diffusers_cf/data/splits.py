"""The splits of a data set by patient, from a seed or a file."""

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from diffusers_cf.errors import InputError
from diffusers_cf.files import read_json


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
FRACTIONS = {"train": 0.75, "validation": 0.05}


def subject(patient: str) -> str:
    """Return the person behind an id: in `BraTS-GLI-00012-001` (BraTS from 2023) the last number is a visit."""
    match = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d{3}", patient)
    return match.group(1) if match else patient


def seeded_splits(patients: list[str], seed: int) -> dict[str, list[str]]:
    """Split shuffled ids at 75/5/20 % (Sec. 4 of the paper: 938/62/251 of BraTS 2021).

    All visits of a person are in the same split. With at least three persons no split is empty.
    """
    people = sorted({subject(patient) for patient in patients})
    random.Random(seed).shuffle(people)
    counts = {name: int(fraction * len(people)) for name, fraction in FRACTIONS.items()}
    counts["test"] = len(people) - sum(counts.values())
    for name in ("test", "validation", "train"):
        largest = max(counts, key=counts.get)
        if not counts[name] and counts[largest] > 1:
            counts[name], counts[largest] = 1, counts[largest] - 1
    splits, start = {}, 0
    for name in SPLITS:
        chosen = set(people[start : start + counts[name]])
        splits[name] = sorted(patient for patient in patients if subject(patient) in chosen)
        start += counts[name]
    return splits


def read_splits(split_file: str | Path, patients: list[str], left_out: Iterable[str] = ()) -> dict[str, list[str]]:
    """Read splits from a JSON file {"train": [ids], "validation": [ids], "test": [ids]}.

    Args:
        split_file (`str` or `Path`): FILE.json, or FILE.json:NAME for a file that holds several splits by name.
        patients (`list[str]`): all ids of the data; those that the file does not mention are left out, with a warning.
        left_out (`Iterable[str]`): ids that the file may mention and that go into no split.

    Raises:
        InputError: the file can't be used, names an unknown patient, or names a patient twice.
    """
    path, _, chosen = str(split_file).rpartition(":")
    if not path or Path(split_file).is_file():
        path, chosen = str(split_file), None
    content = read_json(path)
    if chosen is not None:
        if not isinstance(content.get(chosen), dict):
            raise InputError(f"{path}: no split named {chosen} (there are {', '.join(content)})")
        content = content[chosen]
    if not content or not set(content) <= set(SPLITS):
        hint = "" if chosen else f"; for one of several splits, {Path(path).name}:NAME"
        raise InputError(f"{path}: must have {', '.join(SPLITS)}, but has {_some(set(content))}{hint}")
    for name, ids in content.items():
        if not isinstance(ids, list) or not all(isinstance(patient, str) for patient in ids):
            raise InputError(f"{path}: {name} must be a list of patient ids")
    listed = Counter(patient for ids in content.values() for patient in ids)
    if twice := {patient for patient, count in listed.items() if count > 1}:
        raise InputError(f"{path}: in two splits or twice: {_some(twice)}")
    if unknown := set(listed) - set(patients) - set(left_out):
        raise InputError(f"{path}: {len(unknown)} patients are not in the data: {_some(unknown)}")
    if forgotten := set(patients) - set(listed):
        logger.warning("%s: %d patients are in no split and left out: %s", path, len(forgotten), _some(forgotten))
    people = Counter(person for ids in content.values() for person in {subject(patient) for patient in ids})
    for person in sorted(person for person, count in people.items() if count > 1):
        logger.warning("%s: visits of %s are in different splits", path, person)
    return {name: sorted(set(content.get(name, [])) - set(left_out)) for name in SPLITS}


def _some(names: set[str]) -> str:
    return (", ".join(sorted(names)[:3]) or "nothing") + (", .." if len(names) > 3 else "")
