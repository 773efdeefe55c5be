"""What `segment` writes about patients and cohorts as JSON: OUT/PATIENT/report.json and OUT/summary.json."""

from pathlib import Path

from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, read_json, write_json


REPORT = "report.json"
SUMMARY = "summary.json"
STATES = ("done", "skipped", "failed")
# Entries of report.json that `report` needs.
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
    if missing := [name for name in _REQUIRED if name not in report]:
        raise InputError(f"{folder / REPORT}: not a report of segment: {missing[0]} is missing")
    return report


def add_to_summary(output: Path, outcomes: dict[str, dict[str, str]]) -> None:
    """Add outcomes to OUT/summary.json. The new outcome of a patient replaces the old one.

    Args:
        output (`Path`): OUT.
        outcomes (`dict`): by patient, or by path where there is no patient: `state`, one of `STATES`, and for a
            failure its `reason`.
    """
    with alone_at(output / SUMMARY, timeout=60):  # shards may end at the same time
        patients = read_summary(output) | outcomes
        counts = {state: sum(outcome["state"] == state for outcome in patients.values()) for state in STATES}
        write_json(counts | {"patients": dict(sorted(patients.items()))}, output / SUMMARY)


def read_summary(output: Path) -> dict[str, dict[str, str]]:
    """Return the outcomes in OUT/summary.json; an empty dict if there is no such file."""
    path = output / SUMMARY
    return read_json(path)["patients"] if path.exists() else {}
