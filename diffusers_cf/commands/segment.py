"""`diffusers-cf segment`: heatmap, mask and counterfactuals of patients, or of whole cohorts, as NIfTI."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from diffusers_cf.commands import options
from diffusers_cf.errors import BusyError, InputError, in_one_line
from diffusers_cf.files import make_folder


def add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf segment`."""
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="a patient (NIfTI files or DICOM series) or a cohort")
    add("--model", required=True, help=options.MODEL)
    add("--output", required=True, metavar="OUT", help="folder for the results; each patient gets a folder in it")
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `segment` and `bids` share."""
    add = parser.add_argument
    options.add_settings_arguments(parser)
    add("--threshold", type=float, help="map value from which a voxel is lesion; default: recommended by the model")
    text = "find the brain in scans of whole heads, and take the rest for background (extra skull)"
    add("--skull_strip", action="store_true", help=f"{text}; default: scans are skull-stripped")
    options.add_device_arguments(parser, compile=True)
    text = "also write filled_<modality>.nii.gz: the scan with the lesion replaced by its counterfactual; default: off"
    add("--fill", action="store_true", help=text)
    text = "segment finished patients again; default: skip them, or fail if model, settings, dtype or scans changed"
    add("--overwrite", action="store_true", help=text)
    options.add_convention_argument(parser)
    options.add_shard_argument(parser, "segments what is missing")


def run_segment(args: argparse.Namespace) -> int:
    """Segment every patient of the given folders; see [`segment_patients`]."""
    return segment_patients(args, lambda modalities: _find_all(args.folders, modalities, args.output))


def segment_patients(args: argparse.Namespace, find: Callable, finish: Callable | None = None) -> int:
    """Segment every patient of this process and print a line for each. A failure does not stop the others.

    Args:
        args (`Namespace`): `model`, `output` and the options of [`add_run_arguments`].
        find (`Callable`): `(modalities) -> (names and folders of patients, a line for each path that failed)`.
        finish (`Callable`, *optional*): `(name, folder, report) -> folder that is named to the user`, called for every
            finished patient.

    Returns:
        `int`: 0, or 2 if a patient failed; then stderr ends with a line for each failure, as does OUT/summary.json.
    """
    from diffusers_cf.evaluation.processes import share_of_work
    from diffusers_cf.inference import check_device_arguments, open_pipeline
    from diffusers_cf.segmentation.cohorts import add_to_summary
    from diffusers_cf.segmentation.patient import segmentation_facts

    share = share_of_work(args.shard)
    check_device_arguments(args, share)
    pipe = open_pipeline(args.model, args.device, args.dtype, args.compile)
    settings = {name: getattr(args, name) for name in (*options.SETTINGS, "threshold")}
    modalities = segmentation_facts(pipe, args.model, **settings)["preprocessing"]["modalities"]
    patients, not_found = find(modalities)
    not_found = {path: {"state": "failed", "reason": problem} for path, problem in not_found.items()}
    if patients:
        make_folder(args.output)
    done = _segment_all(pipe, share.of(patients), args, settings, share.is_main or share.is_shard, finish)
    # every process knows what could not be found; only one reports it
    outcomes = dict(share.gather([*done.items(), *(not_found.items() if share.is_main else ())]))
    failures = [outcome["reason"] for outcome in outcomes.values() if "reason" in outcome]
    if share.is_main or share.is_shard:
        if len(outcomes) > 1:
            counts = Counter(outcome["state"] for outcome in outcomes.values())
            print(f"{counts['done']} done, {counts['skipped']} finished before, {len(failures)} failed", flush=True)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        if patients:
            # the process that is writing a busy patient reports its outcome
            add_to_summary(Path(args.output), {k: v for k, v in outcomes.items() if v["state"] != "busy"})
    return 2 if failures else 0


def _find_all(given: list[str], modalities: list[str], output: str) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """Return names and folders of all patients, and a line for each folder without patients and each shared name."""
    from diffusers_cf.segmentation.cohorts import find_patients

    folders, failures = {}, {}
    for folder in given:
        try:
            found, problems = find_patients(folder, modalities, output)
        except InputError as error:
            found, problems = [], {folder: str(error)}
        failures |= problems
        for name, patient in found:
            folders.setdefault(name, {}).setdefault(os.path.realpath(patient), patient)
    for name, same in folders.items():
        if len(same) > 1:
            listed = " and ".join(map(str, same.values()))
            failures[name] = f"two patients are called {name}: {listed}"
    return [(name, *same.values()) for name, same in folders.items() if len(same) == 1], failures


def _segment_all(
    pipe, patients: list, args: argparse.Namespace, settings: dict, talks: bool, finish: Callable | None
) -> dict[str, dict]:
    """Segment patients one after the other and return the outcome of each: `state`, and `reason` of a failure."""
    from tqdm.auto import tqdm

    from diffusers_cf.segmentation.patient import segment_patient

    given = {"model": args.model, "batch_size": args.batch_size, "overwrite": args.overwrite}
    given |= {"fill": args.fill, "skull_strip": args.skull_strip, "convention": args.convention, "progress": talks}
    outcomes = {}
    bar = tqdm(patients, desc="Patients", unit="patient", disable=not talks or len(patients) < 2)
    for name, folder in bar:
        target = Path(args.output) / name
        state = "skipped" if target.exists() and not args.overwrite else "done"
        try:
            report = segment_patient(pipe, folder, args.output, patient=name, **given, **settings)
            target = finish(name, folder, report) if finish else target
        except (InputError, OSError, MemoryError) as error:
            line, state = in_one_line(error), "busy" if isinstance(error, BusyError) else "failed"
            outcomes[name] = {"state": state, "reason": line if name in line else f"{target}: {line}"}
            continue
        outcomes[name] = {"state": state}
        if "dicom_error" in report:
            outcomes[name] = {"state": "failed", "reason": f"{target}: only NIfTI files: {report['dicom_error']}"}
        spent = "finished before, skipped" if state == "skipped" else f"{report['seconds']:.1f} s"
        with bar.external_write_mode():
            print(f"{name}: {report['lesion_volume_ml']:.1f} ml above the threshold, {spent} -> {target}", flush=True)
    return outcomes
