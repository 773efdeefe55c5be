"""Options that several commands share. Nothing here imports torch, so that `--help` is quick."""

import argparse

from diffusers_cf.settings import MAP_SETTINGS, MAPS, NAMES


MODEL = "model: a folder, user/name on the Hub, or the name of a shipped model"  # help text
DATASET = "slice data set: a folder written by diffusers-cf prepare, or user/name[@revision] on the Hub"  # help text
SETTINGS = ("settings", *MAP_SETTINGS)  # options of `add_settings_arguments`


def add_device_arguments(
    parser: argparse.ArgumentParser, batch_size: int | None = None, dtype: str = "auto", compile: bool = False
) -> None:
    """Add `--device`, `--dtype`, `--batch_size` and, if `compile`, `--compile`; a batch size of None is `auto`."""
    add = parser.add_argument
    add("--device", help="torch device that computes, such as cpu or cuda:1; default: cuda if there is one, else cpu")
    text = "number type of the network; auto is bfloat16 if the device computes in it, else float32"
    choices = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=choices, default=dtype, help=f"{text}; default: %(default)s")
    if batch_size:
        add("--batch_size", type=int, default=batch_size, help="slices computed at a time; default: %(default)s")
    else:
        text = "slices computed at a time, or auto: 64 on a CPU and the largest number that fits on a GPU"
        add("--batch_size", type=_batch_size, help=f"{text}; default: auto")
    if compile:
        add("--compile", action="store_true", help="compile the network first, which takes minutes; default: off")


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inference settings, except for the threshold."""
    add, default = parser.add_argument, "default: recommended by the model"
    add("--settings", choices=NAMES, help="source of the settings that are not given; default: recommended")
    add("--guidance_scale", type=float, help=f"weight w of the guidance towards healthy, 0 or more; {default}")
    add("--strength", type=float, help=f"share L of the noise levels to which an image is encoded, 0 to 1; {default}")
    add("--num_inference_steps", type=int, help=f"steps, a divisor of the number of training timesteps; {default}")
    text = "anomaly map: |image - counterfactual|, |reconstruction - counterfactual|, the change towards disease "
    add("--map", choices=MAPS, help=f"{text}(signed), or one that needs no counterfactual (forward); {default}")


def add_postprocessing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each attribute of `PostProcessing`."""
    add, default = parser.add_argument, "default: recommended by the model, else"
    text = "side of the median filter of post-processing in pixels, 1 for none"
    add("--median_size", type=int, help=f"{text}; {default} 5")
    text = "standard deviation in slices of a Gaussian filter across slices in post-processing"
    add("--slice_sigma", type=float, help=f"{text}; {default} 0, none")
    text = "number of the channel in which lesions are bright, 0 the first: post-processing weights the map by its brightness"
    add("--bright_channel", type=int, metavar="CHANNEL", help=f"{text}; {default} no weights")
    rim = parser.add_mutually_exclusive_group()
    for name, value, text in (("clear", True, "clears"), ("keep", False, "keeps")):
        text = f"post-processing {text} the rim of the foreground; {default} it is cleared"
        rim.add_argument(f"--{name}_rim", dest="clear_rim", action="store_const", const=value, help=text)


def add_convention_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--neurological`, which sets `convention`."""
    text = "show the patient's left at the left of pictures; default: radiological, the patient's right at the left"
    kept = {"action": "store_const", "const": "neurological", "default": "radiological"}
    parser.add_argument("--neurological", dest="convention", **kept, help=text)


def add_shard_argument(parser: argparse.ArgumentParser, last: str) -> None:
    """Add `--shard`; `last` says what the command does without it after all shards are done."""
    text = f"compute only part i of n equal parts; when all are done, the command without --shard {last}"
    parser.add_argument("--shard", metavar="i/n", help=f"{text}; default: the whole work")
