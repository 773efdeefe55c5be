"""Quality against network evaluations (NFE): steps, strength, guidance scale, map and solver on validation slices.

python benchmarks/frontier.py --model MODEL --dataset DATASET --output results/phantom/frontier.json

A second run adds the points that an earlier one did not measure. The figure is written beside the result.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from common import make_parser, open_slices, run_script, write_result
from matplotlib.figure import Figure

from diffusers_cf.commands.options import add_device_arguments
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.sweep import sweep
from diffusers_cf.files import read_json
from diffusers_cf.inference import open_pipeline
from diffusers_cf.provenance import model_fingerprint
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler
from diffusers_cf.settings import PAPER_SETTINGS


# Options of the inverse scheduler, which encodes, and of the scheduler, which decodes.
SOLVERS = {
    "first order": ({}, {}),
    "second order": ({"solver_order": 2}, {}),
    "second order in both": ({"solver_order": 2}, {"solver_order": 2}),
    "fixed point": ({"num_fixed_point_iterations": 1}, {}),
}
DECODED = ("counterfactual", "reconstruction")
FORWARD = ("first order", "second order")  # the other solvers make no difference to the forward map
LIMIT = 24  # largest NFE per slice of the setting that is recommended


def set_solver(pipe, solver: str) -> None:
    """Give a pipeline the schedulers of a solver, whatever it had before."""
    encoding, decoding = SOLVERS[solver]
    scheduler = DynamicDDIMScheduler.from_config(pipe.scheduler.config, **{"solver_order": 1} | decoding)
    options = {"solver_order": 1, "num_fixed_point_iterations": 0} | encoding
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config, **options)
    pipe.register_modules(scheduler=scheduler, inverse_scheduler=inverse)


def key_of(point: dict) -> tuple:
    """Return what identifies a point, apart from its map."""
    return tuple(point[name] for name in ("solver", "num_inference_steps", "strength", "guidance_scale"))


def best(points: list[dict], limit: float = float("inf")) -> dict | None:
    """Return the point with the highest AUPRC after post-processing at an NFE of at most `limit`."""
    allowed = [point for point in points if point["network_evaluations"] <= limit]
    return max(allowed, key=lambda point: point["postprocessed_auprc"], default=None)


def papers(points: list[dict]) -> list[dict]:
    """Return the points with the paper's strength, steps, map and solver, at any guidance scale."""
    fixed = {name: PAPER_SETTINGS[name] for name in ("strength", "num_inference_steps", "map")}
    fixed["solver"] = "first order"
    return [point for point in points if all(point[name] == value for name, value in fixed.items())]


def main(args) -> None:
    """Measure what the output does not hold yet, and write it after each solver and number of steps."""
    dataset, rows = open_slices(args, lesions=True)
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    set_solver(pipe, "first order")  # the fingerprint shall not depend on the solver that the model recommends
    output, points = Path(args.output), []
    facts = {"model": model_fingerprint(pipe), "data": dataset.preprocessing, "split": args.split}
    facts |= {"n_slices": len(rows), "dtype": args.dtype}
    if output.exists():
        kept, expected = read_json(output), json.loads(json.dumps(facts))
        if other := [name for name, value in expected.items() if kept.get(name) != value]:
            raise InputError(f"{output}: holds points of other {', '.join(other)}: choose another --output")
        points = kept["points"]
    for steps, solver in itertools.product(sorted(args.num_inference_steps), args.solvers):
        wanted = {(solver, steps, *setting) for setting in itertools.product(args.strengths, args.guidance_scales)}
        missing = wanted - {key_of(point) for point in points}
        if strengths := sorted({strength for _, _, strength, _ in missing if round(steps * strength)}):
            set_solver(pipe, solver)
            maps = (*DECODED, "forward") if solver in FORWARD else DECODED
            found = sweep(pipe, dataset, rows, args.guidance_scales, strengths, maps, steps, args.batch_size)
            found = [asdict(point) | {"solver": solver} for point in found]
            again = {key_of(point) for point in found}
            points = [point for point in points if key_of(point) not in again] + found
        chosen = {"best": best(points, LIMIT), "papers": papers(points)}
        write_result(facts | chosen | {"points": points}, args.output)
    plot(output.with_suffix(".png"), points)
    print(f"NFE of at most {LIMIT}: {best(points, LIMIT)}")
    print(f"the paper's steps and strength: {best(papers(points))}")


def plot(path: Path, points: Sequence[dict]) -> None:
    """Write the best AUPRC over NFE as a curve per solver and map; stars are the paper's settings."""
    figure = Figure(figsize=(3.4, 3.0), dpi=200, layout="constrained")
    axis, maps = figure.subplots(), dict.fromkeys(point["map"] for point in points)
    colors = dict(zip(maps, ("#0072B2", "#D55E00", "#009E73"), strict=False))
    styles = dict(zip(SOLVERS, ("--", "-", ":", "-."), strict=True))
    for kind, solver in itertools.product(maps, SOLVERS):
        family = [p for p in points if (p["map"], p["solver"]) == (kind, solver)]
        family.sort(key=lambda p: p["network_evaluations"])
        if family:
            curve = np.maximum.accumulate([p["postprocessed_auprc"] for p in family])
            look = {"color": colors[kind], "linestyle": styles[solver], "linewidth": 1, "label": f"{kind}, {solver}"}
            axis.step([p["network_evaluations"] for p in family], curve, where="post", **look)
    for point in papers(points):
        place = point["network_evaluations"], point["postprocessed_auprc"]
        axis.plot(*place, "k*", markersize=5)
        axis.annotate(f"w = {point['guidance_scale']:g}", place, (3, 3), textcoords="offset points", fontsize=6)
    axis.set_xscale("log", base=2)
    axis.margins(x=0.15)  # room for the words beside the stars
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("NFE per slice (stars: the paper's L and steps)", fontsize=7)
    axis.set_ylabel("best AUPRC, post-processed", fontsize=7)
    axis.tick_params(labelsize=6, which="both")
    axis.grid(alpha=0.3, linewidth=0.5)
    figure.legend(loc="outside upper left", ncols=2, fontsize=5.5, frameon=False, handlelength=3)
    figure.savefig(path)


if __name__ == "__main__":
    parser = make_parser(__doc__, "validation", max_slices=96)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 8, 10, 20, 25, 40, 50, 100])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.75, 0.9])
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[3.0, 6.0, 12.0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    add_device_arguments(parser, batch_size=32)
    raise SystemExit(run_script(main, parser.parse_args()))
