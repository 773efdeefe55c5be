"""Class activation map (Zhou et al. 2016): where a classifier of healthy and unhealthy slices finds its evidence."""

from collections.abc import Iterator, Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from diffusers_cf.baselines.method import TrainableMethod, evaluation_mode, foreground, unit_images
from diffusers_cf.images import resize_images


class ClassActivationMap(TrainableMethod):
    """A ResNet trained with the same slice labels as the counterfactual model: the plain weakly supervised rival.

    The last feature map is averaged and classified linearly, so the difference of the two logits is the mean over the
    locations of a score of each one. The default network has one stage: its map is a quarter of the image's side.
    Each further stage halves it. `hidden_sizes=(64, 128, 256, 512), depths=(2, 2, 2, 2)` is ResNet-18.

    Args:
        num_channels: channels of the images.
        image_size: side of the network's images in pixels, a multiple of the map's pixel.
        embedding_size: width of the stem, which divides the side by 4.
        hidden_sizes: widths of the stages.
        depths: residual layers of the stages.
        layer_type: `basic` or `bottleneck`.
        learning_rate: of AdamW.

    Raises:
        ValueError: the stages don't divide the image's side.
    """

    trained_on = "all"

    @register_to_config
    def __init__(
        self,
        num_channels: int = 4,
        image_size: int = 64,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (128,),
        depths: Sequence[int] = (4,),
        layer_type: str = "basic",
        learning_rate: float = 5e-4,
    ):
        super().__init__()
        stride = 2 ** (len(hidden_sizes) + 1)
        if image_size % stride:
            raise ValueError(f"image_size is {image_size}: it must be a multiple of {stride}")
        self.resnet = ResNetForImageClassification(
            ResNetConfig(
                num_channels=num_channels, embedding_size=embedding_size, hidden_sizes=list(hidden_sizes),
                depths=list(depths), layer_type=layer_type, num_labels=2,
            )
        )  # fmt: skip

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW for the classifier."""
        return {"classifier": torch.optim.AdamW(self.parameters(), self.config.learning_rate)}

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields `classifier`, the cross-entropy of healthy (label 0) against unhealthy (any other label)."""
        yield "classifier", self.classifier_loss(batch)

    def classifier_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of a training batch, a scalar."""
        return functional.cross_entropy(self.resnet(unit_images(batch)).logits, (batch["labels"] > 0).long())

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The cross-entropy of validation slices."""
        with evaluation_mode(self):
            return self.classifier_loss(batch)

    def activation_map(self, images: torch.Tensor) -> torch.Tensor:
        """M(x, y) of unhealthy minus that of healthy (Zhou et al. 2016, Eq. 2), of any sign.

        Args:
            images: `(N, C, h, w)` in input units, at the network's size.

        Returns:
            `(N, h / 4, w / 4)` with one stage; its mean plus [`bias_difference`] is the difference of the logits.
        """
        features = self.resnet.resnet(images).last_hidden_state
        healthy, unhealthy = self.resnet.classifier[-1].weight
        return torch.einsum("k,nkhw->nhw", unhealthy - healthy, features)

    @property
    def bias_difference(self) -> torch.Tensor:
        """The classifier's bias of unhealthy minus that of healthy, a scalar."""
        healthy, unhealthy = self.resnet.classifier[-1].bias
        return unhealthy - healthy

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Maps `(N, h, w)`, at least 0: -log p(healthy) of each location's features alone, 0 outside the foreground.

        That is softplus(M + bias): close to Grad-CAM's ReLU above 0, but below 0 it keeps the order of tissue, which
        a clamp would tie with the background, and a plain M would rank under it.

        Args:
            images: `(N, C, H, W)` in input units.
        """
        images = self.network_input(images)
        with evaluation_mode(self):
            logits = self.activation_map(images) + self.bias_difference
        logits = resize_images(logits[:, None], images.shape[-2:])
        return (functional.softplus(logits) * foreground(images))[:, 0]

    @torch.no_grad()
    def slice_score(self, images: torch.Tensor) -> torch.Tensor:
        """Probability that each slice is unhealthy, `(N, C, H, W)` in input units -> `(N,)` in [0, 1]."""
        with evaluation_mode(self):
            logits = self.resnet(self.network_input(images)).logits
        return logits.softmax(dim=1)[:, 1]
