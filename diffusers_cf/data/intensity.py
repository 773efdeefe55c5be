"""Intensity scales: which intensity of a scan becomes 1 (`normalize` in preprocessing.json).

    median    2.5 times the median of the foreground, so that healthy tissue lies near 0.4
    p99       the 99th percentile of the foreground (Sec. 4 of the paper), or another one, such as p98
    none      1: intensities are kept

A lesion is bright and a small share of the brain. It raises the 99th percentile and hardly changes the median. With
`p99` a large lesion therefore makes healthy tissue dark, and no single threshold or network fits all patients.
"""

import re
from collections.abc import Mapping

import numpy as np

from diffusers_cf.errors import InputError


DEFAULT_NORMALIZE = "median"
MEDIANS_OF_ONE = 2.5
MAX_NEGATIVE = 0.2  # resampling with splines rings a little below 0; z-scores are negative in half of the voxels
MOST_UNSCALED = 10.0  # intensities that are kept as they are: 1 should be about the brightest tissue
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?|100)")


def check_normalize(normalize: str) -> None:
    """Raise `InputError` unless `normalize` is the name of an intensity scale."""
    if not isinstance(normalize, str) or not (normalize in ("median", "none") or _PERCENTILE.fullmatch(normalize)):
        raise InputError(f"normalize is {normalize!r}: it must be median, p99 (any percentile) or none")


def unit_intensity(volume: np.ndarray, normalize: str) -> float:
    """Return the intensity that becomes 1, in the units of one modality of one scan; its foreground is above 0.

    Raises:
        InputError: no voxel is above 0, or the scale is unknown.
    """
    check_normalize(normalize)
    if normalize == "none":
        return 1.0
    foreground = volume[volume > 0].astype(np.float32)
    if not foreground.size:
        raise InputError("the scan is empty: no voxel above 0")
    if normalize == "median":
        return MEDIANS_OF_ONE * float(np.median(foreground))
    return float(np.percentile(foreground, float(normalize[1:])))


def intensity_problem(values: np.ndarray, normalize: str) -> str | None:
    """Return why the unscaled intensities of one modality of one patient can't be used; None if they can."""
    if bad := int((~np.isfinite(values)).sum()):
        return f"{bad} values are NaN or infinite"
    positive, negative = int((values > 0).sum()), int((values < 0).sum())
    if not positive:
        return "empty: no value above 0"
    if negative > MAX_NEGATIVE * (positive + negative):
        share = round(100 * negative / (positive + negative))
        return f"{share} % of the values are negative, but raw intensities start at 0"
    if normalize == "none" and (most := float(np.percentile(values[values > 0], 99))) > MOST_UNSCALED:
        return f"values reach {most:g}, but --normalize none needs a scale with bright tissue at 1: use median or p99"
    return None


def normalize_of(facts: Mapping) -> str:
    """Return the scale of the images that a preprocessing.json describes, of a data set or of a model.

    Older files have no `normalize` but a percentile; None stands for the scale `none`.
    """
    if "normalize" in facts:
        return facts["normalize"]
    percentile = facts.get("percentile", 99.0)
    return "none" if percentile is None else f"p{percentile}".removesuffix(".0")


def with_named_scale(facts: Mapping) -> dict:
    """Return the content of a preprocessing.json with `normalize` instead of the percentile of older files."""
    return {name: value for name, value in facts.items() if name != "percentile"} | {"normalize": normalize_of(facts)}


def unit_in_words(normalize: str, kind: str | None = None) -> str:
    """Return what 1 means as an intensity or in a kind of map, such as `1 = 99th percentile`, for legends and help."""
    if kind == "student":
        return "1 = certainly disease"
    if normalize == "median":
        return f"1 = {MEDIANS_OF_ONE:g} x the foreground's median"
    return "1 = value 1 of the images" if normalize == "none" else f"1 = {normalize[1:]}th percentile"


def check_same_scale(model: str, of_model: Mapping, dataset: str, of_dataset: Mapping, hint: str = "") -> None:
    """Raise `InputError` if the preprocessing.json of a model and of a data set differ in their intensity scale.

    `model` and `dataset` are their names, for the message, which ends with `hint`.
    """
    known, given = normalize_of(of_model), normalize_of(of_dataset)
    if known != given:
        raise InputError(
            f"{model}: takes images of the intensity scale {known}, {dataset} has {given}:"
            f" prepare the data with --normalize {known}{hint}"
        )
