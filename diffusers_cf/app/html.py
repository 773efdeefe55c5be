"""What the page of `diffusers-cf app` shows of a slice: HTML with the pictures inside, never written to a file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib import colormaps
from PIL import Image, ImageColor
from scipy import ndimage

from diffusers_cf.app.explorer import SliceView, VolumeFiles
from diffusers_cf.data.nifti import read_nifti, to_canonical
from diffusers_cf.plots import CONVENTIONS, EXPERT, FOUND, GREY, as_shown, scale_of
from diffusers_cf.segmentation.report import ranges, volume_viewer
from diffusers_cf.segmentation.volumes import read_scan


SEE_THROUGH = 0.4  # share of HEAT_MAXIMUM below which the heatmap fades, so that the anatomy shows
OUTLINE_SCALE = 4  # pixels of an outline's picture per pixel of the slice

TEMPLATES = Environment(loader=PackageLoader("diffusers_cf"), autoescape=True, trim_blocks=True)
CSS, ZOOM = (TEMPLATES.get_template(name).render() for name in ("app.css", "zoom.js"))


def slice_html(
    view: SliceView, channel: int, modalities: Sequence[str], unit: str, kind: str, convention: str = "radiological"
) -> str:
    """Return input, counterfactual, heatmap and mask of one modality side by side, with a legend.

    Args:
        view (`SliceView`): the slice.
        channel (`int`): index of the modality to show.
        modalities (`Sequence[str]`): names of all modalities.
        unit (`str`): what a heat of 1 means, as from `unit_in_words`.
        kind (`str`): of the map; that of a student is a probability.
        convention (`str`): `radiological` or `neurological`.
    """
    parts = (view.images, view.counterfactuals, view.heatmap, view.mask, view.reference)
    view = SliceView(*(as_shown(part, convention) for part in parts), view.pixel_mm, view.score, view.of_volume)
    scan, (measure, most) = _grey(view.images[channel]), scale_of(kind)
    share = np.clip(view.heatmap / most, 0, 1)
    heat = colormaps["inferno"](share, bytes=True)
    heat[..., 3] = np.rint(230 * np.clip(share / SEE_THROUGH, 0, 1))
    mask_caption = "mask, whole volume" if view.of_volume else "mask, slice alone"
    painted = [] if view.counterfactuals is None else [view.counterfactuals]
    panels = [
        ("input", f"input ({modalities[channel]})", scan, None),
        *(("counterfactual", "counterfactual", _grey(images[channel]), None) for images in painted),
        ("heatmap", "heatmap", scan, _png(heat)),
        ("mask", mask_caption if view.mask is not None else "no mask: no threshold", scan, _outlines(view)),
    ]
    height, width = np.multiply(view.heatmap.shape, view.pixel_mm)
    keys = [(FOUND, "found")] * (view.mask is not None) + [(EXPERT, "expert")] * (view.reference is not None)
    return TEMPLATES.get_template("slice.html").render(
        measure=measure, panels=panels, aspect=width / height, maximum=most,
        unit=unit, keys=keys, convention=CONVENTIONS[convention],
        colours=[tuple(rgb) for rgb in colormaps["inferno"](np.linspace(0, 1, 9), bytes=True)[:, :3].tolist()],
    )  # fmt: skip


def verdict_html(view: SliceView, threshold: float | None) -> str:
    """Return whether any voxel of the slice reaches the threshold, and the slice's score."""
    square_cm = None if view.mask is None else view.mask.sum() * np.prod(view.pixel_mm) / 100
    return _verdict("slice", area=square_cm, threshold=threshold, score=view.score)


def volume_html(files: VolumeFiles) -> str:
    """Return the verdict on the whole patient and the settings it was made with."""
    return _verdict("patient", report=files.report, slices=ranges(files.lesion_slices))


def planes_html(files: VolumeFiles, scan: Path, convention: str = "radiological") -> str:
    """Return a viewer of three planes, the volume's heatmap over a scan, that contacts no other machine.

    Args:
        files (`VolumeFiles`): heatmap and report of the whole volume.
        scan (`Path`): a scan that was segmented.
        convention (`str`): `radiological` or `neurological`.
    """
    heat, background = to_canonical(read_nifti(files.heatmap)), to_canonical(read_scan(scan))
    _, most = scale_of(files.report["settings"]["map"])
    viewer = volume_viewer(files.report, heat, background, max(most, 1.5 * files.report["threshold"]), convention)
    return TEMPLATES.get_template("planes.html").render(viewer=viewer, report=files.report)


def _verdict(of: str, **facts) -> str:
    return TEMPLATES.get_template("verdict.html").render(of=of, **facts)


def _grey(image: np.ndarray) -> str:
    return _png(np.clip(np.rint(image / GREY["vmax"] * 255), 0, 255).astype(np.uint8))


def _outlines(view: SliceView) -> str | None:
    """Return the outlines of both masks, finer than the slice; the mask found is shaded as well."""
    if view.mask is None and view.reference is None:
        return None
    picture = np.zeros((*np.multiply(view.heatmap.shape, OUTLINE_SCALE), 4), np.uint8)
    for mask, colour, shade in ((view.mask, FOUND, 70), (view.reference, EXPERT, 0)):
        if mask is not None:
            large = np.kron(mask > 0, np.ones((OUTLINE_SCALE, OUTLINE_SCALE), bool))
            inner = ndimage.binary_erosion(large, np.ones((3, 3)), iterations=OUTLINE_SCALE // 2)
            picture[large & inner & (shade > 0)] = (*ImageColor.getrgb(colour), shade)
            picture[large & ~inner] = (*ImageColor.getrgb(colour), 255)
    return _png(picture)


def _png(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=3)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
