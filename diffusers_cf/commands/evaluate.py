"""`diffusers-cf evaluate`: measures a model folder or a baseline on a split and writes RESULT.json."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.baselines import BASELINES, make_baseline
from diffusers_cf.commands.options import (
    add_compile_argument,
    add_device_arguments,
    add_settings_arguments,
    add_shard_argument,
    check_device_arguments,
    open_pipeline,
    take_device,
)
from diffusers_cf.data import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.measuring import begin_parts
from diffusers_cf.evaluation.processes import share_of_work
from diffusers_cf.evaluation.protocol import evaluate, write_result
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf evaluate`."""
    method = parser.add_mutually_exclusive_group(required=True)
    method.add_argument("--model", metavar="FOLDER", help="folder or Hub id of a model")
    method.add_argument("--method", metavar="ID", help=f"a method without a model folder: {', '.join(BASELINES)}")
    parser.add_argument(
        "--dataset", required=True, help="folder written by diffusers-cf prepare, or user/name[@revision] on the Hub"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help="default: %(default)s"
    )
    parser.add_argument(
        "--output", required=True, metavar="RESULT.json", help="counts go to RESULT.counts.npz beside it"
    )
    add_device_arguments(parser)
    add_compile_argument(parser)
    add_settings_arguments(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        help="for Dice per patient, default: what the model recommends, else the split's ideal one",
    )
    parser.add_argument("--max_patients", type=int, help="only the first patients in alphabetical order")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, default: %(default)s")
    add_shard_argument(parser, "puts the result together")


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluates as the options say, writes RESULT.json and RESULT.counts.npz, and prints the main figures.

    Raises:
        InputError: Model, data set, options or output can't be used.
    """
    share = share_of_work(args.shard)
    take_device(args, share)
    check_device_arguments(args)
    if args.max_patients is not None and args.max_patients < 1:
        raise InputError(f"--max_patients must be at least 1, not {args.max_patients}")
    output = _output_file(args.output)
    dataset = SliceDataset(args.dataset, args.split)
    if not dataset.has_masks:
        raise InputError(f"{args.dataset} has no lesion masks: it trains a model, but can't be evaluated")
    if not len(dataset):
        raise InputError(f"{args.dataset} has no slices in its split {args.split}")
    method = _load_model(args, dataset) if args.model else _load_baseline(args, dataset)
    settings, fingerprint = method.pop("settings"), method.pop("fingerprint")
    facts = _facts(args, dataset, settings)
    parts = output.with_suffix(".parts")
    # which of a machine's GPUs measured a part changes nothing
    begin_parts(parts, facts | {"device": torch.device(args.device).type, "fingerprint": fingerprint})
    result = evaluate(
        dataset=dataset,
        threshold=settings["threshold"],
        batch_size=args.batch_size,
        device=args.device,
        indices=_rows_of_first_patients(dataset.patients, args.max_patients),
        counts_path=output.with_suffix(".counts.npz"),
        seed=args.seed,
        parts=parts,
        share=share,
        **method,
    )
    if result is not None:
        made_by = {"model_sha256": fingerprint, "command": command_line(), "commit": package_commit()}
        write_result({**result, **facts, **made_by}, output)
        shutil.rmtree(parts)
        print(_summary(result, output))
    elif share.is_shard:
        print(f"shard {args.shard} is measured; the same command without --shard puts all together -> {output}")
    return 0


def _facts(args: argparse.Namespace, dataset: SliceDataset, settings: dict) -> dict:
    return {
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


def _output_file(path: str) -> Path:
    """Returns the output's path, its folder made now: not to fail after hours."""
    output = Path(path)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output.parent}: the folder can't be made ({error.strerror})") from None
    if output.is_dir() or output.suffix != ".json":
        raise InputError(f"{output}: the output must be a file RESULT.json")
    return output


def _load_model(args: argparse.Namespace, dataset: SliceDataset) -> dict:
    """Returns a model's keyword arguments for `evaluate`, and `settings`."""
    pipe = open_pipeline(args.model, args.device, args.dtype, args.compile, dataset=dataset)
    names = ("settings", "guidance_scale", "strength", "num_inference_steps", "map", "threshold")
    try:
        settings = pipe.resolve_settings(**{name: getattr(args, name) for name in names})
        pipe.scheduler.set_timesteps(settings["num_inference_steps"])
    except ValueError as error:
        raise InputError(str(error)) from None
    call = {name: value for name, value in settings.items() if name != "threshold"}
    return {
        "anomaly_map": lambda images: pipe(images, **call).heatmaps,
        "network_evaluations_per_slice": pipe.network_evaluations(**call),
        "settings": settings,
        "fingerprint": model_fingerprint(pipe),
    }


def _load_baseline(args: argparse.Namespace, dataset: SliceDataset) -> dict:
    """Returns a baseline's keyword arguments for `evaluate`, and `settings`."""
    for name in ("settings", "guidance_scale", "strength", "num_inference_steps", "map"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is a setting of models, not of --method {args.method}")
    method = make_baseline(args.method, dataset.preprocessing["modalities"])

    def anomaly_map(images: torch.Tensor) -> torch.Tensor:
        return method.anomaly_map(images.to(args.device))

    return {
        "anomaly_map": anomaly_map,
        "whole_patients": method.whole_patient,
        "network_evaluations_per_slice": method.network_evaluations_per_slice,
        "settings": {"threshold": args.threshold},
        "fingerprint": None,
    }


def _rows_of_first_patients(patients: np.ndarray, max_patients: int | None) -> np.ndarray:
    return np.flatnonzero(np.isin(patients, np.unique(patients)[:max_patients]))


def _summary(result: dict, output: Path) -> str:
    """Returns the main figures as a small table."""
    rows = [f"{'':16}AUPRC  ideal Dice  foreground AUPRC  foreground ideal Dice  slice AUROC  AUPRC, Dice per patient"]
    for name, part in (("map", result), ("post-processed", result["postprocessed"])):
        keys = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc")
        values = [part[key] for key in keys] + [part[f"per_patient_{name}"]["mean"] for name in ("auprc", "dice")]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        widths = (5, 12, 18, 23, 13, 15, 8)
        rows.append(f"{name:16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    rows.append(f"{result['n_slices']} slices of {result['n_patients']} patients -> {output}")
    return "\n".join(rows)
