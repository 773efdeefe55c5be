"""What the page of `diffusers-cf app` shows of a slice, as HTML that holds its own pictures and is written to no file."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from scipy import ndimage

from diffusers_cf.app.explorer import SliceView, VolumeFiles
from diffusers_cf.plots import GREY, HEAT_MAXIMUM
from diffusers_cf.segmentation.report import ranges


# Okabe and Ito's orange and sky blue, which colour-blind readers tell apart too, and on grey.
FOUND, EXPERT = (230, 159, 0), (86, 180, 233)
SEE_THROUGH = 0.4  # share of HEAT_MAXIMUM below which heat fades away, so that anatomy shows
OUTLINE_SCALE = 4  # pixels of an outline for each of the slice

CSS = """
#cf-limit, #cf-message, #cf-pictures, #cf-verdict, #cf-found,
#cf-limit *, #cf-message > *, #cf-pictures > *, #cf-verdict > *, #cf-found > * {padding-top: 0; padding-bottom: 0}
#cf-found {min-height: 64px}
#cf-files .wrap {padding-top: 26px; line-height: 1.3}
#cf-files .icon-wrap {display: none}
#cf-message:not(:has(.cf-message)), #cf-limit:has([hidden]) {display: none}
.cf-slice {display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; max-width: 138vh; margin: auto}
.cf-slice figure {margin: 0}
.cf-slice figcaption {font-size: 0.9rem; margin-bottom: 2px; white-space: nowrap; overflow: hidden}
.cf-image {position: relative; background: #000; width: 100%; border-radius: 4px; overflow: hidden}
.cf-image img {position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; object-fit: fill}
.cf-image span {position: absolute; color: #fff; font-size: 0.75rem; text-shadow: 0 0 3px #000, 0 0 3px #000}
.cf-l {left: 5px; top: 46%} .cf-r {right: 5px; top: 46%} .cf-a {top: 2px; left: 48%} .cf-p {bottom: 2px; left: 48%}
.cf-legend {display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.85rem; margin-top: 6px; justify-content: center}
.cf-bar {display: inline-block; width: 150px; height: 0.8em; vertical-align: middle; margin: 0 6px}
.cf-key {display: inline-block; width: 0.9em; height: 0.9em; border: 3px solid; vertical-align: middle; margin-right: 5px}
.cf-verdict {border-left: 6px solid; padding: 2px 12px; font-size: 1rem}
.cf-verdict b {font-size: 1.15rem}
.cf-unhealthy {border-color: rgb(230, 159, 0)} .cf-healthy {border-color: rgb(86, 180, 233)} .cf-none {border-color: #888}
.cf-message {padding: 2px 12px; border-left: 6px solid #888}
.cf-error {border-color: #d55e00; font-weight: 600}
.cf-wait {text-align: center; padding: 60px 10px; opacity: 0.75}
@media (max-width: 800px) {.cf-slice {grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px}}
"""


def slice_html(view: SliceView, channel: int, modalities: Sequence[str], unit: str) -> str:
    """Input, counterfactual, heatmap and mask of one modality side by side, with sides, colour scale and legend.

    Args:
        view: The slice.
        channel: Index of the modality that is shown.
        modalities: Names of all.
        unit: What a heat of 1 means, as from `unit_in_words`.
    """
    name = escape(modalities[channel])
    scan = _grey(view.images[channel])
    whole = "whole volume" if view.of_volume else "slice alone"
    found = f"mask, {whole}" if view.mask is not None else "no mask: no threshold"
    panels = [
        ("input", f"input ({name})", scan, None),
        ("counterfactual", "counterfactual", _grey(view.counterfactuals[channel]), None),
        ("heatmap", "heatmap", scan, _heat(view.heatmap)),
        ("mask", found, scan, _outlines(view)),
    ]
    height, width = (n * mm for n, mm in zip(view.heatmap.shape, view.pixel_mm, strict=True))
    figures = "".join(_figure(*panel, aspect=width / height) for panel in panels)
    keys = [(FOUND, "found")] if view.mask is not None else []
    keys += [(EXPERT, "expert")] if view.reference is not None else []
    legend = "".join(
        f'<div><i class="cf-key" style="border-color: rgb{color}"></i>{text}</div>' for color, text in keys
    )
    return (
        f'<div class="cf-slice">{figures}</div><div class="cf-legend"><div>heatmap: 0 {_colour_bar()} {HEAT_MAXIMUM:g}'
        f" (change, {escape(unit)})</div>{legend}<div>L: the patient’s left, A: anterior</div></div>"
    )


def verdict_html(view: SliceView, threshold: float | None) -> str:
    """Healthy or unhealthy, by whether anything of the slice lies above the threshold, and its score."""
    score = f"score {view.score:.4f} (mean heat over the brain in this slice)"
    if view.mask is None:
        return _verdict("none", "No verdict", f"no threshold: the model recommends none, so choose one; {score}")
    least = f"the threshold of {threshold:.3g}"
    if view.mask.any():
        return _verdict("unhealthy", "Slice: unhealthy", f"{view.lesion_cm2:.1f} cm² at or above {least}; {score}")
    return _verdict("healthy", "Slice: healthy", f"no lesion at or above {least}; {score}")


def volume_html(files: VolumeFiles) -> str:
    """The verdict on the whole patient, with the settings that it holds for."""
    report = files.report
    values, dice = report["settings"], report.get("dice")
    settings = (
        f"guidance scale {values['guidance_scale']:g}, strength {values['strength']:g}, "
        f"{values['num_inference_steps']} steps, threshold {report['threshold']:.3g}"
    )
    expert = "" if dice is None else f"; Dice with the expert’s mask {dice:.2f}"
    if not files.lesion_slices:
        return _verdict("healthy", "Patient: healthy", f"no lesion in {report['n_slices']} slices ({settings})")
    found = f"{report['lesion_volume_ml']:.1f} ml in slices {ranges(files.lesion_slices)}{expert} ({settings})"
    return _verdict("unhealthy", "Patient: unhealthy", found)


def message_html(text: str, is_error: bool = False) -> str:
    """One line for the user; an empty one for no text."""
    kind, role = (" cf-error", "alert") if is_error else ("", "status")
    return f'<div class="cf-message{kind}" role="{role}">{escape(text)}</div>' if text else ""


def _verdict(kind: str, title: str, text: str) -> str:
    return f'<div class="cf-verdict cf-{kind}" role="status"><b>{title}</b> · {text}</div>'


def _figure(kind: str, caption: str, base: str, overlay: str | None, aspect: float) -> str:
    over = "" if overlay is None else f'<img class="cf-overlay" src="{overlay}" alt="">'
    sides = "".join(f'<span class="cf-{side.lower()}">{side}</span>' for side in "LRAP")
    return (
        f'<figure class="cf-{kind}"><figcaption>{caption}</figcaption>'
        f'<div class="cf-image" style="aspect-ratio: {aspect:.4f}"><img src="{base}" alt="{caption}">{over}{sides}</div>'
        "</figure>"
    )


def _grey(image: np.ndarray) -> str:
    return _png(np.clip(np.rint(image / GREY["vmax"] * 255), 0, 255).astype(np.uint8))


def _heat(heatmap: np.ndarray) -> str:
    share = np.clip(heatmap / HEAT_MAXIMUM, 0, 1)
    colours = _inferno()(share, bytes=True)
    colours[..., 3] = np.rint(230 * np.clip(share / SEE_THROUGH, 0, 1))
    return _png(colours)


def _outlines(view: SliceView) -> str | None:
    """Outlines of the masks, finer than the slice; what was found is shaded as well."""
    if view.mask is None and view.reference is None:
        return None
    height, width = view.heatmap.shape
    picture = np.zeros((OUTLINE_SCALE * height, OUTLINE_SCALE * width, 4), np.uint8)
    for mask, colour, shade in ((view.mask, FOUND, 70), (view.reference, EXPERT, 0)):
        if mask is not None:
            large = np.kron(mask > 0, np.ones((OUTLINE_SCALE, OUTLINE_SCALE), bool))
            inner = ndimage.binary_erosion(large, np.ones((3, 3)), iterations=OUTLINE_SCALE // 2)
            picture[large & inner & (shade > 0)] = (*colour, shade)
            picture[large & ~inner] = (*colour, 255)
    return _png(picture)


def _colour_bar() -> str:
    stops = ", ".join(f"rgb{tuple(int(value) for value in _inferno()(i / 8, bytes=True)[:3])}" for i in range(9))
    return f'<i class="cf-bar" style="background: linear-gradient(to right, {stops})"></i>'


def _inferno():
    from matplotlib import colormaps

    return colormaps["inferno"]


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=3)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
