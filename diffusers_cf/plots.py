"""Pictures: rows of slices with counterfactual, heatmap and mask (Fig. 2's columns)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


GREY = {"cmap": "gray", "vmin": 0, "vmax": 1.1}  # how images in input units are shown: 1 = p99
HEAT_MAXIMUM = 0.25  # a change by a quarter of the image's unit has the brightest colour: one scale for all


def plot_slices(
    path: str | Path,
    images: np.ndarray,
    counterfactuals: np.ndarray,
    heatmaps: np.ndarray,
    masks: np.ndarray | None = None,
    channel_names: Sequence[str] = (),
    channel: int = 0,
    heat_maximum: float = HEAT_MAXIMUM,
    title: str = "",
    row_names: Sequence[str] = (),
    mask_name: str = "lesion",
    references: np.ndarray | None = None,
    sides: bool = False,
    unit: str = "",
) -> None:
    """Writes a PNG with one row a slice: input, counterfactual, heatmap over the input and, if given, the mask.

    Args:
        path: the PNG; a folder that is missing is an error.
        images: `(N, C, H, W)` in input units.
        counterfactuals: `(N, C, H, W)` in input units.
        heatmaps: `(N, H, W)` in input units.
        masks: `(N, H, W)`, above 0 = lesion, drawn as a contour in the last column.
        channel_names: names of the C channels.
        channel: index of the channel that is shown.
        heat_maximum: the change that has the brightest colour.
        title: above the picture.
        row_names: one a slice.
        mask_name: title of the last column.
        references: `(N, H, W)`, above 0 = lesion, drawn in green below `masks` to compare with.
        sides: write L and R beside each picture, where column 0 is the patient's left.
        unit: what a heat of 1 means, as from `unit_in_words`.
    """
    from matplotlib.figure import Figure

    name = channel_names[channel] if len(channel_names) else f"channel {channel}"
    columns = [f"input ({name})", "counterfactual", "heatmap"] + ([mask_name] if masks is not None else [])
    figure = Figure(figsize=(2.2 * len(columns) + 0.6, 2.2 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for i, row in enumerate(axes):
        for axis in row:
            axis.imshow(images[i, channel], **GREY)
            axis.set(xticks=[], yticks=[])
            for side, x in (("L", 0.03), ("R", 0.97)) if sides else ():
                align = "left" if side == "L" else "right"
                axis.text(x, 0.5, side, color="white", fontsize=9, ha=align, va="center", transform=axis.transAxes)
        row[1].imshow(counterfactuals[i, channel], **GREY)
        heat = row[2].imshow(heatmaps[i], cmap="inferno", vmin=0, vmax=heat_maximum, alpha=0.8)
        if masks is not None:
            if references is not None:
                draw_contour(row[3], references[i], "lime")
            draw_contour(row[3], masks[i], "red")
        if row_names:
            row[0].set_ylabel(row_names[i], fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=9)
    label = f"heatmap: change, {unit}" if unit else "heatmap: change"
    figure.colorbar(heat, ax=axes, shrink=min(1, 2 / len(images)), extend="max", label=label)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_contour(axes, mask: np.ndarray, color: str, linewidth: float = 1) -> None:
    """Draws the outline of a mask `(H, W)`, above 0 = inside; nothing for an empty one."""
    if (mask > 0).any():
        axes.contour(mask > 0, [0.5], colors=color, linewidths=linewidth)


def plot_sweep(path: str | Path, points: Sequence) -> None:
    """Writes Fig. 3: ideal Dice and AUPRC in the foreground over strength, a curve for each guidance scale and map.

    Each number of steps and each order of the solver is a row of its own.

    Args:
        path: the PNG.
        points: `SweepPoint`s.
    """
    from matplotlib.figure import Figure

    grids = list(dict.fromkeys((p.num_inference_steps, p.solver_order) for p in points))
    figure = Figure(figsize=(10, 4 * len(grids)), layout="constrained")
    rows = figure.subplots(len(grids), 2, squeeze=False)
    looks = _looks_of_curves(points)
    for axes, (steps, order) in zip(rows, grids, strict=True):
        chosen = [p for p in points if (p.num_inference_steps, p.solver_order) == (steps, order)]
        _plot_curves(axes, chosen, looks)
        if len(grids) > 1:
            axes[0].set_title(f"{steps} steps" + (f", solver of order {order}" if order else ""), fontsize=9)
    handles, names = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=7, handlelength=3.5)
    figure.savefig(path, dpi=110)


def _looks_of_curves(points: Sequence) -> dict[tuple[str, float], dict]:
    """For each map and guidance scale of a sweep how its curve is drawn."""
    from matplotlib import colormaps

    scales = sorted({p.guidance_scale for p in points})
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(scales)))
    return {
        (kind, scale): {"linestyle": style, "marker": ".", "color": color, "label": f"{kind}, w = {scale:g}"}
        for kind, style in zip(sorted({p.map for p in points}), ("-", "--", ":", "-."), strict=False)
        for scale, color in zip(scales, colors, strict=True)
    }


def _plot_curves(axes, points: Sequence, looks: dict) -> None:
    """One row of Fig. 3: ideal Dice into the first of two axes, AUPRC into the second."""
    for (kind, scale), look in looks.items():
        curve = sorted((p for p in points if (p.map, p.guidance_scale) == (kind, scale)), key=lambda p: p.strength)
        strengths = [p.strength for p in curve]
        axes[0].plot(strengths, [p.foreground_ideal_dice for p in curve], **look)
        axes[1].plot(strengths, [p.foreground_auprc for p in curve], **look)
    for axis, name in zip(axes, ("ideal Dice in the foreground", "AUPRC in the foreground"), strict=True):
        axis.set_xlabel("strength L")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
