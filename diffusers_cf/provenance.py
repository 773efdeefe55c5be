"""Where a result comes from: the command that made it, the commit of the package, the model."""

import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import diffusers_cf


@functools.cache
def package_commit() -> str:
    """Returns `git describe` of the checkout that the package runs from, else the package's version.

    A copy that has not its own history is told its commit by the variable DIFFUSERS_CF_COMMIT. Asked once a process: a
    commit made meanwhile is not the code that runs.
    """
    if told := os.environ.get("DIFFUSERS_CF_COMMIT"):
        return told
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


def model_fingerprint(pipe) -> str:
    """SHA-256 over class, configuration and weights of every component, as they are in memory."""
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        config = {key: value for key, value in getattr(component, "config", {}).items() if not key.startswith("_")}
        description = [name, type(component).__name__, config]
        digest.update(json.dumps(description, sort_keys=True, default=str).encode())
        for key, tensor in component.state_dict().items() if isinstance(component, torch.nn.Module) else ():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
