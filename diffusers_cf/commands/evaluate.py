"""`diffusers-cf evaluate`: measure a model or a baseline on a split and write RESULT.json."""

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from diffusers_cf.commands.options import (
    add_compile_argument,
    add_device_arguments,
    add_settings_arguments,
    add_shard_argument,
)
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.processes import share_of_work
from diffusers_cf.files import alone_at, write_json
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf evaluate`."""
    add = parser.add_argument
    method = parser.add_mutually_exclusive_group(required=True)
    method.add_argument("--model", metavar="FOLDER", help="folder, Hub id or name of a model")
    method.add_argument("--method", metavar="ID", help="a baseline without training, such as threshold-flair")
    add("--dataset", required=True, help="folder written by diffusers-cf prepare, or user/name[@revision] on the Hub")
    add("--split", default="test", choices=SPLITS, help="default: %(default)s")
    add(
        "--output",
        required=True,
        metavar="RESULT.json",
        help="file to write; counts go to RESULT.counts.npz beside it",
    )
    add_device_arguments(parser)
    add_compile_argument(parser)
    add_settings_arguments(parser)
    add("--threshold", type=float, help="threshold of the heatmap for Dice per patient, in heatmap units; default: the "
        "model's recommended one, else the ideal one of this split")  # fmt: skip
    add("--max_patients", type=int, help="use only the first patients in alphabetical order; default: all")
    add("--seed", type=int, default=0, help="seed of the bootstrap, default: %(default)s")
    add_shard_argument(parser, "puts the result together")


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a method, write RESULT.json and RESULT.counts.npz, and print the main numbers.

    Raises:
        InputError: model, data set, options or output can't be used.
    """
    import torch

    from diffusers_cf.evaluation.inputs import open_split
    from diffusers_cf.evaluation.protocol import begin_parts, evaluate
    from diffusers_cf.inference import check_device_arguments, take_device

    share = share_of_work(args.shard)
    take_device(args, share)
    check_device_arguments(args)
    if args.max_patients is not None and args.max_patients < 1:
        raise InputError(f"--max_patients must be at least 1, not {args.max_patients}")
    output = Path(args.output)
    if output.is_dir() or output.suffix != ".json":
        raise InputError(f"{output}: the output must be a file RESULT.json")
    dataset = open_split(args.dataset, args.split)
    load = _load_model if args.model else _load_baseline
    method, settings, fingerprint = load(args, dataset)
    chosen = np.isin(dataset.patients, np.unique(dataset.patients)[: args.max_patients])
    facts = {
        "model" if args.model else "method": args.model or args.method,
        "settings": settings,
        "dataset": {
            "folder": args.dataset,
            **({"commit": dataset.commit} if dataset.commit else {}),
            "split": args.split,
            **dataset.preprocessing,
        },
        "max_patients": args.max_patients,
        "seed": args.seed,
        "device": args.device,
        "dtype": args.dtype,
    }
    parts = output.with_suffix(".parts")
    # shards of one output run at the same time, each with a lock of its own; a launcher's processes share one
    locked = output.with_name(f"{output.stem}.shard-{share.index + 1}-of-{share.count}") if share.is_shard else output
    with alone_at(locked) if share.is_main or share.is_shard else nullcontext():
        # parts depend on the kind of device, but not on its number
        begin_parts(parts, facts | {"device": torch.device(args.device).type, "fingerprint": fingerprint})
        result = evaluate(
            dataset=dataset,
            threshold=settings["threshold"],
            batch_size=args.batch_size,
            device=args.device,
            indices=np.flatnonzero(chosen),
            counts_path=output.with_suffix(".counts.npz"),
            seed=args.seed,
            parts=parts,
            share=share,
            **method,
        )
        if result is not None:
            made_by = {"model_sha256": fingerprint, "command": command_line(), "commit": package_commit()}
            write_json({**result, **facts, **made_by}, output)
            shutil.rmtree(parts)
    if result is not None:
        print(_summary(result, output))
    elif share.is_shard:
        print(f"shard {args.shard} is measured; the same command without --shard puts all together -> {output}")
    return 0


def _load_model(args: argparse.Namespace, dataset) -> tuple[dict, dict, str]:
    """Return a model's keyword arguments for `evaluate`, its settings, and its fingerprint."""
    from diffusers_cf.evaluation.inputs import checked_settings
    from diffusers_cf.inference import open_pipeline

    pipe = open_pipeline(args.model, args.device, args.dtype, args.compile, dataset=dataset)
    names = ("settings", "guidance_scale", "strength", "num_inference_steps", "map", "threshold")
    settings = checked_settings(pipe, **{name: getattr(args, name) for name in names})
    call = {name: value for name, value in settings.items() if name != "threshold"}
    method = {
        "anomaly_map": lambda images: pipe(images, **call).heatmaps,
        "network_evaluations_per_slice": pipe.network_evaluations(**call),
    }
    return method, settings, model_fingerprint(pipe)


def _load_baseline(args: argparse.Namespace, dataset) -> tuple[dict, dict, None]:
    """Return a baseline's keyword arguments for `evaluate`, and its settings."""
    from diffusers_cf.baselines import make_baseline

    for name in ("settings", "guidance_scale", "strength", "num_inference_steps", "map"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is a setting of models, not of --method {args.method}")
    baseline = make_baseline(args.method, dataset.preprocessing["modalities"])
    method = {
        "anomaly_map": lambda images: baseline.anomaly_map(images.to(args.device)),
        "whole_patients": baseline.whole_patient,
        "network_evaluations_per_slice": baseline.network_evaluations_per_slice,
    }
    return method, {"threshold": args.threshold}, None


def _summary(result: dict, output: Path) -> str:
    """Return the main numbers as a small table."""
    rows = [f"{'':16}AUPRC  ideal Dice  foreground AUPRC  foreground ideal Dice  slice AUROC  AUPRC, Dice per patient"]
    for name, part in (("map", result), ("post-processed", result["postprocessed"])):
        keys = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc")
        values = [part[key] for key in keys] + [part[f"per_patient_{name}"]["mean"] for name in ("auprc", "dice")]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        widths = (5, 12, 18, 23, 13, 15, 8)
        rows.append(f"{name:16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    rows.append(f"{result['n_slices']} slices of {result['n_patients']} patients -> {output}")
    return "\n".join(rows)
