"""Class activation map (CAM, Zhou et al. 2016): where a classifier of healthy and unhealthy slices finds its evidence.

The classifier averages its last feature map and ends with a linear layer, so the difference of its two logits is the
mean over locations of a score of each location (Eq. 2). It sees the same slice labels as the counterfactual model.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from diffusers_cf.baselines.method import TrainableMethod, foreground, frozen, unit_images
from diffusers_cf.images import resize_images


class ClassActivationMap(TrainableMethod):
    """A ResNet classifier of slices and its class activation map (method id `cam`).

    With the default of one stage the map has a quarter of the image's side; each further stage halves it.
    `hidden_sizes=(64, 128, 256, 512), depths=(2, 2, 2, 2)` is ResNet-18.

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels.
        embedding_size (`int`): channels of the stem, which divides the side by 4.
        hidden_sizes (`Sequence[int]`): channels of each stage.
        depths (`Sequence[int]`): residual layers of each stage.
        learning_rate (`float`): of AdamW.
    """

    trained_on = "all"

    @register_to_config
    def __init__(
        self, num_channels: int = 4, image_size: int = 64, embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (128,), depths: Sequence[int] = (4,), learning_rate: float = 5e-4,
    ):  # fmt: skip
        super().__init__()
        config = ResNetConfig(
            num_channels=num_channels, embedding_size=embedding_size, hidden_sizes=list(hidden_sizes),
            depths=list(depths), layer_type="basic", num_labels=2,
        )  # fmt: skip
        self.resnet = ResNetForImageClassification(config)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"classifier": torch.optim.AdamW(self.parameters(), self.config.learning_rate)}

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the cross-entropy of healthy (label 0) against unhealthy (any other label)."""
        logits = self.resnet(unit_images(batch)).logits
        yield "classifier", functional.cross_entropy(logits, (batch["labels"] > 0).long())

    def activation_map(self, images: torch.Tensor) -> torch.Tensor:
        """Return the map of unhealthy minus that of healthy, biases included; its mean is the difference of the logits.

        Args:
            images (`torch.Tensor`): `(N, C, h, w)` in input units, at the network's size.

        Returns:
            `torch.Tensor`: `(N, h / 4, w / 4)` with one stage, of any sign.
        """
        features = self.resnet.resnet(images).last_hidden_state
        head = self.resnet.classifier[-1]
        (healthy, unhealthy), (healthy_bias, unhealthy_bias) = head.weight, head.bias
        return torch.einsum("k,nkhw->nhw", unhealthy - healthy, features) + (unhealthy_bias - healthy_bias)

    @torch.no_grad()
    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Return -log p(healthy) from each location's features alone: above 0 in the foreground, 0 outside.

        This is the softplus of [`activation_map`]. Without it, tissue that speaks for healthy would rank below the
        background; with a clamp at 0 it would rank the same.
        """
        images = self.network_input(images)
        with frozen(self):
            logits = self.activation_map(images)
        logits = resize_images(logits[:, None], images.shape[-2:])
        return (functional.softplus(logits) * foreground(images))[:, 0]
