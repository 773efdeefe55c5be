"""Many settings of inference from one encoding, which depends on neither guidance scale nor strength."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffusers_cf.images import Windows, resize_images
from diffusers_cf.maps import check_forward, forward_maps, heatmap


def encode_trajectory(pipe, prepared: torch.Tensor, strength: float, num_inference_steps: int) -> list[torch.Tensor]:
    """Latents `(N, C, h, w)` after 0, 1, .., K steps of the first loop of Algorithm 1, K = round(n L).

    Args:
        pipe: a `CounterfactualDDIMPipeline`.
        prepared: `(N, C, h, w)`, what `pipe.prepare_images` made, or windows of it.
        strength: the largest L that is wanted.
        num_inference_steps: n, steps of the full grid.
    """
    latents = [prepared]

    def keep(_, step, timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    pipe.encode(prepared, strength, num_inference_steps, keep)
    return latents[:: pipe.inverse_scheduler.order]


class Encoding(NamedTuple):
    """Images on their way to noise, from where any guidance scale and any smaller strength can be decoded.

    Attributes:
        prepared: `(N, C, h, w)`, as from `pipe.prepare_images`.
        groups: where the network has something to do in them.
        latents: for each group what `encode_trajectory` gives.
    """

    prepared: torch.Tensor
    groups: list[Windows]
    latents: list[list[torch.Tensor]]

    @property
    def steps(self) -> float:
        """How far it goes; without limit where there is nothing to encode."""
        return min((len(latents) - 1 for latents in self.latents), default=math.inf)


def encode_images(pipe, images: torch.Tensor, strength: float, num_inference_steps: int) -> Encoding:
    """Encodes images `(N, C, H, W)` in input units up to the largest strength that is wanted.

    Raises:
        ValueError: images or settings are outside their ranges.
    """
    pipe.check_inputs(images)
    prepared = pipe.prepare_images(images)
    groups = pipe.windows(prepared)
    latents = [encode_trajectory(pipe, group.cut(prepared), strength, num_inference_steps) for group in groups]
    return Encoding(prepared, groups, latents)


def decode_null(pipe, encoding: Encoding, settings: Mapping) -> list[torch.Tensor]:
    """For each group of an encoding what the null condition decodes, which depends on no guidance scale."""
    walk = {name: settings[name] for name in ("strength", "num_inference_steps")}
    return [pipe.denoise(encoded, None, 0, **walk) for encoded in _encoded(encoding, settings)]


def _encoded(encoding: Encoding, settings: Mapping) -> list[torch.Tensor]:
    return [latents[round(settings["num_inference_steps"] * settings["strength"])] for latents in encoding.latents]


def decode_images(
    pipe, encoding: Encoding, settings: Mapping, null: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes of the same images, without encoding them again.

    Args:
        pipe: a `CounterfactualDDIMPipeline`.
        encoding: to the strength of `settings` or beyond, on a grid of as many steps.
        settings: as from `pipe.resolve_settings`, with a map of `DECODED_MAPS`.
        null: from `decode_null` with the same settings, for a map other than `counterfactual`; None = made here.

    Returns:
        Changes `(N, C, h, w)`, counterfactual minus image, and heatmaps `(N, h, w)`, in input units at the network's
        size.
    """
    walk = {name: settings[name] for name in ("strength", "num_inference_steps")}
    changes = torch.zeros_like(encoding.prepared)
    references = inputs = _inputs(encoding)
    if settings["map"] != "counterfactual":
        references = decode_null(pipe, encoding, settings) if null is None else null
    scale = settings["guidance_scale"]
    decoded = [pipe.denoise(encoded, None, scale, **walk) for encoded in _encoded(encoding, settings)]
    for group, given, found in zip(encoding.groups, inputs, decoded, strict=True):
        group.paste(changes, found - given)
    return changes, _heat(pipe, encoding, settings["map"], references, decoded)


