"""`diffusers-cf sweep`: measure every combination of settings on validation slices and store the best."""

import argparse
import itertools
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from diffusers_cf.commands.options import DATASET, MODEL, add_device_arguments
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder, read_json, write_json
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.settings import DECODED_MAPS, MAP_SETTINGS, MAPS, NAMES, PAPER_SETTINGS


logger = logging.getLogger(__name__)

# The paper's Fig. 3 begins at a strength of 0.4. Small networks and real FLAIR slices do best below it.
GUIDANCE_SCALES = [1.5, 2.5, 3.0]
STRENGTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf sweep`."""
    add = parser.add_argument
    add("--model", required=True, help=MODEL)
    add("--dataset", required=True, help=f"{DATASET}; it needs masks")
    add("--output", required=True, metavar="RESULTS", help="folder for sweep.json and sweep.png")
    add("--split", default="validation", choices=SPLITS, help="split to measure on; default: %(default)s")
    add("--guidance_scales", type=float, nargs="+", default=GUIDANCE_SCALES, help="weights w; default: %(default)s")
    add("--strengths", type=float, nargs="+", default=STRENGTHS, help="strengths L, in (0, 1]; default: %(default)s")
    add("--maps", nargs="+", choices=MAPS, help="kinds of anomaly map to try; default: all but delta and student")
    text = "numbers of steps over all noise levels, divisors of the number of training timesteps; default: 100"
    add("--num_inference_steps", type=int, nargs="+", default=[100], help=text)
    text = "orders of the solver that encodes; 2 helps with few steps, not with forward; default: the model's own"
    add("--solver_order", type=int, nargs="+", choices=(1, 2), help=text)
    text = "orders of the solver that decodes; 2 helps where encoding has it, too; default: the model's own"
    add("--decoding_solver_order", type=int, nargs="+", choices=(1, 2), help=text)
    add("--max_slices", type=int, default=256, help="slices to measure on, evenly spread; default: %(default)s")
    add("--max_evaluations", type=int, help="largest number of network passes per slice to try; default: no limit")
    add_device_arguments(parser, batch_size=32)
    text = "write into the model folder the best setting as recommended, with its solver orders if they are swept and "
    text += "the post-processing that is best for it on all slices of the split; "
    text += "or, after a sweep of the paper's setting alone, its threshold (paper); default: write nothing"
    add("--store", nargs="?", const="recommended", choices=NAMES, help=text)


def run_sweep(args: argparse.Namespace) -> None:
    """Measure the settings, write RESULTS/sweep.json and sweep.png, and print the best one."""
    from diffusers_cf.evaluation.sweep import sweep
    from diffusers_cf.inference import check_device_arguments
    from diffusers_cf.plots import plot_sweep

    check_device_arguments(args)
    _check_options(args)
    pipe, dataset, rows = _open(args)
    asked = args.maps is not None
    _check_grids(args, pipe)
    make_folder(args.output)
    more = {"evaluation_size": dataset.preprocessing["size"]}
    if "signed" in args.maps:
        _learn_signs(args, pipe, more, asked)
    points = []
    for grid in _grids(args, pipe):
        points += sweep(pipe, dataset, rows, *grid, args.batch_size, args.max_evaluations)
    best = max(points, key=lambda point: point.postprocessed_auprc)
    chosen_by = {"command": command_line(), "commit": package_commit(), "split": args.split, "n_slices": len(rows)}
    document = chosen_by | {"best": asdict(best), "points": [asdict(point) for point in points]}
    write_json(document, Path(args.output) / "sweep.json")
    plot_sweep(Path(args.output) / "sweep.png", points)
    print(f"best: {asdict(best)}")
    if args.store == "recommended":
        stored = replace(best)
        chain = _choose_chain(args, pipe, dataset, stored)
        write_json(document | {"stored": asdict(stored) | {"postprocess": chain}}, Path(args.output) / "sweep.json")
        print(f"post-processing: {chain}, AUPRC {stored.postprocessed_auprc:.3f} of all {len(dataset)} slices")
        store_point(args.model, args.store, stored, chosen_by | {"n_slices": len(dataset)}, more, chain)
    elif args.store:
        store_point(args.model, args.store, best, chosen_by, more)


def _check_options(args: argparse.Namespace) -> None:
    if not all(0 < strength <= 1 for strength in args.strengths):
        raise InputError(f"--strengths {args.strengths}: each must lie in (0, 1]")
    if args.store and not Path(args.model).is_dir():
        raise InputError(f"{args.model}: settings can be stored in a model folder only")
    swept = [args.guidance_scales, args.strengths, args.num_inference_steps, args.maps, args.solver_order]
    swept.append(args.decoding_solver_order)
    if args.store == "paper" and swept != [*([PAPER_SETTINGS[name]] for name in MAP_SETTINGS), None, None]:
        options = "--guidance_scales 3 --strengths 0.75 --maps counterfactual --num_inference_steps 100"
        raise InputError(f"--store paper needs a sweep of the paper's setting alone: {options} and no --solver_order")


def _open(args: argparse.Namespace) -> tuple:
    """Return the pipeline, the split, and its rows to measure on."""
    from diffusers_cf.evaluation.inputs import open_split, rows_of_both_labels
    from diffusers_cf.evaluation.sweep import has_lesion
    from diffusers_cf.inference import open_pipeline

    dataset = open_split(args.dataset, args.split)
    rows = rows_of_both_labels(dataset, args.max_slices)
    if not has_lesion(dataset, rows, args.batch_size):
        chosen = f"{args.dataset}: the {len(rows)} slices chosen of the split {args.split}"
        raise InputError(f"{chosen} have no lesion pixel in their foreground, where settings are compared")
    return open_pipeline(args.model, args.device, args.dtype, dataset=dataset), dataset, rows


def _check_grids(args: argparse.Namespace, pipe) -> None:
    """Check all settings before the first is measured, because a sweep takes hours; fill in `args.maps`."""
    from diffusers_cf.evaluation.sweep import settings_of_sweep
    from diffusers_cf.maps import check_map

    if not args.maps:
        args.maps = []
        for kind in (*DECODED_MAPS, "forward"):  # the others share no work between settings
            with suppress(ValueError):
                check_map(pipe, kind)
                args.maps.append(kind)
    try:
        found = [settings_of_sweep(pipe, *grid, args.max_evaluations) for grid in _grids(args, pipe)]
    except ValueError as error:
        raise InputError(f"{args.model}: {error}") from None
    if not any(found):
        raise InputError(f"no setting of the sweep needs at most {args.max_evaluations} network evaluations")


def _learn_signs(args: argparse.Namespace, pipe, more: dict, asked: bool) -> None:
    """Learn signs from training slices, with the most exact encoding, for the pipeline and `more`.

    Where the labels do not tell them, leave out the map `signed`, or refuse it if it was asked for.
    """
    from diffusers_cf.evaluation.inputs import open_split, rows_of_both_labels
    from diffusers_cf.evaluation.sweep import SIGN_SLICES, learn_signs

    _set_solver_orders(pipe, max(args.solver_order or [0]), max(args.decoding_solver_order or [0]))
    scales, strengths = sorted(args.guidance_scales), sorted(args.strengths)
    settings = {"guidance_scale": scales[(len(scales) - 1) // 2], "strength": strengths[len(strengths) // 2]}
    try:
        train = open_split(args.dataset, "train", masks=False)
        rows = rows_of_both_labels(train, SIGN_SLICES)
        settings["num_inference_steps"] = max(args.num_inference_steps)
        learned = learn_signs(pipe, train, rows, args.batch_size, **settings)
    except InputError as error:
        if asked:
            raise
        logger.warning("the map signed is left out: %s", error)
        args.maps.remove("signed")
        return
    print(f"signs {learned['signs']}, t of the labels {learned['t']}")
    more["signs"] = learned["signs"]
    pipe.preprocessing = pipe.preprocessing | {"signs": more["signs"]}


def _grids(args: argparse.Namespace, pipe) -> Iterator[tuple]:
    """Yield the arguments of `sweep` for each pair of solver orders and number of steps, set in the pipeline."""
    orders = (args.solver_order or [0], args.decoding_solver_order or [0])
    for order, decoding_order, steps in itertools.product(*orders, args.num_inference_steps):
        _set_solver_orders(pipe, order, decoding_order)
        pipe.scheduler.set_timesteps(steps)
        yield args.guidance_scales, args.strengths, args.maps, steps


def _set_solver_orders(pipe, encoding: int, decoding: int) -> None:
    """Give the schedulers these orders; 0 keeps the model's own. Raise ValueError if one can't have its order."""
    for name, order in (("inverse_scheduler", encoding), ("scheduler", decoding)):
        old = getattr(pipe, name)
        if order and "solver_order" not in old.config:
            raise ValueError(f"a {type(old).__name__} has no solver_order")
        if order:
            pipe.register_modules(**{name: type(old).from_config(old.config, solver_order=order)})


def _choose_chain(args: argparse.Namespace, pipe, dataset, best):
    """Return the post-processing that is best for a point on all patients of the split; give the point its scores."""
    from diffusers_cf.baselines.method import PipelineMap
    from diffusers_cf.evaluation.chains import choose_chain

    _set_solver_orders(pipe, best.solver_order or 0, best.decoding_solver_order or 0)
    call = {name: getattr(best, name) for name in MAP_SETTINGS}
    chain, counts = choose_chain(PipelineMap(pipe, call), dataset, batch_size=args.batch_size)
    best.postprocessed_auprc = counts[chain].average_precision()
    best.postprocessed_ideal_dice, best.threshold = counts[chain].ideal_dice()
    return chain.as_setting


def store_point(model: str, name: str, point, chosen_by: dict, more: dict, chain: bool | dict = True) -> None:
    """Write a [`SweepPoint`] into a model folder, all of it or nothing.

    The point becomes the recommended setting, with its solver orders; or for the name `paper`, its threshold becomes
    that of the paper's setting. `chain` is its post-processing, and `more` holds further entries of preprocessing.json, such as `signs`.
    """
    from diffusers_cf.loading import PREPROCESSING, read_preprocessing, replace_json

    known = read_preprocessing(model)
    if name == "paper":
        stored = {"paper_threshold": point.threshold, "paper_threshold_chosen_by": chosen_by}
        return replace_json(model, {PREPROCESSING: known | stored | more})
    known.pop("threshold_chosen_by", None)  # it tells of the threshold that is replaced
    scores = {"postprocessed_auprc": point.postprocessed_auprc, "ideal_dice": point.postprocessed_ideal_dice}
    settings = {name: getattr(point, name) for name in (*MAP_SETTINGS, "threshold")} | {"postprocess": chain}
    files = {PREPROCESSING: known | {"settings": settings, "settings_chosen_by": chosen_by | scores} | more}
    orders = {"inverse_scheduler": point.solver_order, "scheduler": point.decoding_solver_order}
    for name, order in orders.items():  # a setting needs its solvers
        path = f"{name}/scheduler_config.json"
        config = read_json(Path(model, path))
        if order not in (None, config.get("solver_order", 1)):
            files[path] = config | {"solver_order": order}
    replace_json(model, files)
