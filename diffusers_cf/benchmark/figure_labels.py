"""Names beside the points of a figure, where points and names lie close together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#555555"
NEAR = 6  # points between a marker and its name, if there is room


def label_points(
    figure: "Figure",
    axis,
    labels: Sequence[tuple[float, float, str]],
    nameless: Sequence[tuple[float, float]] = (),
) -> None:
    """Writes each name beside its point: over no point or name, within the axes, nearer to its own than to others.

    Args:
        figure: where the points are drawn already.
        axis: of them.
        labels: place and name of each point.
        nameless: places of further points.
    """
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    points = [axis.transData.transform(place[:2]) for place in (*labels, *nameless)]
    taken = [_around(point, figure.dpi) for point in points]
    for own, (x, y, name) in enumerate(labels):
        text = axis.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=6.5, path_effects=_halo(),
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": INK, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        faults = {}
        for shift, alignment in _places():
            text.set(position=shift, ha=alignment, va="center")
            box = _text_box(text)
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            nearest = int(np.argmin([_distance(box, point) for point in points]))
            # Far off, the line tells whose name it is.
            ambiguous = nearest != own and np.hypot(*shift) < 15
            faults[shift, alignment] = 10 * outside + 2 * sum(map(box.overlaps, taken)) + ambiguous
        shift, alignment = min(faults, key=faults.get)
        text.set(position=shift, ha=alignment)
        text.arrow_patch.set_visible(np.hypot(*shift) > NEAR)
        taken.append(_text_box(text))


def _halo() -> list:
    """Keeps names legible where they lie over an error bar."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.6, foreground="white")]


def _distance(box, point: np.ndarray) -> float:
    """From a point to the nearest one of a box."""
    return float(np.hypot(*(point - np.clip(point, box.min, box.max))))


def _text_box(text):
    """The text's own box, without its line to the point, in pixels."""
    from matplotlib.text import Text

    text.update_positions(text.get_figure().canvas.get_renderer())
    return Text.get_window_extent(text)


def _places():
    """Offsets in points and alignments to try for a name, near ones first."""
    for distance in (NEAR, 12, 20, 30, 42, 56, 72):
        yield (distance, 0), "left"
        yield (-distance, 0), "right"
        for vertical in (distance, -distance):
            yield (0, vertical), "center"
            yield (0.7 * distance, vertical), "left"
            yield (-0.7 * distance, vertical), "right"


def _around(point: np.ndarray, dots_per_inch: float):
    """A marker's box in pixels."""
    from matplotlib.transforms import Bbox

    half = 4 / 72 * dots_per_inch
    return Bbox([point - half, point + half])
