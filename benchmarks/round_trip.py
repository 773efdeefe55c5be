"""What encoding and decoding without guidance lose: mean |x - x_null| in the foreground of healthy slices.

python benchmarks/round_trip.py --model MODEL --dataset DATASET --output results/phantom/round_trip.json
"""

import torch
from common import make_parser, open_slices, run_script

from diffusers_cf.commands.options import add_device_arguments
from diffusers_cf.data.slices import batches_of
from diffusers_cf.inference import open_pipeline


def round_trip_error(pipe, images: torch.Tensor, strength: float, num_inference_steps: int) -> torch.Tensor:
    """Return the mean absolute error `(N,)` over foreground and channels at the network's size, in input units."""
    small = (pipe.prepare_images(images).cpu() + 1) / 2  # (N, C, h, w)
    walk = {"strength": strength, "num_inference_steps": num_inference_steps}
    error = (pipe.denoise(pipe.invert(images, **walk), None, 0, **walk).cpu() - small).abs().mean(dim=1)
    inside = (small > 0).any(dim=1)
    return (error * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)


def main(args) -> dict:
    """Return a row per number of steps and strength."""
    dataset, chosen = open_slices(args, label=0)
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    rows = []
    for steps in args.num_inference_steps:
        for strength in args.strengths:
            batches = batches_of(dataset, chosen, args.batch_size)
            error = torch.cat([round_trip_error(pipe, batch["images"], strength, steps) for batch in batches])
            row = {"num_inference_steps": steps, "strength": strength}
            rows.append(row | {"mean_error": error.mean().item(), "worst_slice": error.max().item()})
            print(rows[-1], flush=True)
    return {"split": args.split, "n_slices": len(chosen), "rows": rows}


if __name__ == "__main__":
    parser = make_parser(__doc__, "test", max_slices=64)
    parser.add_argument("--model", required=True)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[100])
    add_device_arguments(parser, batch_size=16)
    raise SystemExit(run_script(main, parser.parse_args()))
