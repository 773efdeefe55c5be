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
    """Write a PNG with one row a slice: input, counterfactual, heatmap over the input and, if given, the mask.

    Args:
        path (`str` or `Path`): the PNG.
        images (`np.ndarray`): `(N, C, H, W)` in input units.
        counterfactuals (`np.ndarray`): `(N, C, H, W)` in input units.
        heatmaps (`np.ndarray`): `(N, H, W)` in input units.
        masks (`np.ndarray`, *optional*): `(N, H, W)`, above 0 = lesion, drawn as a red outline in the last column.
        channel_names (`Sequence[str]`): names of the C channels.
        channel (`int`): index of the channel that is shown.
        heat_maximum (`float`): the change that has the brightest colour.
        title (`str`): above the picture.
        row_names (`Sequence[str]`): one a slice.
        mask_name (`str`): title of the last column.
        references (`np.ndarray`, *optional*): `(N, H, W)`, above 0 = lesion, drawn in green below `masks` to compare.
        sides (`bool`): write L and R beside each picture, where column 0 is the patient's left.
        unit (`str`): what a heat of 1 means, as from `unit_in_words`.
    """
    from matplotlib.figure import Figure

    name = channel_names[channel] if len(channel_names) else f"channel {channel}"
    titles = [f"input ({name})", "counterfactual", "heatmap"] + ([mask_name] if masks is not None else [])
    count = len(images)
    figure = Figure(figsize=(2.2 * len(titles) + 0.6, 2.2 * count + 0.5), layout="constrained")
    axes = figure.subplots(count, len(titles), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axis, column_title in zip(axes[0], titles, strict=True):
        axis.set_title(column_title, fontsize=9)
    for i, (given, healthy, heat, *outlined) in enumerate(axes):
        for axis in (given, heat, *outlined):
            axis.imshow(images[i, channel], **GREY)
        healthy.imshow(counterfactuals[i, channel], **GREY)
        colors = heat.imshow(heatmaps[i], cmap="inferno", vmin=0, vmax=heat_maximum, alpha=0.8)
        for axis in outlined:
            if references is not None:
                draw_contour(axis, references[i], "lime")
            draw_contour(axis, masks[i], "red")
        if row_names:
            given.set_ylabel(row_names[i], fontsize=8)
    for axis in axes.flat if sides else ():
        look = {"color": "white", "fontsize": 9, "va": "center", "transform": axis.transAxes}
        axis.text(0.03, 0.5, "L", ha="left", **look)
        axis.text(0.97, 0.5, "R", ha="right", **look)
    label = f"heatmap: change, {unit}" if unit else "heatmap: change"
    figure.colorbar(colors, ax=axes, shrink=min(1, 2 / count), extend="max", label=label)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_contour(axes, mask: np.ndarray, color: str, linewidth: float = 1) -> None:
    """Draw the outline of a mask `(H, W)`, above 0 = inside; nothing for an empty one."""
    if (mask > 0).any():
        axes.contour(mask > 0, [0.5], colors=color, linewidths=linewidth)


def plot_sweep(path: str | Path, points: Sequence) -> None:
    """Write Fig. 3: ideal Dice and AUPRC in the foreground over strength, a curve for each guidance scale and map.

    Each number of steps and each order of the solver is a row of its own.

    Args:
        path (`str` or `Path`): the PNG.
        points (`Sequence[SweepPoint]`): the results of a sweep.
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
    """Return how the curve of each map and guidance scale of a sweep is drawn."""
    from matplotlib import colormaps

    scales = sorted({p.guidance_scale for p in points})
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(scales)))
    return {
        (kind, scale): {"linestyle": style, "marker": ".", "color": color, "label": f"{kind}, w = {scale:g}"}
        for kind, style in zip(sorted({p.map for p in points}), ("-", "--", ":", "-."), strict=False)
        for scale, color in zip(scales, colors, strict=True)
    }


def _plot_curves(axes, points: Sequence, looks: dict) -> None:
    """Draw a row of Fig. 3: ideal Dice in the first of two axes, AUPRC in the second."""
    for (kind, scale), look in looks.items():
        curve = sorted((p for p in points if (p.map, p.guidance_scale) == (kind, scale)), key=lambda p: p.strength)
        strengths = [p.strength for p in curve]
        axes[0].plot(strengths, [p.foreground_ideal_dice for p in curve], **look)
        axes[1].plot(strengths, [p.foreground_auprc for p in curve], **look)
    for axis, name in zip(axes, ("ideal Dice in the foreground", "AUPRC in the foreground"), strict=True):
        axis.set_xlabel("strength L")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
