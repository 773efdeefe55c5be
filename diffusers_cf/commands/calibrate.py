"""`diffusers-cf calibrate`: choose a threshold from labels of slices alone, and measure its Dice if masks exist."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusers_cf.commands.options import (
    DATASET,
    MODEL,
    add_device_arguments,
    add_postprocessing_arguments,
    add_settings_arguments,
)
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.calibration import HEALTHY_QUANTILE, dice_of_thresholds, thresholds_of_labels
from diffusers_cf.files import make_folder, write_json
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit
from diffusers_cf.settings import MAP_SETTINGS


RULES = ("slice-labels", "healthy-quantile")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf calibrate`."""
    add = parser.add_argument
    add("--model", required=True, help=MODEL)
    add("--dataset", required=True, help=f"{DATASET}; thresholds are chosen without its masks")
    add("--output", required=True, metavar="RESULT.json", help="file for thresholds and Dice")
    add("--split", default="validation", choices=SPLITS, help="split to choose on; default: %(default)s")
    add("--max_slices", type=int, default=256, help="slices to choose on, evenly spread; default: %(default)s")
    add("--measure", choices=SPLITS, help="split with masks on which Dice of each rule is measured; default: none")
    add_settings_arguments(parser)
    add_postprocessing_arguments(parser)
    add_device_arguments(parser, batch_size=32)
    text = "write settings and threshold of this rule into the model folder as recommended; if no rule is named: "
    add("--store", nargs="?", const=RULES[0], choices=RULES, help=f"{text}%(const)s; default: write nothing")


def run_calibrate(args: argparse.Namespace) -> None:
    """Choose a threshold by every rule, write RESULT.json and print the thresholds."""
    from diffusers_cf.baselines.method import PipelineMap
    from diffusers_cf.evaluation.inputs import checked_chain, checked_settings, open_split, rows_of_both_labels
    from diffusers_cf.inference import check_device_arguments, open_pipeline

    check_device_arguments(args)
    if args.store and not Path(args.model).is_dir():
        raise InputError(f"{args.model}: a threshold can be stored in a model folder only")
    chosen_on = open_split(args.dataset, args.split, masks=False)
    measured_on = open_split(args.dataset, args.measure) if args.measure else None
    rows = rows_of_both_labels(chosen_on, args.max_slices)
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=chosen_on)
    settings = checked_settings(pipe, args.settings, **{name: getattr(args, name) for name in MAP_SETTINGS})
    settings = {name: settings[name] for name in MAP_SETTINGS}
    chain = checked_chain(args, pipe.preprocessing.get("settings", {}), chosen_on.preprocessing["modalities"])
    if chain.slice_sigma:  # a filter across slices needs them all
        rows = rows_of_patients(chosen_on, len(rows))
    output = Path(args.output)
    make_folder(output.parent)
    method = PipelineMap(pipe, settings)
    thresholds = thresholds_of_labels(postprocessed_maps(method, chosen_on, rows, chain, args.batch_size))
    scores = {}
    if measured_on:
        maps = postprocessed_maps(method, measured_on, np.arange(len(measured_on)), chain, args.batch_size)
        scores = dice_of_thresholds(maps, thresholds)
    chosen_by = {"command": command_line(), "commit": package_commit(), "split": args.split, "n_slices": len(rows)}
    result = {
        "thresholds": thresholds, "dice": scores, "model": args.model, "model_sha256": model_fingerprint(pipe),
        "settings": settings | {"postprocess": chain.as_setting}, "dtype": args.dtype, "data": chosen_on.preprocessing, "quantile": HEALTHY_QUANTILE,
        "measured_on": args.measure, **chosen_by,
    }  # fmt: skip
    write_json(result, output)
    for name, threshold in thresholds.items():
        print(f"{name}: {threshold}" + (f", Dice {scores[name]:.3f}" if scores else ""))
    if scores:
        print(f"ideal, chosen with masks: Dice {scores['ideal']:.3f}")
    if args.store:
        settings |= {"threshold": thresholds[args.store], "postprocess": chain.as_setting}
        _store(args.model, settings, chosen_by | {"rule": args.store}, chosen_on.preprocessing["size"])


def rows_of_patients(dataset, max_slices: int) -> np.ndarray:
    """Return the rows of whole patients, evenly spread, with about `max_slices` slices."""
    from diffusers_cf.evaluation.protocol import rows_by_patient
    from diffusers_cf.evaluation.sweep import evenly_spread

    patients = list(rows_by_patient(dataset, np.arange(len(dataset))).values())
    return np.concatenate(
        [patients[i] for i in evenly_spread(len(patients), max(1, max_slices * len(patients) // len(dataset)))]
    )


def postprocessed_maps(method, dataset, rows, chain, batch_size: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield the post-processed maps `(S, H, W)` of each patient, with its images, labels and masks."""
    from tqdm.auto import tqdm

    from diffusers_cf.evaluation.chains import maps_of_rows

    with tqdm(total=len(rows), desc=dataset.split, unit="slice") as bar:
        for patient, maps in maps_of_rows(method, dataset, rows, batch_size, progress=bar):
            yield chain.apply(maps, patient.images, patient.slices), vars(patient)


def _store(folder: str, settings: dict, chosen_by: dict, size: int) -> None:
    """Write settings and threshold into the model folder's preprocessing.json, and how the threshold was chosen."""
    from diffusers_cf.loading import PREPROCESSING, read_preprocessing, replace_json

    known = read_preprocessing(folder)
    former = known.pop("settings_chosen_by", None)
    if former and all(settings[name] == known.get("settings", {}).get(name) for name in MAP_SETTINGS):
        # the settings stay as they were chosen; their ideal Dice was that of another threshold
        known["settings_chosen_by"] = {name: value for name, value in former.items() if name != "ideal_dice"}
    stored = {"settings": settings, "threshold_chosen_by": chosen_by, "evaluation_size": size}
    replace_json(folder, {PREPROCESSING: known | stored})
