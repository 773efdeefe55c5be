"""What a sweep of (w, L) costs from one encoding against running each setting alone: network evaluations and seconds."""

import json
import time
from itertools import product
from pathlib import Path

import torch

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.commands.options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.commands.sweep import GUIDANCE_SCALES
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.evaluation.sweep import evenly_spread
from diffusers_cf.evaluation.trajectories import heatmaps_of_settings
from diffusers_cf.files import make_folder
from diffusers_cf.provenance import command_line, package_commit


STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Counter:
    """Counts what passes through a network: images, each branch for itself."""

    def __init__(self, network: torch.nn.Module):
        self.images = 0
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network, arguments, named):
        self.images += len(arguments[0])


def measure(counter: Counter, work, num_slices: int) -> tuple[dict, dict[str, float]]:
    """What some work returns, and its network evaluations and seconds a slice."""
    counter.images, start = 0, time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, {"evaluations_per_slice": counter.images / num_slices, "seconds_per_slice": seconds / num_slices}


def one_encoding(pipe, images: torch.Tensor, steps: int) -> dict[tuple[float, float], torch.Tensor]:
    """Maps `(N, H, W)` of every (L, w), all decoded from one encoding."""
    found = heatmaps_of_settings(pipe, images, product(STRENGTHS, GUIDANCE_SCALES, ["counterfactual"]), steps)
    return {(strength, scale): torch.from_numpy(heat) for (strength, scale, _), heat in found}


def each_alone(pipe, images: torch.Tensor, steps: int) -> dict[tuple[float, float], torch.Tensor]:
    """The same maps, the whole of Algorithm 1 for each (L, w)."""
    return {
        (strength, scale): pipe(images, None, scale, strength, steps, map="counterfactual").heatmaps.cpu()
        for strength in STRENGTHS
        for scale in GUIDANCE_SCALES
    }


def main(args) -> None:
    """Both ways in turn, as often as asked; how far their maps are apart."""
    check_device_arguments(args)
    for name in ("repeats", "max_slices"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}")
    dataset = SliceDataset(args.dataset, "validation")
    if not len(dataset):
        raise InputError(f"{args.dataset}: the split validation is empty")
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=dataset)
    if pipe.unet.config.in_channels != dataset.preprocessing["channels"]:
        raise InputError(f"{args.model} is for {pipe.unet.config.in_channels} channels, {args.dataset} has others")
    make_folder(Path(args.output).parent)
    rows = evenly_spread(len(dataset), args.max_slices)
    batches = [batch["images"] for batch in batches_of(dataset, rows, args.batch_size)]
    counter, runs, worst = Counter(pipe.unet), [], 0.0
    for _ in range(args.repeats):
        costs, maps = {}, {}
        for work in (one_encoding, each_alone):
            run = lambda work=work: [work(pipe, images, args.num_inference_steps) for images in batches]  # noqa: E731
            maps[work], costs[work.__name__] = measure(counter, run, len(rows))
        runs.append(costs)
        for together, alone in zip(maps[one_encoding], maps[each_alone], strict=True):
            worst = max(worst, *((together[key] - heat).abs().max().item() for key, heat in alone.items()))
    facts = {
        "command": command_line(),
        "commit": package_commit(),
        "threads": torch.get_num_threads(),
        "n_slices": len(rows),
        "n_settings": len(STRENGTHS) * len(GUIDANCE_SCALES),
        "num_inference_steps": args.num_inference_steps,
    }
    write_result(facts | {"largest_difference_of_maps": worst, "runs": runs}, Path(args.output))
    print(json.dumps(runs[-1]), f"largest difference of the maps {worst:.1e}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--max_slices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    add_device_arguments(parser, batch_size=16)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
