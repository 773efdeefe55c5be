"""Compute many inference settings from one encoding, which does not depend on guidance scale or final strength."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffusers_cf.images import Windows, resize_images
from diffusers_cf.maps import check_map, forward_maps, heatmap, per_present_channel
from diffusers_cf.settings import DECODED_MAPS


# strength, guidance scale and map
Setting = tuple[float, float, str]


def encode_trajectory(
    pipe, prepared: torch.Tensor, strength: float, num_inference_steps: int, callback: Callable | None = None
) -> list[torch.Tensor]:
    """Return the latents `(N, C, h, w)` after 0, 1, .., K steps of the first loop of Algorithm 1, K = round(n L).

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): the pipeline.
        prepared (`torch.Tensor`): `(N, C, h, w)` from `pipe.prepare_images`, or windows of it.
        strength (`float`): the largest L that is needed.
        num_inference_steps (`int`): n, steps of the full grid.
        callback (`Callable`, *optional*): as in `pipe.encode`; may end the walk by raising an error.
    """
    latents = [prepared]

    def keep(_, step, timestep, tensors):
        latents.append(tensors["latents"])
        return callback(pipe, step, timestep, tensors) if callback else {}

    pipe.encode(prepared, strength, num_inference_steps, keep)
    return latents[:: pipe.inverse_scheduler.order]


class Encoding(NamedTuple):
    """Encoded images, from which any guidance scale and any smaller strength can be decoded.

    Attributes:
        prepared (`torch.Tensor`): `(N, C, h, w)` from `pipe.prepare_images`.
        groups (`list[Windows]`): the windows of the images that the network computes.
        latents (`list[list[torch.Tensor]]`): what `encode_trajectory` returns for each group.
    """

    prepared: torch.Tensor
    groups: list[Windows]
    latents: list[list[torch.Tensor]]

    @property
    def steps(self) -> float:
        """Number of encoding steps; inf for images without foreground."""
        return min((len(latents) - 1 for latents in self.latents), default=math.inf)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The windows `(n, C, h, w)` of each group in input units."""
        return [(latents[0] + 1) / 2 for latents in self.latents]


def encode_images(
    pipe, images: torch.Tensor, strength: float, num_inference_steps: int, callback: Callable | None = None
) -> Encoding:
    """Encode images `(N, C, H, W)` in input units up to the largest strength; callback as in `encode_trajectory`.

    Raises:
        ValueError: images or settings are out of range.
    """
    pipe.check_inputs(images)
    prepared = pipe.prepare_images(images)
    groups = pipe.windows(prepared)
    walk = strength, num_inference_steps, callback
    latents = [encode_trajectory(pipe, group.cut(prepared), *walk) for group in groups]
    return Encoding(prepared, groups, latents)


def decode_null(pipe, encoding: Encoding, settings: Mapping, callback: Callable | None = None) -> list[torch.Tensor]:
    """Decode with the null condition, `(n, C, h, w)` for each group; does not depend on the guidance scale."""
    return _decode(pipe, encoding, {**settings, "guidance_scale": 0}, callback)


