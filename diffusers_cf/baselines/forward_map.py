"""Forward map: what the classes disagree on while an image is encoded, without decoding (after AnoFPDM, Che et al.)."""

from collections.abc import Iterator, Sequence

import torch

from diffusers_cf.baselines.method import AnomalyMethod, foreground
from diffusers_cf.guidance import implicit_guidance
from diffusers_cf.images import network_images, to_device
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


class ForwardMap(AnomalyMethod):
    """Mean over the encoding of |x0_null - x0_guided|, two predictions of the clean image from the same x.

    The walk is the first loop of Algorithm 1 under the null condition, without fixed-point refinement. Each of its K
    steps predicts the noise under null and target in one batch, and the inverse scheduler makes both clean images. The
    idea is AnoFPDM's (Che et al. 2025), which compares with the image itself, and chooses weights and end by itself.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): a trained conditional pipeline with a [`DynamicDDIMInverseScheduler`]; the
            first class is the target.

    Raises:
        ValueError: the pipeline has no class encoder, or a stock inverse scheduler.
    """

    # The guided difference is proportional to the scale but for normalisation, so few scales tell all.
    candidates = [
        {"guidance_scale": scale, "strength": strength, "num_inference_steps": 100}
        for strength in (0.2, 0.4, 0.6, 0.8)
        for scale in (1.0, 3.0)
    ]

    def __init__(self, pipe: CounterfactualDDIMPipeline):
        if pipe.class_encoder is None:
            raise ValueError("pipe has no class_encoder: a forward map compares conditions")
        if not hasattr(pipe.inverse_scheduler, "predict_original"):
            name = type(pipe.inverse_scheduler).__name__
            raise ValueError(f"inverse_scheduler is {name}: a forward map needs DynamicDDIMInverseScheduler")
        super().__init__()
        self.pipe = pipe

    @property
    def network_evaluations_per_slice(self) -> int:
        """2K: both conditions at each step of the encoding."""
        return 2 * self._num_steps(self.settings)

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Maps `(N, h, w)` at network size, at least 0, of images `(N, C, H, W)`; both in input units."""
        return dict(self._maps(images, [self.settings]))[0]

    def maps_of_candidates(self, images: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields `(index of a candidate, its maps)`; those of the same `num_inference_steps` share one walk."""
        yield from self._maps(images, self.candidates)

    def _num_steps(self, settings: dict) -> int:
        # resolved, so that a value out of range is refused here as by the pipeline
        settings = self.pipe.resolve_settings(**settings)
        return round(settings["num_inference_steps"] * settings["strength"])

    def _maps(self, images: torch.Tensor, candidates: Sequence[dict]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields `(index, maps)` of settings; nothing is computed where the pipeline computes nothing."""
        pipe = self.pipe
        pipe.check_inputs(images)
        prepared = network_images(images, pipe.image_size, pipe.config.clip_input)
        groups = pipe.windows(prepared)  # before the images travel: reading them back would wait for earlier ones
        prepared = to_device(prepared, pipe._execution_device)
        maps = [torch.zeros_like(prepared[:, 0]) for _ in candidates]
        for group in groups:
            for index, found in self._maps_of_windows(group.cut(prepared), candidates):
                group.paste(maps[index], found)
        yield from enumerate(maps)

    def _maps_of_windows(
        self, latents: torch.Tensor, candidates: Sequence[dict]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields `(index, maps)` of settings with a step to walk, each once its own K steps are averaged."""
        inside = foreground((latents + 1) / 2)[:, 0]
        for grid in dict.fromkeys(c["num_inference_steps"] for c in candidates):
            chosen = {i: c for i, c in enumerate(candidates) if c["num_inference_steps"] == grid}
            ends = {index: self._num_steps(settings) for index, settings in chosen.items()}
            scales = {settings["guidance_scale"] for settings in chosen.values()}
            sums = {scale: torch.zeros_like(inside) for scale in scales}
            for step, changes in enumerate(self._walk(latents, grid, max(ends.values()), scales), start=1):
                for scale, change in changes.items():
                    sums[scale] += change
                for index, end in ends.items():
                    if end == step:
                        yield index, sums[chosen[index]["guidance_scale"]] / step * inside

    def _walk(
        self, latents: torch.Tensor, num_inference_steps: int, steps: int, scales: set[float]
    ) -> Iterator[dict[float, torch.Tensor]]:
        """Yields for each step of the encoding the change `(N, h, w)` in input units at each guidance scale."""
        scheduler, count = self.pipe.inverse_scheduler, len(latents)
        scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            both = self.pipe.encode_classes([None] * count + [self._target] * count, 2 * count)
        for t in scheduler.timesteps[:steps]:
            with torch.no_grad():
                told = scheduler.network_timestep(t)
                null, target = self.pipe.predict_noise(torch.cat([latents, latents]), told, both).chunk(2)
                clean, changes = scheduler.predict_original(null, t, latents), {}
                for scale in scales:
                    guided = scheduler.predict_original(implicit_guidance(null, target, scale), t, latents)
                    # the network's range [-1, 1] is twice as wide as the input's
                    changes[scale] = (clean - guided).abs().mean(dim=1) / 2
                latents = scheduler.step(null, t, latents).prev_sample
            yield changes

    @property
    def _target(self) -> str:
        return self.pipe.class_encoder.config.class_names[0]
