"""What evaluation and tables expect of an anomaly method, and what the trainable methods share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin

from diffusers_cf.images import resize_images


@dataclass(frozen=True)
class Grid:
    """Settings of inference to choose from on validation slices."""

    num_inference_steps: int  # of the full grid of every diffusion model; fixed, not chosen
    guidance_scales: tuple[float, ...]  # values of w
    strengths: tuple[float, ...]  # values of L, in (0, 1]
    classifier_scales: tuple[float, ...]  # values of s, for classifier guidance
    restoration_steps: int | None = None  # gradient steps of the VAE restoration; None for its default

    def settings(self, scales: Sequence[float], kind: str = "counterfactual") -> list[dict]:
        """Return the pipeline's settings for every combination of these scales with the strengths."""
        fixed = {"num_inference_steps": self.num_inference_steps, "map": kind}
        return [{"guidance_scale": w, "strength": s} | fixed for s in self.strengths for w in scales]


class AnomalyMethod:
    """The contract that evaluation, tables and figures rely on."""

    whole_patient = False  # whether `anomaly_map` needs all slices of a patient in one call
    candidates: Sequence[dict] = ({},)  # settings of inference to choose from on validation slices
    network_evaluations_per_slice: float = 1  # NFE of a map with the settings in use

    def __init__(self):
        self.settings = dict(self.candidates[0])

    def candidates_on(self, grid: Grid) -> Sequence[dict]:
        """Return the candidates for a grid; only methods that have settings of inference override this."""
        return self.candidates

    def learn(self, slices) -> dict:
        """Learn what the map with the settings in use needs beside a network, from labels of training slices.

        Args:
            slices (`SliceDataset`): the training split.

        Returns:
            `dict`: what was learned, for the result.
        """
        return {}

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Return maps `(N, h, w)`, higher = more lesion, of images `(N, C, H, W)` in input units."""
        raise NotImplementedError

    def maps_of_candidates(self, images: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(index of a candidate, its maps)`; override it if candidates can share work."""
        kept = self.settings
        for index, settings in enumerate(self.candidates):
            self.settings = dict(settings)
            yield index, self.anomaly_map(images)
        self.settings = kept


class PipelineMap(AnomalyMethod):
    """The map of a pipeline with one setting.

    Args:
        pipe (`CounterfactualDDIMPipeline`): the model.
        settings (`Mapping`): arguments of its call.
    """

    def __init__(self, pipe, settings: Mapping):
        self.pipe, self.settings = pipe, dict(settings)

    @property
    def network_evaluations_per_slice(self) -> int:
        return self.pipe.network_evaluations(**self.settings)

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        return self.pipe(images, **self.settings).heatmaps


class TrainableMethod(ModelMixin, ConfigMixin, AnomalyMethod):
    """A method that is trained. Its config holds `num_channels` and `image_size` of the network's input."""

    trained_on = "healthy"  # slices, or "all" with their labels
    clip_input = True  # whether training images are cut at 1
    averaged = False  # whether inference uses the moving average of the weights
    comparable_from = 0.0  # share of the training after which validation losses can be compared
    mixed_precision = True  # whether the losses may be computed in bfloat16
    max_grad_norm: float | None = 1.0  # gradients of a step are clipped to this norm; None for no clipping

    def __init__(self):
        ModelMixin.__init__(self)
        AnomalyMethod.__init__(self)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return a new optimiser for each name that `losses` yields."""
        raise NotImplementedError

    def learning_rate_factor(self, progress: float) -> float:
        """Return the factor of the learning rates after this share of the training."""
        return 1.0

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name of an optimiser, scalar loss)`; that optimiser steps before the next loss is computed.

        Args:
            batch (`dict`): from [`training.loop.TrainingSlices`]: `images` in [-1, 1] and `noise`, `(N, C, h, w)`;
                `labels`, `timesteps` and `uniform`, `(N,)`.
            progress (`float`): share of the training that is done, from 0 to 1.
        """
        raise NotImplementedError

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a scalar to compare checkpoints by; the default is the first loss of the last training step."""
        with frozen(self):
            return next(self.losses(batch, 1.0))[1]

    def network_input(self, images: torch.Tensor) -> torch.Tensor:
        """Clip images `(N, C, H, W)` in input units at 1 and resize them to `(N, C, h, w)`, the network's size."""
        side = self.config.image_size
        return resize_images(images.to(self.device, torch.float32).clamp(max=1), (side, side))


def unit_images(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the images of a training batch in input units, `(N, C, h, w)` in [0, 1]."""
    return (batch["images"] + 1) / 2


def foreground(images: torch.Tensor) -> torch.Tensor:
    """Return 1 where any channel of images `(N, C, h, w)` in input units is above 0, else 0: `(N, 1, h, w)`."""
    return (images > 0).any(dim=1, keepdim=True).to(images)


def residual_map(images: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """Return the mean over channels of |x - x'| in the foreground, 0 outside: `(N, C, h, w)` to `(N, h, w)`."""
    return ((images - restored).abs() * foreground(images)).mean(dim=1)


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Keep modules in evaluation mode and without gradients for their parameters within this context.

    Batch norm then uses its running statistics, so that no image depends on the others of its batch.
    """
    modes = [module.training for module in modules]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for module in modules:
            module.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
        for parameter in parameters:
            parameter.requires_grad_(True)
