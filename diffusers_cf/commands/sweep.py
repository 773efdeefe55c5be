"""`diffusers-cf sweep`: measure every combination of settings on validation slices; the best can be stored."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from diffusers_cf.commands.options import add_device_arguments
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder, read_json, write_json
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.settings import MAP_SETTINGS, MAPS, NAMES, PAPER_SETTINGS


# The paper's Fig. 3 begins at a strength of 0.4; for small networks and real FLAIR slices the best ones are lower.
GUIDANCE_SCALES = (1.5, 2.5, 3.0)
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf sweep`."""
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="folder, Hub id or name of a model")
    add("--dataset", required=True, help="slice data set with masks, or user/name[@revision]")
    add("--output", required=True, metavar="RESULTS", help="folder for sweep.json and sweep.png")
    add("--split", default="validation", choices=SPLITS, help="split to measure on, default: %(default)s")
    scales, strengths = (" ".join(map(str, values)) for values in (GUIDANCE_SCALES, STRENGTHS))
    add(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=list(GUIDANCE_SCALES),
        help=f"values of w, default: {scales}",
    )
    add("--strengths", type=float, nargs="+", default=list(STRENGTHS), help=f"values of L, default: {strengths}")
    add("--maps", nargs="+", choices=MAPS, help="kinds of heatmap, default: all that the model can compute")
    add("--num_inference_steps", type=int, nargs="+", default=[100], help="steps of the full grid, default: 100")
    add("--solver_order", type=int, nargs="+", choices=(1, 2), help="orders of the solver that encodes; 2 costs the "
        "same NFE and helps with few steps, but not for the map forward; default: the model's own")  # fmt: skip
    add(
        "--max_slices", type=int, default=256, help="slices to measure on, evenly spread, default: 256 as in the paper"
    )
    add("--max_evaluations", type=int, help="leave out settings with more NFE per slice, default: keep all")
    add_device_arguments(parser, batch_size=32)
    add("--store", nargs="?", const="recommended", choices=NAMES, help="write the best setting, and its solver order if "
        "--solver_order is given, into the model folder as recommended; with `paper` only the threshold of the paper's "
        "setting, which must be the only one of the sweep; default: write nothing")  # fmt: skip


