"""The runs of a benchmark: measure every method for every seed, keep each result, and write tables and figures."""

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from diffusers_cf.benchmark.figures import write_figures
from diffusers_cf.benchmark.networks import Method, Networks
from diffusers_cf.benchmark.protocol import (
    KIND,
    BenchmarkData,
    as_json,
    choose_settings,
    measure,
    slice_aurocs,
)
from diffusers_cf.benchmark.tables import collect_cells, write_tables
from diffusers_cf.data.intensity import with_named_scale
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import bootstraps_of_file
from diffusers_cf.evaluation.processes import Share
from diffusers_cf.files import make_folder, write_json
from diffusers_cf.provenance import command_line, package_commit


ROWS_PER_TRAINING = 4  # number of rows that take about as long to measure as one network takes to train


class Benchmark:
    """Measures methods, and keeps each result (a cell of the tables) so that no run does it twice.

    Args:
        output (`Path`): folder of tables and figures; its folder `cells` holds a JSON file per method and seed.
        networks (`Networks`): makes the methods.
        preset_name (`str`): name of the preset, for the results.
    """

    def __init__(self, output: Path, networks: Networks, preset_name: str):
        self.output, self.networks, self.preset = output, networks, networks.preset
        dtype = str(networks.dtype).removeprefix("torch.")
        # plain "bfloat16" in older results means that the whole network computed in it
        dtype += "" if dtype == "float32" else ", finest level float32"
        self.metadata = as_json({"preset": preset_name, **asdict(self.preset), "dtype": dtype})

    def run(self, methods: Sequence[Method], data: dict[int, BenchmarkData], share: Share, pictures: bool) -> None:
        """Measure what is missing, seed by seed; write the tables after each result, and the figures at the end.

        When several processes share the work, tables and figures are written once all of them have finished.

        Args:
            methods (`Sequence[Method]`): what to measure.
            data (`dict[int, BenchmarkData]`): the slices of each seed.
            share (`Share`): the part of the work that this process does.
            pictures (`bool`): whether to write Fig. 1 and Fig. 2, which show slices.

        Raises:
            InputError: the output holds results of another benchmark, or a network was trained in another way.
        """
        self._check_cells(data)
        make_folder(self.output / "cells")
        for seed, method in cells_of_share(methods, list(data), share):
            self.run_cell(method, data[seed], seed)
            if share.count == 1:
                write_tables(self.output, methods, list(data))
        share.wait()
        if share.is_main and not share.is_shard:
            write_tables(self.output, methods, list(data))
            write_figures(self, data, pictures)

    def _check_cells(self, data: dict[int, BenchmarkData]) -> None:
        """Refuse results of another preset or of other slices: they must not end up in one table with new ones."""
        first = next(iter(data.values()))
        for cell in collect_cells(self.output):
            kept = cell.get("benchmark", {})
            slices = with_named_scale(kept.get("data", {}))
            different = [name for name, value in self.metadata.items() if kept.get(name) != value]
            different += [name for name in KIND if slices.get(name) != first.metadata[name]]
            if cell["seed"] in data and slices != data[cell["seed"]].metadata:
                different.append(f"slices for seed {cell['seed']}")
            if other := ", ".join(different):
                raise InputError(f"{self.output} holds a benchmark with other {other}: choose another --output")

    def run_cell(self, method: Method, data: BenchmarkData, seed: int) -> None:
        """Measure a method for a seed and write `cells/METHOD-seedS.json`, unless it is there."""
        path = self.output / "cells" / f"{method.id}-seed{seed}.json"
        if path.is_file():
            return
        start = time.perf_counter()
        made, training = self.networks.make(method, data, seed)
        choice = choose_settings(made, data)
        with tempfile.TemporaryDirectory() as folder:
            counts = Path(folder) / "cell.counts.npz"
            cell = measure(made, data, counts)
            bootstrap = bootstraps_of_file(counts)
        cell |= {"method": method.id, "row": method.row.title, "tables": list(method.row.tables), "seed": seed}
        cell |= {"settings": made.settings, "choice": choice, "bootstrap": bootstrap} | training
        cell["slice_scores"] = slice_aurocs(data)
        cell |= {"dataset": data.folder, "benchmark": self.metadata | {"data": data.metadata}}
        cell |= {"command": command_line(), "commit": package_commit(), "device": self.networks.device}
        cell["seconds"] = round(time.perf_counter() - start, 1)
        write_json(cell, path)
        auprc = f"AUPRC {cell['auprc']:.3f}, post-processed {cell['postprocessed']['auprc']:.3f}"
        print(f"{method.id}, seed {seed}: {auprc} ({cell['n_slices']} slices, settings {made.settings})", flush=True)


def cells_of_share(methods: Sequence[Method], seeds: Sequence[int], share: Share) -> list[tuple[int, Method]]:
    """Return the cells that this process measures, seed by seed; rows of one network stay together."""
    groups: dict[tuple, list] = {}
    for seed, method in itertools.product(seeds, methods):
        groups.setdefault((seed, method.row.network), []).append((seed, method))
    sizes = [len(cells) + ROWS_PER_TRAINING * (network is not None) for (_, network), cells in groups.items()]
    return [cell for cells in share.of(list(groups.values()), sizes) for cell in cells]


def images_of_seed(output: Path, seed: int, methods: Sequence[Method]) -> dict[str, int]:
    """Return the number of images that each network of these methods was trained on for an earlier seed.

    Raises:
        InputError: there is no result of that seed with one of the networks.
    """
    cells = [cell for cell in collect_cells(output) if cell["seed"] == seed]
    seen = {Method.of(cell["method"]).row.network: cell.get("images_seen") for cell in cells}
    for method in methods:
        if method.row.network and not seen.get(method.row.network):
            raise InputError(f"{output}: no result of seed {seed} with the network {method.row.network} ({method.id})")
    return {network: images for network, images in seen.items() if network}
