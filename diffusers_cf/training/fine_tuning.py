"""The pipeline that a training run fine-tunes, and the metadata of the model that it makes."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import UNet2DConditionModel

from diffusers_cf.data.intensity import check_same_scale
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.inference import modalities_of
from diffusers_cf.maps import check_signs
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.provenance import package_commit


WINDOWS_OF_BASE = 0.7  # share of the images that go on in windows, where the base computes in them


def open_base(args, dataset: SliceDataset) -> CounterfactualDDIMPipeline | None:
    """Open the pipeline to fine-tune, with the data set's modalities, and take its input options over into `args`.

    Raises:
        InputError: it can't be loaded, or was made for other images, classes, timesteps or another intensity scale.
    """
    if not args.pretrained_model:
        return None
    pipe = CounterfactualDDIMPipeline.from_pretrained(args.pretrained_model)
    known, given = pipe.preprocessing.get("modalities"), dataset.preprocessing.get("modalities")
    if known and given and known != given:
        _take_modalities(args, pipe, given)
    _check_fits(args, pipe, dataset)
    if not args.renormalize:
        hint = ", or train with --renormalize if the change is meant"
        check_same_scale(args.pretrained_model, pipe.preprocessing, args.dataset, dataset.preprocessing, hint)
    if args.crop_background is None and pipe.config.crop_background:
        args.crop_background = WINDOWS_OF_BASE
    args.no_clip_input |= not pipe.config.clip_input
    return pipe


def _take_modalities(args, pipe: CounterfactualDDIMPipeline, wanted: Sequence[str]) -> None:
    known = modalities_of(pipe, args.pretrained_model)
    if missing := [name for name in wanted if name not in known]:
        raise InputError(
            f"{args.pretrained_model}: takes {', '.join(known)}, {args.dataset} has {', '.join(missing)} as well"
        )
    channels = [known.index(name) for name in wanted]
    pipe.register_modules(unet=keep_channels(pipe.unet, channels))
    if signs := pipe.preprocessing.get("signs"):
        try:
            check_signs(signs, len(known))
        except ValueError as error:
            raise InputError(f"{args.pretrained_model}: {error}") from None
        pipe.preprocessing = pipe.preprocessing | {"signs": [signs[channel] for channel in channels]}


def keep_channels(unet: UNet2DConditionModel, channels: Sequence[int]) -> UNet2DConditionModel:
    """Return a network for some of another's channels, in the order given.

    The first and the last convolution keep the weights of these channels. All other weights stay: the network misses
    what the other channels told it until it is trained without them.
    """
    kept = UNet2DConditionModel.from_config(unet.config, in_channels=len(channels), out_channels=len(channels))
    weights = unet.state_dict()
    weights["conv_in.weight"] = weights["conv_in.weight"][:, channels]
    weights |= {name: weights[name][channels] for name in ("conv_out.weight", "conv_out.bias")}
    kept.load_state_dict(weights)
    return kept


def _check_fits(args, pipe: CounterfactualDDIMPipeline, dataset: SliceDataset) -> None:
    channels, classes = pipe.unet.config.in_channels, pipe.class_encoder and pipe.class_encoder.config.class_names
    if channels != dataset.preprocessing["channels"]:
        raise InputError(
            f"{args.pretrained_model}: takes {channels} channels, {args.dataset} has {dataset.preprocessing['channels']}"
        )
    if classes and tuple(classes) != dataset.class_names:
        raise InputError(
            f"{args.pretrained_model}: knows the classes {list(classes)}, {args.dataset} has {list(dataset.class_names)}"
        )
    scheduler = pipe.scheduler.config
    for option, theirs, ours in (
        ("resolution", pipe.unet.config.sample_size, args.resolution or pipe.unet.config.sample_size),
        ("prediction_type", scheduler.prediction_type, args.prediction_type),
        ("ddpm_num_steps", scheduler.num_train_timesteps, args.ddpm_num_steps),
        ("ddpm_beta_schedule", scheduler.beta_schedule, args.ddpm_beta_schedule),
    ):
        if theirs != ours:
            raise InputError(f"{args.pretrained_model}: was trained with --{option} {theirs}, this run has {ours}")


def model_metadata(args, slices, global_batch: int, base: CounterfactualDDIMPipeline | None, command: str) -> dict:
    """Return the model's preprocessing.json: the data set's, at the network's size, and how it was trained.

    Of a base model it keeps the recommended settings and signs, but no threshold: that belongs to the base's maps.
    """
    metadata = {k: v for k, v in slices.slices.preprocessing.items() if k != "splits"} | {"size": slices.image_size[0]}
    training = {
        "command": command,
        "commit": package_commit(),
        "images": args.max_train_steps * global_batch,
        "slices": slices.num_slices,
        "patients": slices.num_patients,
    }
    if base:
        name = args.pretrained_model  # a Hub id, or of a folder only its name
        training["base_model"] = Path(name).resolve().name if Path(name).is_dir() else name
        settings = {k: v for k, v in base.preprocessing.get("settings", {}).items() if k != "threshold"}
        metadata |= {"settings": settings} if settings else {}
        metadata |= {"signs": base.preprocessing["signs"]} if "signs" in base.preprocessing else {}
    return metadata | {"training": training}