def decode_images(
    pipe,
    encoding: Encoding,
    settings: Mapping,
    null: Sequence[torch.Tensor] | None = None,
    callback: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the pipeline computes for the same images, without encoding them again.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): the pipeline.
        encoding (`Encoding`): up to the strength of `settings` or further, with as many steps of the full grid.
        settings (`Mapping`): from `pipe.resolve_settings`, with a map of `DECODED_MAPS`.
        null (`Sequence[torch.Tensor]`, *optional*): from `decode_null` with the same settings; decoded here if needed.
        callback (`Callable`, *optional*): as in `pipe.decode`.

    Returns:
        Changes `(N, C, h, w)`, counterfactual minus image, and heatmaps `(N, h, w)`, in input units at the network's
        size.
    """
    changes, decoded = torch.zeros_like(encoding.prepared), _decode(pipe, encoding, settings, callback)
    for group, image, counterfactual in zip(encoding.groups, encoding.inputs, decoded, strict=True):
        group.paste(changes, counterfactual - image)
    if settings["map"] != "counterfactual" and null is None:
        null = decode_null(pipe, encoding, settings, callback)
    return changes, _heat(pipe, encoding, settings["map"], decoded, null)


def _decode(pipe, encoding: Encoding, settings: Mapping, callback: Callable | None = None) -> list[torch.Tensor]:
    options = {name: settings[name] for name in ("guidance_scale", "strength", "num_inference_steps")}
    options["callback_on_step_end"] = callback
    steps = round(settings["num_inference_steps"] * settings["strength"])
    return [pipe.denoise(latents[steps], None, **options) for latents in encoding.latents]


def _heat(pipe, encoding: Encoding, kind: str, decoded, null) -> torch.Tensor:
    """Return heatmaps `(N, h, w)` of one kind from the images of each group, decoded with guidance and without."""
    heat, references = torch.zeros_like(encoding.prepared[:, 0]), encoding.inputs if kind == "counterfactual" else null
    for group, *pair in zip(encoding.groups, references, decoded, strict=True):
        group.paste(heat, heatmap(kind, *pair, pipe.preprocessing.get("signs")))
    return heat


def heatmaps_of_settings(
    pipe, images: torch.Tensor, settings: Iterable[Setting], num_inference_steps: int
) -> Iterator[tuple[Setting, np.ndarray]]:
    """Yield `((strength, guidance_scale, map), heatmaps (N, H, W))` of each setting: `forward` first, strengths rising.

    Costs one encoding to the largest strength, one decoding per strength and scale, and one more per strength if a map
    other than `counterfactual` is wanted; for `forward` one encoding of two branches.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): the pipeline.
        images (`torch.Tensor`): `(N, C, H, W)` in input units.
        settings (`Iterable[Setting]`): the wanted settings.
        num_inference_steps (`int`): n, steps of the full grid.
    """
    settings = sorted(settings)
    forward = [setting for setting in settings if setting[2] == "forward"]
    decoded = [setting for setting in settings if setting[2] in DECODED_MAPS]
    for compute, chosen in ((_forward_heatmaps, forward), (_decoded_heatmaps, decoded)):
        for setting, heat in compute(pipe, images, chosen, num_inference_steps) if chosen else ():
            yield setting, resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0].cpu().numpy()
    for strength, scale, kind in settings:  # maps that share nothing
        if kind not in (*DECODED_MAPS, "forward"):
            yield (
                (strength, scale, kind),
                pipe(images, None, scale, strength, num_inference_steps, kind, output_type="np")[0],
            )


def _decoded_heatmaps(pipe, images, settings: Sequence[Setting], num_inference_steps: int) -> Iterator:
    """Yield heatmaps `(N, h, w)` of decoded counterfactuals."""
    encoding = encode_images(pipe, images, settings[-1][0], num_inference_steps)
    for strength, of_strength in itertools.groupby(settings, key=lambda setting: setting[0]):
        null = None  # serves all guidance scales
        for scale, of_scale in itertools.groupby(of_strength, key=lambda setting: setting[1]):
            walk = {"strength": strength, "guidance_scale": scale, "num_inference_steps": num_inference_steps}
            decoded = _decode(pipe, encoding, walk)
            for setting in of_scale:
                if null is None and setting[2] != "counterfactual":
                    null = decode_null(pipe, encoding, walk)
                yield setting, _heat(pipe, encoding, setting[2], decoded, null)


def _forward_heatmaps(pipe, images, settings: Sequence[Setting], num_inference_steps: int) -> Iterator:
    """Yield heatmaps `(N, h, w)` of the map `forward`, all from one walk."""
    pipe.check_inputs(images)
    check_map(pipe, "forward")
    prepared = pipe.prepare_images(images)
    heats = {setting: torch.zeros_like(prepared[:, 0]) for setting in settings}
    scales = list(dict.fromkeys(scale for _, scale, _ in settings))
    for group in pipe.windows(prepared):
        walked = forward_maps(pipe, group.cut(prepared), settings[-1][0], num_inference_steps, scales)
        for step, (_, found) in enumerate(walked):
            for (strength, scale, _), heat in heats.items():
                if round(num_inference_steps * strength) == step:
                    group.paste(heat, found[scale][1])
    for setting, heat in heats.items():
        yield setting, per_present_channel(heat, images.to(heat.device))
