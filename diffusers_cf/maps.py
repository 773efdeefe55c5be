"""Heatmaps: the last line of Algorithm 1, its variants, and maps that need no decoding."""

from collections.abc import Callable, Iterator, Sequence

import torch

from diffusers_cf.images import resize_images
from diffusers_cf.models import implicit_guidance
from diffusers_cf.settings import COMPARED_MAPS


def anomaly_heatmap(reference: torch.Tensor, counterfactual: torch.Tensor) -> torch.Tensor:
    """Return the last line of Algorithm 1: the mean over channels of |x - x_cf|, `(N, C, H, W)` to `(N, H, W)`."""
    return (reference - counterfactual).abs().mean(dim=1)


def signed_heatmap(reference: torch.Tensor, counterfactual: torch.Tensor, signs: Sequence[float]) -> torch.Tensor:
    """Return the mean over channels of `weight (x - x_cf)`, 0 where it is negative: `(N, C, H, W)` to `(N, H, W)`.

    This map is not in the paper. Noise of either sign cancels out in the mean.

    Args:
        reference (`torch.Tensor`): x, or x_null, `(N, C, H, W)`.
        counterfactual (`torch.Tensor`): x_cf, `(N, C, H, W)`.
        signs (`Sequence[float]`): weight of each channel, above 0 if lesions are brighter than tissue, below 0 if they
            are darker, 0 if the channel says nothing; see [`evaluation.sweep.learn_signs`].
    """
    weights = torch.tensor(signs, dtype=reference.dtype, device=reference.device).reshape(1, -1, 1, 1)
    return (weights * (reference - counterfactual)).mean(dim=1).clamp(min=0)


def heatmap(kind: str, reference: torch.Tensor, counterfactual: torch.Tensor, signs: Sequence[float] | None = None):
    """Return [`signed_heatmap`] if the map is `signed`, else [`anomaly_heatmap`], `(N, H, W)`."""
    if kind == "signed":
        return signed_heatmap(reference, counterfactual, signs)
    return anomaly_heatmap(reference, counterfactual)


def per_present_channel(heatmaps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Turn means `(N, h, w)` over all channels into means over those that images `(N, C, H, W)` have anywhere above 0."""
    present = (images > 0).flatten(2).any(dim=2).sum(dim=1).clamp(min=1)
    return heatmaps * (images.shape[1] / present)[:, None, None]


def check_signs(signs: object, channels: int) -> None:
    """Raise ValueError unless `signs` holds a number for each channel, which the map `signed` needs."""
    numbers = isinstance(signs, Sequence) and all(isinstance(sign, (int, float)) for sign in signs)
    if not numbers or len(signs) != channels:
        raise ValueError("map is 'signed': preprocessing holds no `signs`, one for each channel (sweep --store)")


@torch.no_grad()
def student_maps(student: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the probability of disease that a student gives each pixel, in one pass.

    Args:
        student (`UNet2DModel`): takes images in [-1, 1] at its own size and returns one logit a pixel.
        images (`torch.Tensor`): `(N, C, H, W)` in input units.

    Returns:
        `torch.Tensor`: `(N, h, w)` in [0, 1] at the student's size, 0 outside the foreground.
    """
    inside = resize_images(images.float(), (student.config.sample_size,) * 2).clamp(max=1)
    logits = student((inside * 2 - 1).to(student.dtype), 0).sample[:, 0].float()
    return logits.sigmoid() * (inside > 0).any(dim=1)


def check_map(pipe, kind: str) -> None:
    """Raise ValueError unless a pipeline has what a kind of map needs beside the network and its schedulers."""
    if kind == "student" and pipe.student is None:
        raise ValueError("map is 'student': this model has no student (diffusers-cf distill)")
    if kind not in COMPARED_MAPS:
        return
    if pipe.class_encoder is None:
        raise ValueError(f"map is {kind!r}: it compares conditions, and this model has no class_encoder")
    part = "inverse_scheduler" if kind == "forward" else "scheduler"
    if not hasattr(scheduler := getattr(pipe, part), "predict_original"):
        wanted = "DynamicDDIMInverseScheduler" if kind == "forward" else "DynamicDDIMScheduler"
        raise ValueError(f"map is {kind!r}: it needs a {wanted}, and {part} is {type(scheduler).__name__}")
    if kind == "forward" and scheduler.order > 1:
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
        pipe ([`CounterfactualDDIMPipeline`]): passes [`check_map`].
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


@torch.no_grad()
def delta_maps(
    pipe, latents: torch.Tensor, strength: float, num_inference_steps: int, guidance_scale: float,
    target: str | Sequence[str] | None = None, callback: Callable | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compare the clean images that null and target predict of the image with added noise, the same for both.

    This is the mask of DiffEdit (Couairon et al. 2023) for images instead of words, with the mean over several noise
    levels as in ANDi (Frotscher et al. 2024). Nothing is encoded. Each level of the grid gets one draw of noise and its
    negative, in one batch with both conditions, so that what depends on the draw cancels out to first order.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): passes [`check_map`].
        latents (`torch.Tensor`): x_0 at the network's size, `(N, C, h, w)` in [-1, 1].
        strength (`float`): L, the share of the noise levels.
        num_inference_steps (`int`): n, number of noise levels for L = 1.
        guidance_scale (`float`): w; the map is proportional to it, but for dynamic normalisation.
        target (`str` or list of `str`, *optional*): as in `pipe.decode`.
        callback (`Callable`, *optional*): as in `pipe.decode`, after each level.
        generator (`torch.Generator`, *optional*): of the noise; by default it is the same for all images and calls.

    Returns:
        The noisy latents of the last level, the change `(N, C, h, w)` and the heatmap `(N, h, w)`, its absolute value
        averaged over channels; in input units, 0 outside the foreground.
    """
    _, timesteps = pipe.timesteps(strength, num_inference_steps)
    conditions = pipe.encode_classes(None, len(latents)), pipe.encode_target(target, len(latents))
    four = tuple(
        torch.cat([null, wanted]).repeat(2, *[1] * (null.ndim - 1)) for null, wanted in zip(*conditions, strict=True)
    )
    generator = generator or torch.Generator().manual_seed(0)
    noisy, change, inside = latents, torch.zeros_like(latents), (latents > -1).any(dim=1, keepdim=True)
    last = pipe.scheduler.config.num_train_timesteps - 1  # the noisier ends of the steps: their first one begins clean
    levels = (timesteps.flip(0) + (last + 1) // num_inference_steps).clamp(max=last)
    for i, t in enumerate(pipe.progress_bar(levels)):
        if pipe.interrupt:
            continue
        noise = torch.randn(latents[:1].shape, generator=generator, device=generator.device).to(latents)
        for_both = [pipe.scheduler.add_noise(latents, draw.expand_as(latents), t[None]) for draw in (noise, -noise)]
        sample = torch.cat([each for each in for_both for _ in conditions])
        epsilon = pipe.predict_noise(sample, t, four).reshape(2, 2, *latents.shape)
        for noisy, (eps_null, eps_target) in zip(for_both, epsilon, strict=True):
            guided = implicit_guidance(eps_null, eps_target, guidance_scale)
            x0_null, x0_target = (pipe.scheduler.predict_original(eps, t, noisy) for eps in (eps_null, guided))
            change += (x0_target - x0_null) / (4 * len(levels)) * inside  # two draws; [-1, 1] is twice as wide
        noisy = pipe.end_of_step(callback, i, t, noisy)
    return noisy, change, change.abs().mean(dim=1)
