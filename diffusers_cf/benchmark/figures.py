"""Figures 1 to 4: the process, maps of every method, sensitivity to settings, quality against cost.

Widths are those of a printed page with two columns and of one column. The colours are those of Okabe and Ito, which
colour-blind readers can tell apart; line styles and markers differ, too.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from diffusers_cf.baselines import ROWS, AnomalyMethod
from diffusers_cf.benchmark.networks import Method
from diffusers_cf.benchmark.protocol import BenchmarkData
from diffusers_cf.benchmark.tables import collect_cells
from diffusers_cf.data.preprocessing import convention_of
from diffusers_cf.evaluation.protocol import maps_at_size
from diffusers_cf.evaluation.sweep import evenly_spread, has_lesion, sweep
from diffusers_cf.evaluation.trajectories import encode_trajectory
from diffusers_cf.files import read_json, write_json
from diffusers_cf.images import resize_images
from diffusers_cf.plots import EXPERT, FOUND, GREY, as_shown, caption, draw_contour, mark_sides
from diffusers_cf.provenance import command_line, package_commit


PAGE, COLUMN = 7.0, 3.4  # inches
DOTS_PER_INCH = 200
FONT = {"fontsize": 7}
BLUE, VERMILLION, BLACK = "#0072B2", "#D55E00", "#000000"
OTHERS = (BLUE, FOUND, "#009E73", EXPERT, "#CC79A7")
MARKERS = "osD^vPX*<>hp"
HEAT = "inferno"
FIGURE1_IMAGES = 5  # intermediate images of each of the two loops
# Columns of Fig. 2: the methods of Table 1 but for single modalities, which look like the input.
FIGURE2 = [name for name, row in ROWS.items() if 1 in row.tables and "<" not in name]
FIGURE2_ROWS = 5
# Scales of the paper's Fig. 3, and the method of each kind of guidance.
FIGURE3_SCALES = (1.5, 2.5, 3.0)
FIGURE3 = {"implicit": "ours", "classifier": "cdpm-classifier"}


def write_figures(benchmark, data: Mapping[int, BenchmarkData], pictures: bool) -> None:
    """Write figure4.png of all seeds, and figure1.png to figure3.png of the first seed.

    Fig. 1 to 3 train nothing: methods that are not measured, or whose networks lie elsewhere, are left out.

    Args:
        benchmark (`Benchmark`): the benchmark, with results in its output folder.
        data (`Mapping[int, BenchmarkData]`): the slices of each seed of this run.
        pictures (`bool`): whether to write Fig. 1 and Fig. 2, which show slices.
    """
    cells, seed = collect_cells(benchmark.output), min(data)
    plot_quality(benchmark.output / "figure4.png", cells)
    if seed != min(cell["seed"] for cell in cells):
        return
    settings = {
        cell["method"]: cell["settings"]
        for cell in cells
        if cell["seed"] == seed and benchmark.networks.is_ready(Method.of(cell["method"]), seed)
    }

    def made(id: str) -> AnomalyMethod:
        """Return a method with the settings of its result."""
        method, _ = benchmark.networks.make(Method.of(id), data[seed], seed)
        method.settings = method.settings | settings[id]  # an older result may lack a setting
        method.learn(data[seed].train)
        return method

    if set(FIGURE3.values()) <= set(settings):
        write_figure3(benchmark, made, data[seed], seed)
    if pictures and "ours" in settings:
        write_figure1(benchmark.output / "figure1.png", made("ours"), data[seed])
    if pictures and set(FIGURE2) & set(settings):
        write_figure2(benchmark.output / "figure2.png", [id for id in FIGURE2 if id in settings], made, data[seed])


def example_rows(data: BenchmarkData, count: int) -> list[int]:
    """Return the test slice with the largest lesion of each of `count` patients, evenly spread over those with one."""
    areas = np.concatenate([batch["masks"].sum(dim=(1, 2)).numpy() for batch in data.test_batches()])
    rows, patients = np.asarray(data.test_rows), data.test.patients[data.test_rows]
    best = {p: rows[patients == p][areas[patients == p].argmax()] for p in np.unique(patients[areas > 0])}
    return [int(best[list(best)[i]]) for i in evenly_spread(len(best), count)]


def write_figure1(path: Path, method: AnomalyMethod, data: BenchmarkData) -> None:
    """Write Fig. 1 of one test slice, from the images that encoding and decoding go through."""
    pipe, settings, row = method.pipe, method.settings, example_rows(data, FIGURE2_ROWS)[0]
    batch = data.test.collate(data.test.__getitems__([row]))
    walk = {name: settings[name] for name in ("strength", "num_inference_steps")}
    encodings, decodings = encode_trajectory(pipe, pipe.prepare_images(batch["images"]), **walk), []

    def keep(_, step, timestep, tensors):
        decodings.append(tensors["latents"])
        return {}

    pipe.denoise(encodings[-1], None, settings["guidance_scale"], callback_on_step_end=keep, **walk)
    out = pipe(batch["images"], **settings)
    times = pipe.inverse_scheduler.timesteps.tolist()
    chosen = evenly_spread(len(encodings) - 2, FIGURE1_IMAGES)  # without the image and the latent

    def shown(images: torch.Tensor) -> np.ndarray:
        """Return the first channel (h, w) of an image (1, C, H, W) at the network's size."""
        return resize_images(images.float().cpu(), pipe.image_size)[0, 0].numpy()

    # the latent after encoding step i + 1 and the one after all but i + 1 decoding steps have the same noise level
    encoding = {f"image ({data.modalities[0]})": shown(batch["images"])}
    encoding |= {f"t = {times[i]}": shown((encodings[i + 1] + 1) / 2) for i in chosen}
    encoding |= {f"latent, t = {times[len(encodings) - 2]}": shown((encodings[-1] + 1) / 2)}
    decoding = {"counterfactual": shown(out.counterfactuals)}
    decoding |= {f"t = {times[i]}": shown((decodings[-2 - i] + 1) / 2) for i in chosen}
    heatmap, mask = shown(out.heatmaps[:, None]), shown(batch["masks"][:, None]) > 0.5
    plot_process(path, encoding, decoding, heatmap, mask, convention_of(data.test.preprocessing))


