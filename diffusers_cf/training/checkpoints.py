"""Checkpoints of a training run: written whole or not at all, found again, and checked before they are resumed."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffusers_cf.errors import InputError, first_line, reading


CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"
ADVICE = "lower --learning_rate or use bf16; the checkpoints saved so far are whole"


def check_weights(weights: list[torch.Tensor], step: int) -> None:
    """Raise `InputError` if the last update made weights NaN or infinite: its own loss can't show that yet."""
    if not all(w.isfinite().all() for w in weights):
        raise InputError(f"the weights became NaN or infinite by step {step}: {ADVICE}")


def finished_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    found = [
        p for p in Path(folder).glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and (p / STATE_FILE).is_file()
    ]
    return sorted(found, key=_step)


def check_output_folder(output: Path, resume_from: str | None) -> None:
    """Raise `InputError` if a new run would write into a folder that holds another run's checkpoints."""
    finished = finished_checkpoints(output)
    if finished and not resume_from:
        raise InputError(
            f"{output} already holds {finished[-1].name}: go on from it with --resume_from_checkpoint latest,"
            " or start in another --output_dir"
        )


def save_checkpoint(accelerator, folder: Path, state: dict, save_model=None, limit: int | None = None) -> None:
    """Save the whole training state as `checkpoint-STEP`, or nothing; then delete the oldest beyond `limit`.

    Args:
        accelerator: holds the state to save.
        folder (`Path`): the run's output folder.
        state (`dict`): for trainer_state.json, which is written last; `step` is the number of optimiser steps done.
        save_model (`Callable`, *optional*): `(folder) -> None`, saves the EMA weights as a pipeline; called on the main
            process.
        limit (`int`, *optional*): how many checkpoints to keep.

    Raises:
        OSError: the checkpoint can't be written; nothing of it is left.
    """
    step = state["step"]
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if save_model:
                save_model(temporary / "pipeline")
            (temporary / STATE_FILE).write_text(json.dumps(state, indent=2))
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of torch and safetensors raise their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(errno.EIO, f"the checkpoint can't be written ({first_line(error)})", str(final)) from error
    if accelerator.is_main_process:
        if final.exists():
            _delete(final)
        os.replace(temporary, final)
        kept = [path for path in finished_checkpoints(folder) if _step(path) <= step]
        for old in kept[:-limit] if limit else []:
            _delete(old)
    accelerator.wait_for_everyone()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _delete(checkpoint: Path) -> None:
    # Rename first: a kill halfway must not leave a folder that looks complete.
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def find_checkpoint(folder: Path, name: str | None, metadata: dict) -> tuple[Path, dict] | None:
    """Return the checkpoint to resume from and its trainer_state.json, or None if there is none.

    Args:
        folder (`Path`): the run's output folder.
        name (`str`, *optional*): a path, a name in the folder, or `latest`.
        metadata (`dict`): what must equal the checkpoint's trainer_state.json: seed, batch, data.

    Raises:
        InputError: the checkpoint is missing, incomplete or has other `metadata`.
    """
    if name is None:
        return None
    if name == "latest":
        finished = finished_checkpoints(folder)
        if not finished:
            return None
        path = finished[-1]
    else:
        path = Path(name) if Path(name).is_dir() else Path(folder) / name
    with reading(path, "complete checkpoint"):
        state = json.loads((path / STATE_FILE).read_text())
        state["step"] = int(state["step"])
    for key, value in metadata.items():
        if state.get(key) != value:
            raise InputError(f"{path}: made with {key} = {state.get(key)}, this run has {value}")
    return path, state
