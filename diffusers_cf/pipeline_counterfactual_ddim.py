"""CounterfactualDDIMPipeline: Algorithm 1 of "What is Healthy?" (Sanchez et al. 2022), from image to heatmap."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput

from diffusers_cf.forward import ForwardChange, check_forward
from diffusers_cf.guidance import implicit_guidance
from diffusers_cf.heatmaps import heatmap
from diffusers_cf.images import (
    Windows,
    check_images,
    foreground_windows,
    network_images,
    resize_images,
    to_device,
    window_side,
)
from diffusers_cf.loading import ModelFolderMixin
from diffusers_cf.mirrored import check_mirrored
from diffusers_cf.models import ClassTokenEncoder, predict_noise
from diffusers_cf.settings import settings_in_use


@dataclass
class CounterfactualOutput(BaseOutput):
    """Output of [`CounterfactualDDIMPipeline`].

    Args:
        heatmaps (`torch.Tensor` or `np.ndarray`): `(N, H, W)`, at least 0, in input units: 1 is a change by
            the unit of the model's intensity scale, the same for all images.
        counterfactuals (`torch.Tensor` or `np.ndarray`): `(N, C, H, W)`, the image as it would look in the target
            class, in the input's range; with the map `forward` the image plus the mean change along the encoding.
        latents (`torch.Tensor` or `np.ndarray`): `(N, C, h, w)`, where encoding ended, at the network's size; 0 for
            empty images and outside the windows of `crop_background`, so that `denoise` can't decode those.
    """

    heatmaps: torch.Tensor | np.ndarray
    counterfactuals: torch.Tensor | np.ndarray
    latents: torch.Tensor | np.ndarray


class CounterfactualDDIMPipeline(ModelFolderMixin, DiffusionPipeline):
    r"""Encodes an image with the null condition, decodes it towards a class, and maps what had to change.

    Images are `(N, C, H, W)`, on the intensity scale that the model's preprocessing.json names (`normalize`; see
    `data/intensity.py`), background 0; inside they are [-1, 1] at the network's size. Arithmetic of the steps is float32 whatever the dtype of the network.

    Args:
        unet ([`UNet2DConditionModel`]): epsilon_theta, such as [`counterfactual_unet`] makes.
        class_encoder ([`ClassTokenEncoder`], *optional*): tau; None for an unconditional U-Net.
        scheduler ([`SchedulerMixin`]): for decoding, [`DynamicDDIMScheduler`] or a stock `DDIMScheduler` (Table 2's row
            without dynamic normalisation).
        inverse_scheduler ([`SchedulerMixin`]): for encoding, its mirror image.
        clip_input (`bool`, *optional*): cut the input at 1 before encoding, and compare with that. The authors
            don't; then dynamic normalisation holds x0 at 1 while the noise that is left takes up the peaks, divided by
            almost nothing, and latents leave the network's range just where lesions are bright.
        crop_background (`bool`, *optional*): compute each image in a window around its foreground, about two thirds of a brain slice;
            the quantile of dynamic normalisation then is that of the window. For networks that were trained on windows
            (`train_counterfactual.py --crop_background`): others lose accuracy. False computes all of it, as the paper.
    """

    model_cpu_offload_seq = "class_encoder->unet"
    _optional_components = ["class_encoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        class_encoder: ClassTokenEncoder | None,
        scheduler: SchedulerMixin,
        inverse_scheduler: SchedulerMixin,
        clip_input: bool | None = None,
        crop_background: bool | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, class_encoder=class_encoder, scheduler=scheduler, inverse_scheduler=inverse_scheduler
        )
        self.register_switches(clip_input=clip_input, crop_background=crop_background)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width at which the network works, in pixels."""
        return tuple(np.broadcast_to(self.unet.config.sample_size, 2).tolist())

    def resolve_settings(self, settings: str | None = None, **given) -> dict:
        """Settings with each None replaced by what the model recommends, else by the paper's.

        Args:
            settings: `paper` for the authors' in the place of what the model recommends.
            **given: any of `guidance_scale`, `strength`, `num_inference_steps`, `map`, `threshold`; checked.

        Raises:
            ValueError: one is out of its range, or the pipeline can't make the map `forward`.
        """
        found = settings_in_use(self.preprocessing, given, settings)
        if found["map"] == "forward":
            check_forward(self)
        return found

    def _resolve_walk(self, **given) -> dict:
        """[`resolve_settings`] where no map is made: a recommended one that is impossible here does not matter."""
        return self.resolve_settings(**given, map="counterfactual")

    def network_evaluations(self, **settings) -> int:
        """Network evaluations for one image: K to encode, K or 2K to decode, K more for a reconstruction.

        For the map `forward` 2K in all, and K more for each fixed-point iteration, as in every encoding.
        """
        settings = self.resolve_settings(**settings)
        steps = round(settings["num_inference_steps"] * settings["strength"])
        refinements = self.inverse_scheduler.config.get("num_fixed_point_iterations", 0)
        if settings["map"] == "forward":
            return steps * (2 + refinements)
        decoding = 2 if self.class_encoder is not None and settings["guidance_scale"] not in (0, 1) else 1
        return steps * (1 + refinements + decoding + (settings["map"] != "counterfactual"))

    def check_inputs(self, images: torch.Tensor) -> None:
        """Raises ValueError unless images are finite floats `(N, C, H, W)` of the network's channels and aspect."""
        check_images(images, self.unet.config.in_channels, self.image_size)

    def encode_classes(self, names: str | None | Sequence[str], batch_size: int) -> tuple | None:
        """Condition `(tokens, vector)` of class names, one for all or one for each sample; None is the null symbol.

        Raises:
            ValueError: a class is unknown, or there are more or fewer names than samples.
        """
        if self.class_encoder is None:
            return None
        names = [names] * batch_size if names is None or isinstance(names, str) else list(names)
        if len(names) != batch_size:
            raise ValueError(f"target holds {len(names)} names for {batch_size} images")
        ids = torch.tensor([self.class_encoder.class_id(name) for name in names], dtype=torch.long)
        return self.class_encoder(to_device(ids, self._execution_device))

    def prepare_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, C, H, W)` in input units as the network's float32 `(N, C, h, w)` in [-1, 1]."""
        return to_device(network_images(images, self.image_size, self.config.clip_input), self._execution_device)

    def windows(self, prepared: torch.Tensor) -> list[Windows]:
        """Where the network has something to do in what `prepare_images` made, `(N, C, h, w)`."""
        halvings = len(self.unet.config.get("block_out_channels", (1,))) - 1
        side = window_side(self.image_size, halvings) if self.config.crop_background else None
        return foreground_windows((prepared > -1).any(dim=1), side)

    def _timesteps(self, strength: float, num_inference_steps: int) -> torch.Tensor:
        """The K rising timesteps that encoding walks; decoding walks their mirror image.

        They stay on the CPU, where schedulers read them: on an accelerator each step would wait for the one before.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        self.inverse_scheduler.set_timesteps(num_inference_steps)
        check_mirrored(self.scheduler, self.inverse_scheduler)
        return self.inverse_scheduler.timesteps[: round(num_inference_steps * strength)]

    def predict_noise(self, sample: torch.Tensor, timestep: int, condition: tuple | None) -> torch.Tensor:
        """epsilon_theta, float32 `(N, C, h, w)`, of a sample at one timestep; no waiting for an accelerator."""
        dtype = self.unet.dtype
        timestep = torch.full((1,), int(timestep), device=sample.device)
        condition = condition and tuple(part.to(dtype) for part in condition)
        return predict_noise(self.unet, sample.to(dtype), timestep, condition).float()

    @torch.no_grad()
    def invert(
        self,
        images: torch.Tensor,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """First loop of Algorithm 1: encodes images to latents by DDIM upwards, with the null condition.

        Args:
            images (`torch.Tensor`): `(N, C, H, W)` in input units.
            strength (`float`, *optional*): L, the share of the grid that is walked: K = round(n L) steps.
            num_inference_steps (`int`, *optional*): n, steps of the full grid; a divisor of the training steps.
            callback_on_step_end (`Callable`, *optional*): `(pipe, step, timestep, {"latents"}) -> dict`.

        Returns:
            `torch.Tensor`: latents, float32 `(N, C, h, w)`, of whole images: this and `denoise` know no windows
                (`trajectories.encode_images` and `decode_images` do).

        Raises:
            ValueError: for images or settings outside their range, or schedulers that don't mirror each other.
        """
        settings = self._resolve_walk(strength=strength, num_inference_steps=num_inference_steps)
        self.check_inputs(images)
        return self.encode(self.prepare_images(images), settings, callback_on_step_end)

    @torch.no_grad()
    def encode(
        self,
        latents: torch.Tensor,
        settings: dict,
        callback_on_step_end: Callable | None = None,
        predict: Callable | None = None,
    ) -> torch.Tensor:
        """[`invert`] of what `prepare_images` made, or of windows of it.

        Args:
            latents (`torch.Tensor`): `(N, C, h, w)` in [-1, 1].
            settings (`dict`): as from `resolve_settings`.
            callback_on_step_end (`Callable`, *optional*): as in `invert`.
            predict (`Callable`, *optional*): `(x, t) -> eps` in the place of the null prediction that a step begins with.
        """
        timesteps = self._timesteps(settings["strength"], settings["num_inference_steps"])
        null = self.encode_classes(None, len(latents))
        refinements = self.inverse_scheduler.config.get("num_fixed_point_iterations", 0)
        told = getattr(self.inverse_scheduler, "network_timestep", lambda timestep: timestep)
        predict = predict or (lambda sample, t: self.predict_noise(sample, told(t), null))
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                nearer = latents
                latents = self.inverse_scheduler.step(predict(nearer, t), t, nearer).prev_sample
                for _ in range(refinements):
                    noise = self.predict_noise(latents, t, null)
                    latents = self.inverse_scheduler.refine(noise, t, nearer, latents)
                latents = self._after_step(callback_on_step_end, i, t, latents)
                bar.update()
        return latents

    @torch.no_grad()
    def denoise(
        self,
        latents: torch.Tensor,
        target: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """Second loop of Algorithm 1: decodes latents by DDIM downwards, guided towards the target class.

        Args:
            latents (`torch.Tensor`): from [`~CounterfactualDDIMPipeline.invert`] with the same strength and steps.
            target (`str` or list of `str`, *optional*): class by name, one for all or one a sample; defaults to the
                first class.
            guidance_scale (`float`, *optional*): w of Sec. 3.2; 0 is the null condition alone, a reconstruction.
            strength (`float`, *optional*): as in `invert`; so are the next and the last one.
            num_inference_steps (`int`, *optional*): steps of the full grid.
            generator (`torch.Generator`, *optional*): for a stochastic scheduler in the place of DDIM.
            callback_on_step_end (`Callable`, *optional*): called after each step.

        Returns:
            `torch.Tensor`: counterfactuals at the network's size, float32 `(N, C, h, w)` in input units.

        Raises:
            ValueError: for settings outside their range, an unknown target, or schedulers that don't mirror each other.
        """
        given = {"strength": strength, "num_inference_steps": num_inference_steps}
        settings = self._resolve_walk(guidance_scale=guidance_scale, **given)
        timesteps = self._timesteps(settings["strength"], settings["num_inference_steps"]).flip(0)
        predict = self._guided_prediction(target, settings["guidance_scale"], len(latents))
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                latents = self.scheduler.step(predict(latents, t), t, latents, **extra).prev_sample
                latents = self._after_step(callback_on_step_end, i, t, latents)
                bar.update()
        return (latents + 1) / 2

    def _encode_target(self, target: str | Sequence[str] | None, batch_size: int) -> tuple | None:
        if self.class_encoder is None:
            if target is not None:
                raise ValueError(f"target is {target!r}: this model is unconditional and knows no classes")
            return None
        first = self.class_encoder.config.class_names[0]
        return self.encode_classes(first if target is None else target, batch_size)

    def _targets_of(self, target: str | Sequence[str] | None, batch_size: int) -> list[str] | None:
        """The target of each image, checked; None for the default one."""
        self._encode_target(target, batch_size)
        return [target] * batch_size if isinstance(target, str) else target and list(target)

    def _guided_prediction(self, target, guidance_scale: float, batch_size: int) -> Callable:
        """`(x, t) -> eps`: one batched network call for both branches, one branch where the scale is 0 or 1."""
        null = self.encode_classes(None, batch_size)
        wanted = self._encode_target(target, batch_size)
        if null is None or guidance_scale == 0:
            return lambda sample, t: self.predict_noise(sample, t, null)
        if guidance_scale == 1:
            return lambda sample, t: self.predict_noise(sample, t, wanted)
        both = tuple(torch.cat(pair) for pair in zip(null, wanted, strict=True))
        return lambda sample, t: implicit_guidance(
            *self.predict_noise(torch.cat([sample, sample]), t, both).chunk(2), guidance_scale
        )

    def _after_step(self, callback, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if callback is None:
            return latents
        return callback(self, step, timestep, {"latents": latents}).pop("latents", latents)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | np.ndarray,
        target: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        map: str | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        settings: str | None = None,
    ) -> CounterfactualOutput | tuple:
        r"""Algorithm 1: encode with the null condition, decode towards the target, compare.

        Args:
            images (`torch.Tensor` or `np.ndarray`): `(N, C, H, W)`, on the model's intensity scale, background 0.
            target (`str` or list of `str`, *optional*): class by name, one for all or one a sample; defaults to the
                first class.
            guidance_scale (`float`, *optional*): w of Sec. 3.2. This and the next three default to what the model
                recommends, else to the paper's (3.0, 0.75, 100, counterfactual).
            strength (`float`, *optional*): L in [0, 1], the share of the grid that is walked.
            num_inference_steps (`int`, *optional*): steps of the full grid, a divisor of the training steps.
            map (`str`, *optional*): `counterfactual`, |x - x_cf|; `reconstruction`, |x_null - x_cf| with x_null
                decoded by the null condition: it takes out what the inversion itself changed, for K more evaluations;
                `signed`, the same with a sign for each modality in the place of the absolute value; or `forward`, the
                mean of |x0_null - x0_guided| along the encoding, for 2K evaluations in all: nothing is decoded, and
                the counterfactual is the image plus the mean change.
            generator (`torch.Generator`, *optional*): for a stochastic scheduler in the place of DDIM.
            output_type (`str`): `pt` or `np`.
            return_dict (`bool`): [`CounterfactualOutput`], or the tuple of its fields.
            callback_on_step_end (`Callable`, *optional*): `(pipe, step, timestep, {"latents"}) -> dict`, called after
                each step of encoding and of decoding; with `crop_background` of the images of each size of window.
            settings (`str`, *optional*): `paper`, what isn't given is the paper's, whatever the model recommends.

        Raises:
            ValueError: for an argument outside its range, or schedulers that don't mirror each other.

        Examples:

        ```py
        >>> from diffusers_cf import CounterfactualDDIMPipeline
        >>> pipe = CounterfactualDDIMPipeline.from_pretrained("folder-or-hub-id")
        >>> out = pipe(images)  # images: (N, C, H, W), on the model's intensity scale
        >>> out.heatmaps.shape  # (N, H, W)
        ```
        """
        # 1. Inputs. Images without content never reach the network.
        if output_type not in ("pt", "np"):
            raise ValueError(f"output_type is {output_type!r}: it must be one of pt, np")
        images = torch.as_tensor(images)
        self.check_inputs(images)
        given = {"guidance_scale": guidance_scale, "strength": strength, "num_inference_steps": num_inference_steps}
        settings = self.resolve_settings(settings, **given, map=map)
        target = self._targets_of(target, len(images))

        # 2. Encode, decode, compare; back to the input's size the change is resampled, never the image.
        prepared = network_images(images, self.image_size, self.config.clip_input)  # (N, C, h, w)
        groups = self.windows(prepared)  # before the images travel: reading them back would wait for earlier ones
        images, prepared = (to_device(part.float(), self._execution_device) for part in (images, prepared))
        latents, changes = torch.zeros_like(prepared), torch.zeros_like(prepared)
        heat = torch.zeros_like(prepared[:, 0])
        for group in groups:
            chosen = target and [target[number] for number in group.index]
            found = self._encode_decode_compare(group.cut(prepared), chosen, settings, generator, callback_on_step_end)
            for whole, windows in zip((latents, changes, heat), found, strict=True):
                group.paste(whole, windows)
        size = tuple(images.shape[-2:])
        heatmaps = resize_images(heat[:, None], size)[:, 0]
        counterfactuals = images + resize_images(changes, size)
        self.maybe_free_model_hooks()

        fields = (heatmaps, counterfactuals, latents)
        fields = tuple(field.cpu().numpy() for field in fields) if output_type == "np" else fields
        return CounterfactualOutput(*fields) if return_dict else fields

    def _encode_decode_compare(
        self, prepared, target, settings: dict, generator, callback
    ) -> tuple[torch.Tensor, ...]:
        """Algorithm 1 at the network's size: latents and change, each `(n, C, h, w)`, and heatmaps `(n, h, w)`."""
        if settings["map"] == "forward":
            scale = settings["guidance_scale"]
            forward = ForwardChange(self, prepared, [scale], target)
            latents = self.encode(prepared, settings, callback, forward)
            return latents, forward.change(scale), forward.heatmaps(scale)
        walk = {k: settings[k] for k in ("strength", "num_inference_steps")} | {"callback_on_step_end": callback}
        latents = self.encode(prepared, settings, callback)
        decoded = self.denoise(latents, target, settings["guidance_scale"], generator=generator, **walk)
        reference = (prepared + 1) / 2
        change = decoded - reference
        if settings["map"] != "counterfactual":
            reference = self.denoise(latents, guidance_scale=0, generator=generator, **walk)
        return latents, change, heatmap(settings["map"], reference, decoded, self.preprocessing.get("signs"))

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Heatmaps `(N, H, W)` of images `(N, C, H, W)` with the recommended settings: the contract of every method."""
        return self(images).heatmaps
