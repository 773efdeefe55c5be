"""What `train_counterfactual.py --pretrained_model` takes over from the pipeline that it fine-tunes."""

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
from diffusers_cf.training.options import command_of


def open_base(args, dataset: SliceDataset) -> CounterfactualDDIMPipeline | None:
    """The pipeline to fine-tune, if there is one and it fits the data set; of its modalities those of the data set.

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
    """A network for some of another's channels, in the order given.

    The first and the last convolution keep the weights of these channels, everything between them stays as it is: what
    the other channels told the network is missing until it is trained without them.
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


def inherited_facts(base: CounterfactualDDIMPipeline) -> dict:
    """What preprocessing.json keeps: recommended settings and signs, but no threshold, which belongs to the base's maps."""
    settings = {name: value for name, value in base.preprocessing.get("settings", {}).items() if name != "threshold"}
    kept = {"settings": settings} if settings else {}
    return kept | {name: base.preprocessing[name] for name in ("signs",) if name in base.preprocessing}


def public_name(model: str) -> str:
    """A Hub id as it is, of a folder its name: paths of this machine are nobody else's business."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def model_facts(
    args,
    slices,
    global_batch: int,
    base: CounterfactualDDIMPipeline | None,
) -> dict:
    """preprocessing.json of the model: the data set's, at the network's size, and how it was trained."""
    facts = {k: v for k, v in slices.slices.preprocessing.items() if k != "splits"} | {"size": slices.image_size[0]}
    training = {
        "command": command_of(args),
        "commit": package_commit(),
        "images": args.max_train_steps * global_batch,
        "slices": slices.num_slices,
        "patients": slices.num_patients,
    }
    if base:
        training["base_model"] = public_name(args.pretrained_model)
        facts |= inherited_facts(base)
    return facts | {"training": training}
