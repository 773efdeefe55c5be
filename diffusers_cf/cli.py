"""`diffusers-cf`: one command for each thing that a user does with data and models."""

import importlib
import sys
from collections.abc import Sequence

from diffusers_cf import __version__
from diffusers_cf.arguments import ArgumentParser, run_command


# name -> (module that has add_NAME_arguments and run_NAME, what it does)
COMMANDS = {
    "prepare": ("diffusers_cf.commands.prepare", "scans, arrays, pictures or the phantom to a slice data set"),
    "segment": ("diffusers_cf.commands.segment", "patients or cohorts to heatmap, mask and counterfactual as NIfTI"),
    "evaluate": ("diffusers_cf.commands.evaluate", "a model or method on a data set to RESULT.json"),
    "sweep": (
        "diffusers_cf.commands.sweep",
        "guidance scale, strength, steps, solver and map on validation slices (Fig. 3)",
    ),
    "calibrate": ("diffusers_cf.commands.calibrate", "a threshold for the mask from labels of slices alone"),
    "benchmark": (
        "diffusers_cf.commands.benchmark",
        "every method of the paper under one protocol to tables and figures",
    ),
    "report": ("diffusers_cf.commands.report", "what segment found, in one patient or a cohort, to one HTML page"),
    "app": ("diffusers_cf.commands.app", "a page to look at patients with a model: slices, sliders, whole volumes"),
    "publish": ("diffusers_cf.commands.publish", "a model folder to the Hub, with a card made of facts"),
    "publish-dataset": (
        "diffusers_cf.commands.publish",
        "a data set to the Hub, or how to make it where its licence forbids",
    ),
    "demo": ("diffusers_cf.commands.demo", "the shipped model on a phantom patient that it has never seen"),
}


def build_parser(command: str | None) -> ArgumentParser:
    """The parser with every command's name; only the options of `command` are loaded, with its module."""
    parser = ArgumentParser(prog="diffusers-cf", description=__doc__)
    parser.add_argument("--version", action="version", version=f"diffusers_cf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        options = commands.add_parser(name, help=text, description=f"{name}: {text}")
        if name == command:
            getattr(importlib.import_module(module), f"add_{_identifier(name)}_arguments")(options)
    return parser


def _identifier(command: str) -> str:
    return command.replace("-", "_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 done, 2 bad usage or input. A fault of ours ends in a traceback and 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    run = getattr(importlib.import_module(COMMANDS[args.command][0]), f"run_{_identifier(args.command)}")
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
