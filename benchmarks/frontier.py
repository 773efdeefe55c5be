"""Quality of the map against network passes: steps, strength, guidance scale, kind of map and solver on validation slices."""

import json
from dataclasses import asdict
from pathlib import Path

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.benchmark.figures import plot_frontier
from diffusers_cf.commands.options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.evaluation.sweep import evenly_spread, has_lesion, sweep
from diffusers_cf.files import make_folder
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler
from diffusers_cf.settings import PAPER_SETTINGS


# How an image is encoded and decoded: options of the inverse scheduler and of the scheduler.
SOLVERS = {
    "first order": ({}, {}),
    "second order": ({"solver_order": 2}, {}),
    "second order in both": ({"solver_order": 2}, {"solver_order": 2}),
    "fixed point": ({"num_fixed_point_iterations": 1}, {}),
}
DECODED = ("counterfactual", "reconstruction")
# no decoding to be of second order, and what refines the encoding for decoding's sake is left out
FORWARD = ("first order", "second order")
LIMIT = 24  # passes a slice of the setting that is recommended


def set_solver(pipe, solver: str) -> None:
    """Gives a pipeline the schedulers of a solver, whatever it came with."""
    encoding, decoding = SOLVERS[solver]
    scheduler = DynamicDDIMScheduler.from_config(pipe.scheduler.config, **{"solver_order": 1} | decoding)
    options = {"solver_order": 1, "num_fixed_point_iterations": 0} | encoding
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config, **options)
    pipe.register_modules(scheduler=scheduler, inverse_scheduler=inverse)


def points_of(pipe, dataset, rows, args, solver: str, steps: int, strengths: list[float]) -> list[dict]:
    """Every point of one solver and grid at some strengths."""
    set_solver(pipe, solver)
    maps = (*DECODED, "forward") if solver in FORWARD else DECODED
    found = sweep(pipe, dataset, rows, args.guidance_scales, strengths, maps, steps, args.batch_size)
    return [asdict(point) | {"solver": solver} for point in found]


def add_missing(points: list[dict], pipe, dataset, rows, args, solver: str, steps: int) -> list[dict]:
    """The points, with those of one solver and grid that they lack of the options."""
    known = {key_of(point) for point in points}
    keys = {(solver, steps, strength, scale) for strength in args.strengths for scale in args.guidance_scales}
    strengths = sorted({strength for _, _, strength, _ in keys - known if round(steps * strength)})
    if not strengths:
        return points
    found = points_of(pipe, dataset, rows, args, solver, steps, strengths)
    again = {key_of(point) for point in found}
    return [point for point in points if key_of(point) not in again] + found


def key_of(point: dict) -> tuple:
    """What tells a point from others but for its kind of map."""
    return tuple(point[name] for name in ("solver", "num_inference_steps", "strength", "guidance_scale"))


def best(points: list[dict], limit: float = float("inf")) -> dict | None:
    """The point with the highest AUPRC after post-processing at no more than so many passes."""
    allowed = [point for point in points if point["network_evaluations"] <= limit]
    return max(allowed, key=lambda point: point["postprocessed_auprc"], default=None)


def papers(points: list[dict]) -> list[dict]:
    """Points of first order with the authors' strength, steps and map: their scale and others."""
    fixed = {name: PAPER_SETTINGS[name] for name in ("strength", "num_inference_steps", "map")} | {
        "solver": "first order"
    }
    return [point for point in points if all(point[name] == value for name, value in fixed.items())]


def slices_to_measure(args) -> tuple[SliceDataset, list[int]]:
    """The split that the options name, and its rows in use.

    Raises:
        InputError: There is no lesion in them.
    """
    dataset = SliceDataset(args.dataset, args.split)
    rows = evenly_spread(len(dataset), args.max_slices) if len(dataset) else []
    if not rows or not dataset.has_masks or not has_lesion(dataset, rows, args.batch_size):
        raise InputError(f"{args.dataset}: the split {args.split} has no slices with lesion masks to measure on")
    return dataset, rows


def main(args) -> None:
    """Measures what the output doesn't hold yet, and writes it after each grid."""
    check_device_arguments(args)
    dataset, rows = slices_to_measure(args)
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    set_solver(pipe, "first order")  # a network is the same whatever solver its folder recommends
    output = Path(args.output)
    make_folder(output.parent)
    facts = {
        "model": model_fingerprint(pipe), "data": dataset.preprocessing, "split": args.split, "n_slices": len(rows),
        "dtype": args.dtype,
    }  # fmt: skip
    points = _kept_points(output, json.loads(json.dumps(facts)))
    for steps in sorted(args.num_inference_steps):
        for solver in args.solvers:
            points = add_missing(points, pipe, dataset, rows, args, solver, steps)
            chosen = {"best": best(points, LIMIT), "papers": papers(points)}
            document = facts | chosen | {"command": command_line(), "commit": package_commit(), "points": points}
            write_result(document, output)
    plot_frontier(output.with_suffix(".png"), points, papers(points))
    print(f"at most {LIMIT} passes: {best(points, LIMIT)}")
    print(f"the paper's grid and strength: {best(papers(points))}")


def _kept_points(output: Path, facts: dict) -> list[dict]:
    """The points of an earlier run; refuses one of something else."""
    if not output.exists():
        return []
    try:
        kept = json.loads(output.read_text(encoding="utf-8"))
        other = [name for name, value in facts.items() if kept.get(name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{output}: can't be read ({error})") from None
    if other:
        raise InputError(f"{output}: holds points of other {', '.join(other)}: choose another --output")
    return kept["points"]


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True, metavar="RESULT.json", help="the figure goes beside it")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 8, 10, 20, 25, 40, 50, 100])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.75, 0.9])
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[3.0, 6.0, 12.0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--max_slices", type=int, default=96)
    add_device_arguments(parser, batch_size=32)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
