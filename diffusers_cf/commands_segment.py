"""`diffusers-cf segment`: patients, or whole cohorts of them, to heatmap, mask and counterfactual as NIfTI."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from diffusers_cf.arguments import make_folder
from diffusers_cf.cohorts import find_patients
from diffusers_cf.errors import InputError
from diffusers_cf.inference_options import (
    add_compile_argument,
    add_device_arguments,
    add_settings_arguments,
    add_shard_argument,
    check_device_arguments,
    open_pipeline,
    take_device,
)
from diffusers_cf.processes import Share, share_of_work
from diffusers_cf.volumes import segment_patient, segmentation_facts


SETTINGS = ("settings", "guidance_scale", "strength", "num_inference_steps", "map", "threshold")


def add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf segment`."""
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="a patient, one NIfTI file a modality, or a cohort of patients")
    add("--model", required=True, help="folder or Hub id of a model")
    add("--output", required=True, metavar="OUT", help="gets a folder for each patient")
    add_settings_arguments(parser)
    add("--threshold", type=float, help="heat from which on a voxel is lesion; a change of 1 = 99th percentile")
    add_device_arguments(parser)
    add_compile_argument(parser)
    add("--overwrite", action="store_true", help="replace patients finished with another model or other settings")
    add_shard_argument(parser, "does what shards have left")


def run_segment(args: argparse.Namespace) -> int:
    """Segments every patient of this process, printing a line for each; one that fails does not stop the others.

    Returns:
        0, or 2 if a patient failed: stderr then ends in one line for each of them.

    Raises:
        InputError: Model, options or output can't be used, or two patients have the same name.
    """
    share = share_of_work(args.shard)
    take_device(args, share)
    check_device_arguments(args)
    pipe = open_pipeline(args.model, args.device, args.dtype, args.compile)
    settings = {name: getattr(args, name) for name in SETTINGS}
    modalities = segmentation_facts(pipe, args.model, **settings)["preprocessing"]["modalities"]
    patients, failures = _patients(args, modalities)
    make_folder(args.output)
    options = {"model": args.model, "batch_size": args.batch_size, "overwrite": args.overwrite} | settings
    done = _segment_all(pipe, share.of(patients), args.output, options, share)
    # what can't be found is known to every process, and said by one
    failures = share.gather(done.pop("failures") + (failures if share.is_main else []))
    counts = [sum(values) for values in zip(*share.gather([tuple(done.values())]), strict=True)]
    if share.is_main or share.is_shard:
        if sum(counts) + len(failures) > 1:
            print(f"{counts[0]} done, {counts[1]} finished before, {len(failures)} failed", flush=True)
        for failure in failures:
            print(f"error: {' '.join(failure.split())}", file=sys.stderr)
    return 2 if failures else 0


def _patients(args: argparse.Namespace, modalities: list[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Every patient by name, and what is wrong with folders that hold none."""
    patients, failures = [], []
    for folder in args.folders:
        try:
            patients += find_patients(folder, modalities, args.output)
        except InputError as error:
            failures.append(str(error))
    twice = [name for name, count in Counter(name for name, _ in patients).items() if count > 1]
    if twice:
        raise InputError(
            f"two patients are called {twice[0]}: both would be written to {Path(args.output) / twice[0]}"
        )
    return patients, failures


def _segment_all(pipe, patients: list[tuple[str, Path]], output: str, options: dict, share: Share) -> dict:
    """Segments patients one after the other; how many were `done` and `skipped`, and the `failures`."""
    counts = {"done": 0, "skipped": 0, "failures": []}
    for name, folder in patients:
        target = Path(output) / name
        skip = target.exists() and not options["overwrite"]
        progress = share.is_main or share.is_shard
        try:
            report = segment_patient(pipe, folder, output, patient=name, progress=progress, **options)
        except InputError as error:
            counts["failures"].append(str(error) if name in str(error) else f"{folder}: {error}")
            continue
        counts["skipped" if skip else "done"] += 1
        state = "finished before, skipped" if skip else f"{report['seconds']:.1f} s"
        print(f"{name}: {report['lesion_volume_ml']:.1f} ml above the threshold, {state} -> {target}", flush=True)
    return counts
