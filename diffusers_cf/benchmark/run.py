"""`diffusers-cf benchmark`: trains and measures every method under one protocol and writes tables and figures."""

import argparse
import itertools
import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from diffusers_cf.baselines import NETWORKS, ROWS, AnomalyMethod, Grid, row_of
from diffusers_cf.benchmark.networks import Networks, check_sizes
from diffusers_cf.benchmark.plots import write_figures
from diffusers_cf.benchmark.presets import PRESETS, Preset
from diffusers_cf.benchmark.protocol import (
    KIND,
    BenchmarkData,
    as_json,
    choose_settings,
    diffusion_classifier_auroc,
    measure,
    position_auroc,
    saturated_share,
)
from diffusers_cf.benchmark.tables import collect_cells, write_tables
from diffusers_cf.commands.options import (
    DTYPES,
    add_device_arguments,
    add_shard_argument,
    check_device_arguments,
    take_device,
)
from diffusers_cf.data.intensity import with_named_scale
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import bootstraps_of_file
from diffusers_cf.evaluation.processes import Share, share_of_work
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.files import make_folder
from diffusers_cf.provenance import command_line, package_commit


TRAIN_TIMESTEPS = 1000  # of every diffusion model in `NETWORKS`
ROWS_A_TRAINING = 4  # how many rows take about as long to measure as a network takes to train


