"""What `train_counterfactual.py --pretrained_model` takes over from the pipeline that it fine-tunes."""

from pathlib import Path

from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.data.streaming import SliceStream
from diffusers_cf.errors import InputError
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


def open_base(args, dataset: SliceDataset | SliceStream) -> CounterfactualDDIMPipeline | None:
    """The pipeline to fine-tune, if there is one and it fits the data set.

    Raises:
        InputError: it can't be loaded, or was made for other images, classes or timesteps.
    """
    if not args.pretrained_model:
        return None
    pipe = CounterfactualDDIMPipeline.from_pretrained(args.pretrained_model)
    _check_fits(args, pipe, dataset)
    return pipe


def _check_fits(args, pipe: CounterfactualDDIMPipeline, dataset: SliceDataset | SliceStream) -> None:
    channels, classes = pipe.unet.config.in_channels, pipe.class_encoder and pipe.class_encoder.config.class_names
    if channels != dataset.preprocessing["channels"]:
        raise InputError(
            f"{args.pretrained_model}: takes {channels} channels, {args.dataset} has {dataset.preprocessing['channels']}"
        )
    if classes and tuple(classes) != dataset.class_names:
        raise InputError(
            f"{args.pretrained_model}: knows the classes {list(classes)}, {args.dataset} has {list(dataset.class_names)}"
        )
    known, given = pipe.preprocessing.get("modalities"), dataset.preprocessing.get("modalities")
    if known and given and known != given:
        raise InputError(f"{args.pretrained_model}: takes {', '.join(known)}, {args.dataset} has {', '.join(given)}")
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
