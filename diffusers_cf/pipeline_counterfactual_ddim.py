"""CounterfactualDDIMPipeline: Algorithm 1 of "What is Healthy?" (Sanchez et al. 2022), from image to heatmap."""

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.utils import BaseOutput

from diffusers_cf.images import Windows, foreground_windows, network_images, resize_images, to_device, window_side
from diffusers_cf.loading import SWITCHES, ModelFolderMixin
from diffusers_cf.maps import check_signs, delta_maps, forward_maps, heatmap, per_present_channel, student_maps
from diffusers_cf.models import ClassTokenEncoder, implicit_guidance, predict_noise
from diffusers_cf.schedulers import authors_schedulers, check_mirrored


@dataclass
class CounterfactualOutput(BaseOutput):
    """Output of [`CounterfactualDDIMPipeline`].

    Args:
        heatmaps (`torch.Tensor` or `np.ndarray`): `(N, H, W)`, 0 or more, in input units (never scaled per image).
        counterfactuals (`torch.Tensor` or `np.ndarray`): `(N, C, H, W)`, the image as it would look in the target
            class, in input units. For the maps `forward` and `delta` it is the image plus the mean change; None for
            the map `student`, which makes neither counterfactuals nor latents.
        latents (`torch.Tensor` or `np.ndarray`): `(N, C, h, w)`, the result of encoding at the network's size. They
            are 0, and can't be decoded, for empty images and outside the windows of `crop_background`.
    """

    heatmaps: torch.Tensor | np.ndarray
    counterfactuals: torch.Tensor | np.ndarray | None
    latents: torch.Tensor | np.ndarray | None