class Benchmark:
    """Trains networks and measures rows; what is finished is kept and not done again.

    Args:
        output: folder of tables and figures; `cells/` in it holds a JSON a row and seed.
        networks: the trained ones.
        preset_name: what its preset is called.
    """

    def __init__(self, output: Path, networks: Networks, preset_name: str):
        self.output, self.networks, self.preset = output, networks, networks.preset
        dtype = str(networks.dtype).removeprefix("torch.")
        # "bfloat16" alone stands in cells of networks that computed in it as a whole
        dtype += "" if dtype == "float32" else ", finest level float32"
        self.facts = as_json({"preset": preset_name, **asdict(self.preset), "dtype": dtype})

    def check_cells(self, data: dict[int, BenchmarkData]) -> None:
        """Cells of another preset or of other slices must not end up in one table with these.

        Args:
            data: of each seed.

        Raises:
            InputError: there are such cells, or one can't be read.
        """
        if not any((self.output / "cells").glob("*.json")):
            return
        first = next(iter(data.values()))
        for cell in collect_cells(self.output):
            kept = cell.get("benchmark", {})
            of_data = with_named_scale(kept.get("data", {}))
            different = [name for name, value in self.facts.items() if kept.get(name) != value]
            different += [name for name in KIND if of_data.get(name) != first.facts[name]]
            if cell["seed"] in data and of_data != data[cell["seed"]].facts:
                different.append(f"slices for seed {cell['seed']}")
            if different:
                other = ", ".join(different)
                raise InputError(f"{self.output} holds a benchmark with other {other}: choose another --output")

    def run_cell(self, method: str, data: BenchmarkData, seed: int) -> None:
        """Measures a row for a seed and writes `cells/METHOD-seedS.json`, unless it is there."""
        path = self.output / "cells" / f"{method}-seed{seed}.json"
        if path.is_file():
            return
        row, start = row_of(method), time.perf_counter()
        made, record = self.make_method(method, data, seed)
        choice = choose_settings(made, data)
        with tempfile.TemporaryDirectory() as folder:
            counts = Path(folder) / "cell.counts.npz"
            cell = measure(made, data, counts)
            bootstrap = bootstraps_of_file(counts)
        cell |= {
            "method": method,
            "row": row.title,
            "tables": list(row.tables),
            "seed": seed,
            "settings": made.settings,
        }
        cell |= record | {"choice": choice, "bootstrap": bootstrap, **self._beside(method, made, data, seed)}
        cell |= {
            "dataset": data.folder,
            "benchmark": self.facts | {"data": data.facts},
            "command": command_line(),
            "commit": package_commit(),
            "device": self.networks.device,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(cell | {"seconds": round(time.perf_counter() - start, 1)}, path)
        scores = ", ".join(f"{part} {cell_part['auprc']:.3f}" for part, cell_part in _parts(cell))
        print(
            f"{method}, seed {seed}: AUPRC {scores} ({cell['n_slices']} slices, settings {made.settings})", flush=True
        )

    def _beside(self, method: str, made: AnomalyMethod, data: BenchmarkData, seed: int) -> dict:
        """What stands beside the scores of a map."""
        beside = {"slice_scores": {"position": position_auroc(data)}}
        if method == "ours":
            beside["slice_scores"]["diffusion_classifier"] = diffusion_classifier_auroc(made.pipe, data, seed)
        if method in ("ours", "ours-clipped", "ours-unclipped"):
            grid = self.preset.grid
            beside["saturated_share"] = saturated_share(made.pipe, data, max(grid.strengths), grid.num_inference_steps)
        return beside

    def make_method(self, method: str, data: BenchmarkData, seed: int) -> tuple[AnomalyMethod, dict]:
        """A row's method, trained if need be, and what a cell says of its training."""
        row = row_of(method)
        if row.network is None:
            return row.make(data.modalities, self.preset.grid), {"trained_on": "not trained", "converged": None}
        network, record = self.networks.get(row.network, data, seed)
        names = ("trained_on", "converged", "images_seen", "parameters", "curve")
        facts = {"train_seconds": record["seconds"], "trained_commit": record["commit"]}
        return row.make(network, self.preset.grid), {name: record[name] for name in names} | facts


def _parts(cell: dict):
    return ("raw", cell), ("post-processed", cell["postprocessed"])


def all_methods(modalities: list[str]) -> list[str]:
    """Ids of every row for images with these modalities, the ones that share a network one after the other."""
    methods = [m for m in ROWS if "<" not in m and (m != "threshold" or "flair" in modalities)]
    methods += [f"threshold-{modality}" for modality in modalities]
    networks = [None, *NETWORKS]
    return sorted(methods, key=lambda method: networks.index(row_of(method).network))


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf benchmark`."""
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        nargs="+",
        help="slice data set with masks, folder or user/name[@revision]; several, one a seed: splits of the same data",
    )
    add("--output", required=True, metavar="RESULTS", help="folder for tables, figures and a JSON a method and seed")
    add("--models", metavar="FOLDER", help="where trained networks are kept, default: RESULTS/models")
    add("--methods", nargs="+", metavar="ID", help=f"default: all of {', '.join(ROWS)}")
    add("--seeds", type=int, help="default: 3, or one a data set")
    add(
        "--first_seed",
        type=int,
        default=1,
        help="to add later seeds to a folder that holds earlier ones, default: %(default)s",
    )
    add("--preset", choices=PRESETS, default="cpu", help="default: %(default)s")
    add("--image_size", type=int, help="side of every network's input; default: the preset's")
    add("--train_seconds", type=float, help="training time of each network; default: the preset's")
    add(
        "--images_of_seed",
        type=int,
        metavar="SEED",
        help="train each network on as many images as that seed's in RESULTS, however long it takes: for later seeds on"
        " a faster or slower machine",
    )
    add("--num_inference_steps", type=int, help="full grid of the diffusion methods; default: the preset's")
    add("--strengths", type=float, nargs="+", help="values of L to choose from; default: the preset's")
    add("--augment", action="store_true", help="small rotations, scales, shifts and gains, for small data sets")
    add(
        "--no_pictures",
        action="store_true",
        help="no figure that shows slices (Fig. 1 and 2): data that may not be shown",
    )
    add_device_arguments(parser, batch_size=32, dtype="float32")
    add_shard_argument(parser, "writes tables and figures")


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset with the command line's changes."""
    preset = PRESETS[args.preset]
    if args.image_size is not None:
        if args.image_size < 16 or args.image_size & (args.image_size - 1):
            raise InputError(f"--image_size is {args.image_size}: it must be a power of two, 16 or more")
        preset = replace(preset, image_size=args.image_size)
    if args.train_seconds is not None:
        if not 0 < args.train_seconds < math.inf:
            raise InputError(f"--train_seconds is {args.train_seconds}: it must be above 0 and finite")
        preset = replace(preset, budget=replace(preset.budget, seconds=args.train_seconds))
    preset = replace(preset, grid=_grid_of(args, preset))
    return replace(preset, budget=replace(preset.budget, augment=preset.budget.augment or args.augment))


def _grid_of(args: argparse.Namespace, preset: Preset) -> Grid:
    grid, steps, strengths = preset.grid, args.num_inference_steps, args.strengths
    if steps is not None:
        if steps < 1 or TRAIN_TIMESTEPS % steps:
            raise InputError(f"--num_inference_steps is {steps}: it must divide {TRAIN_TIMESTEPS}")
        grid = replace(grid, num_inference_steps=steps)
    if strengths is not None:
        grid = replace(grid, strengths=tuple(sorted(set(strengths))))
    for strength in (*grid.strengths, *preset.figure_strengths):
        if not 0 < strength <= 1 or round(strength * grid.num_inference_steps) < 1:
            raise InputError(
                f"the strength {strength} must lie in (0, 1] and be a step or more of {grid.num_inference_steps}"
            )
    return grid


def run_benchmark(args: argparse.Namespace) -> int:
    """Runs what is missing of the benchmark, seed by seed, and writes the tables after each cell, the figures at the end.

    Several processes share the networks, with the rows that each of them serves; tables then come at the end, too.

    Raises:
        InputError: data set, methods or options can't be used, or the output holds another benchmark's cells.
    """
    package_commit()  # of the code that runs, whatever is committed meanwhile
    share = share_of_work(args.shard)
    take_device(args, share)
    check_device_arguments(args)
    preset = preset_of(args)
    data = _data_of_seeds(args, preset)
    methods = _methods(args, preset, next(iter(data.values())))
    output = Path(args.output)
    models = Path(args.models) if args.models else output / "models"
    images = _images_of_seed(output, args.images_of_seed, methods)
    benchmark = Benchmark(output, Networks(models, preset, args.device, DTYPES[args.dtype], images), args.preset)
    benchmark.check_cells(data)
    make_folder(output)
    if any(row_of(method).network for method in methods):
        make_folder(models)
    for seed, method in _cells_of_share(methods, list(data), share):
        benchmark.run_cell(method, data[seed], seed)
        if share.count == 1:
            write_tables(output, methods, list(data))
    share.wait()
    if share.is_shard:
        print(f"shard {args.shard} is measured; the same command without --shard writes tables and figures")
    elif share.is_main:
        write_tables(output, methods, list(data))
        write_figures(benchmark, data, pictures=not args.no_pictures)
        print(f"tables and figures -> {output}")
    return 0


def _images_of_seed(output: Path, seed: int | None, methods: list[str]) -> dict[str, int]:
    """The images that the networks of these methods saw in an earlier seed; none where no seed is asked for."""
    if seed is None:
        return {}
    cells = {cell["method"]: cell for cell in collect_cells(output) if cell["seed"] == seed}
    seen = {row_of(name).network: cell.get("images_seen") for name, cell in cells.items()}
    for method in methods:
        network = row_of(method).network
        if network and not seen.get(network):
            raise InputError(f"{output}: holds no cell of seed {seed} with the network {network} ({method})")
    return {network: images for network, images in seen.items() if network}


def _cells_of_share(methods: list[str], seeds: list[int], share: Share) -> list[tuple[int, str]]:
    """The cells of this process, seed by seed; rows of one network stay together, and a training weighs most."""
    groups: dict[tuple, list] = {}
    for seed, method in itertools.product(seeds, methods):
        groups.setdefault((seed, row_of(method).network), []).append((seed, method))
    sizes = [len(cells) + ROWS_A_TRAINING * (network is not None) for (_, network), cells in groups.items()]
    return [cell for cells in share.of(list(groups.values()), sizes) for cell in cells]


def _methods(args: argparse.Namespace, preset: Preset, data: BenchmarkData) -> list[str]:
    """The ids wanted, after a look whether each can be made for this data."""
    methods = list(dict.fromkeys(method.lower() for method in args.methods or all_methods(data.modalities)))
    rows = [row_of(method) for method in methods]
    for row in rows:
        if row.network is None:
            row.make(data.modalities, preset.grid)
    check_sizes(sorted({row.network for row in rows if row.network}), preset, data.channels)
    return methods


def _data_of_seeds(args: argparse.Namespace, preset: Preset) -> dict[int, BenchmarkData]:
    """The slices of each seed; several data sets must be splits of one kind of data."""
    seeds = _seeds(args)
    made = {folder: BenchmarkData(folder, preset, args.batch_size) for folder in dict.fromkeys(seeds.values())}
    first, *others = made.values()
    for other in others:
        if different := [name for name in KIND if other.facts[name] != first.facts[name]]:
            raise InputError(f"{first.folder} and {other.folder} differ in {', '.join(different)}")
    return {seed: made[folder] for seed, folder in seeds.items()}


def _seeds(args: argparse.Namespace) -> dict[int, str]:
    """The data set of each seed."""
    several = len(args.dataset) > 1
    if args.first_seed < 0:
        raise InputError(f"--first_seed is {args.first_seed}: it must be 0 or more")
    if args.seeds is not None and args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}: it must be 1 or more")
    count = args.seeds or (len(args.dataset) if several else 3)
    if several and count != len(args.dataset):
        raise InputError(f"--seeds {count} with {len(args.dataset)} data sets: several data sets mean one a seed")
    numbers = range(args.first_seed, args.first_seed + count)
    return dict(zip(numbers, args.dataset if several else args.dataset * count, strict=True))
