"""The diffusion models of both tables, trained on Eq. 1; their maps come from Algorithm 1.

Beside the paper's own model there are CDPM on healthy slices only, CDPM with classifier guidance (Wolleb et al. 2022),
and CDPM with the condition in AdaGN (Table 2).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config

from diffusers_cf.baselines.classifier_guidance import ClassifierGuidedDDIMPipeline, NoisyClassifier
from diffusers_cf.baselines.method import Grid, PipelineMap, TrainableMethod
from diffusers_cf.evaluation.inputs import rows_of_both_labels
from diffusers_cf.evaluation.sweep import SIGN_SLICES, learn_signs
from diffusers_cf.evaluation.trajectories import heatmaps_of_settings
from diffusers_cf.losses import ALL_TIMESTEPS_FROM, drop_condition, noise_prediction_loss, rising_timesteps
from diffusers_cf.models import ConditionalNoisePredictor, class_token_encoder, counterfactual_unet
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


WARM_UP = 0.03  # share of the training in which the learning rate rises
GUIDANCE_DROPOUT = 0.35
# arguments of NoisyClassifier for each size of the U-Net
CLASSIFIER_SIZES = {
    "small": {},
    "paper": {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2, "norm_num_groups": 32},
}


class CounterfactualDiffusion(TrainableMethod):
    """The paper's model (network `ours`), or its baseline with `conditioning="adagn"` (network `cdpm-adagn`).

    Args:
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels, a multiple of 8.
        unet_size (`str`): a key of [`models.UNET_SIZES`].
        conditioning (`str`): `attention`, `adagn` or `unconditional`.
        class_names (`tuple[str]`): healthy first.
        learning_rate (`float`): the highest one; it rises over the first 3 %.
        first_timesteps (`float`): share of the timesteps that training begins with, 1 for the paper's uniform ones; see
            [`losses.rising_timesteps`].
        snr_gamma (`float`, *optional*): of min-SNR weighting; None for the paper's unweighted Eq. 1.
        cosine (`bool`): whether the learning rate falls as a cosine; the paper's stays.
        clip_input (`bool`): cut images at 1; the authors do not.
    """

    trained_on = "all"
    averaged = True
    has_classifier = False

    @register_to_config
    def __init__(
        self, num_channels: int = 4, image_size: int = 64, unet_size: str = "small", conditioning: str = "attention",
        class_names: tuple[str, ...] = ("healthy", "unhealthy"), learning_rate: float = 1.5e-3,
        first_timesteps: float = 0.2, snr_gamma: float | None = 5.0, cosine: bool = True, clip_input: bool = True,
    ):  # fmt: skip
        super().__init__()
        encoder = None if conditioning == "unconditional" else class_token_encoder(unet_size, class_names)
        unet = counterfactual_unet(unet_size, conditioning, image_size, num_channels)
        self.network = ConditionalNoisePredictor(unet, encoder)
        if self.has_classifier:
            options = CLASSIFIER_SIZES[unet_size]
            self.classifier = NoisyClassifier(num_channels, image_size, len(class_names), **options)
        self.noise_scheduler = DDPMScheduler(beta_schedule="linear")

    @property
    def clip_input(self) -> bool:
        """Whether training images are cut at 1."""
        return self.config.clip_input

    @property
    def comparable_from(self) -> float:
        """Before all timesteps are trained, the validation loss asks for many that were never seen."""
        return 0.0 if self.config.first_timesteps == 1 else ALL_TIMESTEPS_FROM

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": torch.optim.AdamW(self.network.parameters(), self.config.learning_rate, fused=True)}

    def learning_rate_factor(self, progress: float) -> float:
        fall = 0.5 * (1 + math.cos(progress * math.pi)) if self.config.cosine else 1.0
        return min(1.0, (progress + 1e-3) / WARM_UP) * fall

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        class_ids, encoder = batch["labels"], self.network.class_encoder
        if encoder is not None:
            class_ids = drop_condition(class_ids, encoder.null_id, GUIDANCE_DROPOUT, batch["uniform"])
        timesteps = rising_timesteps(batch["timesteps"], progress, self.config.first_timesteps)
        yield "network", self._noise_loss(batch | {"timesteps": timesteps}, class_ids)

    def _noise_loss(self, batch: dict[str, torch.Tensor], class_ids: torch.Tensor) -> torch.Tensor:
        images, noise, timesteps = batch["images"], batch["noise"], batch["timesteps"]
        return noise_prediction_loss(
            self.network, self.noise_scheduler, images, class_ids, noise, timesteps, self.config.snr_gamma
        )

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return Eq. 1 of the batch, with every label."""
        return self._noise_loss(batch, batch["labels"])

    def pipeline(self, encoding: Mapping | None = None, **scheduler_options) -> CounterfactualDDIMPipeline:
        """Return a pipeline with this network.

        Args:
            encoding (`Mapping`, *optional*): options of [`DynamicDDIMInverseScheduler`] only.
            **scheduler_options: options of [`DynamicDDIMScheduler`], the same for both passes.
        """
        scheduler = DynamicDDIMScheduler(**scheduler_options)
        inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config, **(encoding or {}))
        pipe = self._pipeline(scheduler, inverse)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _pipeline(self, scheduler, inverse) -> CounterfactualDDIMPipeline:
        parts = (self.network.unet, self.network.class_encoder, scheduler, inverse)
        # without windows, as in the paper
        return CounterfactualDDIMPipeline(*parts, crop_background=False, clip_input=self.clip_input)

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        return CounterfactualMap(self).anomaly_map(images)


