"""`diffusers-cf segment`: patients, or whole cohorts of them, to heatmap, mask and counterfactual as NIfTI."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm

from diffusers_cf.commands.options import (
    add_compile_argument,
    add_device_arguments,
    add_settings_arguments,
    add_shard_argument,
    check_device_arguments,
    open_pipeline,
    take_device,
)
from diffusers_cf.errors import BusyError, InputError
from diffusers_cf.evaluation.processes import Share, share_of_work
from diffusers_cf.files import make_folder
from diffusers_cf.segmentation.cohorts import find_patients
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts
from diffusers_cf.segmentation.results import add_to_summary


SETTINGS = ("settings", "guidance_scale", "strength", "num_inference_steps", "map", "threshold")


def add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf segment`."""
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="a patient, one NIfTI file a modality, or a cohort of patients")
    add("--model", required=True, help="folder or Hub id of a model")
    add("--output", required=True, metavar="OUT", help="gets a folder for each patient")
    add_settings_arguments(parser)
    add("--threshold", type=float, help="heat from which on a voxel is lesion, on the model's intensity scale")
    add_device_arguments(parser)
    add_compile_argument(parser)
    add(
        "--overwrite",
        action="store_true",
        help="do every patient again, which another model, settings, dtype or scans need",
    )
    add_shard_argument(parser, "does what shards have left")


def run_segment(args: argparse.Namespace) -> int:
    """Segments every patient of this process, printing a line for each; one that fails does not stop the others.

    Returns:
        0, or 2 if a patient failed: stderr then ends in one line for each of them, and OUT/summary.json says the same.

    Raises:
        InputError: Model, options or output can't be used.
    """
    share = share_of_work(args.shard)
    take_device(args, share)
    check_device_arguments(args)
    pipe = open_pipeline(args.model, args.device, args.dtype, args.compile)
    settings = {name: getattr(args, name) for name in SETTINGS}
    modalities = segmentation_facts(pipe, args.model, **settings)["preprocessing"]["modalities"]
    patients, outcomes = _patients(args, modalities)
    if patients:
        make_folder(args.output)
    options = {"model": args.model, "batch_size": args.batch_size, "overwrite": args.overwrite} | settings
    done = _segment_all(pipe, share.of(patients), args.output, options, share)
    # what can't be found is known to every process, and said by one
    outcomes = dict(share.gather([*done.items(), *(outcomes.items() if share.is_main else ())]))
    failures = [outcome["reason"] for outcome in outcomes.values() if "reason" in outcome]
    if share.is_main or share.is_shard:
        if len(outcomes) > 1:
            counts = Counter(outcome["state"] for outcome in outcomes.values())
            print(f"{counts['done']} done, {counts['skipped']} finished before, {len(failures)} failed", flush=True)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        if patients:
            # of a patient that another process is at, that one has the last word
            add_to_summary(Path(args.output), {k: v for k, v in outcomes.items() if v["state"] != "busy"})
    return 2 if failures else 0


def _patients(args: argparse.Namespace, modalities: list[str]) -> tuple[list[tuple[str, Path]], dict[str, dict]]:
    """Every patient by name, and outcomes of what can't be segmented: folders without one, patients of one name."""
    folders, failures = {}, {}
    for given in args.folders:
        try:
            found, problems = find_patients(given, modalities, args.output)
        except InputError as error:
            failures[given] = _failed(str(error))
            continue
        failures |= {path: _failed(problem) for path, problem in problems.items()}
        for name, folder in found:
            folders.setdefault(name, {}).setdefault(os.path.realpath(folder), folder)
    for name, same in folders.items():
        if len(same) > 1:
            listed = " and ".join(map(str, same.values()))
            failures[name] = _failed(
                f"two patients are called {name}: {listed}: both would be written to {Path(args.output) / name}"
            )
    return [(name, *same.values()) for name, same in folders.items() if len(same) == 1], failures


def _failed(reason: str) -> dict[str, str]:
    return {"state": "failed", "reason": " ".join(reason.split())}


def _segment_all(pipe, patients: list[tuple[str, Path]], output: str, options: dict, share: Share) -> dict[str, dict]:
    """Segments patients one after the other, and tells the outcome of each: `state`, and `reason` of a failure."""
    outcomes, talks = {}, share.is_main or share.is_shard
    bar = tqdm(patients, desc="Patients", unit="patient", disable=not talks or len(patients) < 2)
    for name, folder in bar:
        target = Path(output) / name
        skip = target.exists() and not options["overwrite"]
        try:
            report = segment_patient(pipe, folder, output, patient=name, progress=talks, **options)
        except InputError as error:
            outcomes[name] = _failed(str(error) if name in str(error) else f"{folder}: {error}")
            outcomes[name] |= {"state": "busy"} if isinstance(error, BusyError) else {}
            continue
        outcomes[name] = {"state": "skipped" if skip else "done"}
        if "dicom_error" in report:
            outcomes[name] = _failed(f"{target}: holds NIfTI files alone: {report['dicom_error']}")
        state = "finished before, skipped" if skip else f"{report['seconds']:.1f} s"
        with bar.external_write_mode():
            print(f"{name}: {report['lesion_volume_ml']:.1f} ml above the threshold, {state} -> {target}", flush=True)
    return outcomes
