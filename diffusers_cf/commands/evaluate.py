"""`diffusers-cf evaluate`: measure a model or a baseline on a split and write RESULT.json."""

import argparse
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from diffusers_cf.commands import options
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.processes import share_of_work
from diffusers_cf.files import alone_at, write_json
from diffusers_cf.provenance import command_line, model_fingerprint, package_commit


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf evaluate`."""
    add = parser.add_argument
    method = parser.add_mutually_exclusive_group(required=True)
    method.add_argument("--model", help=options.MODEL)
    method.add_argument("--method", metavar="ID", help="a baseline without training, such as threshold-flair")
    add("--dataset", required=True, help=f"{options.DATASET}; it needs masks")
    add("--split", default="test", choices=SPLITS, help="split to measure on; default: %(default)s")
    text = "file for the scores; RESULT.counts.npz beside it gets the pixel counts of each patient"
    add("--output", required=True, metavar="RESULT.json", help=text)
    options.add_device_arguments(parser, compile=True)
    options.add_settings_arguments(parser)
    options.add_postprocessing_arguments(parser)
    text = "measure the root of the model's map times the brightness of FLAIR"
    add("--with_intensity", action="store_const", const=True, help=f"{text}; default: off")
    text = "choose post-processing and the thresholds of Dice on the validation split, with its masks"
    add("--choose_on_validation", action="store_true", help=f"{text}; default: off")
    text = "map value from which a pixel counts as lesion, for Dice per patient, in map units"
    add("--threshold", type=float, help=f"{text}; default: recommended by the model, else the ideal one of this split")
    add("--seed", type=int, default=0, help="seed of the bootstrap intervals; default: %(default)s")
    options.add_shard_argument(parser, "combines them into the result")


def run_evaluate(args: argparse.Namespace) -> None:
    """Evaluate a method, write RESULT.json and RESULT.counts.npz, and print the main numbers."""
    from diffusers_cf.evaluation.inputs import open_split
    from diffusers_cf.evaluation.protocol import begin_parts, evaluate
    from diffusers_cf.inference import check_device_arguments

    share = share_of_work(args.shard)
    check_device_arguments(args, share)
    output = Path(args.output)
    if output.is_dir() or output.suffix != ".json":
        raise InputError(f"{output}: the output must be a file RESULT.json")
    dataset = open_split(args.dataset, args.split)
    method, settings, chain, fingerprint = (_open_model if args.model else _make_baseline)(args, dataset)
    if args.choose_on_validation:
        chain, settings["threshold"] = _choose(args, method, chain.bright_channel)
    facts = _facts(args, dataset, settings) | {"postprocess": chain.as_setting}
    parts = output.with_suffix(".parts")
    with _lock(output, share):
        # patients may be measured on different devices of one kind
        begin_parts(parts, facts | {"device": args.device.partition(":")[0], "fingerprint": fingerprint})
        result = evaluate(
            method.anomaly_map, dataset, batch_size=args.batch_size, whole_patients=method.whole_patient,
            device=args.device, threshold=settings["threshold"], seed=args.seed, chain=chain,
            network_evaluations_per_slice=method.network_evaluations_per_slice,
            counts_path=output.with_suffix(".counts.npz"), parts=parts, share=share,
        )  # fmt: skip
        if result is not None:
            made_by = {"model_sha256": fingerprint, "command": command_line(), "commit": package_commit()}
            write_json({**result, **facts, **made_by}, output)
            shutil.rmtree(parts)
    if result is not None:
        print(_summary(result, output))
    elif share.is_shard:
        print(f"shard {args.shard} is measured; the same command without --shard combines all shards -> {output}")


def _open_model(args: argparse.Namespace, dataset) -> tuple:
    """Return a model as an anomaly method, its settings, its post-processing, and its fingerprint."""
    from diffusers_cf.baselines.combination import IntensityCombination
    from diffusers_cf.baselines.method import PipelineMap
    from diffusers_cf.evaluation.inputs import checked_chain, checked_settings
    from diffusers_cf.inference import open_pipeline

    pipe = open_pipeline(args.model, args.device, args.dtype, args.compile, dataset=dataset)
    settings = checked_settings(pipe, **{name: getattr(args, name) for name in (*options.SETTINGS, "threshold")})
    method = PipelineMap(pipe, {name: value for name, value in settings.items() if name != "threshold"})
    chain = checked_chain(args, pipe.preprocessing.get("settings", {}), dataset.preprocessing["modalities"])
    if args.with_intensity:
        method = IntensityCombination(method, dataset.preprocessing["modalities"])
        settings |= {"with_intensity": True, "threshold": args.threshold}  # the model's threshold is of other maps
        chain = replace(chain, bright_channel=args.bright_channel)  # not twice
    return method, settings, chain, model_fingerprint(pipe)


def _make_baseline(args: argparse.Namespace, dataset) -> tuple:
    """Return a baseline, its settings, and its post-processing; a baseline has no fingerprint."""
    from diffusers_cf.baselines import make_baseline
    from diffusers_cf.evaluation.inputs import checked_chain

    for name in (*options.SETTINGS, "with_intensity"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is a setting of models, not of --method {args.method}")
    modalities = dataset.preprocessing["modalities"]
    method = make_baseline(args.method, modalities)
    return method, {"threshold": args.threshold}, checked_chain(args, {}, modalities), None


def _choose(args: argparse.Namespace, method, bright_channel: int | None) -> tuple:
    """Return the post-processing that is best on the validation split, and the ideal thresholds there."""
    from diffusers_cf.evaluation.chains import RAW, choose_chain
    from diffusers_cf.evaluation.inputs import open_split

    if args.threshold is not None or args.split == "validation":
        raise InputError("--choose_on_validation chooses the thresholds, on another split than the one to measure on")
    validation = open_split(args.dataset, "validation")
    options = {"batch_size": args.batch_size, "device": args.device}
    chain, counts = choose_chain(method, validation, bright_channel, **options)
    return chain, {"raw": counts[RAW].ideal_dice()[1], "postprocessed": counts[chain].ideal_dice()[1]}


def _facts(args: argparse.Namespace, dataset, settings: dict) -> dict:
    """Return what a result depends on, as RESULT.json names it."""
    commit = {"commit": dataset.commit} if dataset.commit else {}
    return {
        "model" if args.model else "method": args.model or args.method,
        "settings": settings,
        "dataset": {"folder": args.dataset, **commit, "split": args.split, **dataset.preprocessing},
        **{name: getattr(args, name) for name in ("seed", "device", "dtype")},
    }


def _lock(output: Path, share):
    """Lock the output: each shard has a lock of its own, all processes of a launcher share one."""
    if share.is_shard:
        return alone_at(output.with_name(f"{output.stem}.shard-{share.index + 1}-of-{share.count}"))
    return alone_at(output) if share.is_main else nullcontext()


def _summary(result: dict, output: Path) -> str:
    """Return the main numbers as a small table."""
    rows = [f"{'':16}AUPRC  ideal Dice  foreground AUPRC  foreground ideal Dice  slice AUROC  AUPRC, Dice per patient"]
    for name, part in (("map", result), ("post-processed", result["postprocessed"])):
        keys = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc")
        values = [part[key] for key in keys] + [part[f"per_patient_{name}"]["mean"] for name in ("auprc", "dice")]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        widths = (5, 12, 18, 23, 13, 15, 8)
        rows.append(f"{name:16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join([*rows, f"{result['n_slices']} slices of {result['n_patients']} patients -> {output}"])
