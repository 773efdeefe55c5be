"""Figures 1 to 4: the process, maps of every method, sensitivity to settings, quality against cost.

Sized for print: 7 inches are the width of a page with two columns, 3.4 that of one. Colours are those of Okabe and Ito,
which tell apart without red and green; line style and marker say the same once more.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusers_cf.benchmark.figure_labels import label_points
from diffusers_cf.plots import GREY, draw_contour


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, COLUMN = 7.0, 3.4
DOTS_PER_INCH = 200
FONT = {"fontsize": 7}
BLUE, VERMILLION, SKY, BLACK = "#0072B2", "#D55E00", "#56B4E9", "#000000"
MARKERS = "osD^vPX*<>hp"
HEAT = "inferno"


def percentile_scales(maps: Mapping[str, np.ndarray], percentile: float = 99.9) -> dict[str, float]:
    """Returns for each method the percentile of all its maps `(N, H, W)` together: its unit in `plot_method_maps`.

    A method whose percentile isn't above 0 gets its maximum, and one without anything above 0 gets 1.
    """
    scales = {}
    for name, values in maps.items():
        found = [float(np.percentile(values, percentile)), float(np.max(values)), 1.0]
        scales[name] = next(value for value in found if value > 0)
    return scales


def plot_method_maps(
    path: str | Path,
    images: np.ndarray,
    masks: np.ndarray,
    maps: Mapping[str, np.ndarray],
    scales: Mapping[str, float],
    scale_name: str,
    maximum: float = 1.0,
    channel: int = 0,
    channel_name: str = "FLAIR",
    row_names: Sequence[str] = (),
) -> "Figure":
    """Writes Fig. 2: a row a slice, columns input, ground truth and the map of every method.

    Methods have units of their own. Each map is divided by one number, the same for all slices of the method and
    printed below its column, so that slices compare within a column and no image is stretched by itself.

    Args:
        path: The picture.
        images: (N, C, H, W) in input units.
        masks: (N, H, W), above 0 = lesion.
        maps: Method's name -> (N, h, w), higher = more lesion, columns in this order.
        scales: Method's name -> a positive number in the method's units, such as its threshold chosen on validation
            slices, or `percentile_scales` of maps of many slices.
        scale_name: What `scales` are, for the legend.
        maximum: The relative value that has the brightest colour: 2 puts a threshold in the middle of the scale.
        channel: Index of the channel that is shown.
        channel_name: Its name.
        row_names: One a slice.

    Raises:
        ValueError: A scale isn't positive.
    """
    for name in maps:
        if not scales[name] > 0:
            raise ValueError(f"the scale of {name} must be positive, not {scales[name]}")
    rows, columns = len(images), 2 + len(maps)
    side = min(1.3, (PAGE - 0.3) / columns)
    small = 6 if side > 0.7 else 5
    figure = _figure(columns * side + 0.3, rows * side + 0.95)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, row in enumerate(axes):
        for axis in row[:2]:
            axis.imshow(images[i, channel], **GREY)
        draw_contour(row[1], masks[i], SKY, 0.8)
        for axis, (name, values) in zip(row[2:], maps.items(), strict=True):
            heat = axis.imshow(values[i] / scales[name], cmap=HEAT, vmin=0, vmax=maximum)
        if len(row_names):
            row[0].set_ylabel(row_names[i], **FONT)
        _hide_ticks(row)
    for axis, name in zip(axes[0], (f"input\n({channel_name})", "ground\ntruth", *maps), strict=True):
        axis.set_title(_wrapped(name, 13), fontsize=small)
    for axis, name in zip(axes[-1, 2:], maps, strict=True):
        axis.set_xlabel(f"1 = {scales[name]:.2g}", fontsize=small)
    bar = figure.colorbar(heat, ax=axes, location="bottom", shrink=0.6, aspect=45, extend="max")
    bar.set_label(f"map / {scale_name}\n(one number a method, below its column)", **FONT)
    bar.ax.tick_params(labelsize=6)
    return _saved(figure, path)


def plot_process(
    path: str | Path,
    image: np.ndarray,
    encodings: np.ndarray,
    latent: np.ndarray,
    decodings: np.ndarray,
    counterfactual: np.ndarray,
    heatmap: np.ndarray,
    mask: np.ndarray,
    channel: int = 0,
    channel_name: str = "FLAIR",
    encoding_names: Sequence[str] = (),
    decoding_names: Sequence[str] = (),
    latent_name: str = "latent",
) -> "Figure":
    """Writes Fig. 1 of one slice: encoding above, from left to right, decoding below, from right to left.

    Args:
        path: The picture.
        image: (C, H, W) in input units.
        encodings: (K, C, h, w), some steps of the encoding in input units: from the network's range by (x + 1) / 2.
        latent: (C, h, w), where encoding ended, in input units.
        decodings: (K, C, h, w), steps of the decoding in the order they came, in input units.
        counterfactual: (C, H, W) in input units.
        heatmap: (H, W), its brightest colour is its 99.9th percentile.
        mask: (H, W), above 0 = lesion.
        channel: Index of the channel that is shown.
        channel_name: Its name.
        encoding_names: What to print above each step of the encoding, such as `t = 200`.
        decoding_names: The same below each step of the decoding.
        latent_name: The same for the latent.
    """
    figure, top, bottom, end = _process_axes(len(encodings))
    images = {top[0]: image, top[1]: image, bottom[1]: counterfactual, end: latent}
    images |= dict(zip([*top[2:], *bottom[2:]], [*encodings, *decodings[::-1]], strict=True))
    for axis, shown in images.items():
        axis.imshow(shown[channel], **GREY)
    draw_contour(top[0], mask, SKY)
    unit = percentile_scales({"heatmap": heatmap})["heatmap"]
    bottom[0].imshow(heatmap, cmap=HEAT, vmin=0, vmax=unit)
    names = ["ground truth", f"image ({channel_name})", *_filled(encoding_names, len(encodings))]
    for axis, name in zip([*top, end], [*names, latent_name], strict=True):
        axis.set_title(_wrapped(name, 16), **FONT, pad=3)
    names = [f"heatmap\n(0 to {unit:.2g})", "counterfactual", *_filled(decoding_names, len(decodings))[::-1]]
    for axis, name in zip(bottom, names, strict=True):
        axis.set_xlabel(name, **FONT, labelpad=3)
    _draw_flow(figure, top, bottom, end)
    return _saved(figure, path)


def _draw_flow(figure: "Figure", top: list, bottom: list, end: "Axes") -> None:
    """Arrows of Fig. 1, and the names of both loops in the gap between their rows."""
    for left, right in zip(top[1:], [*top[2:], end], strict=True):
        _arrow(figure, left, right, BLUE)
    for left, right in zip(bottom, [*bottom[1:], end], strict=True):
        _arrow(figure, right, left, VERMILLION if left is not bottom[0] else BLACK)
    _arrow(figure, top[1], bottom[0], BLACK)
    middle = (top[2].get_position().x0 + top[-1].get_position().x1) / 2
    gap = bottom[0].get_position().y1, top[0].get_position().y0
    for share, text, color in (
        (0.7, "encode, without condition", BLUE),
        (0.3, "decode, guided to healthy", VERMILLION),
    ):
        y = gap[0] + share * (gap[1] - gap[0])
        figure.text(middle, y, text, color=color, ha="center", va="center", **FONT)


def _process_axes(steps: int) -> tuple["Figure", list, list, "Axes"]:
    """Axes of Fig. 1 without ticks: an upper and a lower row of 2 + `steps`, and the latent at the end of both."""
    gap, between, margin, text = 0.2, 0.42, 0.1, 0.3
    columns = 3 + steps
    side = (PAGE - 2 * margin - (columns - 1) * gap) / columns
    height = 2 * side + between + 2 * text
    figure = _figure(PAGE, height)
    figure.set_layout_engine("none")

    def axes(column: int, bottom: float):
        left = margin + column * (side + gap)
        axis = figure.add_axes((left / PAGE, bottom / height, side / PAGE, side / height))
        _hide_ticks([axis])
        return axis

    lower, upper = text, text + side + between
    top, bottom = ([axes(column, level) for column in range(columns - 1)] for level in (upper, lower))
    return figure, top, bottom, axes(columns - 1, (upper + lower) / 2)


def robustness(points: Sequence[Mapping], measure: str = "ideal_dice") -> dict[str, dict[str, float | None]]:
    """How little each guidance depends on its settings: the spread of Dice over the grid of scale and strength (Fig. 3).

    A guidance that is equally weak everywhere has a small spread, too: read it beside `best` and as share of `mean`.

    Args:
        points: With `guidance`, `guidance_scale`, `strength` and the measure, one for each setting.
        measure: Key of what is spread.

    Returns:
        For each guidance `std` (over the grid, n in the denominator), `range` (largest minus smallest), `best`,
        `mean`, `relative_std` (std / mean, None for a mean of 0) and `n`, the number of settings.
    """
    spread = {}
    for guidance in dict.fromkeys(point["guidance"] for point in points):
        values = np.array([point[measure] for point in points if point["guidance"] == guidance])
        std, mean = float(values.std()), float(values.mean())
        spread[guidance] = {
            "std": std,
            "range": float(np.ptp(values)),
            "best": float(values.max()),
            "mean": mean,
            "relative_std": std / mean if mean else None,
            "n": len(values),
        }
    return spread


def plot_strengths(
    path: str | Path, points: Sequence[Mapping], measure: str = "ideal_dice", measure_name: str = "ideal Dice"
) -> "Figure":
    """Writes Fig. 3: Dice over strength L, a curve for each guidance and scale, with the guidance's robustness.

    Args:
        path: The picture.
        points: As in `robustness`, of one guidance or two.
        measure: Key of what is drawn.
        measure_name: Its name.
    """
    figure = _figure(COLUMN, 3.9)
    axis = figure.subplots()
    spread = robustness(points, measure)
    places = ("outside lower left", "outside lower right")
    for guidance, color, style, place in zip(spread, (BLUE, VERMILLION), ("-", "--"), places, strict=False):
        lines = _strength_curves(axis, [p for p in points if p["guidance"] == guidance], measure, color, style)
        look = {"fontsize": 6, "title_fontsize": 6, "frameon": False, "handlelength": 3.5}
        title = _spread_in_words(guidance, spread[guidance])
        figure.legend(handles=lines, loc=place, title=title, alignment="left", **look)
    figure.suptitle(_wrapped(_robustness_in_words(spread, measure_name), 70), fontsize=6)
    axis.set_xlabel("strength L", **FONT)
    axis.set_ylabel(measure_name, **FONT)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3, linewidth=0.5)
    return _saved(figure, path)


def _spread_in_words(guidance: str, found: Mapping) -> str:
    share = "" if found["relative_std"] is None else f" = {100 * found['relative_std']:.0f} % of the mean"
    level = f"best {found['best']:.3f}, mean {found['mean']:.3f}"
    spread = f"std {found['std']:.3f}{share}\nmax - min {found['range']:.3f}"
    return f"{guidance} guidance, {found['n']} settings:\n{level}\n{spread}"


def _robustness_in_words(spread: Mapping[str, Mapping], measure_name: str) -> str:
    """What Fig. 3 says above its axes: which guidance is best, which spreads least for its mean, and the caveat."""
    relative = {name: found["relative_std"] for name, found in spread.items() if found["relative_std"] is not None}
    words = f"A small spread is robustness only where {measure_name} is high, too."
    if len(relative) < 2:
        return words
    best = max(spread, key=lambda name: spread[name]["best"])
    return f"Best {measure_name}: {best}. Least std / mean: {min(relative, key=relative.get)}.\n{words}"


def _strength_curves(axis, points: Sequence[Mapping], measure: str, color: str, style: str) -> list:
    """Draws a curve a scale, paler and with another marker for a larger one, and returns the lines."""
    lines, scales = [], sorted({point["guidance_scale"] for point in points})
    for index, scale in enumerate(scales):
        curve = sorted((p for p in points if p["guidance_scale"] == scale), key=lambda point: point["strength"])
        look = {"marker": MARKERS[index % len(MARKERS)], "alpha": 1 - 0.55 * index / len(scales)}
        look |= {"color": color, "linestyle": style, "markersize": 3.5, "linewidth": 1, "label": f"scale {scale:g}"}
        lines += axis.plot([p["strength"] for p in curve], [p[measure] for p in curve], **look)
    return lines


def plot_quality_against_evaluations(
    path: str | Path, cells: Sequence[Mapping], chain: str = "raw", ours: str = "ours"
) -> "Figure":
    """Writes Fig. 4: AUPRC over network evaluations a slice, a marker a method, its seeds' deviation as a bar.

    The axis is logarithmic above 1 and linear below, so that a method without a network has its place at 0. Rows of
    Table 2 alone, which lie close to ours, are dots without a name.

    Args:
        path: The picture.
        cells: Of `tables.collect_cells`; cells of the same method are seeds of it.
        chain: `raw` or `postprocessed`.
        ours: The method that stands out.
    """
    figure = _figure(PAGE * 0.7, 3.3)
    axis = figure.subplots()
    methods: dict[str, list[Mapping]] = {}
    for cell in sorted(cells, key=lambda cell: 1 in cell["tables"]):  # names cover no dot
        methods.setdefault(cell["method"], []).append(cell)
    labels, variants = [], []
    for index, (method, seeds) in enumerate(methods.items()):
        values = [(cell if chain == "raw" else cell[chain])["auprc"] for cell in seeds]
        x, y = float(np.mean([cell["network_evaluations_per_slice"] for cell in seeds])), float(np.mean(values))
        if 1 not in seeds[0]["tables"]:
            variants.append((x, y))
            continue
        look = {"color": VERMILLION, "markersize": 8} if method == ours else {"color": BLUE, "markersize": 5.5}
        look |= {"marker": MARKERS[index % len(MARKERS)], "markeredgecolor": "white", "markeredgewidth": 0.5}
        deviation = np.std(values, ddof=1) if len(values) > 1 else None
        axis.errorbar(x, y, deviation, elinewidth=0.7, capsize=2, label=seeds[0]["row"], **look)
        labels.append((x, y, seeds[0]["row"]))
    if variants:
        axis.plot(*zip(*variants, strict=True), ".", color=BLACK, markersize=3, label="rows of Table 2 alone")
        axis.legend(handles=axis.lines[-1:], loc="lower right", fontsize=6)
    largest = max([10, *(x for x, *_ in labels + variants)])
    axis.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [0, *(10**power for power in range(int(np.ceil(np.log10(largest))) + 1))]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xlim(-0.35, largest * 2.5)
    axis.margins(y=0.15)
    axis.set_xlabel("network evaluations a slice", **FONT)
    axis.set_ylabel("AUPRC" if chain == "raw" else "AUPRC, post-processed", **FONT)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3, linewidth=0.5)
    label_points(figure, axis, labels, variants)
    return _saved(figure, path)


def plot_frontier(path: str | Path, points: Sequence[Mapping], papers: Sequence[Mapping]) -> "Figure":
    """Writes quality against passes for every solver and kind of map: the best AUPRC for at most so many passes.

    Args:
        path: The picture.
        points: With `solver`, `map`, `network_evaluations` and `postprocessed_auprc`, one for each setting.
        papers: Those of the paper's grid, marked one by one with their guidance scale.
    """
    figure = _figure(COLUMN, 3.0)
    axis = figure.subplots()
    colors = dict(zip(dict.fromkeys(p["map"] for p in points), (BLUE, VERMILLION, "#009E73"), strict=False))
    styles = dict(zip(dict.fromkeys(p["solver"] for p in points), ("--", "-", ":", "-."), strict=False))
    for (kind, color), (solver, style) in itertools.product(colors.items(), styles.items()):
        family = [p for p in points if (p["map"], p["solver"]) == (kind, solver)]
        family.sort(key=lambda p: p["network_evaluations"])
        best = np.maximum.accumulate([p["postprocessed_auprc"] for p in family])
        if family:
            costs, look = [p["network_evaluations"] for p in family], {"color": color, "linestyle": style}
            axis.step(costs, best, where="post", linewidth=1, label=f"{kind}, {solver}", **look)
    for point in papers:
        place = point["network_evaluations"], point["postprocessed_auprc"]
        axis.plot(*place, "*", color=BLACK, markersize=5)
        axis.annotate(f"w = {point['guidance_scale']:g}", place, (3, 3), textcoords="offset points", fontsize=6)
    axis.set_xscale("log", base=2)
    axis.set_xlim(right=1.6 * axis.get_xlim()[1])  # room for the words beside the last star
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("network passes a slice (stars: the paper's L and steps)", **FONT)
    axis.set_ylabel("best AUPRC, post-processed", **FONT)
    axis.tick_params(labelsize=6, which="both")
    axis.grid(alpha=0.3, linewidth=0.5)
    figure.legend(loc="outside upper left", ncols=2, fontsize=5.5, frameon=False, handlelength=3)
    return _saved(figure, path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: "Figure", path: str | Path) -> "Figure":
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return figure


def _hide_ticks(axes) -> None:
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])


def _filled(names: Sequence[str], count: int) -> list[str]:
    return list(names) if len(names) else [""] * count


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, width, break_long_words=False))


def _arrow(figure: "Figure", start, end, color: str) -> None:
    """An arrow from the edge of one axes to that of another, over the gap between them."""
    from matplotlib.patches import FancyArrowPatch

    a, b = start.get_position(), end.get_position()
    rightwards = a.x0 < b.x0
    ends = (a.x1 if rightwards else a.x0, (a.y0 + a.y1) / 2), (b.x0 if rightwards else b.x1, (b.y0 + b.y1) / 2)
    if a.y0 > b.y1:
        ends = (a.x0, a.y0), (b.x1, b.y1)
    figure.add_artist(
        FancyArrowPatch(*ends, transform=figure.transFigure, arrowstyle="-|>", mutation_scale=7, color=color, lw=1)
    )
