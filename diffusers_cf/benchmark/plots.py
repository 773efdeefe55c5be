"""What the figures of a benchmark show: slices, intermediate images and sweeps of its trained networks."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.baselines import ROWS, row_of
from diffusers_cf.benchmark.figures import (
    percentile_scales,
    plot_method_maps,
    plot_process,
    plot_quality_against_evaluations,
    plot_strengths,
)
from diffusers_cf.benchmark.protocol import BenchmarkData
from diffusers_cf.benchmark.tables import collect_cells
from diffusers_cf.data.slices import batches_of
from diffusers_cf.evaluation.protocol import maps_at_size, write_result
from diffusers_cf.evaluation.sweep import evenly_spread, has_lesion, sweep
from diffusers_cf.evaluation.trajectories import encode_trajectory
from diffusers_cf.images import resize_images
from diffusers_cf.provenance import command_line, package_commit


# Fig. 2's columns, left to right: every method of Table 1 but the single modalities, which show what the input shows.
FIGURE2 = [name for name, row in ROWS.items() if 1 in row.tables and "<" not in name]
FIGURE2_ROWS = 5
# Fig. 3 of the paper; `guidance` is how its legend calls it.
FIGURE3_SCALES = (1.5, 2.5, 3.0)
FIGURE3 = {"implicit": "ours", "classifier": "cdpm-classifier"}
FIGURE1_IMAGES = 5


def write_figures(benchmark, data: dict[int, BenchmarkData], pictures: bool) -> None:
    """Writes figure4.png of all seeds and figure1.png to figure3.png of the first, as far as their rows are measured.

    Fig. 1 to 3 load networks; they train none, and are left alone where the first seed's are not at hand.

    Args:
        benchmark: a `Benchmark`.
        data: the slices of each seed of this run.
        pictures: whether Fig. 1 and Fig. 2, which show slices, are wanted.
    """
    measured = collect_cells(benchmark.output)
    plot_quality_against_evaluations(benchmark.output / "figure4.png", measured, "postprocessed")
    seed = min(cell["seed"] for cell in measured)
    cells = {cell["method"]: cell for cell in measured if cell["seed"] == seed and _can_be_made(benchmark, cell)}
    if seed in data:
        _write_figures_of_seed(benchmark, data[seed], seed, cells, pictures)


def _can_be_made(benchmark, cell: dict) -> bool:
    network = row_of(cell["method"]).network
    return network is None or benchmark.networks.is_trained(network, cell["seed"])


def _write_figures_of_seed(benchmark, data: BenchmarkData, seed: int, cells: dict[str, dict], pictures: bool) -> None:
    if set(FIGURE3.values()) <= set(cells):
        write_figure3(benchmark, data, seed)
    if pictures and "ours" in cells:
        write_figure1(benchmark, data, seed, cells["ours"]["settings"])
    if pictures:
        write_figure2(benchmark, data, seed, cells)


def example_rows(data: BenchmarkData, count: int) -> list[int]:
    """For each of some patients, evenly spread over those with a lesion, the test slice with the largest one."""
    batches = batches_of(data.test, data.test_rows, data.batch_size)
    areas = np.concatenate([batch["masks"].sum(dim=(1, 2)).numpy() for batch in batches])
    rows, patients = np.asarray(data.test_rows), data.test.patients[data.test_rows]
    best = {p: rows[patients == p][areas[patients == p].argmax()] for p in np.unique(patients[areas > 0])}
    return [int(best[list(best)[i]]) for i in evenly_spread(len(best), count)]


def write_figure1(benchmark, data: BenchmarkData, seed: int, settings: dict) -> None:
    """Fig. 1 of one test slice, from the images that encoding and decoding really went through."""
    method, _ = benchmark.make_method("ours", data, seed)
    pipe, row = method.pipe, example_rows(data, FIGURE2_ROWS)[0]
    batch = data.test.collate(data.test.__getitems__([row]))
    walk = {name: settings[name] for name in ("strength", "num_inference_steps")}
    encodings = encode_trajectory(pipe, pipe.prepare_images(batch["images"]), **walk)
    decodings = []

    def keep(_, step, timestep, tensors):
        decodings.append(tensors["latents"])
        return {}

    pipe.denoise(encodings[-1], None, settings["guidance_scale"], callback_on_step_end=keep, **walk)
    out = pipe(batch["images"], **settings)
    # Between the image and the latent; the same timesteps on the way there and back, where each came one step earlier.
    chosen = evenly_spread(len(encodings) - 2, FIGURE1_IMAGES)
    times = pipe.inverse_scheduler.timesteps.tolist()
    names = [f"t = {times[i]}" for i in chosen]

    def unit(latents: list[torch.Tensor]) -> np.ndarray:
        return ((torch.cat(latents) + 1) / 2).cpu().numpy()

    plot_process(
        benchmark.output / "figure1.png",
        resize_images(batch["images"], pipe.image_size)[0].numpy(),
        unit([encodings[i + 1] for i in chosen]),
        unit([encodings[-1]])[0],
        unit([decodings[-2 - i] for i in reversed(chosen)]),
        resize_images(out.counterfactuals.cpu(), pipe.image_size)[0].numpy(),
        resize_images(out.heatmaps.cpu()[:, None], pipe.image_size)[0, 0].numpy(),
        resize_images(batch["masks"][:, None].float(), pipe.image_size)[0, 0].numpy() > 0.5,
        channel_name=data.modalities[0],
        encoding_names=names,
        decoding_names=names[::-1],
        latent_name=f"latent, t = {times[len(encodings) - 2]}",
    )


def write_figure2(benchmark, data: BenchmarkData, seed: int, cells: dict[str, dict]) -> None:
    """Fig. 2: test slices of several patients and the maps of the methods that are measured, on one scale a method."""
    rows = example_rows(data, FIGURE2_ROWS)
    batch = data.test.collate(data.test.__getitems__(rows))
    maps = {}
    for name in (method for method in FIGURE2 if method in cells):
        method, _ = benchmark.make_method(name, data, seed)
        # a cell may be older than one of the settings, which then is what all candidates have in common
        method.settings = method.settings | cells[name]["settings"]
        maps[row_of(name).title] = np.concatenate(
            [_map_of_row(method, data, row, tuple(batch["masks"].shape[1:])) for row in rows]
        )
    if maps:
        plot_method_maps(
            benchmark.output / "figure2.png", batch["images"].numpy(), batch["masks"].numpy(), maps,
            percentile_scales(maps), "99.9th percentile of the slices shown", channel_name=data.modalities[0],
        )  # fmt: skip


def _map_of_row(method, data: BenchmarkData, row: int, size: tuple[int, int]) -> np.ndarray:
    """A slice's map `(1, H, W)`; a method that needs all slices of the patient gets them."""
    rows = np.flatnonzero(data.test.patients == data.test.patients[row]) if method.whole_patient else [row]
    images = data.test.collate(data.test.__getitems__([int(r) for r in rows]))["images"]
    return maps_at_size(method.anomaly_map(images)[list(rows).index(row)][None], size)


