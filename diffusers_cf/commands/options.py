"""Options that several commands share; nothing here imports torch, so that `--help` is quick."""

import argparse

from diffusers_cf.settings import MAPS, NAMES


def add_device_arguments(parser: argparse.ArgumentParser, batch_size: int | str = "auto", dtype: str = "auto") -> None:
    """Add where and how the network computes: `--device`, `--dtype` and `--batch_size`."""
    parser.add_argument("--device", help="torch device that computes; default: cuda if there is one, else cpu")
    text = "arithmetic of the network; auto is bfloat16 where the device computes in it; default: %(default)s"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default=dtype, help=text)
    text, kind = "slices computed at a time; default: %(default)s", int
    if batch_size == "auto":
        text, kind = text + ", which is 64 on a CPU and the largest that fits on a GPU", _batch_size
    parser.add_argument("--batch_size", type=kind, default=batch_size, help=text)


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--compile`, which pays off where a network computes for longer than it takes to compile."""
    parser.add_argument("--compile", action="store_true", help="compile the network first, which takes minutes")


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings that a model recommends and a command may replace, all but the threshold."""
    add, default = parser.add_argument, "default: what the model recommends"
    add("--settings", choices=NAMES, help="source of all settings that are not given: the model or the paper")
    add("--guidance_scale", type=float, help=f"w, guidance towards healthy: 0 none, 1 conditional; {default}")
    add("--strength", type=float, help=f"L, share of the noise levels that is walked, 0 to 1; {default}")
    add("--num_inference_steps", type=int, help=f"steps of the whole grid, a divisor of the training steps; {default}")
    add("--map", choices=MAPS, help=f"how the anomaly map is computed; {default}")


def add_shard_argument(parser: argparse.ArgumentParser, last: str) -> None:
    """Add `--shard`; `last` is what the command does without it, once all shards are done."""
    text = f"do the i-th of n equal parts of the work, on machines without a launcher; then, without it, the command {last}"
    parser.add_argument("--shard", metavar="i/n", help=text)