def run_sweep(args: argparse.Namespace) -> int:
    """Measure the settings, write RESULTS/sweep.json and sweep.png, and print the best one.

    Raises:
        InputError: model, data set or options can't be used.
    """
    from diffusers_cf.evaluation.inputs import open_split, rows_of_both_labels
    from diffusers_cf.evaluation.sweep import best_point, has_lesion, learn_signs, settings_of_sweep, sweep
    from diffusers_cf.inference import open_pipeline
    from diffusers_cf.maps import check_forward
    from diffusers_cf.plots import plot_sweep

    _check_options(args)
    dataset = open_split(args.dataset, args.split)
    rows = rows_of_both_labels(dataset, args.max_slices)
    if not has_lesion(dataset, rows, args.batch_size):
        chosen = f"{args.dataset}: the {len(rows)} slices chosen of the split {args.split}"
        raise InputError(f"{chosen} have no lesion pixel in their foreground, where settings are compared")
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    if not args.maps:
        try:
            check_forward(pipe)
            args.maps = list(MAPS)
        except ValueError:
            args.maps = [name for name in MAPS if name != "forward"]
    try:  # all settings are checked now, because a sweep takes hours
        found = [settings_of_sweep(pipe, *grid, args.max_evaluations) for grid in _grids(args, pipe)]
    except ValueError as error:
        raise InputError(str(error)) from None
    if not any(found):
        raise InputError(f"no setting of the sweep needs at most {args.max_evaluations} network evaluations")
    make_folder(args.output)
    if "signed" in args.maps:  # from about 64 slices, with the most exact encoding
        if args.solver_order:
            _set_solver_order(pipe, args.model, max(args.solver_order))
        signs = learn_signs(
            pipe, dataset, rows[:: max(1, len(rows) // 64)], args.batch_size, guidance_scale=max(args.guidance_scales),
            strength=sorted(args.strengths)[len(args.strengths) // 2],
            num_inference_steps=max(args.num_inference_steps),
        )  # fmt: skip
        pipe.preprocessing = pipe.preprocessing | {"signs": signs}
    points = []
    for grid in _grids(args, pipe):
        points += sweep(pipe, dataset, rows, *grid, args.batch_size, args.max_evaluations)
    best = best_point(points)
    facts = {"command": command_line(), "commit": package_commit(), "split": args.split, "n_slices": len(rows)}
    document = facts | {"best": asdict(best), "points": [asdict(point) for point in points]}
    write_json(document, Path(args.output) / "sweep.json")
    plot_sweep(Path(args.output) / "sweep.png", points)
    print(f"best: {asdict(best)}")
    if args.store:
        more = {"signs": signs} if "signed" in args.maps else {}
        store_point(args.model, args.store, best, facts, more | {"evaluation_size": dataset.preprocessing["size"]})
    return 0


def _check_options(args: argparse.Namespace) -> None:
    from diffusers_cf.inference import check_device_arguments

    check_device_arguments(args)
    if not all(0 < strength <= 1 for strength in args.strengths):
        raise InputError(f"--strengths {args.strengths}: each must lie in (0, 1]")
    if args.store and not Path(args.model).is_dir():
        raise InputError(f"{args.model}: settings can be stored in a model folder only")
    swept = [args.guidance_scales, args.strengths, args.num_inference_steps, args.maps]
    if args.store == "paper" and swept != [[PAPER_SETTINGS[name]] for name in MAP_SETTINGS]:
        options = "--guidance_scales 3 --strengths 0.75 --maps counterfactual --num_inference_steps 100"
        raise InputError(f"--store paper needs a sweep of the paper's setting alone: {options}")
    if args.store == "paper" and args.solver_order:
        raise InputError("--store paper stores a threshold only: it can't change the model's --solver_order")


def _grids(args: argparse.Namespace, pipe) -> Iterator[tuple]:
    """Yield the arguments of `sweep` for each solver order and number of steps, after setting both in the pipeline."""
    for order, steps in itertools.product(args.solver_order or [None], args.num_inference_steps):
        if order:
            _set_solver_order(pipe, args.model, order)
        pipe.scheduler.set_timesteps(steps)
        yield args.guidance_scales, args.strengths, args.maps, steps


def _set_solver_order(pipe, model: str, order: int) -> None:
    inverse = pipe.inverse_scheduler
    if "solver_order" not in inverse.config:
        raise InputError(f"{model}: a {type(inverse).__name__} has no solver_order")
    try:
        pipe.register_modules(inverse_scheduler=type(inverse).from_config(inverse.config, solver_order=order))
    except ValueError as error:
        raise InputError(f"{model}: {error}") from None


def store_point(model: str, name: str, point, chosen_by: dict, more: dict) -> None:
    """Write a point of a sweep into a model folder, all of it or nothing.

    Args:
        model (`str`): the folder.
        name (`str`): `recommended`: all settings of the point, and its solver order; `paper`: its threshold.
        point ([`SweepPoint`]): the setting with its scores.
        chosen_by (`dict`): command, commit and slices of the sweep.
        more (`dict`): further entries of preprocessing.json, such as `signs`.
    """
    from diffusers_cf.loading import PREPROCESSING, read_preprocessing, replace_json

    known = read_preprocessing(model)
    if name == "paper":
        stored = {"paper_threshold": point.threshold, "paper_threshold_chosen_by": chosen_by}
        replace_json(model, {PREPROCESSING: known | stored | more})
        return
    known.pop("threshold_chosen_by", None)  # of the threshold that is replaced
    scores = {"postprocessed_auprc": point.postprocessed_auprc, "ideal_dice": point.postprocessed_ideal_dice}
    settings = {name: getattr(point, name) for name in (*MAP_SETTINGS, "threshold")} | {"postprocess": True}
    files = {PREPROCESSING: known | {"settings": settings, "settings_chosen_by": chosen_by | scores} | more}
    scheduler = "inverse_scheduler/scheduler_config.json"
    config = read_json(Path(model, scheduler))
    if point.solver_order not in (
        None,
        config.get("solver_order", 1),
    ):  # settings need the solver they were chosen with
        files[scheduler] = config | {"solver_order": point.solver_order}
    replace_json(model, files)
