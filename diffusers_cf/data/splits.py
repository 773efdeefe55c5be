"""Which patient goes into which split: by a seed, by a file, or as the source itself froze it."""

import json
import logging
import random
import re
from collections.abc import Iterable
from pathlib import Path

from diffusers_cf.data.preprocessing import SPLITS
from diffusers_cf.errors import InputError


logger = logging.getLogger(__name__)

FRACTIONS = {"train": 0.75, "validation": 0.05}


def subject(patient: str) -> str:
    """The person behind an id: in `BraTS-GLI-00012-001` (BraTS from 2023) the last number is a visit."""
    match = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d{3}", patient)
    return match.group(1) if match else patient


def seeded_splits(patients: list[str], seed: int) -> dict[str, list[str]]:
    """Splits shuffled sorted ids at 75/5/20 % (Sec. 4 of the paper: 938/62/251 of BraTS 2021).

    All visits of a person stay together. With few patients every split gets one, as far as they suffice.
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
    """Reads splits from a JSON file {"train": [ids], "validation": [ids], "test": [ids]}.

    Args:
        split_file: FILE.json, or FILE.json:NAME for a file that holds several splits by name.
        patients: The ids there are. Those the file doesn't mention are left out, with a warning.
        left_out: Ids that the file may name and that are in no split.

    Raises:
        InputError: The file can't be used, names an unknown patient, or a patient twice.
    """
    path, chosen = _parse(split_file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    splits = _select(path, content, chosen)
    listed = [patient for ids in splits.values() for patient in ids]
    twice = sorted({patient for patient in listed if listed.count(patient) > 1})
    if twice:
        raise InputError(f"{path}: in two splits or twice: {_some(twice)}")
    splits = {name: [patient for patient in ids if patient not in left_out] for name, ids in splits.items()}
    unknown = sorted(set(listed) - set(patients) - set(left_out))
    if unknown:
        raise InputError(f"{path}: {len(unknown)} patients are not in the data: {_some(unknown)}")
    left_out = sorted(set(patients) - set(listed))
    if left_out:
        logger.warning("%s: %d patients are in no split and left out: %s", path, len(left_out), _some(left_out))
    for person in {subject(patient) for patient in listed}:
        if sum(any(subject(patient) == person for patient in ids) for ids in splits.values()) > 1:
            logger.warning("%s: visits of %s lie in different splits", path, person)
    return splits


def _parse(split_file: str | Path) -> tuple[Path, str | None]:
    path, _, name = str(split_file).rpartition(":")
    if not path or Path(split_file).is_file():
        return Path(split_file), None
    return Path(path), name


def _select(path: Path, content, chosen: str | None) -> dict[str, list[str]]:
    if not isinstance(content, dict):
        raise InputError(f'{path}: an object with "train", "validation" and "test" is needed')
    if chosen is not None:
        if not isinstance(content.get(chosen), dict):
            raise InputError(f"{path}: no split named {chosen} (there are {', '.join(content)})")
        content = content[chosen]
    elif not set(content) & set(SPLITS) and any(isinstance(value, dict) for value in content.values()):
        raise InputError(f"{path}: holds several splits, choose one: {path.name}:{next(iter(content))}")
    unknown = sorted(set(content) - set(SPLITS))
    if unknown or not content:
        raise InputError(f"{path}: splits are called {', '.join(SPLITS)}, not {', '.join(unknown) or 'nothing'}")
    for name, ids in content.items():
        if not isinstance(ids, list) or not all(isinstance(patient, str) for patient in ids):
            raise InputError(f"{path}: {name} must be a list of patient ids")
    return {name: sorted(content.get(name, [])) for name in SPLITS}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
