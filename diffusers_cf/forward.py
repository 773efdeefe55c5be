"""Forward map: what the classes disagree on while an image is encoded, without decoding (after AnoFPDM, Che et al. 2025)."""

from collections.abc import Sequence

import torch

from diffusers_cf.guidance import implicit_guidance


def check_forward(pipe) -> None:
    """Raises ValueError unless a pipeline can make the map `forward`: it knows classes and has our inverse scheduler."""
    if pipe.class_encoder is None:
        raise ValueError("map is 'forward': it compares conditions, and this model has no class_encoder")
    if not hasattr(pipe.inverse_scheduler, "predict_original"):
        name = type(pipe.inverse_scheduler).__name__
        raise ValueError(f"map is 'forward': it needs a DynamicDDIMInverseScheduler, and inverse_scheduler is {name}")


class ForwardChange:
    """Change from null to guided prediction of the clean image, its mean over the steps of an encoding.

    Takes the place of the null prediction in the first loop of Algorithm 1 (`pipe.encode(.., predict=..)`): each step
    predicts the noise under null and target in one batch, the inverse scheduler makes a clean image of either, and the
    null one alone goes on. A step from the clean image adds nothing, since there is no noise to predict. The idea is AnoFPDM's, which compares with the image itself, and chooses weights and end by
    itself.

    Args:
        pipe: a `CounterfactualDDIMPipeline` that [`check_forward`] lets pass.
        latents: `(N, C, h, w)`, what is encoded, in [-1, 1].
        guidance_scales: values of w, all from the same walk.
        target: class by name, as in `pipe.denoise`.
    """

    def __init__(
        self, pipe, latents: torch.Tensor, guidance_scales: Sequence[float], target: str | Sequence[str] | None = None
    ):
        target = pipe.class_encoder.config.class_names[0] if target is None else target
        pair = (pipe.encode_classes(names, len(latents)) for names in (None, target))
        self._pipe, self._both = pipe, tuple(torch.cat(parts) for parts in zip(*pair, strict=True))
        self._inside = (latents > -1).any(dim=1, keepdim=True)
        self._changes = {scale: torch.zeros_like(latents) for scale in guidance_scales}
        self._sizes = {scale: torch.zeros_like(latents[:, 0]) for scale in guidance_scales}
        self._steps = 0

    def __call__(self, sample: torch.Tensor, timestep: int) -> torch.Tensor:
        """The null prediction for one step of the encoding, `(N, C, h, w)`."""
        scheduler = self._pipe.inverse_scheduler
        told = scheduler.network_timestep(timestep)
        null, target = self._pipe.predict_noise(torch.cat([sample, sample]), told, self._both).chunk(2)
        clean = scheduler.predict_original(null, timestep, sample)
        for scale, sums in self._changes.items():
            guided = scheduler.predict_original(implicit_guidance(null, target, scale), timestep, sample)
            # the network's range [-1, 1] is twice as wide as the input's
            change = (guided - clean) / 2
            sums += change
            self._sizes[scale] += change.abs().mean(dim=1)
        self._steps += 1
        return null

    def change(self, guidance_scale: float) -> torch.Tensor:
        """Mean of x0_guided - x0_null, `(N, C, h, w)` in input units, 0 outside the foreground."""
        return self._changes[guidance_scale] * self._inside / max(1, self._steps)

    def heatmaps(self, guidance_scale: float) -> torch.Tensor:
        """Mean of |x0_guided - x0_null| over steps and channels, `(N, h, w)` in input units, 0 outside the foreground."""
        return self._sizes[guidance_scale] * self._inside[:, 0] / max(1, self._steps)