def write_figure2(
    path: Path, methods: Sequence[str], made: Callable[[str], AnomalyMethod], data: BenchmarkData
) -> None:
    """Write Fig. 2: test slices of several patients and their maps by every method."""
    rows, maps = example_rows(data, FIGURE2_ROWS), {ROWS[id].title: [] for id in methods}
    batch = data.test.collate(data.test.__getitems__(rows))
    for id in methods:
        method = made(id)
        for row in rows:
            given = [row]
            if method.whole_patient:
                given = np.flatnonzero(data.test.patients == data.test.patients[row]).tolist()
            heat = method.anomaly_map(data.test.collate(data.test.__getitems__(given))["images"])[given.index(row)]
            maps[ROWS[id].title].append(maps_at_size(heat[None], batch["masks"].shape[1:])[0])
    images, convention = batch["images"][:, 0].numpy(), convention_of(data.test.preprocessing)
    plot_method_maps(path, images, batch["masks"].numpy(), maps, data.modalities[0], convention)


def write_figure3(benchmark, made: Callable[[str], AnomalyMethod], data: BenchmarkData, seed: int) -> None:
    """Write Fig. 3 and its points, figure3.json; points of an earlier run are used again if nothing has changed."""
    path, preset = benchmark.output / "figure3.json", benchmark.preset
    metadata = {"seed": seed, "benchmark": benchmark.metadata | {"data": data.metadata}}
    kept = read_json(path) if path.is_file() else {}
    if any(kept.get(name) != value for name, value in metadata.items()):
        rows = [data.validation_rows[i] for i in evenly_spread(len(data.validation_rows), preset.figure_slices)]
        if not has_lesion(data.validation, rows, data.batch_size):
            rows = data.validation_rows
        kept = metadata | {"command": command_line(), "commit": package_commit(), "n_slices": len(rows), "points": []}
        grid = (FIGURE3_SCALES, preset.figure_strengths, ("counterfactual",), preset.grid.num_inference_steps)
        for guidance, id in FIGURE3.items():
            found = sweep(made(id).pipe, data.validation, rows, *grid, data.batch_size)
            kept["points"] += [asdict(point) | {"guidance": guidance} for point in found]
        write_json(kept, path)
    plot_strengths(benchmark.output / "figure3.png", kept["points"])


