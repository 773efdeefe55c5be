"""Scores of whole slices without a map, for every map's slice AUROC to stand beside: position, diffusion classifier."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

from diffusers_cf.losses import training_target
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


SPLINE_KNOTS = 8


def relative_positions(patients: Sequence[str], slices: Sequence[int]) -> np.ndarray:
    """Position of each slice within its patient: 0 is the lowest of the slices given, 1 the highest, 0.5 an only one.

    Args:
        patients: `(N,)`, patient of every slice.
        slices: `(N,)`, axial index of every slice.

    Returns:
        float64 `(N,)` in [0, 1].
    """
    _, rows = np.unique(np.asarray(patients), return_inverse=True)
    slices = np.asarray(slices, dtype=np.float64)
    lowest, highest = np.full(rows.max(initial=-1) + 1, np.inf), np.full(rows.max(initial=-1) + 1, -np.inf)
    np.minimum.at(lowest, rows, slices)
    np.maximum.at(highest, rows, slices)
    extent = (highest - lowest)[rows]
    return np.where(extent > 0, (slices - lowest[rows]) / np.where(extent > 0, extent, 1), 0.5)


def position_scores(
    train_labels: Sequence[int], train_positions: Sequence[float], test_positions: Sequence[float]
) -> np.ndarray:
    """Probability that a slice is unhealthy given nothing but its position: logistic regression on cubic splines.

    Lesions are rare at both ends of the head, so any score that tells the ends from the middle detects something; this
    is how much.

    Args:
        train_labels: `(N,)`, 0 healthy, anything else unhealthy.
        train_positions: `(N,)`, as from [`relative_positions`].
        test_positions: `(M,)`.

    Returns:
        float64 `(M,)` in (0, 1).

    Raises:
        ValueError: the labels are all the same.
    """
    # knots over all of [0, 1]: those of the data would coincide where every patient has one slice
    splines = SplineTransformer(knots=np.linspace(0, 1, SPLINE_KNOTS)[:, None], extrapolation="constant")
    model = make_pipeline(splines, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(np.asarray(train_positions)[:, None], np.asarray(train_labels) != 0)
    return model.predict_proba(np.asarray(test_positions)[:, None])[:, 1]


@torch.no_grad()
def diffusion_classifier_scores(
    pipe: CounterfactualDDIMPipeline,
    images: torch.Tensor,
    timesteps: Sequence[int],
    seed: int,
    class_names: tuple[str, str] | None = None,
) -> torch.Tensor:
    """Which condition predicts the noise better: the diffusion classifier of Li et al. (2023, Sec. 3.2).

    The mean over t of `||eps - eps_theta(x_t, healthy)||^2 - ||eps - eps_theta(x_t, unhealthy)||^2`, summed over
    channels and foreground, in units of the network's prediction. Both conditions, and all slices, get the same noise:
    a score doesn't depend on the other slices of its batch.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): a conditional pipeline.
        images (`torch.Tensor`): `(N, C, H, W)` in input units.
        timesteps (`Sequence[int]`): the t to average over; a slice costs two network evaluations for each.
        seed (`int`): of the noise.
        class_names (`tuple[str, str]`, *optional*): healthy and unhealthy; defaults to the first two classes.

    Returns:
        `torch.Tensor`: float32 `(N,)`, higher = more unhealthy; 0 for an empty slice.

    Raises:
        ValueError: the pipeline has no class encoder, or there is no timestep.
    """
    if pipe.class_encoder is None:
        raise ValueError("pipe has no class_encoder: a diffusion classifier compares conditions")
    if not len(timesteps):
        raise ValueError("timesteps is empty: a diffusion classifier needs one or more")
    pipe.check_inputs(images)
    clean = pipe.prepare_images(images)
    inside = (clean > -1).any(dim=1, keepdim=True)
    healthy, unhealthy = class_names or pipe.class_encoder.config.class_names[:2]
    count, generator = len(clean), torch.Generator().manual_seed(seed)
    condition = pipe.encode_classes([healthy] * count + [unhealthy] * count, 2 * count)
    scores = clean.new_zeros(count)
    for t in timesteps:
        noise = torch.randn(clean.shape[1:], generator=generator).to(clean).expand_as(clean)
        everywhere = torch.full((count,), t, device=clean.device)
        noisy = pipe.scheduler.add_noise(clean, noise, everywhere)
        prediction = pipe.predict_noise(torch.cat([noisy, noisy]), t, condition)
        target = training_target(pipe.scheduler, clean, noise, everywhere)
        errors = [((part - target).pow(2) * inside).sum(dim=(1, 2, 3)) for part in prediction.chunk(2)]
        scores += (errors[0] - errors[1]) / len(timesteps)
    return scores
