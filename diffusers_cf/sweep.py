"""The sweep over guidance scale, strength and map on validation slices (Fig. 3), and the settings it recommends."""

import argparse
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_cf import loading, saving
from diffusers_cf.arguments import make_folder
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation import write_result
from diffusers_cf.forward import check_forward
from diffusers_cf.heatmaps import DECODED_MAPS, MAPS
from diffusers_cf.images import resize_images
from diffusers_cf.inference_options import add_device_arguments, check_device_arguments, open_pipeline
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.pixel_counts import PixelCounts
from diffusers_cf.plots import plot_sweep
from diffusers_cf.postprocessing import foreground_mask, postprocess_maps
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.settings import NAMES, PAPER_SETTINGS
from diffusers_cf.trajectories import heatmaps_of_settings


# The paper's axis of Fig. 3 begins at 0.4; on small networks and real FLAIR slices the best strengths lie below.
GUIDANCE_SCALES = (1.5, 2.5, 3.0)
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass
class SweepPoint:
    """Scores of one setting: pooled over all pixels, in the foreground, and in it after post-processing.

    Attributes:
        guidance_scale, strength, num_inference_steps, map: the setting.
        network_evaluations: for one slice.
        auprc, ideal_dice: over all pixels.
        foreground_auprc, foreground_ideal_dice: over pixels with any channel above 0.
        postprocessed_auprc, postprocessed_ideal_dice: over the foreground, of the post-processed map.
        threshold: where the Dice of the post-processed map is ideal, in heatmap units.
        healthy_mean, unhealthy_mean: mean of the map in the foreground of the slices of the first and the other classes.
    """

    guidance_scale: float
    strength: float
    num_inference_steps: int
    map: str
    network_evaluations: int
    auprc: float = 0.0
    ideal_dice: float = 0.0
    foreground_auprc: float = 0.0
    foreground_ideal_dice: float = 0.0
    postprocessed_auprc: float = 0.0
    postprocessed_ideal_dice: float = 0.0
    threshold: float = 0.0
    healthy_mean: float = 0.0
    unhealthy_mean: float = 0.0


class _Scores:
    """Counts of one setting while batches pass."""

    def __init__(self):
        self.all, self.foreground, self.postprocessed = PixelCounts(), PixelCounts(), PixelCounts()
        self.sums, self.counts = np.zeros(2), np.zeros(2)

    def add(self, maps: np.ndarray, batch: dict) -> None:
        images, masks = batch["images"].numpy(), batch["masks"].numpy()
        inside = foreground_mask(images)
        self.all.update(maps, masks)
        self.foreground.update(maps[inside], masks[inside])
        self.postprocessed.update(postprocess_maps(maps, images)[inside], masks[inside])
        sick = (batch["labels"].numpy() > 0).astype(int)
        np.add.at(self.sums, sick, np.where(inside, maps, 0).sum(axis=(1, 2)))
        np.add.at(self.counts, sick, inside.sum(axis=(1, 2)))

    def fill(self, point: SweepPoint) -> SweepPoint:
        point.auprc, (point.ideal_dice, _) = self.all.average_precision(), self.all.ideal_dice()
        point.foreground_auprc = self.foreground.average_precision()
        point.foreground_ideal_dice = self.foreground.ideal_dice()[0]
        point.postprocessed_auprc = self.postprocessed.average_precision()
        point.postprocessed_ideal_dice, point.threshold = self.postprocessed.ideal_dice()
        point.healthy_mean, point.unhealthy_mean = (self.sums / np.maximum(self.counts, 1)).tolist()
        return point


def sweep(
    pipe: CounterfactualDDIMPipeline,
    dataset: SliceDataset,
    indices: Sequence[int],
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
    strengths: Sequence[float] = STRENGTHS,
    maps: Sequence[str] = DECODED_MAPS,
    num_inference_steps: int = 100,
    batch_size: int = 32,
) -> list[SweepPoint]:
    """Scores of every combination; one encoding, kept at each strength, serves all scales and maps.

    Args:
        pipe: the pipeline.
        dataset: a split with masks.
        indices: rows of the split to use.
        guidance_scales: values of w.
        strengths: values of L in (0, 1].
        maps: names of maps, of `heatmaps.MAPS`.
        num_inference_steps: steps of the full grid.
        batch_size: slices at a time.

    Returns:
        A point for each combination, strengths outermost.

    Raises:
        InputError: a map holds NaN or infinite values; the message names its setting.
    """
    points = settings_of_sweep(pipe, guidance_scales, strengths, maps, num_inference_steps)

    def maps_of(images: torch.Tensor) -> Iterator[tuple[tuple, np.ndarray]]:
        return heatmaps_of_settings(pipe, images, strengths, guidance_scales, maps, num_inference_steps)

    return score_maps(maps_of, points, dataset, indices, batch_size)