def plot_process(
    path: str | Path, encoding: Mapping[str, np.ndarray], decoding: Mapping[str, np.ndarray], heatmap: np.ndarray,
    mask: np.ndarray, convention: str | None = None,
) -> Figure:  # fmt: skip
    """Write Fig. 1: encoding in the upper row, from left to right, and decoding in the lower row, from right to left.

    Args:
        path (`str` or `Path`): the picture.
        encoding (`Mapping[str, np.ndarray]`): title -> picture (h, w) in input units: the image, intermediate images, the
            latent.
        decoding (`Mapping[str, np.ndarray]`): the counterfactual and as many intermediate images, the last one first.
        heatmap (`np.ndarray`): (h, w). Its 99.9th percentile has the brightest colour.
        mask (`np.ndarray`): (h, w), above 0 = lesion.
        convention (`str`, *optional*): a key of `CONVENTIONS`; None for images without sides.
    """
    *above, latent = encoding
    columns = range(1 + len(above))
    figure = _figure(PAGE, 2.2, wspace=0.2)
    axes = figure.subplot_mosaic([[*(f"{row}{i}" for i in columns), "latent"] for row in "ab"])
    top, bottom, end = [axes[f"a{i}"] for i in columns], [axes[f"b{i}"] for i in columns], axes["latent"]
    pictures = [next(iter(encoding.values())), *encoding.values(), *decoding.values()]
    titles = ["ground truth", *above, latent, *decoding]
    for axis, title, picture in zip([*top, end, *bottom[1:]], titles, pictures, strict=True):
        axis.imshow(as_shown(picture, convention), **GREY)
        axis.set_title(textwrap.fill(title, 16), **FONT, pad=3)
    draw_contour(top[0], as_shown(mask, convention), EXPERT)
    mark_sides(top[0], convention, fontsize=5)
    unit = scale_of_maps(heatmap)
    bottom[0].imshow(as_shown(heatmap, convention), cmap=HEAT, vmin=0, vmax=unit)
    bottom[0].set_title(f"heatmap\n(0 to {unit:.2g})", **FONT, pad=3)
    for axis in axes.values():
        axis.set(xticks=[], yticks=[])
    arrows = [(*pair, "-|>", BLUE) for pair in pairwise([*top[1:], end])]  # the head at the right
    arrows += [(*pair, "<|-", VERMILLION) for pair in pairwise([*bottom[1:], end])]
    arrows.append((*bottom[:2], "<|-", BLACK))
    for left, right, style, color in arrows:
        look = {"arrowstyle": style, "color": color, "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
        ends = {"xy": (0, 0.5), "xycoords": right.transAxes, "xytext": (1, 0.5), "textcoords": left.transAxes}
        right.annotate("", **ends, arrowprops=look, annotation_clip=False).set_in_layout(False)
    text = "blue: encoding without a condition; red: decoding guided to healthy"
    figure.suptitle(caption(text, convention, "; "), **FONT)
    figure.savefig(path)
    return figure


def scale_of_maps(maps: np.ndarray) -> float:
    """Return the 99.9th percentile of maps of any shape; their maximum if it is 0, and 1 if they are 0 everywhere."""
    return float(np.percentile(maps, 99.9)) or float(np.max(maps)) or 1.0


def plot_method_maps(
    path: str | Path, images: np.ndarray, masks: np.ndarray, maps: Mapping[str, np.ndarray], modality: str,
    convention: str | None = None,
) -> Figure:  # fmt: skip
    """Write Fig. 2: a row per slice, with the columns input, ground truth and the map of every method.

    Methods have units of their own. Each map is divided by one number per method, the 99.9th percentile of its maps,
    which is printed below its column. So slices compare within a column.

    Args:
        path (`str` or `Path`): the picture.
        images (`np.ndarray`): (N, H, W) in input units.
        masks (`np.ndarray`): (N, H, W), above 0 = lesion.
        maps (`Mapping[str, np.ndarray]`): title of a method -> (N, h, w), higher = more lesion, in the order of columns.
        modality (`str`): what `images` show.
        convention (`str`, *optional*): a key of `CONVENTIONS`; None for images without sides.
    """
    rows, columns = len(images), 2 + len(maps)
    side = min(1.3, (PAGE - 0.3) / columns)
    small = {"fontsize": 6 if side > 0.7 else 5}
    figure = _figure(columns * side + 0.3, rows * side + 0.95, w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for (given, truth, *_), image, mask in zip(axes, images, masks, strict=True):
        given.imshow(as_shown(image, convention), **GREY)
        mark_sides(given, convention, fontsize=5)
        truth.imshow(as_shown(image, convention), **GREY)
        draw_contour(truth, as_shown(mask, convention), EXPERT, 0.8)
    for column, values in zip(axes.T[2:], maps.values(), strict=True):
        unit = scale_of_maps(values)
        for axis, picture in zip(column, values, strict=True):
            heat = axis.imshow(as_shown(picture, convention) / unit, cmap=HEAT, vmin=0, vmax=1)
        column[-1].set_xlabel(f"1 = {unit:.2g}", **small)
    for axis, title in zip(axes[0], (f"input ({modality})", "ground truth", *maps), strict=True):
        axis.set_title(textwrap.fill(title, 13, break_long_words=False), **small)
    bar = figure.colorbar(heat, ax=axes, location="bottom", shrink=0.6, aspect=45, extend="max")
    text = "map / 99.9th percentile of the method's maps, the number below its column"
    bar.set_label(caption(text, convention), **FONT)
    bar.ax.tick_params(labelsize=6)
    figure.savefig(path)
    return figure


def plot_strengths(path: str | Path, points: Sequence[Mapping]) -> Figure:
    """Write Fig. 3: ideal Dice over strength L, a curve for each guidance and scale.

    The legend shows the best, mean and standard deviation over all settings of a guidance. One that is equally bad
    everywhere has a small deviation, too.

    Args:
        path (`str` or `Path`): the picture.
        points (`Sequence[Mapping]`): one per setting, with `guidance`, `guidance_scale`, `strength` and `ideal_dice`.
    """
    figure = _figure(COLUMN, 3.6)
    axis = figure.subplots()
    for guidance, color, style, side in zip(FIGURE3, (BLUE, VERMILLION), ("-", "--"), ("left", "right"), strict=True):
        chosen = sorted((p for p in points if p["guidance"] == guidance), key=lambda point: point["strength"])
        scales, lines = sorted({point["guidance_scale"] for point in chosen}), []
        for index, scale in enumerate(scales):  # the larger the scale, the paler the curve
            curve = [(p["strength"], p["ideal_dice"]) for p in chosen if p["guidance_scale"] == scale]
            look = {"color": color, "linestyle": style, "linewidth": 1, "marker": MARKERS[index], "markersize": 3.5}
            look |= {"alpha": 1 - 0.55 * index / len(scales), "label": f"scale {scale:g}"}
            lines += axis.plot(*zip(*curve, strict=True), **look)
        dice = np.array([point["ideal_dice"] for point in chosen])
        title = f"{guidance} guidance\nbest {dice.max():.3f}, mean {dice.mean():.3f}, std {dice.std():.3f}"
        look = {"fontsize": 6, "title_fontsize": 6, "frameon": False, "handlelength": 3.5, "alignment": "left"}
        figure.legend(handles=lines, loc=f"outside lower {side}", title=title, **look)
    _label(axis, "strength L", "ideal Dice")
    figure.savefig(path)
    return figure


def plot_quality(path: str | Path, cells: Sequence[Mapping]) -> Figure:
    """Write Fig. 4: AUPRC of post-processed maps over network evaluations, a marker per method, its deviation as a bar.

    The axis is logarithmic above 1 and linear below, so methods without a network stand at 0. Methods of Table 2 alone,
    which lie close to ours, are dots under one name.

    Args:
        path (`str` or `Path`): the picture.
        cells (`Sequence[Mapping]`): from `tables.collect_cells`; cells of the same method are seeds of it.
    """
    figure = _figure(PAGE, 3.3)
    axis = figure.subplots()
    largest, dots = 10.0, "methods of Table 2 alone"
    for index, method in enumerate(dict.fromkeys(cell["method"] for cell in cells)):
        seeds = [cell for cell in cells if cell["method"] == method]
        values = [cell["postprocessed"]["auprc"] for cell in seeds]
        cost = float(np.mean([cell["network_evaluations_per_slice"] for cell in seeds]))
        largest = max(largest, cost)
        if 1 not in seeds[0]["tables"]:
            axis.plot(cost, np.mean(values), ".", color=BLACK, markersize=3, label=dots)
            dots = "_"  # one entry in the legend for all
            continue
        look = {"marker": MARKERS[index % len(MARKERS)], "elinewidth": 0.7, "capsize": 2, "linestyle": "none"}
        if method == "ours":
            look |= {"color": VERMILLION, "markersize": 8}
        else:
            look |= {"color": OTHERS[index % len(OTHERS)], "markersize": 5.5}
        deviation = np.std(values, ddof=1) if len(values) > 1 else None
        axis.errorbar(cost, np.mean(values), deviation, label=seeds[0]["row"], **look)
    axis.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [0, *(10**power for power in range(int(np.ceil(np.log10(largest))) + 1))]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xlim(-0.35, largest * 2.5)
    _label(axis, "network evaluations per slice", "AUPRC, post-processed")
    figure.legend(loc="outside right center", fontsize=6, frameon=False)
    figure.savefig(path)
    return figure


def _figure(width: float, height: float, **layout: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout=ConstrainedLayoutEngine(**layout))


def _label(axis, x: str, y: str) -> None:
    axis.set_xlabel(x, **FONT)
    axis.set_ylabel(y, **FONT)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3, linewidth=0.5)
