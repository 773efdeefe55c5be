"""Where a result comes from: the command that made it, the commit of the package, the model."""

import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers_cf


# What a recorded command shows instead of an option's value.
_PLACEHOLDERS = {
    "model": "MODEL", "models": "MODELS", "pretrained_model": "MODEL", "dataset": "DATASET", "input": "INPUT",
    "output": "OUTPUT", "output_dir": "MODEL", "split_file": "SPLITS", "labels": "LABELS", "token": "TOKEN",
    "hub_token": "TOKEN",
}  # fmt: skip


@functools.cache
def package_commit() -> str:
    """Return `git describe` of the checkout that the package runs from, else the package's version.

    A copy without a history of its own takes its commit from the variable DIFFUSERS_CF_COMMIT. Read once a process: a
    commit made later is not the code that runs.
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
    """Return the command that runs, as one would type it again, with placeholders for what only this machine has."""
    program = Path(sys.argv[0])
    return public_command(shlex.join([{"cli.py": "diffusers-cf"}.get(program.name, program.name), *sys.argv[1:]]))


def public_command(command: str) -> str:
    """Return a command with placeholders such as DATASET for files, folders and tokens, and without other folders."""
    words, placeholder = [], None
    for word in shlex.split(command):
        if not word.startswith("-"):
            words.append(placeholder or _base_name(word))
            continue
        name, equals, value = word.partition("=")
        placeholder = _PLACEHOLDERS.get(name.lstrip("-").replace("-", "_"))
        words.append(name + equals + (placeholder or _base_name(value)) if equals else word)
    return shlex.join(words)


def _base_name(word: str) -> str:
    """A word without the folders before it; a fraction, such as that of `--shard`, is no path."""
    return word if re.fullmatch(r"\d+/\d+", word) else re.split(r"[/\\]", word.rstrip("/\\"))[-1]


def model_fingerprint(pipe) -> str:
    """Return the SHA-256 of class, configuration and weights of every component, as they are in memory."""
    import torch  # here, so that `diffusers-cf --help` doesn't wait for it

    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        config = {key: value for key, value in getattr(component, "config", {}).items() if not key.startswith("_")}
        description = [name, type(component).__name__, config]
        digest.update(json.dumps(description, sort_keys=True, default=str).encode())
        for key, tensor in component.state_dict().items() if isinstance(component, torch.nn.Module) else ():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
