"""What else could save network passes, tried on validation slices with a model's own settings.

python benchmarks/cheaper_passes.py --model MODEL --dataset DATASET --output results/cheaper_passes.json

Guidance in a part of the steps alone, the encoding's own predictions in the place of decoding's null branch, and means of
several cheap maps from one encoding.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from frontier import slices_to_measure

from diffusers_cf import implicit_guidance
from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.commands.options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.evaluation.sweep import SweepPoint, score_maps
from diffusers_cf.files import make_folder
from diffusers_cf.images import resize_images
from diffusers_cf.maps import heatmap
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit
from diffusers_cf.settings import DECODED_MAPS


class Walk:
    """One batch's way to the latent, with the noise that was predicted on it, and ways back.

    Args:
        pipe: the pipeline, with a solver of first order for decoding.
        image: `(n, C, h, w)`, windows of what `pipe.prepare_images` made.
        settings: as from `pipe.resolve_settings`.
    """

    def __init__(self, pipe, image: torch.Tensor, settings: dict):
        self.pipe, self.image, self.settings, self.noises = pipe, image, settings, []
        predict = pipe.predict_noise

        def keep(*given):
            self.noises.append(predict(*given))
            return self.noises[-1]

        pipe.predict_noise = keep
        try:
            self.latents = pipe.encode(image, settings)
        finally:
            del pipe.predict_noise
        self.null = pipe.encode_classes(None, len(image))
        self.target = pipe.encode_classes(pipe.class_encoder.config.class_names[0], len(image))

    @property
    def timesteps(self) -> list[int]:
        """Of decoding, falling."""
        walked = round(self.settings["num_inference_steps"] * self.settings["strength"])
        return self.pipe.scheduler.timesteps[-walked:].tolist()

    def decode(self, noise_of: Callable[[int, torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        """Decodes with `noise_of(step, x, timestep)`; in input units."""
        x = self.latents
        self.pipe.scheduler.set_timesteps(self.settings["num_inference_steps"])
        for step, t in enumerate(self.timesteps):
            x = self.pipe.scheduler.step(noise_of(step, x, t), t, x).prev_sample
        return (x + 1) / 2

    def null_noise(self, step: int, x: torch.Tensor, t: int) -> torch.Tensor:
        return self.pipe.predict_noise(x, t, self.null)

    def target_noise(self, step: int, x: torch.Tensor, t: int) -> torch.Tensor:
        return self.pipe.predict_noise(x, t, self.target)

    def guided_noise(self, step: int, x: torch.Tensor, t: int) -> torch.Tensor:
        both = tuple(torch.cat(pair) for pair in zip(self.null, self.target, strict=True))
        null, target = self.pipe.predict_noise(torch.cat([x, x]), t, both).chunk(2)
        return implicit_guidance(null, target, self.settings["guidance_scale"])

    def reused_noise(self, step: int, x: torch.Tensor, t: int) -> torch.Tensor:
        """The null branch is what encoding predicted at this timestep, or as near to it as it came."""
        level = len(self.timesteps) - 1 - step
        # a solver of second order is told the level that its step begins at, DDIM the one that it reaches
        level += self.pipe.inverse_scheduler.config.get("solver_order", 1) == 2
        null = self.noises[min(level, len(self.noises) - 1)]
        return implicit_guidance(null, self.target_noise(step, x, t), self.settings["guidance_scale"])

    def guided_between(self, first: float, last: float) -> Callable:
        """Guidance in the steps from one share of decoding to another, the condition alone elsewhere."""
        count = len(self.timesteps)

        def noise_of(step: int, x: torch.Tensor, t: int) -> torch.Tensor:
            inside = first * count <= step < last * count
            return (self.guided_noise if inside else self.target_noise)(step, x, t)

        return noise_of

    def heat(self, decoded: torch.Tensor) -> torch.Tensor:
        """The map of the settings' kind, `(n, h, w)`."""
        kind, reference = self.settings["map"], (self.image + 1) / 2
        if kind != "counterfactual":
            reference = self.decode(self.null_noise)
        return heatmap(kind, reference, decoded, self.pipe.preprocessing.get("signs"))


