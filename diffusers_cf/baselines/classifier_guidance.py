"""Classifier guidance (Dhariwal and Nichol 2021, Algorithm 2): a classifier of noisy images steers the decoding.

Wolleb et al. (2022) find lesions this way, with a scale s of 100; here s is chosen on validation slices.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import AttentionPooling, TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import ResnetDownsampleBlock2D
from torch import nn

from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


class NoisyClassifier(ModelMixin, ConfigMixin):
    """A classifier of noisy images x_t: the encoder half of a U-Net with attention pooling.

    Train it with cross-entropy on x_t at random t, because guidance uses its gradient on noisy images. The size of the
    paper's baseline is `block_out_channels=(64, 128, 256, 256), layers_per_block=2, norm_num_groups=32`.

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the input in pixels.
        num_classes (`int`): number of logits.
        block_out_channels (`Sequence[int]`): channels of each level; each level but the last halves the side.
        layers_per_block (`int`): residual blocks of each level, beside the one that halves the side.
        norm_num_groups (`int`): groups of every group norm; it divides the channels of each level.
    """

    @register_to_config
    def __init__(
        self, num_channels: int = 4, image_size: int = 64, num_classes: int = 2,
        block_out_channels: Sequence[int] = (32, 64, 96, 128), layers_per_block: int = 1, norm_num_groups: int = 8,
    ):  # fmt: skip
        super().__init__()
        widths = list(block_out_channels)
        self.frequencies = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.conv_in = nn.Conv2d(num_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResnetDownsampleBlock2D(
                before, width, 4 * widths[0], num_layers=layers_per_block, resnet_groups=norm_num_groups,
                resnet_time_scale_shift="scale_shift", add_downsample=level < len(widths) - 1,
            )
            for level, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )  # fmt: skip
        self.norm = nn.GroupNorm(norm_num_groups, widths[-1])
        self.pool = AttentionPooling(max(1, widths[-1] // 64), widths[-1])
        self.to_logits = nn.Linear(widths[-1], num_classes)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return logits `(N, num_classes)` of x_t `(N, C, h, w)`, noised from [-1, 1], and t `(N,)`."""
        embedding = self.time_embedding(self.frequencies(timestep).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.blocks:
            hidden, _ = block(hidden, embedding)
        hidden = nn.functional.silu(self.norm(hidden))
        return self.to_logits(self.pool(hidden.flatten(2).transpose(1, 2)))


def log_probability_gradient(
    classifier: ModelMixin, sample: torch.Tensor, timestep: torch.Tensor, class_ids: torch.Tensor
) -> torch.Tensor:
    """Return grad_x log p(y | x_t, t) of a classifier of noisy images (Dhariwal and Nichol 2021, Sec. 4.2).

    Args:
        classifier (`ModelMixin`): `(x_t, t)` to logits, such as [`NoisyClassifier`]; each sample by itself.
        sample (`torch.Tensor`): x_t, `(N, C, h, w)`.
        timestep (`torch.Tensor`): t, `(N,)`.
        class_ids (`torch.Tensor`): y, integers `(N,)`.

    Returns:
        `torch.Tensor`: float32 `(N, C, h, w)`, detached; the weights get no gradients.
    """
    with torch.enable_grad():
        sample = sample.detach().float().requires_grad_()
        logits = classifier(sample.to(classifier.dtype), timestep).float()
        chosen = logits.log_softmax(dim=1).gather(1, class_ids[:, None])
        return torch.autograd.grad(chosen.sum(), sample)[0]


class ClassifierGuidedDDIMPipeline(CounterfactualDDIMPipeline):
    """The counterfactual pipeline with an unconditional U-Net, guided by a classifier instead of a condition.

    `guidance_scale` is s: decoding uses eps' = eps - sqrt(1 - abar_t) * s * grad_x log p(target | x_t, t), and 0 is plain
    decoding. Encoding is unguided. Save U-Net and classifier separately: this pipeline cannot be saved.

    Args:
        unet ([`UNet2DConditionModel`]): an unconditional noise predictor.
        scheduler ([`SchedulerMixin`]): for decoding, with `prediction_type="epsilon"`.
        inverse_scheduler ([`SchedulerMixin`]): for encoding, its mirror image.
        classifier ([`NoisyClassifier`]): `(x_t, t)` to one logit for each class.
        class_names (`Sequence[str]`): names of the logits; the first is the default target.
        clip_input (`bool`): as in [`CounterfactualDDIMPipeline`].
        crop_background (`bool`): as in [`CounterfactualDDIMPipeline`]; the classifier must then be trained on windows.
        class_encoder (`None`, *optional*): a component of the parent class; it must be None.
        student (`None`, *optional*): another one.

    Raises:
        ValueError: there is a class encoder, or the scheduler's prediction type is not epsilon.
    """

    model_cpu_offload_seq = "unet->classifier"

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: SchedulerMixin, inverse_scheduler: SchedulerMixin,
        classifier: NoisyClassifier, class_names: Sequence[str] = ("healthy", "unhealthy"), clip_input: bool = True,
        crop_background: bool = False, class_encoder: None = None, student: None = None,
    ):  # fmt: skip
        if class_encoder is not None or student is not None:
            raise ValueError("class_encoder and student must be None: the classifier knows the classes")
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"prediction_type is {scheduler.config.prediction_type!r}: it must be 'epsilon'")
        super().__init__(unet, None, scheduler, inverse_scheduler, None, clip_input, crop_background)
        self.register_modules(classifier=classifier)
        self.register_to_config(class_names=list(class_names))

    def network_evaluations(self, **settings) -> int:
        """Return the NFE for one image: K to encode, 2K to decode (U-Net and classifier, with its backward pass)."""
        settings = self.resolve_settings(**settings)
        guided = round(settings["num_inference_steps"] * settings["strength"]) if settings["guidance_scale"] else 0
        return super().network_evaluations(**settings) + guided

    def encode_target(self, target: str | Sequence[str] | None, batch_size: int) -> torch.Tensor:
        """Return the index of each sample's target among the logits, `(N,)`; None stands for the first class."""
        known = list(self.config.class_names)
        target = target or known[0]
        names = [target] * batch_size if isinstance(target, str) else list(target)
        if len(names) != batch_size:
            raise ValueError(f"target holds {len(names)} names for {batch_size} images")
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"class {unknown[0]!r} is unknown: this model knows {', '.join(known)}")
        return torch.tensor([known.index(name) for name in names], device=self._execution_device)

    def predict_guided(self, sample: torch.Tensor, timestep: int, null, target, guidance_scale: float) -> torch.Tensor:
        """Return eps' of x_t for the logits `target` `(N,)`; a scale of 0 does not call the classifier."""
        noise = self.predict_noise(sample, timestep, None)
        if guidance_scale == 0:
            return noise
        timesteps = torch.full((len(sample),), int(timestep), device=sample.device)
        gradient = log_probability_gradient(self.classifier, sample, timesteps, target)
        return noise - (1 - self.scheduler.alphas_cumprod[int(timestep)]).sqrt() * guidance_scale * gradient