class HealthyDiffusion(CounterfactualDiffusion):
    """CDPM on healthy slices only (method id `cdpm-healthy`), without labels: use `conditioning="unconditional"`."""

    trained_on = "healthy"


class ClassifierGuidedDiffusion(CounterfactualDiffusion):
    """CDPM with classifier guidance (method id `cdpm-classifier`): use `conditioning="unconditional"`.

    U-Net and classifier are trained side by side on all slices. The classifier starts with clean images, and its noise
    grows ([`losses.rising_timesteps`]): from full noise at once, a short training only learns how likely a lesion is at
    a slice's position.
    """

    has_classifier = True

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        classifier = torch.optim.AdamW(
            self.classifier.parameters(), self.config.learning_rate / 2, weight_decay=0.05, fused=True
        )
        return super().optimizers() | {"classifier": classifier}

    def losses(self, batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().losses(batch, progress)
        timesteps = rising_timesteps(batch["timesteps"], progress, first=0.0)
        noisy = self.noise_scheduler.add_noise(batch["images"], batch["noise"], timesteps)
        logits = self.classifier(noisy, timesteps).float()
        yield "classifier", torch.nn.functional.cross_entropy(logits, batch["labels"])

    def _pipeline(self, scheduler, inverse) -> CounterfactualDDIMPipeline:
        parts = (self.network.unet, scheduler, inverse, self.classifier, self.config.class_names)
        return ClassifierGuidedDDIMPipeline(*parts, clip_input=self.clip_input)


class CounterfactualMap(PipelineMap):
    """A trained diffusion model with options of its schedulers and settings of inference to choose from.

    Args:
        trained ([`CounterfactualDiffusion`]): the trained network.
        scales (`str` or `Sequence[float]`): guidance scales to choose from, or the field of [`Grid`] with them.
        kind (`str`): the pipeline's `map`.
        encoding (`Mapping`, *optional*): options of [`DynamicDDIMInverseScheduler`] only.
        **scheduler_options: options of [`DynamicDDIMScheduler`], the same for both passes.
    """

    def __init__(
        self, trained: CounterfactualDiffusion, scales: str | Sequence[float] = "guidance_scales",
        kind: str = "counterfactual", encoding: Mapping | None = None, **scheduler_options,
    ):  # fmt: skip
        super().__init__(trained.pipeline(encoding, **scheduler_options), self.candidates[0])
        self.scales, self.kind = scales, kind

    def candidates_on(self, grid: Grid) -> Sequence[dict]:
        scales = getattr(grid, self.scales) if isinstance(self.scales, str) else self.scales
        return grid.settings(scales, self.kind)

    def maps_of_candidates(self, images: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(index of a candidate, its maps (N, H, W))`; all candidates share one encoding."""
        index = {(c["strength"], c["guidance_scale"], c["map"]): i for i, c in enumerate(self.candidates)}
        for setting, heat in heatmaps_of_settings(self.pipe, images, index, self.candidates[0]["num_inference_steps"]):
            yield index[setting], torch.from_numpy(heat)

    def learn(self, slices) -> dict:
        """Learn the signs of the map `signed` with the settings in use."""
        if self.kind != "signed":
            return {}
        settings = {name: value for name, value in self.settings.items() if name != "map"}
        learned = learn_signs(self.pipe, slices, rows_of_both_labels(slices, SIGN_SLICES), **settings)
        self.pipe.preprocessing = self.pipe.preprocessing | {"signs": learned["signs"]}
        return learned
