"""What `segment` leaves in OUT, read as foreign input: a folder for each patient, and summary.json about all of them."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers_cf.data.scans import check_patient_id
from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, new_file, read_json
from diffusers_cf.heatmaps import MAPS


REPORT = "report.json"
SUMMARY = "summary.json"
STATES = ("done", "skipped", "failed")
_MAX_PICTURE_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_PATIENCE = 60.0  # seconds that another process may take to write the summary


def own_file(folder: Path, name: str) -> Path:
    """A file that `segment` has written into a patient's folder.

    Raises:
        InputError: It is missing, or no file but a link, which could lead anywhere.
    """
    path = folder / name
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise InputError(f"{path}: a link or no file, which segment does not write")
    if not os.path.exists(path):
        raise InputError(f"{path}: can't be read (no such file)")
    return path


def read_report(folder: Path) -> dict:
    """The content of a patient's report.json; of every fact that a reader needs the kind and range are checked.

    Raises:
        InputError: The file is missing or damaged, lacks a fact, or holds one that `segment` does not write.
    """
    path = own_file(folder, REPORT)
    facts = read_json(path)
    lacking = [name for name in _FACTS if name not in facts]
    if lacking:
        raise InputError(f"{path}: lacks {lacking[0]}: not a report of segment")
    _check(path, facts, _FACTS)
    _check(path, {name: facts.get(name) for name in _SCORES}, _SCORES)
    _check(path, {name: facts["settings"].get(name) for name in _SETTINGS}, _SETTINGS)
    return facts


def read_preview(folder: Path) -> bytes:
    """preview.png, if it is a PNG by its first bytes.

    Raises:
        InputError: It is missing, can't be read, is too large or something else.
    """
    path = own_file(folder, "preview.png")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    if not content.startswith(_PNG) or len(content) > _MAX_PICTURE_BYTES:
        raise InputError(f"{path}: no PNG file of up to {_MAX_PICTURE_BYTES >> 20} MiB")
    return content


def add_to_summary(output: Path, outcomes: Mapping[str, Mapping[str, str]]) -> None:
    """Writes the last word on patients to summary.json in OUT; what other runs have said of others stays.

    Args:
        output: OUT.
        outcomes: By patient, or by folder where there is none: `state`, one of `STATES`, and `reason` of a failure.

    Raises:
        InputError: It can't be written.
    """
    path = output / SUMMARY
    with alone_at(path, _PATIENCE):  # shards may end together
        try:
            earlier = read_summary(output)
        except InputError:  # damaged: said anew
            earlier = {}
        patients = earlier | {name: dict(outcome) for name, outcome in outcomes.items()}
        counts = {state: sum(outcome["state"] == state for outcome in patients.values()) for state in STATES}
        text = json.dumps(counts | {"patients": dict(sorted(patients.items()))}, indent=2)
        try:
            with new_file(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: can't be written ({error.strerror or error})") from None


def read_summary(output: Path) -> dict[str, dict[str, str]]:
    """What summary.json says: by patient or folder `state`, and `reason` of a failure; {} where there is none.

    Raises:
        InputError: It is damaged, or not what `segment` writes.
    """
    if not os.path.lexists(output / SUMMARY):
        return {}
    path = own_file(output, SUMMARY)
    patients = read_json(path).get("patients")
    good = isinstance(patients, dict) and all(
        isinstance(outcome, dict)
        and outcome.get("state") in STATES
        and (outcome["state"] != "failed" or isinstance(outcome.get("reason"), str))
        for outcome in patients.values()
    )
    if not good:
        raise InputError(f"{path}: not a summary of segment")
    return patients


def _check(path: Path, facts: Mapping, kinds: Mapping[str, Callable]) -> None:
    for name, is_good in kinds.items():
        if not is_good(facts[name]):
            shown = json.dumps(facts[name])[:60]
            raise InputError(f"{path}: {name} is {shown}, which is not what segment writes")


def _number(least: float = 0.0, most: float = 1e30) -> Callable:
    # NaN fails the comparison
    return lambda value: type(value) in (int, float) and least <= value <= most


def _is_patient(value) -> bool:
    try:
        return isinstance(value, str) and bool(check_patient_id(value))
    except InputError:
        return False


def _is_sha256(value) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_inputs(value) -> bool:
    """Whether files are named by modalities, which become parts of file names, and `seg`."""
    return (
        isinstance(value, dict)
        and any(name != "seg" for name in value)
        and all(re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}", name) for name in value)
        and all(map(_is_sha256, value.values()))
    )


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value <= 2**31


def _is_score(value) -> bool:
    return value is None or _number(0, 1 + 1e-6)(value)


_FACTS = {
    "patient": _is_patient,
    "model": lambda value: isinstance(value, str),
    "model_sha256": _is_sha256,
    "settings": lambda value: isinstance(value, dict),
    "threshold": _number(math.ulp(0.0)),
    "postprocessed": lambda value: isinstance(value, bool),
    "inputs": _are_inputs,
    "lesion_volume_ml": _number(),
    "n_slices": _is_count,
}
_SCORES = {"dice": _is_score, "auprc": _is_score}
_SETTINGS = {
    "guidance_scale": _number(),
    "strength": _number(0, 1),
    "num_inference_steps": _is_count,
    "map": lambda value: isinstance(value, str) and value in MAPS,
}
