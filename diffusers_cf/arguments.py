"""Command lines: one parser for every command, and what a user's mistake looks like."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from diffusers_cf.errors import InputError
from diffusers_cf.provenance import package_commit


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose options, declared with `_`, may be written with `_` or `-`."""

    def parse_known_args(self, args=None, namespace=None):
        """As in `argparse`, after giving every `--long-option[=value]` the spelling `--long_option[=value]`."""
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_with_underscores(arg) for arg in args], namespace)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def make_folder(path: str | Path) -> None:
    """Makes an output folder, at a command's start: finding out at its end would be late.

    Raises:
        InputError: it can't be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: the output folder can't be made ({error.strerror})") from None


def run_command(command: Callable[[], int | None]) -> int:
    """Exit code of a command: 0 done, or 2 with one line on stderr where the input was bad."""
    package_commit()  # asked now: a commit made while it runs is not the code that runs
    try:
        return command() or 0
    except InputError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return 2
