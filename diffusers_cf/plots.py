"""Pictures: slices with counterfactual, heatmap and mask (the columns of Fig. 2), and the curves of Fig. 3."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np


GREY = {"cmap": "gray", "vmin": 0, "vmax": 1.1}  # how images in input units are shown
HEAT_MAXIMUM = 0.25  # heatmap value with the brightest colour, the same in all pictures
CERTAIN = 1.0  # the same for the map `student`, a probability
# Outlines of masks: orange and sky blue of Okabe and Ito, which colour-blind readers can tell apart, also on grey.
FOUND, EXPERT = "#E69F00", "#56B4E9"
# How slices of a head are shown: the letters of the patient's sides at the left and the right, and what they mean.
CONVENTIONS = {
    "radiological": ("R", "L", "radiological: the patient's right is at the left"),
    "neurological": ("L", "R", "neurological: the patient's left is at the left"),
}


def as_shown(slices: np.ndarray | None, convention: str | None) -> np.ndarray | None:
    """Return slices as pictures show them: the only place where they are mirrored.

    Args:
        slices (`np.ndarray`, *optional*): `(.., H, W)`, column 0 the patient's left, as everywhere in memory; None stays.
        convention (`str`, *optional*): a key of `CONVENTIONS`; None for images without sides, which stay as they are.
    """
    return slices[..., ::-1] if slices is not None and convention == "radiological" else slices


def plot_slices(
    path: str | Path, images: np.ndarray, counterfactuals: np.ndarray | None, heatmaps: np.ndarray,
    masks: np.ndarray | None = None, references: np.ndarray | None = None, channel_names: Sequence[str] = (),
    title: str = "", row_names: Sequence[str] = (), unit: str = "", kind: str = "", convention: str | None = None,
) -> None:  # fmt: skip
    """Write a PNG with one row per slice: input, counterfactual, heatmap over the input and, if given, masks.

    Args:
        path (`str` or `Path`): the PNG, in a folder that exists.
        images (`np.ndarray`): `(N, C, H, W)` in input units.
        counterfactuals (`np.ndarray`, *optional*): `(N, C, H, W)` in input units; without them a column less.
        heatmaps (`np.ndarray`): `(N, H, W)` in input units.
        masks (`np.ndarray`, *optional*): `(N, H, W)`, above 0 = lesion found, drawn as an orange outline in the last column.
        references (`np.ndarray`, *optional*): `(N, H, W)`, above 0 = the expert's lesion, the same in blue.
        channel_names (`Sequence[str]`): names of the C channels, of which the first is shown.
        title (`str`): title of the picture.
        row_names (`Sequence[str]`): a name for each slice.
        unit (`str`): what a heatmap value of 1 means, as from `unit_in_words`.
        kind (`str`): name of the map; that of a `student` is a probability.
        convention (`str`, *optional*): a key of `CONVENTIONS`, which the picture states; column 0 of all arrays must
            be the patient's left. None for images without sides.
    """
    from matplotlib.figure import Figure

    given = (images, counterfactuals, heatmaps, masks, references)
    images, counterfactuals, heatmaps, masks, references = (as_shown(part, convention) for part in given)
    outlines = [(references, EXPERT, "expert (blue)"), (masks, FOUND, "found (orange)")]
    outlines = [outline for outline in outlines if outline[0] is not None]
    columns = [f"input ({channel_names[0]})" if len(channel_names) else "input"]
    columns += ["counterfactual"] * (counterfactuals is not None) + ["heatmap"]
    columns += [", ".join(name for *_, name in outlines)] * bool(outlines)
    measure, most = scale_of(kind)
    column = columns.index("heatmap")
    figure = Figure(figsize=(2.2 * len(columns) + 0.6, 2.2 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for i, row in enumerate(axes):
        for axis in row:
            axis.imshow(images[i, 0], **GREY)
            axis.set(xticks=[], yticks=[])
            mark_sides(axis, convention)
        if counterfactuals is not None:
            row[1].imshow(counterfactuals[i, 0], **GREY)
        heat = row[column].imshow(heatmaps[i], cmap="inferno", vmin=0, vmax=most, alpha=0.8)
        for outline, color, _ in outlines:
            draw_contour(row[-1], outline[i], color)
        if row_names:
            row[0].set_ylabel(row_names[i], fontsize=8)
    for axis, title_of_column in zip(axes[0], columns, strict=True):
        axis.set_title(title_of_column, fontsize=9)
    label = f"heatmap: {measure}" + (f", {unit}" if unit else "")
    figure.colorbar(heat, ax=axes, shrink=min(1, 2 / len(images)), extend="max", label=label)
    figure.suptitle(caption(title, convention), fontsize=9)
    figure.savefig(path, dpi=100)


def scale_of(kind: str) -> tuple[str, float]:
    """Return what the values of a map are, and the value that has the brightest colour."""
    return ("probability", CERTAIN) if kind == "student" else ("change", HEAT_MAXIMUM)


def caption(text: str, convention: str | None, separator: str = "\n") -> str:
    """Return a text that ends with what the convention means."""
    return separator.join(filter(None, [text, convention and CONVENTIONS[convention][-1]]))


def mark_sides(axes, convention: str | None, fontsize: int = 9) -> None:
    """Write the letters of the patient's sides into a picture that [`as_shown`] has turned; nothing without sides."""
    for letter, x, align in (
        zip(CONVENTIONS[convention], (0.03, 0.97), ("left", "right"), strict=False) if convention else ()
    ):
        axes.text(x, 0.5, letter, color="white", fontsize=fontsize, ha=align, va="center", transform=axes.transAxes)


