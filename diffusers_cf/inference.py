"""Open a model for use: device, dtype, compilation, and its preprocessing.json checked against its network."""

import argparse
import logging
import re

import diffusers
import torch
from diffusers import UNet2DConditionModel

from diffusers_cf.data.geometry import FIELD_MM, check_geometry
from diffusers_cf.data.intensity import check_same_scale, normalize_of
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError, first_line
from diffusers_cf.evaluation.postprocessing import PostProcessing
from diffusers_cf.maps import check_signs
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.settings import NAMES


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Guidance multiplies the difference of two nearly equal predictions, and so their rounding errors. Most of the rounding
# happens in the sum of the residual blocks and at the finest level, so these stay in float32.
EXACT = ("conv_in", "conv_out", "time_embedding")
EXACT_WITHIN = ("conv_shortcut", "samplers.0.conv")
# Default side in pixels of the slices on which thresholds are chosen, the default size of `prepare`.
EVALUATION_SIZE = 128
# A modality names a file that `segment` writes, and a model folder is foreign input.
_FILE_NAME = re.compile(r"\w[\w.+-]*")
# Optional entries of preprocessing.json that hold JSON objects.
_TABLES = ("training", "student", "settings_chosen_by", "threshold_chosen_by", "paper_threshold_chosen_by")


def computes_in_bfloat16(device: str | torch.device) -> bool:
    """Return whether a device computes in bfloat16: a GPU that does, or a CPU with AMX or AVX512-BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # private functions of torch: without them the default is float32
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def check_device_arguments(args: argparse.Namespace, share=None) -> None:
    """Replace `--device` and `--dtype` by those in use, after checking them and the batch size.

    Args:
        args (`argparse.Namespace`): with `device`, `dtype` and `batch_size`, as from `add_device_arguments`.
        share (`Share`, *optional*): this process's part of the work. Each process of a launcher gets a GPU of its own,
            unless `--device` names one by its number.

    Raises:
        InputError: the device can't be used, or the batch size is below 1.
    """
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if share is not None and share.launched and args.device == "cuda" and torch.cuda.is_available():
        args.device = f"cuda:{share.local_index % torch.cuda.device_count()}"
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {args.batch_size}")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises AssertionError
        raise InputError(f"--device {args.device} can't be used ({first_line(error)})") from None
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate trains on the current device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_in_bfloat16(args.device) else "float32"
    elif args.dtype == "bfloat16" and not computes_in_bfloat16(args.device):
        logger.warning("bfloat16 is emulated on this machine and many times slower than --dtype auto")


def open_pipeline(
    model: str, device: str = "cpu", dtype: str = "float32", compile: bool = False, variant: str | None = None,
    dataset: SliceDataset | None = None,
):  # fmt: skip
    """Open a model on its device and in its dtype, without progress bars, and check that it takes a data set's images.

    Args:
        model (`str`): folder, Hub id or name of a shipped model.
        device (`str`): where the network computes.
        dtype (`str`): a key of `DTYPES`; see [`compute_in`] for what stays in float32.
        compile (`bool`): compile the network now.
        variant (`str`, *optional*): variant of the weights, such as `fp16`.
        dataset (`SliceDataset`, *optional*): images that the model will get.

    Raises:
        InputError: the model can't be loaded or compiled, or takes other images than those of the data set.
    """
    # its progress bars would hide the one that counts slices
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = CounterfactualDDIMPipeline.from_pretrained(model, dtype=torch.float32, variant=variant)
    finally:
        diffusers.utils.logging.enable_progress_bar()
    if dataset is not None:
        known, given = pipe.preprocessing, dataset.preprocessing
        takes, holds, channels = known.get("modalities"), given["modalities"], pipe.unet.config.in_channels
        if takes and list(takes) != list(holds):
            raise InputError(f"{model} takes {', '.join(takes)}, but {dataset.folder} holds {', '.join(holds)}")
        if channels != given["channels"]:
            raise InputError(f"{model} takes {channels} channels, not the {given['channels']} given")
        check_same_scale(model, known, dataset.folder, given)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # the fastest layout on CPUs and GPUs
    pipe.to(device)
    compute_in(pipe.unet, DTYPES[dtype])
    if compile:
        compile_network(pipe)
    return pipe


@torch.no_grad()
def compile_network(pipe: CounterfactualDDIMPipeline) -> None:
    """Compile a pipeline's U-Net as one graph for every timestep, batch size and image size.

    Raises:
        InputError: it can't be compiled on this machine, for example because there is no compiler.
    """
    # a CPU's convolutions choose their layout by the image size, and each layout needs a graph of its own
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    pipe.unet.compile(fullgraph=True, dynamic=True)
    sample = torch.zeros(2, pipe.unet.config.in_channels, *pipe.image_size, device=pipe.device)
    try:
        pipe.predict_noise(sample, 0, pipe.encode_classes(None, len(sample)))
    except Exception as error:  # compilers raise arbitrary exceptions
        reason = first_line(error)
        raise InputError(f"--compile: the network can't be compiled on this machine ({reason})") from None


def compute_in(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Make a float32 U-Net compute in `dtype`, except for `EXACT`, `EXACT_WITHIN` and the finest level.

    Its input and output stay float32. On a GPU, PyTorch computes float32 convolutions in TF32 by default.

    Args:
        unet (`UNet2DConditionModel`): the network, on the device where it will run.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`; float32 changes nothing.
    """
    if dtype == torch.float32:
        return
    device = unet.device.type
    unet._computing_dtype = dtype
    exact = [getattr(unet, name) for name in EXACT] + [unet.down_blocks[0], unet.up_blocks[-1]]
    for module in exact + [module for name, module in unet.named_modules() if name.endswith(EXACT_WITHIN)]:
        module.forward = torch.autocast(device, enabled=False)(module.forward)
    unet.forward = torch.autocast(device, dtype)(unet.forward)


