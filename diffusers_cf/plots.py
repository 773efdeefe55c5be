"""Pictures: slices with counterfactual, heatmap and mask (the columns of Fig. 2), and the curves of Fig. 3."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np


GREY = {"cmap": "gray", "vmin": 0, "vmax": 1.1}  # how images in input units are shown
HEAT_MAXIMUM = 0.25  # heatmap value with the brightest colour, the same in all pictures
CERTAIN = 1.0  # the same for the map `student`, a probability


def plot_slices(
    path: str | Path, images: np.ndarray, counterfactuals: np.ndarray | None, heatmaps: np.ndarray,
    masks: np.ndarray | None = None, channel_names: Sequence[str] = (), title: str = "", row_names: Sequence[str] = (),
    mask_name: str = "lesion", references: np.ndarray | None = None, sides: bool = False, unit: str = "",
    kind: str = "",
) -> None:  # fmt: skip
    """Write a PNG with one row per slice: input, counterfactual, heatmap over the input and, if given, the mask.

    Args:
        path (`str` or `Path`): the PNG, in a folder that exists.
        images (`np.ndarray`): `(N, C, H, W)` in input units.
        counterfactuals (`np.ndarray`, *optional*): `(N, C, H, W)` in input units; without them a column less.
        heatmaps (`np.ndarray`): `(N, H, W)` in input units.
        masks (`np.ndarray`, *optional*): `(N, H, W)`, above 0 = lesion, drawn as a red contour in the last column.
        channel_names (`Sequence[str]`): names of the C channels, of which the first is shown.
        title (`str`): title of the picture.
        row_names (`Sequence[str]`): a name for each slice.
        mask_name (`str`): title of the last column.
        references (`np.ndarray`, *optional*): `(N, H, W)`, above 0 = lesion, a green contour to compare `masks` with.
        sides (`bool`): write L and R into each picture; column 0 must be the patient's left.
        unit (`str`): what a heatmap value of 1 means, as from `unit_in_words`.
        kind (`str`): name of the map; that of a `student` is a probability.
    """
    from matplotlib.figure import Figure

    columns = [f"input ({channel_names[0]})" if len(channel_names) else "input"]
    columns += ["counterfactual"] * (counterfactuals is not None) + ["heatmap"] + [mask_name] * (masks is not None)
    measure, most = ("probability", CERTAIN) if kind == "student" else ("change", HEAT_MAXIMUM)
    column = columns.index("heatmap")
    figure = Figure(figsize=(2.2 * len(columns) + 0.6, 2.2 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for i, row in enumerate(axes):
        for axis in row:
            axis.imshow(images[i, 0], **GREY)
            axis.set(xticks=[], yticks=[])
            for side, x in (("L", 0.03), ("R", 0.97)) if sides else ():
                align = "left" if side == "L" else "right"
                axis.text(x, 0.5, side, color="white", fontsize=9, ha=align, va="center", transform=axis.transAxes)
        if counterfactuals is not None:
            row[1].imshow(counterfactuals[i, 0], **GREY)
        heat = row[column].imshow(heatmaps[i], cmap="inferno", vmin=0, vmax=most, alpha=0.8)
        if masks is not None:
            if references is not None:
                draw_contour(row[-1], references[i], "lime")
            draw_contour(row[-1], masks[i], "red")
        if row_names:
            row[0].set_ylabel(row_names[i], fontsize=8)
    for axis, title_of_column in zip(axes[0], columns, strict=True):
        axis.set_title(title_of_column, fontsize=9)
    label = f"heatmap: {measure}" + (f", {unit}" if unit else "")
    figure.colorbar(heat, ax=axes, shrink=min(1, 2 / len(images)), extend="max", label=label)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_contour(axes, mask: np.ndarray, color: str, linewidth: float = 1) -> None:
    """Draw the outline of a mask `(H, W)`, above 0 = inside; nothing for an empty one."""
    if (mask > 0).any():
        axes.contour(mask > 0, [0.5], colors=color, linewidths=linewidth)


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
