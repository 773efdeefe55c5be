"""Many settings of inference from one encoding, which depends on neither guidance scale nor strength."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from diffusers_cf.heatmaps import heatmap
from diffusers_cf.images import resize_images


def encode_trajectory(pipe, images: torch.Tensor, strength: float, num_inference_steps: int) -> list[torch.Tensor]:
    """Latents `(N, C, h, w)` after 0, 1, .., K steps of the first loop of Algorithm 1, K = round(n L).

    Args:
        pipe: a `CounterfactualDDIMPipeline`.
        images: `(N, C, H, W)` in input units.
        strength: the largest L that is wanted.
        num_inference_steps: n, steps of the full grid.
    """
    latents = [pipe.prepare_images(images)]

    def keep(_, step, timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    pipe.invert(images, strength, num_inference_steps, callback_on_step_end=keep)
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

    Arguments as in [`encode_trajectory`], and the values to combine. Costs one encoding to the largest strength, one
    decoding for each strength and scale, and one more a strength where a map other than `counterfactual` is asked for.
    """
    latents = encode_trajectory(pipe, images, max(strengths), num_inference_steps)
    image = (latents[0] + 1) / 2
    for strength in sorted(strengths):
        encoded = latents[round(num_inference_steps * strength)]
        walk = {"strength": strength, "num_inference_steps": num_inference_steps}
        null = pipe.denoise(encoded, None, 0, **walk) if set(maps) != {"counterfactual"} else None
        for scale in guidance_scales:
            decoded = pipe.denoise(encoded, None, scale, **walk)
            for kind in maps:
                reference = image if kind == "counterfactual" else null
                heat = heatmap(kind, reference, decoded, pipe.preprocessing.get("signs"))
                heat = resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0]
                heat[~(images > 0).flatten(1).any(dim=1)] = 0
                yield (strength, scale, kind), heat.cpu().numpy()
