"""Check the split, rows and settings of a command before any slice is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.postprocessing import PostProcessing
from diffusers_cf.evaluation.sweep import evenly_spread
from diffusers_cf.maps import check_signs


def open_split(folder: str, split: str, masks: bool = True) -> SliceDataset:
    """Open a split that has slices and, unless `masks` is False, lesion masks; raise `InputError` otherwise."""
    dataset = SliceDataset(folder, split)
    if masks and not dataset.has_masks:
        raise InputError(f"{folder} has no lesion masks: it can train a model, but can't be evaluated")
    if not len(dataset):
        raise InputError(f"{folder} has no slices in its split {split}")
    return dataset


def rows_of_both_labels(dataset: SliceDataset, max_slices: int) -> list[int]:
    """Return at most `max_slices` rows, evenly spread; raise `InputError` unless both labels are among them."""
    if max_slices < 1:
        raise InputError(f"--max_slices must be at least 1, not {max_slices}")
    rows = evenly_spread(len(dataset), max_slices)
    unhealthy = np.asarray(dataset.labels)[rows] != 0
    if unhealthy.all() or not unhealthy.any():
        label = "unhealthy" if unhealthy.all() else "healthy"
        raise InputError(
            f"{dataset.folder}: the {len(rows)} slices chosen of the split {dataset.split} are all {label}"
        )
    return rows


def checked_settings(pipe, settings: str | None = None, **given) -> dict:
    """Return `pipe.resolve_settings`; raise `InputError` for settings that the pipeline can't compute."""
    try:
        found = pipe.resolve_settings(settings, **given)
        pipe.scheduler.set_timesteps(found["num_inference_steps"])
        if found["map"] == "signed":
            check_signs(pipe.preprocessing.get("signs"), pipe.unet.config.in_channels)
    except ValueError as error:
        raise InputError(str(error)) from None
    return found


def checked_chain(args, settings: Mapping, modalities: Sequence[str]) -> PostProcessing:
    """Return the post-processing of options and recommended settings; raise `InputError` for one out of range."""
    try:
        given = {field.name: getattr(args, field.name) for field in fields(PostProcessing)}
        found = PostProcessing.of(settings, **given) or PostProcessing()
        found.check_channels(len(modalities))
    except ValueError as error:
        raise InputError(str(error)) from None
    return found
