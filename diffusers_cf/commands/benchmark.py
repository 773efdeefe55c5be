"""`diffusers-cf benchmark`: train and measure every method under one protocol, and write tables and figures."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from diffusers_cf.commands.options import DATASET, add_device_arguments, add_shard_argument
from diffusers_cf.errors import InputError


PRESET_NAMES = ("smoke", "cpu", "paper")
TRAIN_TIMESTEPS = 1000  # of every diffusion model of the benchmark


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf benchmark`."""
    add = parser.add_argument
    add("--dataset", required=True, nargs="+", help=f"{DATASET}; it needs masks; several: a split for each seed")
    add("--output", required=True, metavar="RESULTS", help="folder for tables, figures and a JSON per method and seed")
    add("--models", metavar="FOLDER", help="folder for trained networks; default: RESULTS/models")
    add("--methods", nargs="+", metavar="ID", help="methods such as ours, vae or threshold-t1; default: all")
    add("--seeds", type=int, help="number of seeds; default: 3, or one per data set")
    add("--first_seed", type=int, default=1, help="number of the first seed, 0 or more; default: %(default)s")
    text = "sizes and budgets: smoke takes minutes, cpu takes hours, paper needs a GPU; default: %(default)s"
    add("--preset", choices=PRESET_NAMES, default="cpu", help=text)
    add("--image_size", type=int, help="side of a network's input, a power of two from 16; default: the preset's")
    add("--train_seconds", type=float, help="training time of each network in seconds; default: the preset's")
    text = "train each network on as many images as for this seed of RESULTS; default: limit the training time"
    add("--images_of_seed", type=int, metavar="SEED", help=text)
    add("--num_inference_steps", type=int, help=f"steps, a divisor of {TRAIN_TIMESTEPS}; default: the preset's")
    add("--strengths", type=float, nargs="+", help="strengths L in (0, 1] to choose from; default: the preset's")
    add("--augment", action="store_true", help="train with random rotations, shifts and gains; default: the preset's")
    add("--no_pictures", action="store_true", help="leave out Fig. 1 and Fig. 2, which show slices; default: off")
    add_device_arguments(parser, batch_size=32, dtype="float32")
    add_shard_argument(parser, "writes tables and figures")


def run_benchmark(args: argparse.Namespace) -> None:
    """Run what is missing of the benchmark."""
    from diffusers_cf.benchmark.networks import Method, Networks, methods_for
    from diffusers_cf.benchmark.protocol import KIND, BenchmarkData
    from diffusers_cf.benchmark.run import Benchmark, images_of_seed
    from diffusers_cf.evaluation.processes import share_of_work
    from diffusers_cf.inference import DTYPES, check_device_arguments

    share = share_of_work(args.shard)
    check_device_arguments(args, share)
    preset, datasets = _preset(args), _datasets(args)
    opened = {folder: BenchmarkData(folder, preset, args.batch_size) for folder in dict.fromkeys(datasets.values())}
    first, *others = opened.values()
    for other in others:
        if different := [name for name in KIND if other.metadata[name] != first.metadata[name]]:
            raise InputError(f"{first.folder} and {other.folder} differ in {', '.join(different)}")
    methods = [Method.of(id) for id in dict.fromkeys(args.methods or ())] or methods_for(first.modalities)
    output = Path(args.output)
    images = {} if args.images_of_seed is None else images_of_seed(output, args.images_of_seed, methods)
    networks = Networks(Path(args.models or output / "models"), preset, args.device, DTYPES[args.dtype], images)
    networks.check(methods, first)
    data = {seed: opened[folder] for seed, folder in datasets.items()}
    Benchmark(output, networks, args.preset).run(methods, data, share, pictures=not args.no_pictures)
    if share.is_shard:
        print(f"shard {args.shard} is measured; the same command without --shard writes tables and figures")
    elif share.is_main:
        print(f"tables and figures -> {output}")


def _preset(args: argparse.Namespace):
    """Return the preset with the changes of the command line."""
    from diffusers_cf.benchmark.presets import PRESETS

    preset, given = PRESETS[args.preset], {name: value for name, value in vars(args).items() if value is not None}
    side = given.get("image_size", preset.image_size)
    seconds = given.get("train_seconds", preset.budget.seconds)
    steps = given.get("num_inference_steps", preset.grid.num_inference_steps)
    strengths = tuple(sorted(set(given.get("strengths", preset.grid.strengths))))
    if side < 16 or side & (side - 1):
        raise InputError(f"--image_size is {side}: it must be a power of two, 16 or more")
    if not 0 < seconds < math.inf:
        raise InputError(f"--train_seconds is {seconds}: it must be above 0 and finite")
    if steps < 1 or TRAIN_TIMESTEPS % steps:
        raise InputError(f"--num_inference_steps is {steps}: it must divide {TRAIN_TIMESTEPS}")
    for strength in (*strengths, *preset.figure_strengths):
        if not 0 < strength <= 1 or round(strength * steps) < 1:
            raise InputError(f"the strength {strength} must lie in (0, 1] and be at least one of {steps} steps")
    budget = replace(preset.budget, seconds=seconds, augment=preset.budget.augment or args.augment)
    grid = replace(preset.grid, num_inference_steps=steps, strengths=strengths)
    return replace(preset, image_size=side, budget=budget, grid=grid)


def _datasets(args: argparse.Namespace) -> dict[int, str]:
    """Return the data set of each seed."""
    count = args.seeds if args.seeds is not None else len(args.dataset) if len(args.dataset) > 1 else 3
    if args.first_seed < 0 or count < 1:
        raise InputError("--first_seed must be 0 or more and --seeds 1 or more")
    if len(args.dataset) not in (1, count):
        raise InputError(f"--seeds is {count}, but there are {len(args.dataset)} data sets: one per seed")
    seeds = range(args.first_seed, args.first_seed + count)
    return dict(zip(seeds, args.dataset * (count // len(args.dataset)), strict=True))