def _inputs(encoding: Encoding) -> list[torch.Tensor]:
    """For each group the images themselves, in input units."""
    return [(latents[0] + 1) / 2 for latents in encoding.latents]


def _heat(pipe, encoding: Encoding, kind: str, references, decoded) -> torch.Tensor:
    """Heatmaps `(N, h, w)` of a kind, from what each group is compared with and what was decoded of it."""
    heat = torch.zeros_like(encoding.prepared[:, 0])
    for group, *pair in zip(encoding.groups, references, decoded, strict=True):
        group.paste(heat, heatmap(kind, *pair, pipe.preprocessing.get("signs")))
    return heat


# strength, guidance scale and map
Setting = tuple[float, float, str]


def heatmaps_of_settings(
    pipe, images: torch.Tensor, settings: Iterable[Setting], num_inference_steps: int
) -> Iterator[tuple[Setting, np.ndarray]]:
    """Yields `((strength, guidance_scale, map), heatmaps (N, H, W))` of each setting, strengths rising; `forward` first.

    Costs one encoding to the largest strength, one decoding for each strength and scale, and one more a strength where
    a map other than `counterfactual` is asked for; for `forward`, one encoding of two branches and nothing else.

    Args:
        pipe: a `CounterfactualDDIMPipeline`.
        images: `(N, C, H, W)` in input units.
        settings: those that are wanted.
        num_inference_steps: n, steps of the full grid.
    """
    settings = sorted(settings, key=lambda setting: setting[0])
    if forward := [setting for setting in settings if setting[2] == "forward"]:
        yield from _forward_heatmaps(pipe, images, forward, num_inference_steps)
    if decoded := [setting for setting in settings if setting[2] != "forward"]:
        yield from _decoded_heatmaps(pipe, images, decoded, num_inference_steps)


def _decoded_heatmaps(pipe, images, settings: Sequence[Setting], num_inference_steps: int) -> Iterator:
    """The part of [`heatmaps_of_settings`] for maps of a decoded counterfactual."""
    encoding = encode_images(pipe, images, settings[-1][0], num_inference_steps)
    for strength, group in itertools.groupby(settings, key=lambda setting: setting[0]):
        chosen, walk = list(group), {"strength": strength, "num_inference_steps": num_inference_steps}
        # x_cf is compared with the image itself, or with what the null condition decodes
        null = [kind for _, _, kind in chosen if kind != "counterfactual"]
        references = {"counterfactual": _inputs(encoding)}
        references |= dict.fromkeys(null, decode_null(pipe, encoding, walk) if null else None)
        for scale in dict.fromkeys(scale for _, scale, _ in chosen):
            decoded = [pipe.denoise(encoded, None, scale, **walk) for encoded in _encoded(encoding, walk)]
            for kind in [setting[2] for setting in chosen if setting[1] == scale]:
                heat = _heat(pipe, encoding, kind, references[kind], decoded)
                heat = resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0]
                yield (strength, scale, kind), heat.cpu().numpy()


def _forward_heatmaps(pipe, images, settings: Sequence[Setting], num_inference_steps: int) -> Iterator:
    """The part of [`heatmaps_of_settings`] for the map `forward`, all of it from one walk."""
    pipe.check_inputs(images)
    check_forward(pipe)
    prepared = pipe.prepare_images(images)
    heats = {setting[:2]: torch.zeros_like(prepared[:, 0]) for setting in settings}
    guidance_scales = list(dict.fromkeys(scale for _, scale in heats))
    for group in pipe.windows(prepared):
        walked = forward_maps(pipe, group.cut(prepared), settings[-1][0], num_inference_steps, guidance_scales)
        for step, (_, found) in enumerate(walked):
            for (strength, scale), heat in heats.items():
                if round(num_inference_steps * strength) == step:
                    group.paste(heat, found[scale][1])
    for (strength, scale), heat in heats.items():
        yield (strength, scale, "forward"), resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0].cpu().numpy()