class CounterfactualDDIMPipeline(ModelFolderMixin, DiffusionPipeline):
    r"""Encode an image with the null condition, decode it towards a class, and map what had to change.

    Images are `(N, C, H, W)` in input units: the intensity scale that the model's preprocessing.json names
    (`normalize`), background 0. The network's range is [-1, 1]. [`encode`] and [`decode`] are the two loops of
    Algorithm 1 in the network's range; [`invert`] and [`denoise`] do the same from and to input units. Loops and
    schedulers compute in float32, whatever the dtype of the network.

    Args:
        unet ([`UNet2DConditionModel`]): epsilon_theta, such as [`counterfactual_unet`] returns.
        class_encoder ([`ClassTokenEncoder`], *optional*): tau; None for an unconditional U-Net.
        scheduler ([`SchedulerMixin`]): decodes: [`DynamicDDIMScheduler`], or a stock `DDIMScheduler` (the row of Table
            2 without dynamic normalisation).
        inverse_scheduler ([`SchedulerMixin`]): encodes: the inverse of `scheduler` with the same options.
        student ([`UNet2DModel`], *optional*): taught by this model's maps (`diffusers-cf distill`); one pass an image.
        clip_input (`bool`, *optional*, defaults to True): clip intensities at 1 before encoding, unlike the authors.
            Dynamic normalisation limits x0 to 1, so brighter pixels would take the latents out of the network's range.
        crop_background (`bool`, *optional*, defaults to False): compute each image, and the quantile of dynamic
            normalisation, in a window around its foreground (about two thirds of a brain slice). Meant for networks
            trained on windows (`train_counterfactual.py --crop_background`); others lose accuracy.
    """

    model_cpu_offload_seq = "class_encoder->unet"
    _optional_components = ["class_encoder", "student"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False

    def __init__(
        self, unet: UNet2DConditionModel, class_encoder: ClassTokenEncoder | None, scheduler: SchedulerMixin,
        inverse_scheduler: SchedulerMixin, student: UNet2DModel | None = None, clip_input: bool | None = None,
        crop_background: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        self.register_modules(
            unet=unet, class_encoder=class_encoder, scheduler=scheduler, inverse_scheduler=inverse_scheduler,
            student=student,
        )  # fmt: skip
        self.register_switches(clip_input=clip_input, crop_background=crop_background)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        return tuple(np.broadcast_to(self.unet.config.sample_size, 2).tolist())

    def with_authors_sampler(self) -> "CounterfactualDDIMPipeline":
        """Return a pipeline with this network that takes the steps of the authors' code, Diff-SCM."""
        parts = (self.unet, self.class_encoder, *authors_schedulers(self.scheduler.config))
        made = type(self)(*parts, clip_input=False, crop_background=False)
        self.register_switches(**{name: self.config[name] for name in SWITCHES})  # pipelines of this U-Net keep them
        return made

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt = True`; the loops then skip all further steps."""
        return self._interrupt

    def network_evaluations(self, **settings) -> int:
        """Return the number of function evaluations (NFE) for one image; settings are arguments of `__call__`."""
        settings = self.resolve_settings(**settings)
        steps = round(settings["num_inference_steps"] * settings["strength"])
        if settings["map"] in ("student", "forward", "delta"):
            return {"student": 1, "forward": 2 * steps, "delta": 4 * steps}[settings["map"]]
        decoding = 2 if self.class_encoder is not None and settings["guidance_scale"] not in (0, 1) else 1
        return steps * (self.inverse_scheduler.order + decoding + (settings["map"] != "counterfactual"))

    def check_inputs(self, images: torch.Tensor) -> None:
        """Raise ValueError unless images are float `(N, C, H, W)`, finite, not negative, with the network's aspect."""
        channels, (height, width) = self.unet.config.in_channels, self.image_size
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}: it must be (N, {channels}, H, W)")
        if not images.is_floating_point():
            raise ValueError(f"images is {images.dtype}: it must be floating, on the model's intensity scale")
        if images.shape[2] * width != images.shape[3] * height:
            raise ValueError(f"images has shape {tuple(images.shape)}: its sides must be as {height} to {width}")
        if images.numel() and not (torch.isfinite(images).all() and images.min() >= 0):
            raise ValueError("images holds NaN, infinite or negative values: it must be 0 outside, positive inside")

    def encode_classes(self, names: str | None | Sequence[str], batch_size: int) -> tuple | None:
        """Return the condition `(tokens, vector)` of class names, one for all samples or one each; None is null.

        Raises:
            ValueError: a class is unknown, or the number of names is not `batch_size`.
        """
        if self.class_encoder is None:
            return None
        names = [names] * batch_size if names is None or isinstance(names, str) else list(names)
        if len(names) != batch_size:
            raise ValueError(f"target holds {len(names)} names for {batch_size} images")
        ids = torch.tensor([self.class_encoder.class_id(name) for name in names], dtype=torch.long)
        return self.class_encoder(to_device(ids, self._execution_device))

    def encode_target(self, target: str | Sequence[str] | None, batch_size: int) -> tuple | None:
        """Return the condition of the target classes; a target of None is the first class."""
        if self.class_encoder is None:
            if target is not None:
                raise ValueError(f"target is {target!r}: this model is unconditional and knows no classes")
            return None
        return self.encode_classes(target or self.class_encoder.config.class_names[0], batch_size)

    def prepare_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return images `(N, C, H, W)` in input units as x_0, float32 `(N, C, h, w)` in [-1, 1]."""
        return to_device(network_images(images, self.image_size, self.config.clip_input), self._execution_device)

    def windows(self, prepared: torch.Tensor) -> list[Windows]:
        """Return the windows of x_0 `(N, C, h, w)` to compute; without `crop_background` they are whole images."""
        halvings = len(self.unet.config.get("block_out_channels", (1,))) - 1
        side = window_side(self.image_size, halvings) if self.config.crop_background else None
        return foreground_windows((prepared > -1).any(dim=1), side)

    def timesteps(self, strength: float, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the timesteps of encoding, ascending, and of decoding, descending: K = round(n L) steps each.

        They stay on the CPU, where schedulers read them. Reading from an accelerator would wait for its queue.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        self.inverse_scheduler.set_timesteps(num_inference_steps)
        check_mirrored(self.scheduler, self.inverse_scheduler)
        steps = round(num_inference_steps * strength)
        up, down = self.inverse_scheduler.timesteps, self.scheduler.timesteps
        return up[: steps * self.inverse_scheduler.order], down[len(down) - steps :]

    def predict_noise(self, sample: torch.Tensor, timestep: int, condition: tuple | None) -> torch.Tensor:
        """Return epsilon_theta(x_t, c, t), float32 `(N, C, h, w)`, without waiting for an accelerator."""
        dtype = self.unet.dtype
        timestep = torch.full((1,), int(timestep), device=sample.device)
        condition = condition and tuple(part.to(dtype) for part in condition)
        return predict_noise(self.unet, sample.to(dtype), timestep, condition).float()

    def predict_guided(self, sample: torch.Tensor, timestep: int, null, target, guidance_scale: float) -> torch.Tensor:
        """Return the guided noise of Sec. 3.2, both branches in one call; for w = 0 or 1 only one branch is needed."""
        if null is None or guidance_scale in (0, 1):
            return self.predict_noise(sample, timestep, target if guidance_scale == 1 else null)
        both = tuple(torch.cat(pair) for pair in zip(null, target, strict=True))
        noise_null, noise_target = self.predict_noise(torch.cat([sample, sample]), timestep, both).chunk(2)
        return implicit_guidance(noise_null, noise_target, guidance_scale)

    @torch.no_grad()
    def encode(self, latents: torch.Tensor, strength: float, num_inference_steps: int, callback=None) -> torch.Tensor:
        """Encode x_0 `(N, C, h, w)` in [-1, 1] to x_L by DDIM upwards, the first loop of Algorithm 1."""
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
        self, latents: torch.Tensor, strength: float, num_inference_steps: int, target=None,
        guidance_scale: float = 0.0, callback=None, generator=None,
    ) -> torch.Tensor:  # fmt: skip
        """Decode x_L to x_0 `(N, C, h, w)` of the target class by guided DDIM downwards, the second loop."""
        _, timesteps = self.timesteps(strength, num_inference_steps)
        null, wanted = self.encode_classes(None, len(latents)), self.encode_target(target, len(latents))
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            noise = self.predict_guided(latents, t, null, wanted, guidance_scale)  # (N, C, h, w)
            latents = self.scheduler.step(noise, t, latents, **extra).prev_sample  # one stride down, (N, C, h, w)
            latents = self.end_of_step(callback, i, t, latents)
        return latents

    def end_of_step(self, callback: Callable | None, step: int, timestep: torch.Tensor, latents: torch.Tensor):
        """Call the callback of a step and return the latents, or those that it replaces them by."""
        return callback(self, step, timestep, {"latents": latents}).pop("latents", latents) if callback else latents

    @torch.no_grad()
    def invert(
        self, images: torch.Tensor, strength: float | None = None, num_inference_steps: int | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Encode images `(N, C, H, W)` to latents x_L, float32 `(N, C, h, w)`; arguments as in `__call__`."""
        given = {"strength": strength, "num_inference_steps": num_inference_steps, "map": "counterfactual"}
        settings = self.resolve_settings(**given)
        self._interrupt = False
        self.check_inputs(images)
        walk = (settings["strength"], settings["num_inference_steps"])
        return self.encode(self.prepare_images(images), *walk, callback_on_step_end)

    @torch.no_grad()
    def denoise(
        self, latents: torch.Tensor, target: str | Sequence[str] | None = None, guidance_scale: float | None = None,
        strength: float | None = None, num_inference_steps: int | None = None,
        generator: torch.Generator | None = None, callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Decode latents of [`invert`] to counterfactuals, float32 `(N, C, h, w)` in input units.

        Arguments are those of `__call__`. Strength and steps must be those of [`invert`]. A guidance scale of 0 uses
        the null condition only and returns a reconstruction.
        """
        given = {"guidance_scale": guidance_scale, "strength": strength, "num_inference_steps": num_inference_steps}
        settings = self.resolve_settings(**given, map="counterfactual")
        self._interrupt = False
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
        r"""Run Algorithm 1: encode with the null condition, decode towards the target, compare.

        Args:
            images (`torch.Tensor` or `np.ndarray`): `(N, C, H, W)` on the model's intensity scale, background 0.
            target (`str` or list of `str`, *optional*): class name, one for all or for each sample; the first class.
            guidance_scale (`float`, *optional*): w of Sec. 3.2, 0 or more. This and the next three default to what the
                model recommends, else to the paper's (3.0, 0.75, 100, counterfactual).
            strength (`float`, *optional*): L in [0, 1], the share of the steps that are taken.
            num_inference_steps (`int`, *optional*): n, number of steps for L = 1; a divisor of the training steps.
            map (`str`, *optional*): `counterfactual`, |x - x_cf|; `reconstruction`, |x_null - x_cf|, where x_null is
                decoded with the null condition, takes K more NFE and has the same error of inversion; `signed`, the
                same with a weight for each modality instead of the absolute value; `forward`, the mean of
                |x0_null - x0_target| along the encoding, 2K NFE without any decoding; `delta`, the same at shared
                noise instead of an encoding, 4K NFE; or `student`, what the student has learned, 1 pass.
            generator (`torch.Generator`, *optional*): for a stochastic scheduler instead of DDIM.
            output_type (`str`): `pt` or `np`.
            return_dict (`bool`): return a [`CounterfactualOutput`], or the tuple of its fields.
            callback_on_step_end (`Callable`, *optional*): `(pipe, step, timestep, {"latents"}) -> dict`, called after
                each step of encoding and decoding, for each window size separately; may return other latents.
            settings (`str`, *optional*): `paper` for the paper's values instead of what the model recommends.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): tensors for the callback; only `latents` exists.

        Raises:
            ValueError: an argument is out of range, or the schedulers' timesteps or options differ.

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
        if isinstance(images, np.ndarray):  # torch takes neither negative strides nor foreign byte orders
            images = torch.from_numpy(np.ascontiguousarray(images, images.dtype.newbyteorder("=")))  # (N, C, H, W)
        self.check_inputs(images)
        self.encode_target(target, len(images))
        self._interrupt = False

        # 2. Omitted settings are those that the model recommends, else the paper's.
        given = {"guidance_scale": guidance_scale, "strength": strength, "num_inference_steps": num_inference_steps}
        settings = self.resolve_settings(settings, **given, map=map)
        w, kind, signs = settings["guidance_scale"], settings["map"], self.preprocessing.get("signs")
        walk = (settings["strength"], settings["num_inference_steps"])
        if kind == "signed":
            check_signs(signs, images.shape[1])

        if kind == "student":
            found = student_maps(self.student, to_device(images, self._execution_device))
            heatmaps = resize_images(found[:, None], tuple(images.shape[-2:]))[:, 0]  # (N, H, W)
            return self.output((heatmaps, None, None), output_type, return_dict)

        # 3. Bring images to the network's size and range. Empty images have no window and never reach the network.
        x_0 = network_images(images, self.image_size, self.config.clip_input)  # (N, C, h, w) in [-1, 1]
        windows = self.windows(x_0)  # on the CPU: reading images back from an accelerator would wait for its queue
        images, x_0 = (to_device(part.float(), self._execution_device) for part in (images, x_0))
        latents, change, heat = torch.zeros_like(x_0), torch.zeros_like(x_0), torch.zeros_like(x_0[:, 0])

        # 4. Encode, decode and compare the images of each window size.
        for group in windows:
            x = group.cut(x_0)  # (n, C, h', w')
            names = target if target is None or isinstance(target, str) else [target[i] for i in group.index]
            if kind == "delta":
                x_L, x_change, x_heat = delta_maps(self, x, *walk, w, names, callback_on_step_end, generator)
            elif kind == "forward":
                walked = forward_maps(self, x, *walk, [w], names, callback_on_step_end)
                x_L, maps = deque(walked, maxlen=1).pop()  # after the last step
                x_change, x_heat = maps[w]
            else:
                x_L = self.encode(x, *walk, callback_on_step_end)
                x_cf, x_ref = self.decode(x_L, *walk, names, w, callback_on_step_end, generator), x
                if kind != "counterfactual":
                    x_ref = self.decode(x_L, *walk, callback=callback_on_step_end, generator=generator)  # x_null
                x_change, x_heat = (x_cf - x) / 2, heatmap(kind, x_ref, x_cf, signs) / 2  # in input units
            for whole, part in ((latents, x_L), (change, x_change), (heat, x_heat)):
                group.paste(whole, part)

        # 5. Return to the input's size: only the change is resampled. A decoded map is the mean over all channels (Alg. 1).
        heat = per_present_channel(heat, images) if kind in ("forward", "delta") else heat
        heatmaps = resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0]  # (N, H, W)
        counterfactuals = images + resize_images(change, tuple(images.shape[-2:]))  # (N, C, H, W)
        return self.output((heatmaps, counterfactuals, latents), output_type, return_dict)

    def output(self, fields: tuple, output_type: str, return_dict: bool) -> CounterfactualOutput | tuple:
        """Return tensors as the output of `__call__`, and free what was offloaded."""
        self.maybe_free_model_hooks()
        fields = tuple(f if f is None or output_type == "pt" else f.cpu().numpy() for f in fields)
        return CounterfactualOutput(*fields) if return_dict else fields

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Return heatmaps `(N, H, W)` of images `(N, C, H, W)` with the recommended settings, as every method does."""
        return self(images).heatmaps
