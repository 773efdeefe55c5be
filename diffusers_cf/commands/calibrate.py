"""`diffusers-cf calibrate`: a threshold for the mask from labels of slices alone, and what it loses where masks exist."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from diffusers_cf import loading
from diffusers_cf.commands.options import (
    add_device_arguments,
    add_settings_arguments,
    check_device_arguments,
    open_pipeline,
)
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.calibration import (
    HEALTHY_QUANTILE,
    DivergenceRule,
    best_split,
    divergences,
    healthy_quantile,
    slice_scores,
)
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask, postprocess_maps
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.evaluation.sweep import evenly_spread
from diffusers_cf.files import make_folder
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit


SETTINGS = ("guidance_scale", "strength", "num_inference_steps", "map")
# Rules with one threshold for all slices, which a model's settings can hold; the first is the default.
RULES = ("slice-labels", "healthy-quantile")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf calibrate`."""
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="folder or Hub id of a model")
    add("--dataset", required=True, help="slice data set; its masks, if it has any, are not looked at to choose")
    add("--output", required=True, metavar="RESULT.json")
    add("--split", default="validation", choices=("train", "validation", "test"))
    add("--max_slices", type=int, default=256, help="to choose on, evenly spread, default: %(default)s")
    add("--quantile", type=float, default=HEALTHY_QUANTILE, help="of healthy pixels, default: %(default)s")
    add("--measure", choices=("train", "validation", "test"), help="a split with masks: Dice of each rule on it")
    add_settings_arguments(parser)
    add_device_arguments(parser, batch_size=32)
    add("--store", nargs="?", const=RULES[0], choices=RULES, help="write the threshold and the settings it belongs to "
        "into the model folder as what it recommends; the rule, default: %(const)s")  # fmt: skip


def run_calibrate(args: argparse.Namespace) -> int:
    """Chooses a threshold by every rule, writes RESULT.json and prints them.

    Raises:
        InputError: model, data set or options can't be used.
    """
    check_device_arguments(args)
    chosen_on, measured_on = _splits(args)
    rows = _rows(chosen_on, args)
    pipe = open_pipeline(args.model, args.device, args.dtype, dataset=chosen_on)
    output = Path(args.output)
    try:
        settings = pipe.resolve_settings(args.settings, **{name: getattr(args, name) for name in SETTINGS})
        settings = {name: settings[name] for name in SETTINGS}
        pipe.scheduler.set_timesteps(settings["num_inference_steps"])
        make_folder(output.parent)
        rules = rules_of_labels(_maps(pipe, chosen_on, rows, settings, args.batch_size), args.quantile)
        scores = {}
        if measured_on:
            everything = range(len(measured_on))
            scores = dice_of_rules(_maps(pipe, measured_on, everything, settings, args.batch_size), rules)
    except ValueError as error:
        raise InputError(str(error)) from None
    facts = {
        "model": args.model, "model_sha256": model_fingerprint(pipe), "settings": settings, "dtype": args.dtype,
        "data": chosen_on.preprocessing, "split": args.split, "n_slices": len(rows), "quantile": args.quantile,
        "measured_on": args.measure, "command": command_line(), "commit": package_commit(),
    }  # fmt: skip
    thresholds = {name: asdict(rule) if isinstance(rule, DivergenceRule) else rule for name, rule in rules.items()}
    write_result({"thresholds": thresholds, "dice": scores, **facts}, output)
    for name, threshold in thresholds.items():
        print(f"{name}: {threshold}" + (f", Dice {scores[name]:.3f}" if scores else ""))
    if scores:
        print(f"ideal, chosen with masks: Dice {scores['ideal']:.3f}")
    if args.store:
        store_threshold(args.model, settings | {"threshold": rules[args.store]}, args.store, facts)
    return 0


def _rows(dataset: SliceDataset, args: argparse.Namespace) -> list[int]:
    """Rows to choose on; whether they can teach a threshold is known before their maps are made."""
    if args.max_slices < 1:
        raise InputError(f"--max_slices must be at least 1, not {args.max_slices}")
    if not 0 < args.quantile < 1:
        raise InputError(f"--quantile is {args.quantile}: it must lie between 0 and 1")
    rows = evenly_spread(len(dataset), args.max_slices)
    sick = np.asarray(dataset.labels)[rows] != 0
    if sick.all() or not sick.any():
        raise InputError(f"{args.dataset}: the {len(rows)} slices of the split {args.split} all have the same label")
    return rows


