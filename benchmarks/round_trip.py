"""What encoding and decoding lose: mean |x - x_null| in the foreground of healthy slices, without guidance.

python benchmarks/round_trip.py --model MODEL --dataset DATASET --output results/phantom/round_trip.json
"""

import json
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.commands.options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.sweep import evenly_spread
from diffusers_cf.provenance import command_line, package_commit


def round_trip_error(pipe, images: torch.Tensor, strength: float, num_inference_steps: int) -> torch.Tensor:
    """Mean absolute error of each image at the network's size, over its foreground and channels; `(N,)`, of p99 = 1."""
    small = (pipe.prepare_images(images).cpu() + 1) / 2
    walk = {"strength": strength, "num_inference_steps": num_inference_steps}
    error = (pipe.denoise(pipe.invert(images, **walk), None, 0, **walk).cpu() - small).abs().mean(dim=1)
    inside = (small > 0).any(dim=1)
    return (error * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)


def main(args) -> None:
    """A row for each strength and number of steps."""
    check_device_arguments(args)
    dataset = SliceDataset(args.dataset, args.split)
    healthy = np.flatnonzero(np.asarray(dataset.labels) == 0)
    if not len(healthy):
        raise InputError(f"{args.dataset}: the split {args.split} has no healthy slice")
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    chosen = healthy[evenly_spread(len(healthy), args.max_slices)]
    rows = []
    for steps in args.num_inference_steps:
        for strength in args.strengths:
            batches = batches_of(dataset, chosen, args.batch_size)
            error = torch.cat([round_trip_error(pipe, batch["images"], strength, steps) for batch in batches])
            row = {"num_inference_steps": steps, "strength": strength}
            rows.append(row | {"mean_error": error.mean().item(), "worst_slice": error.max().item()})
            print(rows[-1], flush=True)
    facts = {"command": command_line(), "commit": package_commit(), "split": args.split, "n_slices": len(chosen)}
    Path(args.output).write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    parser.add_argument("--split", default="test")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[100])
    parser.add_argument("--max_slices", type=int, default=64)
    add_device_arguments(parser, batch_size=16)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
