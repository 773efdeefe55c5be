"""`diffusers-cf sweep`: every combination of settings on validation slices, and the best one made the model's own."""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from diffusers_cf import loading
from diffusers_cf.commands.options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.evaluation.sweep import (
    GUIDANCE_SCALES,
    STRENGTHS,
    SweepPoint,
    best_point,
    evenly_spread,
    has_lesion,
    learn_signs,
    settings_of_sweep,
    sweep,
)
from diffusers_cf.files import make_folder
from diffusers_cf.forward import check_forward
from diffusers_cf.heatmaps import DECODED_MAPS, MAPS
from diffusers_cf.plots import plot_sweep
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.settings import NAMES, PAPER_SETTINGS


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf sweep`."""
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="folder or Hub id of a model")
    add("--dataset", required=True, help="slice data set with masks, or user/name[@revision]")
    add("--output", required=True, metavar="RESULTS", help="folder for sweep.json and sweep.png")
    add("--split", default="validation", choices=("train", "validation", "test"))
    scales, strengths = (" ".join(map(str, values)) for values in (GUIDANCE_SCALES, STRENGTHS))
    add("--guidance_scales", type=float, nargs="+", default=list(GUIDANCE_SCALES), help=f"w, default: {scales}")
    add("--strengths", type=float, nargs="+", default=list(STRENGTHS), help=f"L, default: {strengths}")
    add("--maps", nargs="+", choices=MAPS, help="default: all that the model can make")
    add("--num_inference_steps", type=int, nargs="+", default=[100], help="n of the full grid, default: 100")
    add("--solver_order", type=int, nargs="+", choices=(1, 2), help="of encoding, 2 costs nothing more and pays where steps "
        "are few, but not for the forward map; default: what the model has, --store makes the best one the model's")  # fmt: skip
    add("--max_slices", type=int, default=256, help="evenly spread over the split (256, the paper's number)")
    add("--max_evaluations", type=int, help="leave out settings of more network evaluations a slice")
    add_device_arguments(parser, batch_size=32)
    add("--store", nargs="?", const="recommended", choices=NAMES, help="write the best setting into the model folder as "
        "its recommendation; with `paper` the threshold for the paper's setting, the only one of the sweep")  # fmt: skip


def run_sweep(args: argparse.Namespace) -> int:
    """Runs the sweep, writes RESULTS/sweep.json and sweep.png, prints the best setting; with --store recommends it.

    Raises:
        InputError: model, data set or options can't be used.
    """
    _check_options(args)
    dataset = SliceDataset(args.dataset, args.split)
    if not dataset.has_masks or not len(dataset):
        raise InputError(f"{args.dataset}: the split {args.split} has no slices with lesion masks to measure on")
    indices = evenly_spread(len(dataset), args.max_slices)
    _check_slices(dataset, indices, args)
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    args.maps = args.maps or _possible_maps(pipe)
    try:
        # A sweep takes hours: whether any setting can be recommended is known before.
        if not any([settings_of_sweep(pipe, *grid, args.max_evaluations) for grid in _grids(args, pipe)]):
            raise InputError(f"no setting of the sweep needs at most {args.max_evaluations} network evaluations")
        make_folder(args.output)
        if "signed" in args.maps:
            pipe.preprocessing = pipe.preprocessing | {"signs": _signs_for_sweep(args, pipe, dataset, indices)}
        swept = [
            sweep(pipe, dataset, indices, *grid, args.batch_size, args.max_evaluations) for grid in _grids(args, pipe)
        ]
        points = list(itertools.chain(*swept))
    except ValueError as error:
        raise InputError(str(error)) from None
    best = best_point(points)
    output = Path(args.output)
    facts = {"command": command_line(), "commit": package_commit(), "split": args.split, "n_slices": len(indices)}
    document = facts | {"best": asdict(best), "points": [asdict(point) for point in points]}
    write_result(document, output / "sweep.json")
    plot_sweep(output / "sweep.png", points)
    print(f"best: {asdict(best)}")
    if args.store:
        _store(args, pipe, dataset, best, facts)
    return 0


def _store(args: argparse.Namespace, pipe, dataset: SliceDataset, best: SweepPoint, facts: dict) -> None:
    """Makes what the sweep has found the model's own, as `--store` says."""
    files = {}
    if args.solver_order:
        _set_solver_order(pipe, args.model, best.solver_order)
        files["inverse_scheduler/scheduler_config.json"] = json.loads(pipe.inverse_scheduler.to_json_string())
    kept = {"signs": pipe.preprocessing["signs"]} if "signed" in args.maps else {}
    kept["evaluation_size"] = dataset.preprocessing["size"]
    store = store_settings if args.store == "recommended" else store_paper_threshold
    store(args.model, best, facts, kept, files)


def _check_options(args: argparse.Namespace) -> None:
    check_device_arguments(args)
    if args.max_slices < 1:
        raise InputError(f"--max_slices must be at least 1, not {args.max_slices}")
    if not all(0 < strength <= 1 for strength in args.strengths):
        raise InputError(f"--strengths {args.strengths}: each must lie in (0, 1]")
    if args.store:
        _check_model_folder(args.model)
    swept = [args.guidance_scales, args.strengths, args.num_inference_steps, args.maps]
    names = ("guidance_scale", "strength", "num_inference_steps", "map")
    scale, strength, steps, kind = (PAPER_SETTINGS[name] for name in names)
    if args.store == "paper" and swept != [[scale], [strength], [steps], [kind]]:
        options = "--guidance_scales 3 --strengths 0.75 --maps counterfactual --num_inference_steps 100"
        raise InputError(f"--store paper needs a sweep of the paper's setting alone: {options}")
    if args.store == "paper" and args.solver_order:
        raise InputError("--store paper adds a threshold alone: it can't change the model's --solver_order")


def _possible_maps(pipe) -> list[str]:
    try:
        check_forward(pipe)
    except ValueError:
        return list(DECODED_MAPS)
    return list(MAPS)


def _grids(args: argparse.Namespace, pipe) -> Iterator[tuple]:
    """What `sweep` takes for each solver and number of steps, the pipeline made ready for it meanwhile."""
    for order, steps in itertools.product(args.solver_order or [None], args.num_inference_steps):
        if order:
            _set_solver_order(pipe, args.model, order)
        pipe.scheduler.set_timesteps(steps)
        yield args.guidance_scales, args.strengths, args.maps, steps


def _set_solver_order(pipe, model: str, order: int) -> None:
    """Gives the pipeline an inverse scheduler of another order."""
    inverse = pipe.inverse_scheduler
    try:
        if "solver_order" not in inverse.config:
            raise ValueError(f"a {type(inverse).__name__} knows no solver_order")
        pipe.register_modules(inverse_scheduler=type(inverse).from_config(inverse.config, solver_order=order))
    except ValueError as error:
        raise InputError(f"{model}: {error}") from None


def _check_slices(dataset: SliceDataset, indices: Sequence[int], args: argparse.Namespace) -> None:
    """Raises `InputError` for slices that tell no setting from another: of one class, or without lesion pixels.

    A lesion counts in the foreground, because the best setting is chosen by AUPRC there.
    """
    chosen = f"{args.dataset}: the {len(indices)} slices chosen of the split {args.split}"
    sick = np.asarray(dataset.labels)[indices] != 0
    if sick.all() or not sick.any():
        raise InputError(f"{chosen} are all {'unhealthy' if sick.all() else 'healthy'}: a sweep needs both")
    if not has_lesion(dataset, indices, args.batch_size):
        raise InputError(f"{chosen} have no lesion pixel in their foreground")


def _signs_for_sweep(args: argparse.Namespace, pipe, dataset, indices: Sequence[int]) -> list[int]:
    """Signs from about 64 of the slices, at the largest guidance scale, the middle strength, the most exact encoding."""
    if args.solver_order:
        _set_solver_order(pipe, args.model, max(args.solver_order))
    return learn_signs(
        pipe,
        dataset,
        indices[:: max(1, len(indices) // 64)],
        args.batch_size,
        guidance_scale=max(args.guidance_scales),
        strength=sorted(args.strengths)[len(args.strengths) // 2],
        num_inference_steps=max(args.num_inference_steps),
    )


def store_settings(folder: str, best: SweepPoint, facts: dict, more: dict, files: Mapping | None = None) -> None:
    """Writes a point into the model folder's preprocessing.json as what the model recommends, and what chose it.

    Raises:
        InputError: the model is not a folder.
    """
    _check_model_folder(folder)
    names = ("guidance_scale", "strength", "num_inference_steps", "map", "threshold")
    settings = {name: getattr(best, name) for name in names} | {"postprocess": True}
    chosen = facts | {"postprocessed_auprc": best.postprocessed_auprc, "ideal_dice": best.postprocessed_ideal_dice}
    known = loading.read_preprocessing(folder)
    known.pop("threshold_chosen_by", None)  # of the threshold that stood there before
    stored = {"settings": settings, "settings_chosen_by": chosen} | more
    loading.replace_json(folder, {loading.PREPROCESSING: known | stored, **(files or {})})


def store_paper_threshold(
    folder: str, point: SweepPoint, facts: dict, more: dict, files: Mapping | None = None
) -> None:
    """Writes the threshold of the paper's setting into the model folder's preprocessing.json, and what chose it."""
    _check_model_folder(folder)
    stored = {"paper_threshold": point.threshold, "paper_threshold_chosen_by": facts}
    known = loading.read_preprocessing(folder)
    loading.replace_json(folder, {loading.PREPROCESSING: known | stored | more, **(files or {})})


def _check_model_folder(folder: str) -> None:
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: settings can be stored in a model folder only")
