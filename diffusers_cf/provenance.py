"""Where a result comes from: the command that made it, and the commit of the package."""

import functools
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers_cf


@functools.cache
def package_commit() -> str:
    """Returns `git describe` of the checkout that the package runs from, else the package's version.

    Asked once a process: a commit made meanwhile is not the code that runs.
    """
    root = Path(diffusers_cf.__file__).resolve().parent.parent
    version = f"diffusers_cf {diffusers_cf.__version__}"
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version


def command_line() -> str:
    """Returns the command that runs, as one would type it again."""
    program = Path(sys.argv[0])
    return shlex.join([{"cli.py": "diffusers-cf"}.get(program.name, program.name), *sys.argv[1:]])
