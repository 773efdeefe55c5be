"""Counterfactual diffusion for lesion localisation: one command for each task with data and models."""

import importlib
import sys
from collections.abc import Callable, Sequence

from diffusers_cf import __version__
from diffusers_cf.arguments import ArgumentParser, add_log_level, run_command


# Name of a command: the module that has add_NAME_arguments and run_NAME, and what the command does. Every run_NAME
# raises InputError for options, models and data that can't be used.
COMMANDS = {
    "prepare": ("diffusers_cf.commands.prepare", "make a slice data set from scans, arrays, pictures or the phantom"),
    "segment": ("diffusers_cf.commands.segment", "write heatmap, mask and counterfactual of patients as NIfTI"),
    "bids": ("diffusers_cf.commands.bids", "segment a BIDS dataset into a derivative dataset, as a BIDS-App"),
    "evaluate": ("diffusers_cf.commands.evaluate", "measure a model or a baseline on a split of a data set"),
    "sweep": ("diffusers_cf.commands.sweep", "measure combinations of settings on validation slices (Fig. 3)"),
    "distill": ("diffusers_cf.commands.distill", "teach a student a model's maps: one pass a slice"),
    "calibrate": ("diffusers_cf.commands.calibrate", "choose the threshold of the mask from labels of slices"),
    "benchmark": ("diffusers_cf.commands.benchmark", "measure every method of the paper; write tables and figures"),
    "report": ("diffusers_cf.commands.report", "write one HTML page about segmented patients, or about a training"),
    "app": ("diffusers_cf.commands.app", "serve a page on which users look at patients with a model"),
    "publish": ("diffusers_cf.commands.publish", "push a model folder to the Hub, with a card"),
    "publish-dataset": ("diffusers_cf.commands.publish", "push a data set to the Hub, with a card"),
    "demo": ("diffusers_cf.commands.demo", "segment a phantom patient that the shipped model has never seen"),
}


def build_parser(command: str | None) -> ArgumentParser:
    """Return the parser with the names of all commands, but with the options of `command` alone.

    Args:
        command (`str`, *optional*): a key of `COMMANDS`. Only its module is imported, so that `--help` is quick.
    """
    parser = ArgumentParser(prog="diffusers-cf", description=__doc__)
    parser.add_argument("--version", action="version", version=f"diffusers_cf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        options = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == command:
            _function_of(name, "add_{}_arguments")(options)
            add_log_level(options.add_argument)
    return parser


def _function_of(command: str, name: str) -> Callable:
    return getattr(importlib.import_module(COMMANDS[command][0]), name.format(command.replace("-", "_")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments (`Sequence[str]`, *optional*): the words after `diffusers-cf`; None for those of this process.

    Returns:
        `int`: exit code, see `run_command`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    return run_command(lambda: _function_of(args.command, "run_{}")(args), args.log_level)


if __name__ == "__main__":
    raise SystemExit(main())
