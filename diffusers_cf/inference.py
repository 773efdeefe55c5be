"""Opening a model for use: device, dtype, compilation, and its preprocessing.json checked against its network."""

import argparse
import logging
import re

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_cf.data.geometry import FIELD_MM, check_geometry
from diffusers_cf.data.intensity import check_same_scale, normalize_of
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError, first_line
from diffusers_cf.maps import check_signs
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.settings import NAMES


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Guidance multiplies the difference of two predictions that are nearly equal, and with it what each was rounded by. Most
# of that comes from the sum of all residual blocks and from the finest level, where the image itself passes.
EXACT = ("conv_in", "conv_out", "time_embedding")
EXACT_WITHIN = ("conv_shortcut", "samplers.0.conv")
# Pixels along a side of the slices on which thresholds are chosen, as `prepare` cuts them unless told otherwise.
EVALUATION_SIZE = 128
# `segment` writes a file for each modality, and a model folder is foreign.
_FILE_NAME = re.compile(r"\w[\w.+-]*")
# Entries that are tables of facts, where they are there.
_TABLES = ("training", "settings_chosen_by", "threshold_chosen_by", "paper_threshold_chosen_by")


def default_device() -> str:
    """Return the device that computes unless another one is asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def take_device(args: argparse.Namespace, share) -> None:
    """Give each process that a launcher started a GPU of its own, unless `--device` names one."""
    args.device = args.device or default_device()
    if share.launched and args.device == "cuda" and torch.cuda.is_available():
        args.device = f"cuda:{share.local_index % torch.cuda.device_count()}"


def computes_in_bfloat16(device: str | torch.device) -> bool:
    """Return whether a device has bfloat16 arithmetic: AMX, AVX512-BF16, or a GPU's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # private names: if they vanish we are slower, not wrong
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def check_device_arguments(args: argparse.Namespace) -> None:
    """Settle `--device` and `--dtype auto`; raise `InputError` for a device that can't be used or a batch size below 1."""
    args.device = args.device or default_device()
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
    """Open a model for a command: on its device, in its dtype, without progress bars, and checked against a data set.

    Args:
        model (`str`): folder, Hub id or name of a shipped model.
        device (`str`): where the network computes.
        dtype (`str`): a key of `DTYPES`; see [`compute_in`] for what stays in float32.
        compile (`bool`): compile the network now.
        variant (`str`, *optional*): of the weights.
        dataset (`SliceDataset`, *optional*): the images that the model will get.

    Raises:
        InputError: the model can't be loaded or compiled, or takes other images than those of the data set.
    """
    # several progress bars would hide the one that counts slices
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = CounterfactualDDIMPipeline.from_pretrained(model, dtype=torch.float32, variant=variant)
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
    """Compile a pipeline's U-Net as one graph for every timestep, batch size and image size.

    Raises:
        InputError: it can't be compiled on this machine, for example because there is no compiler.
    """
    # A CPU's convolutions choose their layout by the size of an image, and each choice is a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    pipe.unet.compile(fullgraph=True, dynamic=True)
    sample = torch.zeros(2, pipe.unet.config.in_channels, *pipe.image_size, device=pipe.device)
    try:
        pipe.predict_noise(sample, 0, pipe.encode_classes(None, len(sample)))
    except Exception as error:  # compilers raise arbitrary exceptions
        reason = first_line(error)
        raise InputError(f"--compile: the network can't be compiled on this machine ({reason})") from None


