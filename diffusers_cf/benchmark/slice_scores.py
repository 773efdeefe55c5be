"""Scores of whole slices without a map, to compare with each map's slice AUROC: position, diffusion classifier."""

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
    """Return the position of each slice within its patient: 0 the lowest slice given, 1 the highest, 0.5 a single one.

    Args:
        patients (`Sequence[str]`): `(N,)`, patient of each slice.
        slices (`Sequence[int]`): `(N,)`, axial index of each slice.

    Returns:
        `np.ndarray`: float64 `(N,)` in [0, 1].
    """
    patients, slices = np.asarray(patients), np.asarray(slices, dtype=np.float64)
    positions = np.full(len(slices), 0.5)
    for patient in np.unique(patients):
        own = patients == patient
        low, high = slices[own].min(), slices[own].max()
        if high > low:
            positions[own] = (slices[own] - low) / (high - low)
    return positions


def position_scores(
    train_labels: Sequence[int], train_positions: Sequence[float], test_positions: Sequence[float]
) -> np.ndarray:
    """Return the probability that a slice is unhealthy given its position: logistic regression on cubic splines.

    Lesions are rare at both ends of the head, so a score that only recognises the ends already detects some of them.

    Args:
        train_labels (`Sequence[int]`): `(N,)`, 0 healthy, anything else unhealthy; both must occur.
        train_positions (`Sequence[float]`): `(N,)`, from [`relative_positions`].
        test_positions (`Sequence[float]`): `(M,)`.

    Returns:
        `np.ndarray`: float64 `(M,)` in (0, 1).
    """
    # knots over all of [0, 1]: those of the data would coincide if every patient had one slice
    splines = SplineTransformer(knots=np.linspace(0, 1, SPLINE_KNOTS)[:, None], extrapolation="constant")
    model = make_pipeline(splines, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(np.asarray(train_positions)[:, None], np.asarray(train_labels) != 0)
    return model.predict_proba(np.asarray(test_positions)[:, None])[:, 1]


@torch.no_grad()
def diffusion_classifier_scores(
    pipe: CounterfactualDDIMPipeline, images: torch.Tensor, timesteps: Sequence[int], seed: int
) -> torch.Tensor:
    """Compare how well two conditions predict the noise: the diffusion classifier of Li et al. (2023, Sec. 3.2).

    The score is the mean over t of `||eps - eps_theta(x_t, healthy)||^2 - ||eps - eps_theta(x_t, unhealthy)||^2`,
    summed over channels and foreground. All slices and both conditions get the same noise, so a score does not depend
    on the other slices of the batch.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): a conditional pipeline; its first two classes are compared.
        images (`torch.Tensor`): `(N, C, H, W)` in input units.
        timesteps (`Sequence[int]`): the t to average over, one or more, 2 NFE per slice each.
        seed (`int`): seed of the noise.

    Returns:
        `torch.Tensor`: float32 `(N,)`, higher = more unhealthy; 0 for an empty slice.
    """
    clean = pipe.prepare_images(images)  # (N, C, h, w)
    inside = (clean > -1).any(dim=1, keepdim=True)
    healthy, unhealthy = pipe.class_encoder.config.class_names[:2]
    count, generator = len(clean), torch.Generator().manual_seed(seed)
    condition = pipe.encode_classes([healthy] * count + [unhealthy] * count, 2 * count)
    scores = clean.new_zeros(count)
    for t in timesteps:
        noise = torch.randn(clean.shape[1:], generator=generator).to(clean).expand_as(clean)
        everywhere = torch.full((count,), t, device=clean.device)
        noisy = pipe.scheduler.add_noise(clean, noise, everywhere)
        prediction = pipe.predict_noise(torch.cat([noisy, noisy]), t, condition)  # (2 N, C, h, w)
        target = training_target(pipe.scheduler, clean, noise, everywhere)
        errors = [((part - target).pow(2) * inside).sum(dim=(1, 2, 3)) for part in prediction.chunk(2)]
        scores += (errors[0] - errors[1]) / len(timesteps)
    return scores
