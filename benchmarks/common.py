"""What the scripts of this folder share: options, slices to measure on, and results with their command and commit."""

import statistics
from collections.abc import Callable
from pathlib import Path

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.sweep import evenly_spread, has_lesion
from diffusers_cf.files import make_folder, write_json
from diffusers_cf.inference import check_device_arguments
from diffusers_cf.provenance import command_line, package_commit


def make_parser(description: str, split: str, max_slices: int) -> ArgumentParser:
    """Return a parser with the options `--dataset`, `--split`, `--output` and `--max_slices`.

    Args:
        description (`str`): the script's docstring; its first line is shown.
        split (`str`): default of `--split`.
        max_slices (`int`): default of `--max_slices`.
    """
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="slice data set")
    parser.add_argument("--split", default=split, choices=("train", "validation", "test"), help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    help = "largest number of slices, evenly spread over the split, default: %(default)s"
    parser.add_argument("--max_slices", type=int, default=max_slices, help=help)
    return parser


def open_slices(args, lesions: bool = False, label: int | None = None) -> tuple[SliceDataset, list[int]]:
    """Return the split and its rows to measure on.

    Args:
        args: with `dataset`, `split` and `max_slices`.
        lesions (`bool`): whether the rows must hold lesion pixels.
        label (`int`, *optional*): take slices with this label only.

    Raises:
        InputError: there are no such slices.
    """
    dataset = SliceDataset(args.dataset, args.split)
    rows = [row for row in range(len(dataset)) if label is None or dataset.labels[row] == label]
    rows = [rows[i] for i in evenly_spread(len(rows), args.max_slices)] if rows else []
    if not rows or (lesions and not (dataset.has_masks and has_lesion(dataset, rows))):
        raise InputError(f"{args.dataset}: the split {args.split} has no slices to measure on")
    return dataset, rows


def run_script(main: Callable, args, counts: tuple[str, ...] = ()) -> int:
    """Check the options, run `main(args)` and write the result that it returns, if any.

    Args:
        main (`Callable`): returns a result for `write_result`, or None.
        args: the parsed options.
        counts (`tuple[str, ...]`): options that must be at least 1.
    """

    def command() -> None:
        for name in counts:
            if getattr(args, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}")
        if hasattr(args, "device"):
            check_device_arguments(args)
        result = main(args)
        if result is not None:
            write_result(result, args.output)

    return run_command(command)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def write_result(result: dict, output: str) -> None:
    """Write a result with the command and the commit that made it."""
    make_folder(Path(output).parent)
    write_json(result | {"command": command_line(), "commit": package_commit()}, output)
