"""What `segment` writes about patients and cohorts as JSON: OUT/PATIENT/report.json and OUT/summary.json."""

from collections.abc import Mapping
from pathlib import Path

from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, read_json, write_json
from diffusers_cf.settings import MAP_SETTINGS


REPORT = "report.json"
SUMMARY = "summary.json"
STATES = ("done", "skipped", "failed")
_REQUIRED = (
    "patient", "model", "model_sha256", "preprocessing", "threshold", "postprocessed", "inputs", "lesion_volume_ml",
    "n_slices", "settings",
)  # fmt: skip


def read_report(folder: Path) -> dict:
    """Return the content of a patient's report.json.

    Raises:
        InputError: the file is missing, not readable, or not a report of `segment`.
    """
    report = read_json(folder / REPORT)
    missing = [name for name in _REQUIRED if name not in report]
    if missing := missing or [f"settings.{name}" for name in MAP_SETTINGS if name not in report["settings"]]:
        raise InputError(f"{folder / REPORT}: not a report of segment: {missing[0]} is missing")
    return report


def add_to_summary(output: Path, outcomes: Mapping[str, Mapping[str, str]]) -> None:
    """Add outcomes to OUT/summary.json. A newer outcome of a patient replaces the older one.

    Args:
        output (`Path`): OUT.
        outcomes (`Mapping`): by patient, or by path where there is no patient: `state`, one of `STATES`, and for a
            failure its `reason`.
    """
    with alone_at(output / SUMMARY, timeout=60):  # shards may end at the same time
        patients = read_summary(output) | {name: dict(outcome) for name, outcome in outcomes.items()}
        counts = {state: sum(outcome["state"] == state for outcome in patients.values()) for state in STATES}
        write_json(counts | {"patients": dict(sorted(patients.items()))}, output / SUMMARY)


def read_summary(output: Path) -> dict[str, dict[str, str]]:
    """Return the outcomes in OUT/summary.json; an empty dict if there is no such file."""
    path = output / SUMMARY
    return read_json(path)["patients"] if path.exists() else {}
