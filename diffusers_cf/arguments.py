"""Command lines: one parser for every command, and one place where errors become a line and an exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from diffusers_cf.errors import in_one_line
from diffusers_cf.files import remove_empty_folders
from diffusers_cf.provenance import package_commit


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose options, declared with `_`, may be written with `_` or `-`."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse as `argparse` does, after spelling every `--long-option[=value]` as `--long_option[=value]`."""
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_with_underscores(arg) for arg in args], namespace)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


class _Terminated(BaseException):
    """SIGTERM, raised so that temporary files and locks are removed."""


def _terminate(*_) -> None:
    raise _Terminated


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    0 done; 2 with one line on stderr for bad input, a file system error or lack of memory; 130 and 143 with one line
    after Ctrl-C and SIGTERM. Output folders that stayed empty are removed. Any other exception is a fault of this package and keeps its traceback (exit code 1).
    """
    if sys.stderr is None:  # closed by the caller; progress bars and messages have nowhere else to go
        sys.stderr = open(os.devnull, "w")
    package_commit()  # read now: a commit made while the command runs is not the code that runs
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return command() or 0
    except KeyboardInterrupt:
        line, code = "stopped by Ctrl-C", 130
    except _Terminated:
        line, code = "stopped by SIGTERM", 143
    except Exception as error:
        line, code = in_one_line(error), 2
        if line is None:
            raise
    finally:
        remove_empty_folders()
        signal.signal(signal.SIGTERM, previous)
    print(f"error: {line}", file=sys.stderr)
    return code
