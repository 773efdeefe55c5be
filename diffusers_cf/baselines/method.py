"""What every trainable method has in common: sizes, training losses, settings of inference, the map."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin

from diffusers_cf.images import resize_images


class AnomalyMethod:
    """The contract that tables, figures and evaluation rely on.

    Attributes:
        whole_patient: whether `anomaly_map` needs all slices of a patient in one call.
        settings: settings of inference in use; `candidates` lists those to choose from on validation slices.
        network_evaluations_per_slice: what a map costs with these settings.
    """

    whole_patient = False
    candidates: Sequence[dict] = ({},)
    network_evaluations_per_slice: float = 1

    def __init__(self):
        self.settings = dict(self.candidates[0])

    def choose_among(self, candidates: Sequence[dict]) -> None:
        """Puts other `candidates` in the place of the method's own; the first one is in use until one is chosen."""
        self.candidates, self.settings = candidates, dict(candidates[0])

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Maps `(N, h, w)`, higher = more lesion, of images `(N, C, H, W)` in input units."""
        raise NotImplementedError

    def maps_of_candidates(self, images: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields `(index of a candidate, its maps)`; a method that shares work between candidates has its own."""
        kept = self.settings
        for index, settings in enumerate(self.candidates):
            self.settings = dict(settings)
            yield index, self.anomaly_map(images)
        self.settings = kept


class TrainableMethod(ModelMixin, ConfigMixin, AnomalyMethod):
    """A method that learns; its configuration holds `num_channels` and `image_size`, the network's.

    Attributes:
        trained_on: `healthy`, or `all` slices (with their labels).
        averaged: whether inference uses the moving average of the weights.
        comparable_from: share of the training after which validation losses measure one and the same task.
        mixed_precision: whether its losses may be computed in bfloat16.
        max_grad_norm: gradients of an optimiser's step are clipped to this norm; None for no clipping.
    """

    trained_on = "healthy"
    averaged = False
    max_grad_norm: float | None = 1.0
    comparable_from = 0.0
    mixed_precision = True

    def __init__(self):
        ModelMixin.__init__(self)
        AnomalyMethod.__init__(self)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """A fresh optimiser for each name that `losses` yields."""
        raise NotImplementedError

    def learning_rate_factor(self, progress: float) -> float:
        """What the learning rates are multiplied with when this share of the training is done."""
        return 1.0

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields `(optimiser's name, scalar loss)`; that optimiser steps before the next one is asked for.

        Args:
            batch: from [`training.TrainingSlices`]: `images` in [-1, 1] and `noise` `(N, C, h, w)`, `labels`,
                `timesteps` and `uniform` `(N,)`.
            progress: share of the training that is done, from 0 to 1; stages switch by it.
        """
        raise NotImplementedError

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A scalar that falls while the method learns, from a batch of validation slices as in `losses`.

        Unless a method says otherwise it is the first loss of training's last step.
        """
        return next(self.losses(batch, 1.0))[1]

    def network_input(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, C, H, W)` in input units, cut at 1 and resized to `(N, C, h, w)`, still in input units."""
        side = self.config.image_size
        return resize_images(images.to(self.device, torch.float32).clamp(max=1), (side, side))


def unit_images(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Images of a training batch `(N, C, h, w)` in input units, [0, 1]."""
    return (batch["images"] + 1) / 2


def foreground(images: torch.Tensor) -> torch.Tensor:
    """Where any channel of images `(N, C, h, w)` in input units is above 0, `(N, 1, h, w)`, of the images' dtype."""
    return (images > 0).any(dim=1, keepdim=True).to(images)


def residual_map(images: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """Mean over channels of |x - x'| in the foreground, 0 outside: two times `(N, C, h, w) -> (N, h, w)`."""
    return ((images - restored).abs() * foreground(images)).mean(dim=1)


@contextmanager
def evaluation_mode(network: torch.nn.Module) -> Iterator[None]:
    """Within this context batch norm uses its running statistics, so no image depends on the rest of its batch."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
