"""Pictures beside a card: those that are given, if they are pictures that may be shown, and one of phantom slices."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.errors import InputError
from diffusers_cf.hub.sources import source_of
from diffusers_cf.model_facts import usable_facts
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.plots import plot_slices


PHANTOM_PICTURE = "phantom.png"
_PHANTOM_SLICES = 3
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def checked_pictures(pictures: Sequence[str | Path], facts: Mapping) -> dict[str, Path]:
    """The pictures by the names that they will have.

    Args:
        pictures: PNG or JPEG files.
        facts: preprocessing.json of the data set or model that they show.

    Raises:
        InputError: one is no picture, two have the same name, or pictures of these data may not be shown.
    """
    found, source = {}, source_of(facts)
    for path in map(Path, pictures):
        if not path.is_file() or path.suffix.lower() not in _FORMATS:
            raise InputError(f"{path}: a picture must be a .png or .jpg file")
        if not source.may_be_passed_on:
            raise InputError(f"{path}: pictures of these data may not be shown ({source.words})")
        if path.name in found:
            raise InputError(f"{path}: {found[path.name]} has the same name: rename one of the two")
        _check_image(path)
        found[path.name] = path
    return found


def _check_image(path: Path) -> None:
    from PIL import Image

    wanted = _FORMATS[path.suffix.lower()]
    try:
        with Image.open(path, formats=[wanted]) as image:
            image.verify()
    except Exception as error:  # Pillow raises SyntaxError and more for files that were made to be found wrong
        raise InputError(f"{path}: is no {wanted} picture ({' '.join(str(error).split())})") from None


def phantom_picture(pipe: CounterfactualDDIMPipeline, path: Path) -> list[Path]:
    """What a model of phantoms makes of slices of one, of another cohort than it learned from, as it recommends.

    Args:
        pipe: a pipeline that was found publishable.
        path: the PNG.

    Returns:
        The PNG, or nothing for a model of other images.

    Raises:
        InputError: nilearn, which the phantom needs, is not installed.
    """
    from diffusers_cf.data.phantom import MODALITIES, PhantomSource

    facts, geometry = pipe.preprocessing, usable_facts(pipe, "model")["preprocessing"]
    modalities, seed = geometry["modalities"], facts.get("seed")
    if facts.get("source") != "phantom" or not set(modalities) <= set(MODALITIES):
        return []
    cohort = seed + 1 if isinstance(seed, int) and seed >= 0 else 1
    source = PhantomSource(
        cohort, size=geometry["size"], field_mm=geometry["field_mm"], normalize=geometry["normalize"]
    )
    everybody = ((patient, source.read(patient)) for patient in source.patients())
    patient, slices = next(found for found in everybody if found[1].masks.any())
    largest = np.sort(np.argsort(slices.masks.sum(axis=(1, 2)))[-_PHANTOM_SLICES:])
    images = slices.images[largest][:, [MODALITIES.index(name) for name in modalities]]
    out = pipe(images, output_type="np")
    unit = unit_in_words(geometry["normalize"])
    title = f"{patient}, which the model has never seen: the slices with the most disease"
    plot_slices(
        path, images, out.counterfactuals, out.heatmaps, slices.masks[largest], modalities, title=title, unit=unit
    )
    return [path]