def exact_modules(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Return what stays in float32: both ends, the finest level, the time embedding, and shortcuts of residual blocks.

    On a GPU, convolutions in float32 are TF32 unless PyTorch is told otherwise.
    """
    chosen = [getattr(unet, name) for name in EXACT] + [unet.down_blocks[0], unet.up_blocks[-1]]
    return chosen + [module for name, module in unet.named_modules() if name.endswith(EXACT_WITHIN)]


def compute_in(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Make a float32 U-Net compute in `dtype`, all but [`exact_modules`]; what it takes and gives stays float32.

    Args:
        unet (`UNet2DConditionModel`): on the device where it will run.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`; float32 changes nothing.
    """
    if dtype == torch.float32:
        return
    device = unet.device.type
    unet._computing_dtype = dtype
    for module in exact_modules(unet):
        module.forward = torch.autocast(device, enabled=False)(module.forward)
    unet.forward = torch.autocast(device, dtype)(unet.forward)


def computing_dtype(unet: UNet2DConditionModel) -> str:
    """Return the name of the dtype that a U-Net computes in: `compute_in`'s, else that of its weights."""
    return str(getattr(unet, "_computing_dtype", unet.dtype)).removeprefix("torch.")


def usable_facts(pipe: CounterfactualDDIMPipeline, model: str, **settings) -> dict:
    """Return what a model takes, `preprocessing` (modalities and geometry), and its `settings`, both checked.

    Args:
        pipe: The pipeline.
        model: Its name, for messages.
        **settings: As in `pipe.resolve_settings`.

    Raises:
        InputError: The model does not say what it takes, or says what its network contradicts; or a setting is out of
            range.
    """
    known, modalities = pipe.preprocessing, modalities_of(pipe, model)
    try:
        settings = pipe.resolve_settings(**settings)
        pipe.timesteps(settings["strength"], settings["num_inference_steps"])
        size = known.get("evaluation_size", max(EVALUATION_SIZE, known.get("size", 0)))
        geometry = {"size": size, "field_mm": known.get("field_mm", FIELD_MM)}
        geometry["normalize"] = normalize_of(known)
        if geometry["normalize"] == "none":
            raise ValueError(f"{model}: takes images as they are, so that no scan can be brought to its scale")
        check_geometry(**geometry)
        threshold = settings["threshold"]
        if threshold is not None and not 0 < threshold < float("inf"):
            raise ValueError(f"threshold is {threshold}: it must be above 0 and finite")
        if settings["map"] == "signed":
            check_signs(known.get("signs"), len(modalities))
    except TypeError as error:
        raise InputError(f"{model}: preprocessing.json holds a value of a wrong type ({error})") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    return {"preprocessing": {"modalities": modalities, **geometry}, "settings": settings}


def check_publishable(pipe: CounterfactualDDIMPipeline, model: str) -> None:
    """Refuses a model that nobody could use: what it recommends is checked as for use, and what its card is made of.

    Raises:
        InputError: as [`usable_facts`], or an entry is not what it must be.
    """
    facts = pipe.preprocessing
    for name in NAMES:
        usable_facts(pipe, model, settings=name)
    for name in _TABLES:
        if not isinstance(facts.get(name, {}), dict):
            raise InputError(f"{model}: `{name}` in its preprocessing.json is not a JSON object")
    if not isinstance(facts.get("settings", {}).get("postprocess", False), bool):
        raise InputError(f"{model}: `postprocess` in its preprocessing.json is neither true nor false")


def modalities_of(pipe: CounterfactualDDIMPipeline, model: str) -> list[str]:
    """The modalities that a model takes, a name for each of its channels.

    Raises:
        InputError: they are not named, or not as its network and its class encoder are.
    """
    known, channels = pipe.preprocessing, pipe.unet.config.in_channels
    modalities, classes = known.get("modalities"), known.get("class_names")
    if not (isinstance(modalities, list) and modalities and all(isinstance(name, str) for name in modalities)):
        raise InputError(f"{model}: its preprocessing.json does not name the modalities that it takes")
    if bad := [name for name in modalities if not _FILE_NAME.fullmatch(name)]:
        raise InputError(f"{model}: its modality {bad[0]!r} can't be a part of a file's name")
    if len(modalities) != channels:
        raise InputError(f"{model}: takes {channels} channels, but names the modalities {', '.join(modalities)}")
    encoder = pipe.class_encoder
    if classes is not None and encoder is not None and classes != list(encoder.config.class_names):
        raise InputError(f"{model}: its network knows the classes {list(encoder.config.class_names)}, not {classes}")
    return modalities