def write_figure3(benchmark, data: BenchmarkData, seed: int) -> None:
    """Fig. 3: ideal Dice on validation slices over strength and scale for both kinds of guidance; points are kept."""
    path, preset = benchmark.output / "figure3.json", benchmark.preset
    facts = {"seed": seed, "benchmark": benchmark.facts | {"data": data.facts}}
    points = _kept_points(path, facts)
    if not points:
        rows = [data.validation_rows[i] for i in evenly_spread(len(data.validation_rows), preset.figure_slices)]
        if not has_lesion(data.validation, rows, data.batch_size):
            rows = data.validation_rows
        for guidance, name in FIGURE3.items():
            pipe = benchmark.make_method(name, data, seed)[0].pipe
            found = sweep(
                pipe, data.validation, rows, FIGURE3_SCALES, preset.figure_strengths, ("counterfactual",),
                preset.grid.num_inference_steps, data.batch_size,
            )  # fmt: skip
            points += [asdict(point) | {"guidance": guidance} for point in found]
        facts |= {"command": command_line(), "commit": package_commit(), "n_slices": len(rows)}
        write_result(facts | {"points": points}, path)
    plot_strengths(benchmark.output / "figure3.png", points)


def _kept_points(path: Path, facts: dict) -> list[dict]:
    """The points of an earlier run that agrees in these facts; none where there is none, or its file is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return kept["points"] if all(kept.get(name) == value for name, value in facts.items()) else []
