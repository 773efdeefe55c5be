"""`diffusers-cf distill`: teach a student the anomaly maps of a model, so that a map costs one pass a slice."""

import argparse
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffusers_cf.commands import options
from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, make_folder, new_file
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit
from diffusers_cf.settings import MAP_SETTINGS


LEAST = {"max_train_steps": 1, "train_batch_size": 1, "seed": 0, "image_size": 8, "learning_rate": 0}


def add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf distill`."""
    add = parser.add_argument
    add("--model", required=True, help=options.MODEL)
    add("--dataset", required=True, help=f"{options.DATASET}; its masks are not read")
    add("--output", required=True, metavar="STUDENT", help="folder for the model with its student")
    text = "baseline without training that teaches instead of the model's map, such as threshold-robust-z"
    add("--teacher", metavar="ID", help=f"{text}; default: the model")
    text = "teach the root of the model's map times the brightness of FLAIR"
    add("--with_intensity", action="store_true", help=f"{text}; default: off")
    options.add_settings_arguments(parser)
    options.add_postprocessing_arguments(parser)
    text = "side of the student's input in pixels, a multiple of 8"
    add("--image_size", type=int, help=f"{text}; default: the data set's")
    add("--max_train_steps", type=int, default=1000, help="optimiser steps; default: %(default)s")
    add("--train_batch_size", type=int, default=8, help="slices in a step; default: %(default)s")
    add("--learning_rate", type=float, default=2e-3, help="the highest learning rate; default: %(default)s")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation; default: %(default)s")
    options.add_device_arguments(parser, batch_size=32)


def run_distill(args: argparse.Namespace) -> None:
    """Compute the teacher's maps, train the student, choose its threshold from labels, and save the model with it.

    A stopped run goes on where it was.
    """
    from accelerate.utils import set_seed

    from diffusers_cf.baselines.student import Student, TaughtSlices
    from diffusers_cf.baselines.training import Budget, set_up_training, train_method
    from diffusers_cf.evaluation.inputs import checked_chain, open_split, rows_of_both_labels
    from diffusers_cf.inference import check_device_arguments, open_pipeline
    from diffusers_cf.loading import MODEL_INDEX

    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name} is {value}: it must be {least} or more")
    check_device_arguments(args)
    output = Path(args.output)
    if (output / MODEL_INDEX).exists():
        raise InputError(f"{output}: holds a finished model: choose another --output")
    splits = [open_split(args.dataset, split, masks=False) for split in ("train", "validation")]
    for split in splits:
        rows_of_both_labels(split, len(split))
    known, pipe = splits[0].preprocessing, open_pipeline(args.model, args.device, args.dtype, dataset=splits[0])
    side = args.image_size or known["size"]
    if side % 8 or side > known["size"]:
        raise InputError(f"--image_size is {side}: it must be a multiple of 8, at most the data set's {known['size']}")
    chain = checked_chain(args, pipe.preprocessing.get("settings", {}), known["modalities"])
    taught = replace(chain, bright_channel=None)  # the weights are for the student's own map
    make_folder(output)
    with alone_at(output):
        teacher, taught_by = _teacher(args, pipe, splits[0])
        taught_by |= {"postprocess": taught.as_setting}
        targets = _targets(output / "targets", teacher, taught_by, splits, taught, args.batch_size)
        train, validation = (TaughtSlices(*pair) for pair in zip(splits, targets, strict=True))
        set_seed(args.seed)
        student = Student(known["channels"], side, learning_rate=args.learning_rate)
        budget = Budget(math.inf, args.max_train_steps, args.train_batch_size, augment=True)
        facts = {"image_size": side, "learning_rate": args.learning_rate, "max_train_steps": args.max_train_steps}
        training = set_up_training(student, train, output, budget, args.seed, args.device, facts)
        record = train_method(student, validation, training)
        pipe.register_modules(student=student.network)
        seen = {"images": record.images_seen, "patients": len(set(train.patients))}
        _store(args, pipe, splits[1], chain, taught_by | seen)
        pipe.save_pretrained(output)
        for leftover in (*output.glob("*checkpoint-*"), output / "targets"):
            shutil.rmtree(leftover)
    threshold = pipe.preprocessing["settings"]["threshold"]
    print(f"student of {record.images_seen} images, threshold {threshold:.3g} -> {output}")


def _teacher(args: argparse.Namespace, pipe, train) -> tuple:
    """Return the method that teaches, and what it is."""
    from diffusers_cf.baselines import make_baseline
    from diffusers_cf.baselines.combination import IntensityCombination
    from diffusers_cf.baselines.method import PipelineMap
    from diffusers_cf.evaluation.inputs import checked_settings

    given = {name: getattr(args, name) for name in options.SETTINGS if getattr(args, name) is not None}
    if args.teacher:
        if given or args.with_intensity:
            raise InputError(f"--teacher {args.teacher} has no settings, and can't be combined with intensity")
        return make_baseline(args.teacher, train.preprocessing["modalities"]), {"teacher": args.teacher}
    settings = checked_settings(pipe, args.settings, **{name: getattr(args, name) for name in MAP_SETTINGS})
    settings = {name: settings[name] for name in MAP_SETTINGS}
    teacher = PipelineMap(pipe, settings)
    taught_by = {"teacher": model_fingerprint(pipe), "settings": settings}
    if args.with_intensity:
        teacher = IntensityCombination(teacher, train.preprocessing["modalities"])
        taught_by["with_intensity"] = True
    return teacher, taught_by


def _targets(folder: Path, teacher, taught_by: dict, splits: list, chain, batch_size: int) -> list[np.ndarray]:
    """Return the targets of each split, from the folder if they were computed before."""
    from tqdm.auto import tqdm

    from diffusers_cf.baselines.student import targets_of_maps
    from diffusers_cf.evaluation.chains import maps_of_split
    from diffusers_cf.evaluation.protocol import begin_parts

    begin_parts(folder, taught_by)
    targets = []
    for split in splits:
        path = folder / f"{split.split}.npy"
        if not path.exists():
            with tqdm(total=len(split), desc=f"Teacher, {split.split}", unit="slice") as bar:
                maps, inside = maps_of_split(teacher, split, chain, batch_size=batch_size, progress=bar)
            with new_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, targets_of_maps(maps, inside, split.labels))
        targets.append(np.load(path, mmap_mode="r"))
    return targets


def _store(args: argparse.Namespace, pipe, validation, chain, taught_by: dict) -> None:
    """Make the student's map the recommended one, with the teacher's post-processing and a threshold from labels."""
    from diffusers_cf.baselines.method import PipelineMap
    from diffusers_cf.commands.calibrate import RULES, postprocessed_maps
    from diffusers_cf.evaluation.calibration import thresholds_of_labels

    student = PipelineMap(pipe, {"map": "student"})
    maps = postprocessed_maps(student, validation, np.arange(len(validation)), chain, args.batch_size)
    threshold, known = thresholds_of_labels(maps)[RULES[0]], pipe.preprocessing
    made_by = {"command": command_line(), "commit": package_commit()}
    chosen_by = made_by | {"split": "validation", "n_slices": len(validation), "rule": RULES[0]}
    pipe.preprocessing = {key: value for key, value in known.items() if key != "settings_chosen_by"} | {
        "settings": known.get("settings", {})
        | {"map": "student", "threshold": threshold, "postprocess": chain.as_setting},
        "threshold_chosen_by": chosen_by,
        "evaluation_size": validation.preprocessing["size"],
        "student": taught_by | made_by,
    }