PARTS = {"whole": (0, 1), "half near the latent": (0, 0.5), "half near the image": (0.5, 1), "middle": (0.25, 0.75)}
VARIANTS: dict[str, Callable[[Walk], torch.Tensor]] = {
    f"guidance: {name}": lambda walk, part=part: walk.heat(walk.decode(walk.guided_between(*part)))
    for name, part in PARTS.items()
} | {"null branch from the encoding": lambda walk: walk.heat(walk.decode(walk.reused_noise))}


MEANS = ("mean of w / 2 and w", "mean of L / 2 and L")


def averages(pipe, image: torch.Tensor, settings: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Means of maps at several scales or strengths; each could share its encoding with the others."""
    scale, strength = settings["guidance_scale"], settings["strength"]

    def mean_over(changes: list[dict]) -> torch.Tensor:
        walks = [Walk(pipe, image, settings | change) for change in changes]
        return torch.stack([walk.heat(walk.decode(walk.guided_noise)) for walk in walks]).mean(dim=0)

    yield MEANS[0], mean_over([{"guidance_scale": scale / 2}, {}])
    yield MEANS[1], mean_over([{"strength": strength / 2}, {}])


def passes(name: str, settings: dict) -> int:
    """Network passes a slice of a variant, its encoding shared where it can be."""
    steps = round(settings["num_inference_steps"] * settings["strength"])
    reference = steps * (settings["map"] != "counterfactual")
    if name.startswith("guidance: "):
        first, last = PARTS[name.removeprefix("guidance: ")]
        guided = sum(first * steps <= step < last * steps for step in range(steps))
        return 2 * steps + guided + reference
    if name == MEANS[0]:
        return 5 * steps + reference
    if name == MEANS[1]:
        half = round(settings["num_inference_steps"] * settings["strength"] / 2)
        return steps + (2 + bool(reference)) * (steps + half)
    return 2 * steps + reference


def maps_of(pipe, settings: dict, images: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields `(variant, maps (N, H, W))` of images `(N, C, H, W)`."""
    prepared = pipe.prepare_images(images)
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for group in pipe.windows(prepared):
            image = group.cut(prepared)
            walk = Walk(pipe, image, settings)
            parts = {name: variant(walk) for name, variant in VARIANTS.items()} | dict(averages(pipe, image, settings))
            for name, heat in parts.items():
                group.paste(found.setdefault(name, torch.zeros_like(prepared[:, 0])), heat)
    for name, heat in found.items():
        yield name, resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0].cpu().numpy()


def main(args) -> None:
    """Measures every variant on the same slices."""
    check_device_arguments(args)
    dataset, rows = slices_to_measure(args)
    pipe = open_pipeline(args.model, args.device, args.dtype)
    settings = pipe.resolve_settings()
    if settings["map"] not in DECODED_MAPS:
        raise InputError(
            f"{args.model}: recommends the map {settings['map']}, which decodes nothing that could be cheaper"
        )
    make_folder(Path(args.output).parent)
    names = [*VARIANTS, *MEANS]
    setting = {name: settings[name] for name in ("guidance_scale", "strength", "num_inference_steps", "map")}
    setting["solver_order"] = pipe.inverse_scheduler.config.get("solver_order")
    points = {name: SweepPoint(**setting, network_evaluations=passes(name, settings)) for name in names}
    found = score_maps(lambda images: maps_of(pipe, settings, images), points, dataset, rows, args.batch_size)
    variants = {name: asdict(point) for name, point in zip(names, found, strict=True)}
    facts = {"model": model_fingerprint(pipe), "data": dataset.preprocessing, "split": args.split}
    facts |= {"n_slices": len(rows), "dtype": args.dtype, "command": command_line(), "commit": package_commit()}
    write_result({"variants": variants, **facts}, Path(args.output))
    for name, point in variants.items():
        scores = f"{point['auprc']:.3f} / {point['postprocessed_auprc']:.3f}"
        print(f"{name:32} {point['network_evaluations']:3} passes  AUPRC {scores}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--max_slices", type=int, default=96)
    add_device_arguments(parser, batch_size=32)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
