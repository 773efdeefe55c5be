"""Heatmaps: the last line of Algorithm 1, its variants, and the forward map, which needs no decoding."""

from collections.abc import Callable, Iterator, Sequence

import torch

from diffusers_cf.models import implicit_guidance


def anomaly_heatmap(reference: torch.Tensor, counterfactual: torch.Tensor) -> torch.Tensor:
    """Return the last line of Algorithm 1: the mean over channels of |x - x_cf|, `(N, C, H, W)` to `(N, H, W)`."""
    return (reference - counterfactual).abs().mean(dim=1)


def signed_heatmap(reference: torch.Tensor, counterfactual: torch.Tensor, signs: Sequence[float]) -> torch.Tensor:
    """Return the mean over channels of `sign (x - x_cf)`, 0 where it is negative: `(N, C, H, W)` to `(N, H, W)`.

    This map is not in the paper. Noise of either sign cancels out in the mean.

    Args:
        reference (`torch.Tensor`): x, or x_null, `(N, C, H, W)`.
        counterfactual (`torch.Tensor`): x_cf, `(N, C, H, W)`.
        signs (`Sequence[float]`): for each channel 1 if lesions are brighter than tissue, -1 if they are darker.
    """
    weights = torch.tensor(signs, dtype=reference.dtype, device=reference.device).reshape(1, -1, 1, 1)
    return (weights * (reference - counterfactual)).mean(dim=1).clamp(min=0)


def heatmap(kind: str, reference: torch.Tensor, counterfactual: torch.Tensor, signs: Sequence[float] | None = None):
    """Return [`signed_heatmap`] if the map is `signed`, else [`anomaly_heatmap`], `(N, H, W)`."""
    if kind == "signed":
        return signed_heatmap(reference, counterfactual, signs)
    return anomaly_heatmap(reference, counterfactual)


def check_signs(signs: object, channels: int) -> None:
    """Raise ValueError unless `signs` holds a number for each channel, which the map `signed` needs."""
    numbers = isinstance(signs, Sequence) and all(isinstance(sign, (int, float)) for sign in signs)
    if not numbers or len(signs) != channels:
        raise ValueError("map is 'signed': preprocessing holds no `signs`, one for each channel (sweep --store)")


def check_forward(pipe) -> None:
    """Raise ValueError unless a pipeline has what the map `forward` needs: classes and our inverse scheduler."""
    if pipe.class_encoder is None:
        raise ValueError("map is 'forward': it compares conditions, and this model has no class_encoder")
    if not hasattr(pipe.inverse_scheduler, "predict_original"):
        name = type(pipe.inverse_scheduler).__name__
        raise ValueError(f"map is 'forward': it needs a DynamicDDIMInverseScheduler, and inverse_scheduler is {name}")
    if pipe.inverse_scheduler.order > 1:
        raise ValueError("map is 'forward': its steps are not refined, set num_fixed_point_iterations=0")


@torch.no_grad()
def forward_maps(
    pipe, latents: torch.Tensor, strength: float, num_inference_steps: int, guidance_scales: Sequence[float],
    target: str | Sequence[str] | None = None, callback: Callable | None = None,
) -> Iterator[tuple[torch.Tensor, dict[float, tuple[torch.Tensor, torch.Tensor]]]]:  # fmt: skip
    """Encode with the null condition and compare the clean images that null and target predict on the way.

    This follows AnoFPDM (Che et al. 2025), which compares with the image itself, and chooses step weights and the last
    step automatically. Each step predicts the noise under both conditions in one batch and continues with the null
    prediction. A step from the clean image adds nothing, since there is no noise to predict.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): passes [`check_forward`].
        latents (`torch.Tensor`): x_0 at the network's size, `(N, C, h, w)` in [-1, 1].
        strength (`float`): L, as in `pipe.encode`.
        num_inference_steps (`int`): n, as in `pipe.encode`.
        guidance_scales (`Sequence[float]`): values of w. All are computed from the same network calls.
        target (`str` or list of `str`, *optional*): as in `pipe.decode`.
        callback (`Callable`, *optional*): as in `pipe.decode`.

    Yields:
        The latents and a dict from guidance scale to `(change, heatmap)`, before the first and after each step. The
        change `(N, C, h, w)` is the mean over the steps so far of x0_target - x0_null, and the heatmap `(N, h, w)` is
        that of its absolute value, averaged over channels; in input units, 0 outside the foreground.
    """
    timesteps, _ = pipe.timesteps(strength, num_inference_steps)
    null, wanted = pipe.encode_classes(None, len(latents)), pipe.encode_target(target, len(latents))
    both = tuple(torch.cat(pair) for pair in zip(null, wanted, strict=True))
    inside = (latents > -1).any(dim=1, keepdim=True)
    changes = {w: torch.zeros_like(latents) for w in guidance_scales}
    sizes = {w: torch.zeros_like(latents[:, 0]) for w in guidance_scales}
    yield latents, {w: (changes[w], sizes[w]) for w in guidance_scales}
    for i, t in enumerate(pipe.progress_bar(timesteps)):
        if pipe.interrupt:
            continue
        eps_null, eps_target = pipe.predict_noise(torch.cat([latents, latents]), t, both).chunk(2)
        x0_null = pipe.inverse_scheduler.predict_original(eps_null, t, latents)
        for w in guidance_scales:
            x0_target = pipe.inverse_scheduler.predict_original(implicit_guidance(eps_null, eps_target, w), t, latents)
            change = (x0_target - x0_null) / 2 * inside  # [-1, 1] is twice as wide as input units
            changes[w] += change
            sizes[w] += change.abs().mean(dim=1)
        latents = pipe.inverse_scheduler.step(eps_null, t, latents).prev_sample
        latents = pipe.end_of_step(callback, i, t, latents)
        yield latents, {w: (changes[w] / (i + 1), sizes[w] / (i + 1)) for w in guidance_scales}
