"""Measure many inference settings on validation slices (Fig. 3): guidance scale, strength and map."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask
from diffusers_cf.evaluation.trajectories import decode_images, encode_images, heatmaps_of_settings
from diffusers_cf.images import resize_images
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.settings import MAP_SETTINGS


SIGN_SLICES = 128  # to learn signs from
LEAST_T = 2.0  # below it the labels do not tell a sign


@dataclass
class SweepPoint:
    """Scores of one setting.

    Attributes:
        guidance_scale, strength, num_inference_steps, map: the setting.
        network_evaluations (`int`): NFE per slice.
        auprc, ideal_dice: over all pixels.
        foreground_auprc, foreground_ideal_dice: over pixels where any channel is above 0.
        postprocessed_auprc, postprocessed_ideal_dice: of the post-processed map, over the foreground.
        threshold: ideal threshold of the post-processed map, in heatmap units.
        solver_order, decoding_solver_order: of the inverse scheduler and of the scheduler; None if one has none.
    """

    guidance_scale: float
    strength: float
    num_inference_steps: int
    map: str
    network_evaluations: int
    auprc: float = 0.0
    ideal_dice: float = 0.0
    foreground_auprc: float = 0.0
    foreground_ideal_dice: float = 0.0
    postprocessed_auprc: float = 0.0
    postprocessed_ideal_dice: float = 0.0
    threshold: float = 0.0
    solver_order: int | None = None
    decoding_solver_order: int | None = None


def sweep(
    pipe: CounterfactualDDIMPipeline, dataset: SliceDataset, indices: Sequence[int], guidance_scales: Sequence[float],
    strengths: Sequence[float], maps: Sequence[str], num_inference_steps: int = 100, batch_size: int = 32,
    max_evaluations: int | None = None,
) -> list[SweepPoint]:  # fmt: skip
    """Measure every combination of settings. One encoding serves all decoded maps, another one all maps `forward`.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): the pipeline.
        dataset (`SliceDataset`): a split with masks.
        indices (`Sequence[int]`): rows of the split to use.
        guidance_scales (`Sequence[float]`): values of w.
        strengths (`Sequence[float]`): values of L in (0, 1].
        maps (`Sequence[str]`): names from `settings.MAPS`.
        num_inference_steps (`int`): steps of the full grid.
        batch_size (`int`): slices at a time.
        max_evaluations (`int`, *optional*): leave out settings with more NFE per slice.

    Returns:
        `list[SweepPoint]`: one for each combination within `max_evaluations`, strengths outermost.

    Raises:
        InputError: a map holds NaN or infinite values; the message names its setting.
    """
    points = settings_of_sweep(pipe, guidance_scales, strengths, maps, num_inference_steps, max_evaluations)
    counts = {setting: (PixelCounts(), PixelCounts(), PixelCounts()) for setting in points}
    with tqdm(total=len(indices), desc="Sweep", unit="slice") as bar:
        for batch in batches_of(dataset, indices, batch_size):
            images, masks = batch["images"].numpy(), batch["masks"].numpy()
            inside = foreground_mask(images)
            for setting, heat in heatmaps_of_settings(pipe, batch["images"], points, num_inference_steps):
                if not np.isfinite(heat).all():
                    values = ", ".join(f"{name} {getattr(points[setting], name)}" for name in MAP_SETTINGS)
                    raise InputError(f"{values}: the map holds NaN or infinite values")
                everywhere, foreground, postprocessed = counts[setting]
                everywhere.update(heat, masks)
                foreground.update(heat[inside], masks[inside])
                postprocessed.update(PostProcessing().apply(heat, images)[inside], masks[inside])
            bar.update(len(images))
    for setting, point in points.items():
        auprcs = [found.average_precision() for found in counts[setting]]
        point.auprc, point.foreground_auprc, point.postprocessed_auprc = auprcs
        ideal_dices, thresholds = zip(*(found.ideal_dice() for found in counts[setting]), strict=True)
        point.ideal_dice, point.foreground_ideal_dice, point.postprocessed_ideal_dice = ideal_dices
        point.threshold = thresholds[-1]
    return list(points.values())


def settings_of_sweep(
    pipe: CounterfactualDDIMPipeline, guidance_scales: Sequence[float], strengths: Sequence[float],
    maps: Sequence[str], num_inference_steps: int, max_evaluations: int | None = None,
) -> dict[tuple[float, float, str], SweepPoint]:  # fmt: skip
    """Return `(strength, guidance_scale, map)` -> point without scores for each setting of a [`sweep`].

    Raises:
        ValueError: a setting is out of range, or the pipeline can't compute it.
    """
    points, schedulers = {}, (pipe.inverse_scheduler, pipe.scheduler)
    orders = [scheduler.config.get("solver_order") for scheduler in schedulers]
    for strength, scale, map in itertools.product(sorted(strengths), guidance_scales, maps):
        setting = (scale, strength, num_inference_steps, map)
        evaluations = pipe.network_evaluations(**dict(zip(MAP_SETTINGS, setting, strict=True)))
        if max_evaluations is None or evaluations <= max_evaluations:
            points[strength, scale, map] = SweepPoint(
                *setting, evaluations, solver_order=orders[0], decoding_solver_order=orders[1]
            )
    return points


def learn_signs(
    pipe: CounterfactualDDIMPipeline, dataset: SliceDataset, indices: Sequence[int], batch_size: int = 32, **settings
) -> dict[str, list[float]]:
    """Return the weight of each channel in the map `signed`, learned from labels, not masks.

    The weight is that of Fisher's discriminant without correlations: the mean change from reconstruction to
    counterfactual of unhealthy slices less that of healthy ones, over the variance of the change in the pixels of
    healthy slices. A channel in which the labels do not tell the sign gets 0.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): the pipeline.
        dataset (`SliceDataset`): slices to learn from; not those to be tested.
        indices (`Sequence[int]`): rows to use, of both labels.
        batch_size (`int`): slices at a time.
        **settings: `guidance_scale`, `strength`, `num_inference_steps`.

    Returns:
        `dict`: `signs`, whose absolute values have a mean of 1: above 0 where disease is brighter; and `t`, Welch's t
        of the mean changes of patients.

    Raises:
        InputError: fewer than two patients have healthy or unhealthy slices, or |t| is below `LEAST_T` in all channels.
    """
    settings["map"] = "counterfactual"
    changes, squares = [], []
    for batch in batches_of(dataset, indices, batch_size):
        encoding = encode_images(pipe, batch["images"], settings["strength"], settings["num_inference_steps"])
        null, healthy = (
            decode_images(pipe, encoding, settings | {"guidance_scale": scale})[0].cpu()  # (N, C, h, w)
            for scale in (0, settings["guidance_scale"])
        )
        inside = (resize_images(batch["images"], pipe.image_size) > 0).any(dim=1, keepdim=True)  # (N, 1, h, w)
        change, size = (null - healthy) * inside, inside.sum(dim=(2, 3)).clamp(min=1)
        changes.append(change.sum(dim=(2, 3)) / size)
        squares.append(change.square().sum(dim=(2, 3)) / size)
    changes, squares, rows = torch.cat(changes).numpy(), torch.cat(squares).numpy(), np.asarray(indices)
    healthy, patients, means = np.asarray(dataset.labels)[rows] == 0, dataset.patients[rows], {}
    for name, chosen in (("unhealthy", ~healthy), ("healthy", healthy)):
        of_patients = [changes[chosen & (patients == patient)].mean(axis=0) for patient in np.unique(patients[chosen])]
        if len(of_patients) < 2:
            raise InputError(f"{dataset.folder}: signs need {name} slices of two patients, not of {len(of_patients)}")
        means[name] = np.array(of_patients)
    difference = means["unhealthy"].mean(axis=0) - means["healthy"].mean(axis=0)
    error = np.sqrt(sum(values.var(axis=0, ddof=1) / len(values) for values in means.values()))
    t = difference / np.maximum(error, 1e-12)
    if not (supported := abs(t) >= LEAST_T).any():
        found = ", ".join(f"{value:.1f}" for value in t)
        raise InputError(f"{dataset.folder}: the labels do not tell the sign of disease in any channel (t of {found})")
    variance = squares[healthy].mean(axis=0) - changes[healthy].mean(axis=0) ** 2
    weights = np.where(supported, difference, 0) / np.maximum(variance, 1e-12)
    return {"signs": (weights / abs(weights).mean()).round(4).tolist(), "t": t.round(2).tolist()}


def evenly_spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int)).tolist()


def has_lesion(dataset: SliceDataset, indices: Sequence[int], batch_size: int = 32) -> bool:
    """Return whether the masks of these rows have a lesion pixel in the foreground."""
    batches = batches_of(dataset, indices, batch_size)
    return any((batch["masks"].numpy()[foreground_mask(batch["images"].numpy())] != 0).any() for batch in batches)