def score_maps(
    maps_of: Callable[[torch.Tensor], Iterable[tuple[Hashable, np.ndarray]]],
    points: Mapping[Hashable, SweepPoint],
    dataset: SliceDataset,
    indices: Sequence[int],
    batch_size: int = 32,
) -> list[SweepPoint]:
    """Fills in the scores of settings whose maps are made together.

    Args:
        maps_of: images `(N, C, H, W)` -> `(key of a setting, maps (N, H, W))`, each setting once.
        points: the settings by their keys.
        dataset: a split with masks.
        indices: rows of the split to use.
        batch_size: slices at a time.

    Raises:
        InputError: a map holds NaN or infinite values; the message names its setting.
    """
    scores = {key: _Scores() for key in points}
    with tqdm(total=len(indices), desc="Sweep", unit="slice") as bar:
        for batch in batches_of(dataset, indices, batch_size):
            for key, heat in maps_of(batch["images"]):
                if not np.isfinite(heat).all():
                    raise InputError(f"{_in_words(points[key])}: the map holds NaN or infinite values")
                scores[key].add(heat, batch)
            bar.update(len(batch["labels"]))
    return [scores[key].fill(point) for key, point in points.items()]


def settings_of_sweep(
    pipe: CounterfactualDDIMPipeline,
    guidance_scales: Sequence[float],
    strengths: Sequence[float],
    maps: Sequence[str],
    num_inference_steps: int,
) -> dict[tuple[float, float, str], SweepPoint]:
    """Every combination by strength, scale and map, strengths outermost, without scores; arguments as in [`sweep`]."""
    points = {}
    for key in itertools.product(sorted(strengths), guidance_scales, maps):
        setting = dict(zip(("strength", "guidance_scale", "map"), key, strict=True))
        setting["num_inference_steps"] = num_inference_steps
        points[key] = SweepPoint(**setting, network_evaluations=pipe.network_evaluations(**setting))
    return points


def _in_words(point: SweepPoint) -> str:
    names = ("guidance_scale", "strength", "num_inference_steps", "map")
    return ", ".join(f"{name} {getattr(point, name)}" for name in names)


def learn_signs(
    pipe: CounterfactualDDIMPipeline, dataset: SliceDataset, indices: Sequence[int], batch_size: int = 32, **settings
) -> list[int]:
    """Whether disease is brighter (1) or darker (-1), for each modality: from labels alone, never from masks.

    The change from null to healthy reconstruction, mean over the foreground, is compared between slices labelled
    healthy and others.

    Args:
        pipe: the pipeline.
        dataset: any split.
        indices: rows to use, of both labels.
        batch_size: slices at a time.
        **settings: `guidance_scale`, `strength`, `num_inference_steps`.
    """
    walk = {name: settings[name] for name in ("strength", "num_inference_steps")}
    changes, sick = [], []
    for batch in batches_of(dataset, indices, batch_size):
        latents = pipe.invert(batch["images"], **walk)
        change = pipe.denoise(latents, None, 0, **walk) - pipe.denoise(
            latents, None, settings["guidance_scale"], **walk
        )
        inside = (resize_images(batch["images"], pipe.image_size) > 0).any(dim=1, keepdim=True).to(change)
        changes.append((change.cpu() * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1))
        sick.append(batch["labels"] > 0)
    changes, sick = torch.cat(changes), torch.cat(sick)
    if sick.all() or not sick.any():
        raise InputError("signs need slices of both labels, and all of those chosen have the same")
    return [1 if value >= 0 else -1 for value in changes[sick].mean(dim=0) - changes[~sick].mean(dim=0)]


def best_point(points: Sequence[SweepPoint], max_evaluations: int | None = None) -> SweepPoint:
    """The point with the highest AUPRC in the foreground after post-processing, among those that cost at most so much."""
    allowed = [p for p in points if max_evaluations is None or p.network_evaluations <= max_evaluations]
    if not allowed:
        raise InputError(f"no setting of the sweep needs at most {max_evaluations} network evaluations")
    return max(allowed, key=lambda point: point.postprocessed_auprc)


