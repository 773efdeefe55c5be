"""The training objective (Eq. 1) and the dropout of the condition that implicit guidance needs (Sec. 3.2)."""

import torch
from diffusers.training_utils import compute_snr


# Share of the training after which `rising_timesteps` returns timesteps of the whole range.
ALL_TIMESTEPS_FROM = 0.75


def noise_prediction_loss(
    model, scheduler, images: torch.Tensor, class_ids: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return Eq. 1, a float32 scalar: the mean of `(eps_theta(x_t, c, t) - eps)^2` over samples, channels and pixels.

    If the scheduler's `prediction_type` is not `epsilon`, the target is that of [`training_target`] instead of eps.

    Args:
        model (`Callable`): `(x_t, t, class_ids) -> prediction`, such as [`ConditionalNoisePredictor`].
        scheduler (`SchedulerMixin`): has `add_noise`, `get_velocity`, `alphas_cumprod` and `config.prediction_type`.
        images (`torch.Tensor`): x_0 in the network's range [-1, 1], `(N, C, H, W)`.
        class_ids (`torch.Tensor`): row of each sample's class in the class encoder, integers `(N,)`.
        noise (`torch.Tensor`): eps ~ N(0, I), `(N, C, H, W)`.
        timesteps (`torch.Tensor`): t, integers `(N,)` in [0, T).
        snr_gamma (`float`, *optional*): gamma of the min-SNR weights (Hang et al. 2023); None for equal weights.
    """
    noisy = scheduler.add_noise(images, noise, timesteps)
    prediction = model(noisy, timesteps, class_ids).float()
    per_sample = (prediction - training_target(scheduler, images, noise, timesteps)).pow(2).mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        per_sample = per_sample * min_snr_weight(scheduler, timesteps, snr_gamma)
    return per_sample.mean()


def training_target(scheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return what the network learns to predict, `(N, C, H, W)`: noise, image or velocity, by `prediction_type`.

    The arguments are those of [`noise_prediction_loss`].

    Raises:
        ValueError: the scheduler's `prediction_type` is unknown.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return images
    if kind == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    raise ValueError(f"prediction_type is {kind!r}: it must be one of epsilon, v_prediction, sample")


def min_snr_weight(scheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the min-SNR weight of each sample's loss, `(N,)`.

    With snr = alpha-bar / (1 - alpha-bar) it is min(snr, gamma) for a network that predicts the image; divided by snr
    for one that predicts epsilon, and by snr + 1 for the velocity.
    """
    snr = compute_snr(scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisor[scheduler.config.prediction_type]


def drop_condition(class_ids: torch.Tensor, null_id: int, probability: float, uniform: torch.Tensor) -> torch.Tensor:
    """Replace the class of each sample by the null symbol with the same probability, independently (Sec. 3.2).

    Args:
        class_ids (`torch.Tensor`): row of each sample's class in the class encoder, integers `(N,)`.
        null_id (`int`): row of the null symbol.
        probability (`float`): in [0, 1]; the paper uses 0.35.
        uniform (`torch.Tensor`): a draw from U[0, 1) for each sample, `(N,)`.
    """
    return torch.where(uniform < probability, torch.full_like(class_ids, null_id), class_ids)


def rising_timesteps(timesteps: torch.Tensor, progress: float, first: float) -> torch.Tensor:
    """Scale timesteps so that training begins at low noise levels and later covers all of them.

    Lesions are visible at low noise, where a short training learns the meaning of the classes. The range is constant
    for the first quarter of the training. It then grows linearly until it is complete at three quarters.

    Args:
        timesteps (`torch.Tensor`): drawn from the whole range [0, T), integers `(N,)`.
        progress (`float`): share of the training that is done, in [0, 1].
        first (`float`): share of the range at the beginning, in [0, 1]; 1 changes nothing.

    Returns:
        `torch.Tensor`: the timesteps times a factor from `first` to 1, rounded down, integers `(N,)`.
    """
    risen = min(max(2 * (progress - ALL_TIMESTEPS_FROM) + 1, 0.0), 1.0)
    return (timesteps * (first + (1 - first) * risen)).long()
