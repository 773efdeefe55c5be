"""The training objective: Eq. 1, and the dropping of the condition that makes implicit guidance possible (Sec. 3.2)."""

import torch
from diffusers.training_utils import compute_snr


# Share of a training after which `rising_timesteps` draws from all of them.
ALL_TIMESTEPS_FROM = 0.75


def noise_prediction_loss(
    model, scheduler, images: torch.Tensor, class_ids: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Eq. 1: mean of `|| eps_theta(x_t, c, t) - eps ||^2` over samples, channels and pixels.

    With `prediction_type="v_prediction"` or `"sample"` in the scheduler the network is compared with that target.

    Args:
        model: callable `(x_t, t, class_ids) -> prediction`, such as `ConditionalNoisePredictor`.
        scheduler: a diffusers scheduler with `add_noise`, `alphas_cumprod` and `config.prediction_type`.
        images (`torch.Tensor`): x_0 in the network's range, `(N, C, H, W)`.
        class_ids (`torch.Tensor`): rows of the condition, null where dropped, `(N,)`.
        noise (`torch.Tensor`): eps ~ N(0, I), `(N, C, H, W)`.
        timesteps (`torch.Tensor`): t, integers in [0, T), `(N,)`.
        snr_gamma (`float`, *optional*): min-SNR weighting (Hang et al. 2023): weight min(snr, gamma) / snr for epsilon.

    Returns:
        `torch.Tensor`: the loss, a float32 scalar.
    """
    noisy = scheduler.add_noise(images, noise, timesteps)
    prediction = model(noisy, timesteps, class_ids).float()
    per_sample = (prediction - training_target(scheduler, images, noise, timesteps)).pow(2).mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        per_sample = per_sample * min_snr_weight(scheduler, timesteps, snr_gamma)
    return per_sample.mean()


def training_target(scheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the network is trained to predict, `(N, C, H, W)`, by the scheduler's `prediction_type`.

    Raises:
        ValueError: for an unknown `prediction_type`.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return images
    if kind != "v_prediction":
        raise ValueError(f"prediction_type is {kind!r}: it must be one of epsilon, v_prediction, sample")
    alpha = scheduler.alphas_cumprod.to(images.device)[timesteps].reshape(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * images


def min_snr_weight(scheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight `(N,)` of each sample's loss: min(snr, gamma), divided by what the target's own scale already weighs."""
    snr = compute_snr(scheduler, timesteps)
    capped = snr.clamp(max=gamma)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return capped / divisor[scheduler.config.prediction_type]


def drop_condition(class_ids: torch.Tensor, null_id: int, probability: float, uniform: torch.Tensor) -> torch.Tensor:
    """Replaces each sample's condition by the null symbol with `probability`, independently (Sec. 3.2: 0.35).

    Args:
        class_ids (`torch.Tensor`): rows of the classes, `(N,)`.
        null_id (`int`): row of the null symbol.
        probability (`float`): in [0, 1].
        uniform (`torch.Tensor`): one draw from U[0, 1) for each sample, `(N,)`.
    """
    return torch.where(uniform < probability, torch.full_like(class_ids, null_id), class_ids)


def rising_timesteps(timesteps: torch.Tensor, progress: float, first: float) -> torch.Tensor:
    """A curriculum of noise: timesteps from the lowest `first` of the range, later from the whole of it.

    A lesion shows at low noise, and there a short training learns what the classes mean; the range stays as it is for
    a quarter of the training and then grows evenly, to the whole at three quarters.

    Args:
        timesteps (`torch.Tensor`): drawn from the whole range [0, T), integers `(N,)`.
        progress (`float`): share of the training that is done.
        first (`float`): share of the range to begin with; 1 leaves the timesteps as they are.

    Returns:
        `torch.Tensor`: the timesteps, scaled by `first` to 1 and rounded down, integers `(N,)`.
    """
    risen = min(max(2 * (progress - ALL_TIMESTEPS_FROM) + 1, 0.0), 1.0)
    return (timesteps * (first + (1 - first) * risen)).long()
