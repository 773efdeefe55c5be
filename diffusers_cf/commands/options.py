"""What commands share that use a model: its options, and opening it."""

import argparse
import logging

import diffusers
import torch

from diffusers_cf.data.intensity import check_same_scale
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.processes import Share
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.precision import compute_in
from diffusers_cf.settings import MAPS, NAMES


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device_arguments(parser: argparse.ArgumentParser, batch_size: int | str = "auto", dtype: str = "auto") -> None:
    """Adds where and how the network computes: `--device`, `--dtype`, `--batch_size`; the last two with defaults."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: %(default)s")
    text = "of the diffusion network in use, auto: bfloat16 where the device computes in it, default: %(default)s"
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default=dtype, help=text)
    text, kind = "slices at a time, default: %(default)s", int
    if batch_size == "auto":
        text, kind = text + ", 64 on a CPU, the largest that fits on a GPU", _batch_size
    parser.add_argument("--batch_size", type=kind, default=batch_size, help=text)


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--compile`, which pays where a network computes for longer than it takes to compile."""
    parser.add_argument("--compile", action="store_true", help="torch.compile the network first, which takes minutes")


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the settings that a model recommends and a command may replace, all but the threshold."""
    parser.add_argument(
        "--settings", choices=NAMES, help="where settings come from that are not given: the model, or the paper"
    )
    parser.add_argument("--guidance_scale", type=float, help="this and the next three: what the model recommends")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--map", choices=MAPS)


def add_shard_argument(parser: argparse.ArgumentParser, last: str) -> None:
    """Adds `--shard`; `last` is what the command does without it, once all shards are done."""
    text = (
        f"the i-th of n equal parts of the work, for machines without a launcher; without it the same command {last}"
    )
    parser.add_argument("--shard", metavar="i/n", help=text)


def take_device(args: argparse.Namespace, share: Share) -> None:
    """Gives each process that a launcher started on a machine a GPU of its own, unless `--device` names one.

    Whether there is any, `check_device_arguments` says.
    """
    if share.launched and args.device == "cuda" and torch.cuda.is_available():
        args.device = f"cuda:{share.local_index % torch.cuda.device_count()}"


def computes_in_bfloat16(device: str | torch.device) -> bool:
    """Whether a device has arithmetic of its own for bfloat16: AMX, AVX512-BF16, or a GPU's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # no public name yet; where it goes away we are slower, not wrong
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def check_device_arguments(args: argparse.Namespace) -> None:
    """Settles `--dtype auto`; raises `InputError` for a device that this machine lacks or a batch size below 1."""
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {args.batch_size}")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so by an AssertionError
        raise InputError(f"--device {args.device} can't be used ({str(error).splitlines()[0]})") from None
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate trains on the current one
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_in_bfloat16(args.device) else "float32"
    elif args.dtype == "bfloat16" and not computes_in_bfloat16(args.device):
        logger.warning("bfloat16 is emulated on this machine and many times slower than --dtype auto")


def open_pipeline(
    model: str, device: str = "cpu", dtype: str = "float32", compile: bool = False, variant: str | None = None,
    dataset: SliceDataset | None = None,
):  # fmt: skip
    """A model folder or Hub id as a [`CounterfactualDDIMPipeline`] without progress bars of its own.

    Args:
        model (`str`): folder or Hub id.
        device (`str`): where to put it.
        dtype (`str`): a key of `DTYPES`, in which the network computes where it does no harm ([`compute_in`]).
        compile (`bool`): whether to compile the network, now.
        variant (`str`, *optional*): of the weights.
        dataset (`SliceDataset`, *optional*): what it will be shown.

    Raises:
        InputError: the model can't be loaded, not be compiled, or takes other images than the data set's; the line names
            it and the reason.
    """
    # Several bars would hide the one that counts slices.
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = CounterfactualDDIMPipeline.from_pretrained(model, dtype=torch.float32, variant=variant)
    except InputError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{model}: can't be loaded ({reason})") from None
    finally:
        diffusers.utils.logging.enable_progress_bar()
    if dataset is not None:
        _check_takes(pipe, model, dataset)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # how convolutions are fastest on CPUs and GPUs alike
    pipe.to(device)
    compute_in(pipe.unet, DTYPES[dtype])
    if compile:
        compile_network(pipe)
    return pipe


def _check_takes(pipe: CounterfactualDDIMPipeline, model: str, dataset: SliceDataset) -> None:
    known, given = pipe.preprocessing, dataset.preprocessing
    modalities, channels = known.get("modalities", given["modalities"]), pipe.unet.config.in_channels
    if list(modalities) != list(given["modalities"]):
        raise InputError(
            f"{model} takes {', '.join(modalities)}, but {dataset.folder} holds {', '.join(given['modalities'])}"
        )
    if channels != given["channels"]:
        raise InputError(f"{model} takes {channels} channels, not the {given['channels']} given")
    check_same_scale(model, known, dataset.folder, given)


@torch.no_grad()
def compile_network(pipe: CounterfactualDDIMPipeline) -> None:
    """Compiles a pipeline's U-Net as one graph for every timestep, number and size of images.

    Raises:
        InputError: it can't be compiled here, for want of a compiler for example.
    """
    # A CPU's convolutions choose their layout by the size of an image, and each choice is a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    pipe.unet.compile(fullgraph=True, dynamic=True)
    sample = torch.zeros(2, pipe.unet.config.in_channels, *pipe.image_size, device=pipe.device)
    try:
        pipe.predict_noise(sample, 0, pipe.encode_classes(None, len(sample)))
    except Exception as error:  # compilers raise whatever they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--compile: the network can't be compiled on this machine ({reason})") from None
