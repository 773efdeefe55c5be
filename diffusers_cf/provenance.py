"""Where a result comes from: its command, the commit of the package, the fingerprint of the model."""

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


# Values that recorded commands show instead of those of these options.
_PLACEHOLDERS = {
    "model": "MODEL", "models": "MODELS", "pretrained_model": "MODEL", "dataset": "DATASET", "input": "INPUT",
    "output": "OUTPUT", "output_dir": "MODEL", "split_file": "SPLITS", "labels": "LABELS", "token": "TOKEN",
    "hub_token": "TOKEN",
}  # fmt: skip


@functools.cache
def package_commit() -> str:
    """Return `git describe` of the checkout that the package runs from, else the package's version.

    A copy without git history takes it from the environment variable DIFFUSERS_CF_COMMIT. The result is cached, because
    a commit that is made later is not the code that runs.
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
    """Return the command that runs, with placeholders for paths and tokens."""
    program = Path(sys.argv[0]).name
    return public_command(shlex.join(["diffusers-cf" if program == "cli.py" else program, *sys.argv[1:]]))


def public_command(command: str) -> str:
    """Return a command with placeholders such as DATASET for paths and tokens; other paths lose their folders."""
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
    """Return the last part of a path; a word like the `1/4` of `--shard` is no path."""
    return word if re.fullmatch(r"\d+/\d+", word) else re.split(r"[/\\]", word.rstrip("/\\"))[-1]


def model_fingerprint(pipe) -> str:
    """Return the SHA-256 of class, configuration and weights of every component, as they are in memory."""
    import torch  # here, so that `diffusers-cf --help` is quick

    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if component is None:
            continue
        config = {key: value for key, value in getattr(component, "config", {}).items() if not key.startswith("_")}
        description = [name, type(component).__name__, config]
        digest.update(json.dumps(description, sort_keys=True, default=str).encode())
        for key, tensor in component.state_dict().items() if isinstance(component, torch.nn.Module) else ():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
