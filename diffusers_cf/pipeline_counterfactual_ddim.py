"""CounterfactualDDIMPipeline: Algorithm 1 of "What is Healthy?" (Sanchez et al. 2022), from image to heatmap."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput

from diffusers_cf.images import Windows, check_images, network_images, network_windows, resize_images, to_device
from diffusers_cf.loading import ModelFolderMixin
from diffusers_cf.maps import check_signs, forward_map, heatmap
from diffusers_cf.models import ClassTokenEncoder, implicit_guidance, predict_noise
from diffusers_cf.schedulers import check_mirrored


@dataclass
class CounterfactualOutput(BaseOutput):
    """Output of [`CounterfactualDDIMPipeline`].

    Args:
        heatmaps (`torch.Tensor` or `np.ndarray`): `(N, H, W)`, at least 0, in input units: 1 is the unit of the model's
            intensity scale, the same for all images.
        counterfactuals (`torch.Tensor` or `np.ndarray`): `(N, C, H, W)`, the image as it would look in the target class,
            in the input's range; for the map `forward` the image plus the mean change along the encoding.
        latents (`torch.Tensor` or `np.ndarray`): `(N, C, h, w)`, where encoding ended, at the network's size; 0 for
            empty images and outside the windows of `crop_background`, so `denoise` can't decode those.
    """

    heatmaps: torch.Tensor | np.ndarray
    counterfactuals: torch.Tensor | np.ndarray
    latents: torch.Tensor | np.ndarray


class CounterfactualDDIMPipeline(ModelFolderMixin, DiffusionPipeline):
    r"""Encodes an image with the null condition, decodes it towards a class, and maps what had to change.

    Images are `(N, C, H, W)`, on the intensity scale that the model's preprocessing.json names (`normalize`), background
    0; inside the pipeline they are [-1, 1] at the network's size. Schedulers compute in float32 whatever the dtype of the
    network. `encode` and `decode` are the two loops of Algorithm 1 in the network's range; `invert` and `denoise` are the
    same from and to images.

    Args:
        unet ([`UNet2DConditionModel`]): epsilon_theta, such as [`counterfactual_unet`] makes.
        class_encoder ([`ClassTokenEncoder`], *optional*): tau; None for an unconditional U-Net.
        scheduler ([`SchedulerMixin`]): for decoding, [`DynamicDDIMScheduler`] or a stock `DDIMScheduler` (Table 2's row
            without dynamic normalisation).
        inverse_scheduler ([`SchedulerMixin`]): for encoding, its mirror image.
        clip_input (`bool`, *optional*, defaults to True): cut the input at 1 before encoding, and compare with that. The authors don't; then dynamic
            normalisation holds x0 at 1 while the remaining noise takes up the peaks, divided by almost nothing, and
            latents leave the network's range just where lesions are bright.
        crop_background (`bool`, *optional*, defaults to False): compute each image in a window around its foreground,
            about two thirds of a brain slice; the quantile of dynamic normalisation is then that of the window. For networks that were trained on windows
            (`train_counterfactual.py --crop_background`); others lose accuracy. False computes whole images, as the paper.
    """

    model_cpu_offload_seq = "class_encoder->unet"
    _optional_components = ["class_encoder"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False

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
        """Height and width of the network's input in pixels."""
        return tuple(np.broadcast_to(self.unet.config.sample_size, 2).tolist())

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt = True`: the loops then do nothing more."""
        return self._interrupt

    def network_evaluations(self, **settings) -> int:
        """Return the NFE for one image: K to encode, K or 2K to decode, K more for a reconstruction; `forward` 2K in all.

        Each fixed-point iteration of the inverse scheduler adds K.
        """
        settings = self.resolve_settings(**settings)
        steps = round(settings["num_inference_steps"] * settings["strength"])
        if settings["map"] == "forward":
            return 2 * steps
        decoding = 2 if self.class_encoder is not None and settings["guidance_scale"] not in (0, 1) else 1
        return steps * (self.inverse_scheduler.order + decoding + (settings["map"] != "counterfactual"))

    def check_inputs(self, images: torch.Tensor) -> None:
        """Raise ValueError unless images are finite floats `(N, C, H, W)` of the network's channels and aspect."""
        check_images(images, self.unet.config.in_channels, self.image_size)

    def encode_classes(self, names: str | None | Sequence[str], batch_size: int) -> tuple | None:
        """Return the condition `(tokens, vector)` of class names, one for all or one a sample; None is the null symbol.

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

    def encode_target(self, target: str | Sequence[str] | None, batch_size: int) -> tuple | None:
        """Return the condition of the target classes; None stands for the first class."""
        if self.class_encoder is None and target is not None:
            raise ValueError(f"target is {target!r}: this model is unconditional and knows no classes")
        if self.class_encoder is None:
            return None
        return self.encode_classes(target or self.class_encoder.config.class_names[0], batch_size)

    def prepare_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return images `(N, C, H, W)` in input units as x_0, float32 `(N, C, h, w)` in [-1, 1]."""
        return to_device(network_images(images, self.image_size, self.config.clip_input), self._execution_device)

    def windows(self, prepared: torch.Tensor) -> list[Windows]:
        """Return where x_0 `(N, C, h, w)` has content: windows around it with `crop_background`, else whole images."""
        halvings = len(self.unet.config.get("block_out_channels", (1,))) - 1
        return network_windows(prepared, self.image_size, halvings if self.config.crop_background else None)

    def timesteps(self, strength: float, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the timesteps of encoding, ascending, and of decoding, descending: K = round(n L) steps each.

        They stay on the CPU, where schedulers read them: on an accelerator each step would wait for the one before.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        self.inverse_scheduler.set_timesteps(num_inference_steps)
        check_mirrored(self.scheduler, self.inverse_scheduler)
        steps = round(num_inference_steps * strength)
        up, down = self.inverse_scheduler.timesteps, self.scheduler.timesteps
        return up[: steps * self.inverse_scheduler.order], down[len(down) - steps :]

    def predict_noise(self, sample: torch.Tensor, timestep: int, condition: tuple | None) -> torch.Tensor:
        """Return epsilon_theta(x_t, c, t), float32 `(N, C, h, w)`; never waits for an accelerator."""
        dtype = self.unet.dtype
        timestep = torch.full((1,), int(timestep), device=sample.device)
        condition = condition and tuple(part.to(dtype) for part in condition)
        return predict_noise(self.unet, sample.to(dtype), timestep, condition).float()

    def predict_guided(self, sample: torch.Tensor, timestep: int, null, target, guidance_scale: float) -> torch.Tensor:
        """Return the guided noise of Sec. 3.2: both branches in one call, only one where w is 0 or 1."""
        if null is None or guidance_scale in (0, 1):
            return self.predict_noise(sample, timestep, target if guidance_scale == 1 else null)
        both = tuple(torch.cat(pair) for pair in zip(null, target, strict=True))
        noise_null, noise_target = self.predict_noise(torch.cat([sample, sample]), timestep, both).chunk(2)
        return implicit_guidance(noise_null, noise_target, guidance_scale)

    @torch.no_grad()
    def encode(self, latents: torch.Tensor, strength: float, num_inference_steps: int, callback=None) -> torch.Tensor:
        """First loop of Algorithm 1: x_0 `(N, C, h, w)` in [-1, 1] to x_L, by DDIM upwards with the null condition."""
        timesteps, _ = self.timesteps(strength, num_inference_steps)
        null = self.encode_classes(None, len(latents))  # tokens (N, T, D), vector (N, V)
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            noise = self.predict_noise(latents, t, null)  # epsilon_theta(x_t, null, t), (N, C, h, w)
            latents = self.inverse_scheduler.step(noise, t, latents).prev_sample  # one stride up, (N, C, h, w)
            latents = self.end_of_step(callback, i, t, latents)
        return latents

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, strength: float, num_inference_steps: int, target=None, guidance_scale: float = 0.0,
        callback=None, generator=None,
    ) -> torch.Tensor:  # fmt: skip
        """Second loop of Algorithm 1: x_L to x_0 of the target class, `(N, C, h, w)` in [-1, 1], by guided DDIM downwards."""
        _, timesteps = self.timesteps(strength, num_inference_steps)
        null, wanted = self.encode_classes(None, len(latents)), self.encode_target(target, len(latents))
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            noise = self.predict_guided(latents, t, null, wanted, guidance_scale)  # (N, C, h, w)
            latents = self.scheduler.step(noise, t, latents, **extra).prev_sample  # one stride down, (N, C, h, w)
            latents = self.end_of_step(callback, i, t, latents)
        return latents

    def end_of_step(self, callback: Callable | None, step: int, timestep: torch.Tensor, latents: torch.Tensor):
        """Return the latents that a callback leaves."""
        return callback(self, step, timestep, {"latents": latents}).pop("latents", latents) if callback else latents

    @torch.no_grad()
    def invert(
        self,
        images: torch.Tensor,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """Encode images `(N, C, H, W)` in input units to latents x_L, float32 `(N, C, h, w)`; arguments as in `__call__`."""
        settings = self.resolve_settings(
            strength=strength, num_inference_steps=num_inference_steps, map="counterfactual"
        )
        self.check_inputs(images)
        walk = (settings["strength"], settings["num_inference_steps"])
        return self.encode(self.prepare_images(images), *walk, callback_on_step_end)

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
        """Decode latents of `invert` to counterfactuals at the network's size, float32 `(N, C, h, w)` in input units.

        The arguments and errors are those of `__call__`; strength and steps must be those of `invert`. With a guidance scale
        of 0, the null condition alone, it is a reconstruction.
        """
        given = {"guidance_scale": guidance_scale, "strength": strength, "num_inference_steps": num_inference_steps}
        settings = self.resolve_settings(**given, map="counterfactual")
        walk = (settings["strength"], settings["num_inference_steps"], target, settings["guidance_scale"])
        return (self.decode(latents, *walk, callback_on_step_end, generator) + 1) / 2

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> CounterfactualOutput | tuple:
        r"""Algorithm 1: encode with the null condition, decode towards the target, compare.

        Args:
            images (`torch.Tensor` or `np.ndarray`): `(N, C, H, W)`, on the model's intensity scale, background 0.
            target (`str` or list of `str`, *optional*): class by name, one for all or one a sample; the first class.
            guidance_scale (`float`, *optional*): w of Sec. 3.2. This and the next three default to what the model
                recommends, else to the paper's (3.0, 0.75, 100, counterfactual).
            strength (`float`, *optional*): L in [0, 1], the share of the grid that is walked.
            num_inference_steps (`int`, *optional*): n, steps of the full grid, a divisor of the training steps.
            map (`str`, *optional*): `counterfactual`, |x - x_cf|; `reconstruction`, |x_null - x_cf| with x_null decoded
                by the null condition, which removes what the inversion itself changed, for K more NFE; `signed`, the
                same with a sign for each modality instead of the absolute value; or `forward`, the mean of
                |x0_null - x0_target| along the encoding, 2K NFE in all: nothing is decoded.
            generator (`torch.Generator`, *optional*): for a stochastic scheduler instead of DDIM.
            output_type (`str`): `pt` or `np`.
            return_dict (`bool`): [`CounterfactualOutput`], or the tuple of its fields.
            callback_on_step_end (`Callable`, *optional*): `(pipe, step, timestep, {"latents"}) -> dict`, called after each
                step of encoding and of decoding; with `crop_background` for the images of each window size.
            settings (`str`, *optional*): `paper` for the paper's values instead of what the model recommends.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): names of the tensors that the callback gets.

        Raises:
            ValueError: an argument is out of range, or the schedulers don't mirror each other.

        Examples:

        ```py
        >>> from diffusers_cf import CounterfactualDDIMPipeline
        >>> pipe = CounterfactualDDIMPipeline.from_pretrained("folder-or-hub-id")
        >>> out = pipe(images)  # images: (N, C, H, W), on the model's intensity scale
        >>> out.heatmaps.shape  # (N, H, W)
        ```
        """
        # 1. Check inputs.
        if output_type not in ("pt", "np"):
            raise ValueError(f"output_type is {output_type!r}: it must be one of pt, np")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs holds {unknown.pop()!r}: there is only 'latents'")
        images = torch.as_tensor(images)  # (N, C, H, W)
        self.check_inputs(images)
        self.encode_target(target, len(images))
        self._interrupt = False

        # 2. Settings that are not given are the model's, else the paper's.
        given = {"guidance_scale": guidance_scale, "strength": strength, "num_inference_steps": num_inference_steps}
        settings = self.resolve_settings(settings, **given, map=map)
        if settings["map"] == "signed":
            check_signs(self.preprocessing.get("signs"), images.shape[1])
        w, kind, walk = (
            settings["guidance_scale"],
            settings["map"],
            (settings["strength"], settings["num_inference_steps"]),
        )

        # 3. The network's size and range. Empty images are in no window, so they never reach the network.
        x_0 = network_images(images, self.image_size, self.config.clip_input)  # (N, C, h, w) in [-1, 1]
        windows = self.windows(x_0)  # before the images travel: reading them back would wait for earlier ones
        images, x_0 = (to_device(part.float(), self._execution_device) for part in (images, x_0))
        latents, change, heat = torch.zeros_like(x_0), torch.zeros_like(x_0), torch.zeros_like(x_0[:, 0])

        # 4. Encode, decode and compare the images of each window size.
        for group in windows:
            x = group.cut(x_0)  # (n, C, h', w')
            names = target if target is None or isinstance(target, str) else [target[i] for i in group.index]
            if kind == "forward":
                x_L, x_change, x_heat = forward_map(self, x, *walk, w, names, callback_on_step_end)
            else:
                x_L = self.encode(x, *walk, callback_on_step_end)
                x_cf = self.decode(x_L, *walk, names, w, callback_on_step_end, generator)
                x_ref = x
                if kind != "counterfactual":
                    x_ref = self.decode(x_L, *walk, callback=callback_on_step_end, generator=generator)  # x_null
                x_change, x_heat = (x_cf - x) / 2, heatmap(kind, x_ref, x_cf, self.preprocessing.get("signs")) / 2
            for whole, part in ((latents, x_L), (change, x_change), (heat, x_heat)):
                group.paste(whole, part)

        # 5. Back to the input's size: the change is resampled, never the image.
        heatmaps = resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0]  # (N, H, W)
        counterfactuals = images + resize_images(change, tuple(images.shape[-2:]))  # (N, C, H, W)
        self.maybe_free_model_hooks()

        # 6. Output.
        fields = (heatmaps, counterfactuals, latents)
        fields = tuple(field.cpu().numpy() for field in fields) if output_type == "np" else fields
        return CounterfactualOutput(*fields) if return_dict else fields

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Return heatmaps `(N, H, W)` of images `(N, C, H, W)` with the recommended settings: every method's contract."""
        return self(images).heatmaps
