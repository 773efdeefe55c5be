"""What a sweep of (w, L) costs from one encoding against running each setting alone: network evaluations and seconds."""

import json
import time
from pathlib import Path

import torch

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.evaluation import write_result
from diffusers_cf.inference_options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.sweep import GUIDANCE_SCALES, evenly_spread
from diffusers_cf.trajectories import heatmaps_of_settings


STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Counter:
    """Counts what passes through a network: images, each branch for itself."""

    def __init__(self, network: torch.nn.Module):
        self.images = 0
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network, arguments, named):
        self.images += len(arguments[0])


def measure(counter: Counter, work, num_slices: int) -> dict[str, float]:
    """Network evaluations and seconds a slice of some work."""
    counter.images, start = 0, time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"evaluations_per_slice": counter.images / num_slices, "seconds_per_slice": seconds / num_slices}


def main(args) -> None:
    """Both ways in turn, as often as asked; the maps of both agree."""
    check_device_arguments(args)
    dataset = SliceDataset(args.dataset, "validation")
    pipe = open_pipeline(args.model, args.device, args.dtype)
    rows = evenly_spread(len(dataset), args.max_slices)
    (batch,) = batches_of(dataset, rows, len(rows))
    images, steps, counter = batch["images"], args.num_inference_steps, Counter(pipe.unet)
    maps = {"together": {}, "alone": {}}

    def together():
        for (strength, scale, _), heat in heatmaps_of_settings(
            pipe, images, STRENGTHS, GUIDANCE_SCALES, ["counterfactual"], steps
        ):
            maps["together"][strength, scale] = torch.from_numpy(heat)

    def alone():
        for strength in STRENGTHS:
            for scale in GUIDANCE_SCALES:
                out = pipe(images, None, scale, strength, steps, map="counterfactual")
                maps["alone"][strength, scale] = out.heatmaps.cpu()

    runs = [
        {"together": measure(counter, together, len(rows)), "alone": measure(counter, alone, len(rows))}
        for _ in range(args.repeats)
    ]
    worst = max((maps["together"][key] - heat).abs().max().item() for key, heat in maps["alone"].items())
    facts = {
        "command": command_line(),
        "commit": package_commit(),
        "n_slices": len(rows),
        "n_settings": len(maps["alone"]),
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
    add_device_arguments(parser)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
