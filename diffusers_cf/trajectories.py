"""Many settings of inference from one encoding, which depends on neither guidance scale nor strength."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from diffusers_cf.heatmaps import heatmap
from diffusers_cf.images import resize_images


def encode_trajectory(pipe, prepared: torch.Tensor, strength: float, num_inference_steps: int) -> list[torch.Tensor]:
    """Latents `(N, C, h, w)` after 0, 1, .., K steps of the first loop of Algorithm 1, K = round(n L).

    Args:
        pipe: a `CounterfactualDDIMPipeline`.
        prepared: `(N, C, h, w)`, what `pipe.prepare_images` made, or windows of it.
        strength: the largest L that is wanted.
        num_inference_steps: n, steps of the full grid.
    """
    latents = [prepared]

    def keep(_, step, timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    settings = pipe.resolve_settings(strength=strength, num_inference_steps=num_inference_steps)
    pipe.encode(prepared, settings, keep)
    return latents


def heatmaps_of_settings(
    pipe,
    images: torch.Tensor,
    strengths: Sequence[float],
    guidance_scales: Sequence[float],
    maps: Sequence[str],
    num_inference_steps: int,
) -> Iterator[tuple[tuple[float, float, str], np.ndarray]]:
    """Yields `((strength, guidance_scale, map), heatmaps (N, H, W))` of every combination, strengths rising.

    Costs one encoding to the largest strength, one decoding for each strength and scale, and one more a strength where
    a map other than `counterfactual` is asked for.

    Args:
        pipe: a `CounterfactualDDIMPipeline`.
        images: `(N, C, H, W)` in input units.
        strengths: values of L.
        guidance_scales: values of w.
        maps: kinds of maps.
        num_inference_steps: n, steps of the full grid.
    """
    pipe.check_inputs(images)
    prepared = pipe.prepare_images(images)
    groups = pipe.windows(prepared)
    encodings = [encode_trajectory(pipe, g.cut(prepared), max(strengths), num_inference_steps) for g in groups]
    for strength in sorted(strengths):
        walk = {"strength": strength, "num_inference_steps": num_inference_steps}
        latents = [encoding[round(num_inference_steps * strength)] for encoding in encodings]
        # x_cf is compared with the image itself, or with what the null condition decodes
        references = {"counterfactual": [(encoding[0] + 1) / 2 for encoding in encodings]}
        if set(maps) != {"counterfactual"}:
            null = [pipe.denoise(encoded, None, 0, **walk) for encoded in latents]
            references |= dict.fromkeys(set(maps) - {"counterfactual"}, null)
        for scale in guidance_scales:
            decoded = [pipe.denoise(encoded, None, scale, **walk) for encoded in latents]
            for kind in maps:
                heat = torch.zeros_like(prepared[:, 0])
                for group, *pair in zip(groups, references[kind], decoded, strict=True):
                    group.paste(heat, heatmap(kind, *pair, pipe.preprocessing.get("signs")))
                heat = resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0]
                yield (strength, scale, kind), heat.cpu().numpy()