def draw_contour(axes, mask: np.ndarray, color: str, linewidth: float = 1) -> None:
    """Draw the outline of a mask `(H, W)`, above 0 = inside; nothing for an empty one."""
    if (mask > 0).any():
        axes.contour(mask > 0, [0.5], colors=color, linewidths=linewidth)


def plot_cohort(path, names: Sequence[str], volumes_ml: Sequence[float], scores: dict) -> None:
    """Write a PNG of the lesion volumes of patients, largest first, and of their scores below, where there are any.

    Args:
        path (`str`, `Path` or file): the PNG.
        names (`Sequence[str]`): names of the patients; written below if there are 40 or fewer.
        volumes_ml (`Sequence[float]`): volume of each patient's lesion.
        scores (`dict`): title -> a fraction for each patient, None where it is not known.
    """
    from matplotlib.figure import Figure

    order, places = np.argsort(volumes_ml, kind="stable")[::-1], range(len(names))
    known = {
        title: [values[i] for i in order] for title, values in scores.items() if any(v is not None for v in values)
    }
    figure = Figure(figsize=(10, 3 + 2.5 * bool(known)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1 + bool(known), sharex=True))
    axes[0].bar(places, np.asarray(volumes_ml)[order], color=FOUND)
    axes[0].set_ylabel("lesion volume, ml")
    for (title, values), marker, color in zip(known.items(), "os", (EXPERT, "black"), strict=False):
        axes[1].plot(places, [np.nan if v is None else v for v in values], marker, color=color, label=title)
        axes[1].set(ylabel="fraction", ylim=(-0.03, 1.03))
        axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    if len(names) <= 40:
        axes[-1].set_xticks(places, [names[i] for i in order], rotation=90, fontsize=7, parse_math=False)
    else:
        axes[-1].set(xticks=[], xlabel=f"{len(names)} patients, largest lesion first")
    figure.savefig(path, dpi=100)


def plot_sweep(path: str | Path, points: Sequence) -> None:
    """Write Fig. 3: ideal Dice and AUPRC in the foreground over strength, a curve for each guidance scale and map.

    Each number of steps and order of the solver has a row of its own.

    Args:
        path (`str` or `Path`): the PNG.
        points (`Sequence[SweepPoint]`): the settings with their scores.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    def grid_of(point) -> tuple:
        return point.num_inference_steps, point.solver_order, point.decoding_solver_order

    grids = list(dict.fromkeys(map(grid_of, points)))
    figure = Figure(figsize=(10, 4 * len(grids)), layout="constrained")
    rows = figure.subplots(len(grids), 2, squeeze=False)
    scales = sorted({point.guidance_scale for point in points})
    styles = list(zip(sorted({point.map for point in points}), ("-", "--", ":", "-."), strict=False))
    colors = list(zip(scales, colormaps["viridis"](np.linspace(0, 0.85, len(scales))), strict=True))
    for axes, (steps, *orders) in zip(rows, grids, strict=True):
        for (kind, style), (scale, color) in itertools.product(styles, colors):
            setting = (steps, *orders, kind, scale)
            curve = [point for point in points if (*grid_of(point), point.map, point.guidance_scale) == setting]
            curve.sort(key=lambda point: point.strength)
            look = {"linestyle": style, "marker": ".", "color": color, "label": f"{kind}, w = {scale:g}"}
            for axis, score in zip(axes, ("foreground_ideal_dice", "foreground_auprc"), strict=True):
                axis.plot([point.strength for point in curve], [getattr(point, score) for point in curve], **look)
        for axis, name in zip(axes, ("ideal Dice in the foreground", "AUPRC in the foreground"), strict=True):
            axis.set(xlabel="strength L", ylabel=name)
            axis.grid(alpha=0.3)
        if len(grids) > 1:
            solvers = [f"{way} of order {n}" for way, n in zip(("encoding", "decoding"), orders, strict=True) if n]
            axes[0].set_title(", ".join([f"{steps} steps", *solvers]), fontsize=9)
    handles, names = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=7, handlelength=3.5)
    figure.savefig(path, dpi=110)
