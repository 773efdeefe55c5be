"""Command lines: one parser for every command, and one place where errors become a line and an exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from diffusers_cf.errors import in_one_line
from diffusers_cf.files import remove_empty_folders
from diffusers_cf.logs import LEVELS, log_to_stderr
from diffusers_cf.provenance import package_commit


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose options are declared with `_` and may be written with `_` or `-`."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse as `argparse` does, after turning every `--long-option[=value]` into `--long_option[=value]`."""
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_with_underscores(arg) for arg in args], namespace)


def add_log_level(add: Callable) -> None:
    """Add the option `--log_level` of every command by a parser's or a group's `add_argument`."""
    text = "least important messages to show on stderr; progress is info; default: %(default)s"
    add("--log_level", choices=LEVELS, default="info", help=text)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


class _Terminated(BaseException):
    """SIGTERM as an exception, so that temporary files and locks are removed."""


def _terminate(*_) -> None:
    raise _Terminated


def run_command(command: Callable[[], int | None], log_level: str = "info") -> int:
    """Run a command and return its exit code.

    The code is 0 for success, 2 after bad input, a file system error or lack of memory, 130 after Ctrl-C and 143 after
    SIGTERM, each of them with one line on stderr. Any other exception is a fault of this package and keeps its
    traceback. Output folders that stayed empty are removed.

    Args:
        command (`Callable`): takes nothing; returns an exit code or None for 0.
        log_level (`str`): see [`log_to_stderr`].
    """
    if sys.stderr is None:  # the caller closed it, but progress bars and messages need a stream
        sys.stderr = open(os.devnull, "w")
    package_commit()  # cached now, because a commit that is made later is not the code that runs
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with log_to_stderr(log_level):
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