def _splits(args: argparse.Namespace) -> tuple[SliceDataset, SliceDataset | None]:
    if args.store and not Path(args.model).is_dir():
        raise InputError(f"{args.model}: a threshold can be stored in a model folder only")
    chosen_on = SliceDataset(args.dataset, args.split)
    if not len(chosen_on):
        raise InputError(f"{args.dataset} has no slices in its split {args.split}")
    if not args.measure:
        return chosen_on, None
    measured_on = SliceDataset(args.dataset, args.measure)
    if not measured_on.has_masks or not len(measured_on):
        raise InputError(f"{args.dataset}: the split {args.measure} has no slices with lesion masks to measure on")
    return chosen_on, measured_on


def _maps(pipe, dataset: SliceDataset, rows, settings: dict, batch_size: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Post-processed maps `(N, H, W)` of batches, with the batch."""
    with tqdm(total=len(rows), desc=dataset.split, unit="slice") as bar:
        for batch in batches_of(dataset, rows, batch_size):
            heatmaps = pipe(batch["images"], **settings).heatmaps.cpu().numpy()
            if not np.isfinite(heatmaps).all():
                raise InputError("the model yields NaN or infinite values")
            yield postprocess_maps(heatmaps, batch["images"]), batch
            bar.update(len(heatmaps))


def rules_of_labels(maps: Iterator[tuple[np.ndarray, dict]], quantile: float = HEALTHY_QUANTILE) -> dict:
    """What every rule makes of slices and their labels; masks are not looked at.

    Args:
        maps: post-processed maps `(N, H, W)` with their batches (`images`, `labels`).
        quantile: of healthy pixels, for that rule.

    Returns:
        Rule -> threshold, or a [`DivergenceRule`].

    Raises:
        ValueError: all slices have the same label, or a quantile out of (0, 1).
    """
    healthy, scores, far, labels = PixelCounts(), [], [], []
    for heat, batch in maps:
        inside, sick = foreground_mask(batch["images"]), np.asarray(batch["labels"]) != 0
        pixels = heat[~sick][inside[~sick]]
        healthy.update(pixels, np.zeros_like(pixels))
        scores.append(slice_scores(heat))
        far.append(divergences(heat, inside))
        labels.append(sick)
    scores, far, labels = map(np.concatenate, (scores, far, labels))
    return {
        "slice-labels": best_split(scores, labels),
        "healthy-quantile": healthy_quantile(healthy, quantile),
        "divergence": DivergenceRule.of_labels(far, labels),
    }


def dice_of_rules(maps: Iterator[tuple[np.ndarray, dict]], rules: dict) -> dict[str, float | None]:
    """Dice over all foreground pixels of each rule, and of the threshold that is `ideal` for these very masks.

    Args:
        maps: post-processed maps `(N, H, W)` with their batches (`images`, `masks`).
        rules: as [`rules_of_labels`] returns them.
    """
    found, counts = {name: PixelCounts() for name in rules}, PixelCounts()
    for heat, batch in maps:
        inside, masks = foreground_mask(batch["images"]), np.asarray(batch["masks"])
        counts.update(heat[inside], masks[inside])
        for name, rule in rules.items():
            limits = rule.thresholds(heat, inside)[:, None, None] if isinstance(rule, DivergenceRule) else rule
            found[name].update((heat >= limits)[inside], masks[inside])
    return {name: marked.dice_at(1.0) for name, marked in found.items()} | {"ideal": counts.ideal_dice()[0]}


def store_threshold(folder: str, settings: dict, rule: str, facts: dict) -> None:
    """Writes settings and threshold into the model folder's preprocessing.json, and what chose the threshold.

    What chose the settings stays if they are the same still, but for the Dice of the threshold that it chose with them.
    """
    known = loading.read_preprocessing(folder)
    chosen = known.pop("settings_chosen_by", None)
    if chosen and all(settings[name] == known.get("settings", {}).get(name) for name in SETTINGS):
        known["settings_chosen_by"] = {name: value for name, value in chosen.items() if name != "ideal_dice"}
    kept = {name: facts[name] for name in ("command", "commit", "split", "n_slices")} | {"rule": rule}
    size = {"evaluation_size": facts["data"]["size"]}
    stored = {"settings": settings | {"postprocess": True}, "threshold_chosen_by": kept} | size
    loading.replace_json(folder, {loading.PREPROCESSING: known | stored})