def computing_dtype(unet: UNet2DConditionModel) -> str:
    """Return the name of the dtype that a U-Net computes in: that of [`compute_in`], else that of its weights."""
    return str(getattr(unet, "_computing_dtype", unet.dtype)).removeprefix("torch.")


def usable_facts(pipe: CounterfactualDDIMPipeline, model: str, **settings) -> dict:
    """Return a model's checked `preprocessing` (modalities and geometry of its input) and `settings`.

    Args:
        pipe ([`CounterfactualDDIMPipeline`]): the pipeline.
        model (`str`): its name, for messages.
        **settings: as in `pipe.resolve_settings`.

    Raises:
        InputError: preprocessing.json lacks its input or contradicts the network, or a setting is out of range.
    """
    known, modalities = pipe.preprocessing, modalities_of(pipe, model)
    try:
        settings = pipe.resolve_settings(**settings)
        pipe.timesteps(settings["strength"], settings["num_inference_steps"])
        size = known.get("evaluation_size", max(EVALUATION_SIZE, known.get("size", 0)))
        geometry = {"size": size, "field_mm": known.get("field_mm", FIELD_MM), "normalize": normalize_of(known)}
        if geometry["normalize"] == "none":
            raise ValueError(f"{model}: takes images as they are, without a scale for scans")
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
    try:
        if chain := PostProcessing.of(known.get("settings", {})):
            chain.check_channels(len(modalities))
    except ValueError as error:
        raise InputError(f"{model}: {error}") from None
    return {"preprocessing": {"modalities": modalities, **geometry}, "settings": settings}


def check_publishable(pipe: CounterfactualDDIMPipeline, model: str) -> None:
    """Check what a model recommends, as before its use, and the entries of preprocessing.json that its card shows.

    Raises:
        InputError: as in [`usable_facts`], or an entry has a wrong type.
    """
    facts = pipe.preprocessing
    for name in NAMES:
        usable_facts(pipe, model, settings=name)
    for name in _TABLES:
        if not isinstance(facts.get(name, {}), dict):
            raise InputError(f"{model}: `{name}` in its preprocessing.json is not a JSON object")


def modalities_of(pipe: CounterfactualDDIMPipeline, model: str) -> list[str]:
    """Return the modalities that a model takes, one for each channel.

    Raises:
        InputError: preprocessing.json names no modalities, or contradicts the network or the class encoder.
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
