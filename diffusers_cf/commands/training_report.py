"""One HTML page about a training: its loss, its validation scores and maps, and what it was trained on."""

import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.errors import InputError
from diffusers_cf.files import new_file, read_json
from diffusers_cf.plots import EXPERT
from diffusers_cf.training.curves import LOSSES, SCORES, read_curve


FACTS = ("modalities", "class_names", "size", "normalize", "field_mm", "settings", "training", "student")
BEST_BY = ("foreground_auprc", "auprc", "slice_auroc")  # the first of these that the scores have


def write_training_report(folder: Path, output: Path) -> None:
    """Write the page, as a whole or not at all; it needs no network. The training may still be running.

    Args:
        folder (`Path`): `--output_dir` of a training.
        output (`Path`): an .html file.

    Raises:
        InputError: the folder holds no learning curve, or a file in it is damaged.
    """
    from jinja2 import Environment, PackageLoader

    losses, scores = read_curve(folder / LOSSES), read_curve(folder / SCORES)
    if not losses:
        raise InputError(f"{folder}: no training to show ({LOSSES} is missing, which train_counterfactual.py writes)")
    curves, known = io.BytesIO(), folder / "preprocessing.json"
    plot_training(curves, losses, scores)
    facts = read_json(known) if known.exists() else {}
    pictures = [
        (title, row, base64.b64encode(path.read_bytes()).decode())
        for title, row in _chosen(scores)
        if (path := (folder / SCORES).with_name(f"step-{row['step']:07d}.png")).exists()
    ]
    environment = Environment(loader=PackageLoader("diffusers_cf"), autoescape=True, trim_blocks=True)
    page = environment.get_template("training.html").render(
        name=folder.resolve().name, last=losses[-1], curves=base64.b64encode(curves.getvalue()).decode(),
        facts={key: facts[key] for key in FACTS if facts.get(key)}, scores=scores, pictures=pictures,
    )  # fmt: skip
    with new_file(output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def plot_training(path, losses: Sequence[dict], scores: Sequence[dict]) -> None:
    """Write a PNG of a training: the loss, and the scores on validation slices, over the images seen.

    Args:
        path (`str`, `Path` or file): the PNG.
        losses (`Sequence[dict]`): rows of losses.json: `images`, `loss`.
        scores (`Sequence[dict]`): rows of validation/scores.json: `images`, and scores by name; [] for one part less.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 + 3 * bool(scores)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1 + bool(scores), sharex=True))
    images, values = ([row[key] for row in losses] for key in ("images", "loss"))
    axes[0].plot(images, values, color=EXPERT, linewidth=0.8, label="loss, mean between log entries")
    width = max(1, len(values) // 20)
    smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
    axes[0].plot(images[width - 1 :], smooth, color="black", label=f"mean of {width}")
    axes[0].set(yscale="log", ylabel="loss (Eq. 1)")
    names = [name for name in (scores[0] if scores else {}) if name not in ("step", "images")]
    for name, marker in zip(names, itertools.cycle("os^vD")):
        axes[-1].plot([row["images"] for row in scores], [row[name] for row in scores], f"-{marker}", label=name)
    if scores:
        axes[-1].set_ylabel("validation slices")
    axes[-1].set_xlabel("images seen")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _chosen(scores: list[dict]) -> list[tuple[str, dict]]:
    """Return the first, the best and the last row of the scores, each with a title and none twice."""
    if not scores:
        return []
    measure = next((name for name in BEST_BY if name in scores[0]), None)
    titles = {len(scores) - 1: "Last", 0: "First"}
    if measure:
        best = max(range(len(scores)), key=lambda i: scores[i][measure])
        titles[best] = f"{titles[best]}, and best {measure}" if best in titles else f"Best {measure}"
    return [(titles[i], scores[i]) for i in sorted(titles)]