def evenly_spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int)).tolist()


def has_lesion(dataset: SliceDataset, indices: Sequence[int], batch_size: int = 32) -> bool:
    """Whether the masks of these rows have a lesion pixel in the foreground, where settings are compared."""
    batches = batches_of(dataset, indices, batch_size)
    return any((batch["masks"].numpy()[foreground_mask(batch["images"].numpy())] != 0).any() for batch in batches)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf sweep`."""
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="folder or Hub id of a model")
    add("--dataset", required=True, help="slice data set with masks, or user/name[@revision]")
    add("--output", required=True, metavar="RESULTS", help="folder for sweep.json and sweep.png")
    add("--split", default="validation", choices=("train", "validation", "test"))
    scales, strengths = (" ".join(map(str, values)) for values in (GUIDANCE_SCALES, STRENGTHS))
    add("--guidance_scales", type=float, nargs="+", default=list(GUIDANCE_SCALES), help=f"w, default: {scales}")
    add("--strengths", type=float, nargs="+", default=list(STRENGTHS), help=f"L, default: {strengths}")
    add("--maps", nargs="+", choices=MAPS, help="default: all that the model can make")
    add("--num_inference_steps", type=int, default=100)
    add("--solver_order", type=int, choices=(1, 2), help="of encoding, 2 costs nothing more and pays where steps are few; "
        "default: what the model has, --store makes it the model's")  # fmt: skip
    add("--max_slices", type=int, default=256, help="evenly spread over the split (256, the paper's number)")
    add("--max_evaluations", type=int, help="recommend a setting of at most so many network evaluations a slice")
    add_device_arguments(parser, batch_size=32)
    add("--store", nargs="?", const="recommended", choices=NAMES, help="write the best setting into the model folder as "
        "its recommendation; with `paper` the threshold for the paper's setting, the only one of the sweep")  # fmt: skip


def run_sweep(args: argparse.Namespace) -> int:
    """Runs the sweep, writes RESULTS/sweep.json and sweep.png, prints the best setting; with --store recommends it.

    Raises:
        InputError: model, data set or options can't be used.
    """
    _check_options(args)
    dataset = SliceDataset(args.dataset, args.split)
    if not dataset.has_masks or not len(dataset):
        raise InputError(f"{args.dataset}: the split {args.split} has no slices with lesion masks to measure on")
    indices = evenly_spread(len(dataset), args.max_slices)
    _check_slices(dataset, indices, args)
    pipe = open_pipeline(args.model, args.device, args.dtype)
    _set_solver_order(pipe, args)
    args.maps = args.maps or _possible_maps(pipe)
    grid = (args.guidance_scales, args.strengths, args.maps, args.num_inference_steps)
    try:
        pipe.scheduler.set_timesteps(args.num_inference_steps)
        # A sweep takes hours: whether any setting can be recommended is known before.
        best_point(list(settings_of_sweep(pipe, *grid).values()), args.max_evaluations)
        make_folder(args.output)
        if "signed" in args.maps:
            pipe.preprocessing = pipe.preprocessing | {"signs": _signs_for_sweep(args, pipe, dataset, indices)}
        points = sweep(pipe, dataset, indices, *grid, args.batch_size)
    except ValueError as error:
        raise InputError(str(error)) from None
    best = best_point(points, args.max_evaluations)
    output = Path(args.output)
    facts = {"command": command_line(), "commit": package_commit(), "split": args.split, "n_slices": len(indices)}
    document = facts | {"best": asdict(best), "points": [asdict(point) for point in points]}
    write_result(document, output / "sweep.json")
    plot_sweep(output / "sweep.png", points)
    print(f"best: {asdict(best)}")
    if args.store:
        _store(args, pipe, dataset, best, facts)
    return 0


def _store(args: argparse.Namespace, pipe, dataset: SliceDataset, best: SweepPoint, facts: dict) -> None:
    """Makes what the sweep has found the model's own, as `--store` says."""
    if args.solver_order:
        pipe.inverse_scheduler.save_pretrained(Path(args.model) / "inverse_scheduler")
        saving.forget_origin(args.model)
    kept = {"signs": pipe.preprocessing["signs"]} if "signed" in args.maps else {}
    kept["evaluation_size"] = dataset.preprocessing["size"]
    store = store_settings if args.store == "recommended" else store_paper_threshold
    store(args.model, best, facts, kept)


def _check_options(args: argparse.Namespace) -> None:
    check_device_arguments(args)
    if args.max_slices < 1:
        raise InputError(f"--max_slices must be at least 1, not {args.max_slices}")
    if not all(0 < strength <= 1 for strength in args.strengths):
        raise InputError(f"--strengths {args.strengths}: each must lie in (0, 1]")
    if args.store:
        _check_model_folder(args.model)
    swept = [args.guidance_scales, args.strengths, args.num_inference_steps, args.maps]
    names = ("guidance_scale", "strength", "num_inference_steps", "map")
    scale, strength, steps, kind = (PAPER_SETTINGS[name] for name in names)
    if args.store == "paper" and swept != [[scale], [strength], steps, [kind]]:
        options = "--guidance_scales 3 --strengths 0.75 --maps counterfactual --num_inference_steps 100"
        raise InputError(f"--store paper needs a sweep of the paper's setting alone: {options}")
    if args.store == "paper" and args.solver_order:
        raise InputError("--store paper adds a threshold alone: it can't change the model's --solver_order")


def _possible_maps(pipe) -> list[str]:
    try:
        check_forward(pipe)
    except ValueError:
        return list(DECODED_MAPS)
    return list(MAPS)


def _set_solver_order(pipe, args: argparse.Namespace) -> None:
    """Gives the pipeline an inverse scheduler of the order that the options ask for."""
    if not args.solver_order:
        return
    inverse = pipe.inverse_scheduler
    try:
        if "solver_order" not in inverse.config:
            raise ValueError(f"a {type(inverse).__name__} knows no solver_order")
        pipe.register_modules(
            inverse_scheduler=type(inverse).from_config(inverse.config, solver_order=args.solver_order)
        )
    except ValueError as error:
        raise InputError(f"{args.model}: {error}") from None


def _check_slices(dataset: SliceDataset, indices: Sequence[int], args: argparse.Namespace) -> None:
    """Raises `InputError` for slices that tell no setting from another: of one class, or without lesion pixels.

    A lesion counts in the foreground, because the best setting is chosen by AUPRC there.
    """
    chosen = f"{args.dataset}: the {len(indices)} slices chosen of the split {args.split}"
    sick = np.asarray(dataset.labels)[indices] != 0
    if sick.all() or not sick.any():
        raise InputError(f"{chosen} are all {'unhealthy' if sick.all() else 'healthy'}: a sweep needs both")
    if not has_lesion(dataset, indices, args.batch_size):
        raise InputError(f"{chosen} have no lesion pixel in their foreground")


def _signs_for_sweep(args: argparse.Namespace, pipe, dataset, indices: Sequence[int]) -> list[int]:
    """Signs from about 64 of the slices, at the sweep's largest guidance scale and its middle strength."""
    return learn_signs(
        pipe,
        dataset,
        indices[:: max(1, len(indices) // 64)],
        args.batch_size,
        guidance_scale=max(args.guidance_scales),
        strength=sorted(args.strengths)[len(args.strengths) // 2],
        num_inference_steps=args.num_inference_steps,
    )


def store_settings(folder: str, best: SweepPoint, facts: dict, more: dict) -> None:
    """Writes a point into the model folder's preprocessing.json as what the model recommends, and what chose it.

    Raises:
        InputError: the model is not a folder.
    """
    _check_model_folder(folder)
    names = ("guidance_scale", "strength", "num_inference_steps", "map", "threshold")
    settings = {name: getattr(best, name) for name in names} | {"postprocess": True}
    chosen = facts | {"postprocessed_auprc": best.postprocessed_auprc, "ideal_dice": best.postprocessed_ideal_dice}
    known = loading.read_preprocessing(folder)
    known.pop("threshold_chosen_by", None)  # of the threshold that stood there before
    stored = {"settings": settings, "settings_chosen_by": chosen} | more
    saving.write_preprocessing(folder, known | stored)


def store_paper_threshold(folder: str, point: SweepPoint, facts: dict, more: dict) -> None:
    """Writes the threshold of the paper's setting into the model folder's preprocessing.json, and what chose it."""
    _check_model_folder(folder)
    stored = {"paper_threshold": point.threshold, "paper_threshold_chosen_by": facts}
    saving.write_preprocessing(folder, loading.read_preprocessing(folder) | stored | more)


def _check_model_folder(folder: str) -> None:
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: settings can be stored in a model folder only")
