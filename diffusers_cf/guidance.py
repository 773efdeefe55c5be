"""How the two branches of the network are put together while decoding: Sec. 3.2."""

import torch


def implicit_guidance(noise_null: torch.Tensor, noise_target: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Implicit (classifier-free) guidance, Sec. 3.2: `w eps(x, c) + (1 - w) eps(x, null)`.

    w is `guidance_scale` as everywhere in diffusers: 0 is unconditional, 1 conditional, above 1 guided.
    """
    return noise_null + guidance_scale * (noise_target - noise_null)
