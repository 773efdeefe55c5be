"""The options of `train_counterfactual.py`."""

from argparse import Namespace

from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType

from diffusers_cf.arguments import ArgumentParser
from diffusers_cf.models import CONDITIONINGS, UNET_SIZES
from diffusers_cf.training.validation import SETTINGS


DESCRIPTION = (
    "Trains the noise predictor of a CounterfactualDDIMPipeline on slices that carry image-level labels alone."
)
# piecewise_constant needs rules that no option gives
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
LEAST = {
    "seed": 0, "train_batch_size": 1, "gradient_accumulation_steps": 1, "max_train_steps": 1, "num_train_epochs": 1,
    "max_train_samples": 1, "learning_rate": 0, "lr_warmup_steps": 0, "ddpm_num_steps": 1, "dataloader_num_workers": 0,
    "checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_steps": 0, "num_validation_slices": 1,
    "logging_steps": 1,
}  # fmt: skip


# Options that don't change the model: paths, logs and the Hub.
OF_HERE = {
    "dataset", "output_dir", "pretrained_model", "resume_from_checkpoint", "report_to", "logging_dir",
    "tracker_project_name", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
}  # fmt: skip


def parse_args(args: list[str] | None = None) -> Namespace:
    """Return the options, named as in diffusers' example scripts."""
    parser = ArgumentParser(prog="train_counterfactual.py", description=DESCRIPTION)
    _add_model_options(parser.add_argument_group("data and model").add_argument)
    _add_optimisation_options(parser.add_argument_group("optimisation").add_argument)
    _add_run_options(parser.add_argument_group("machine, checkpoints, logs").add_argument)
    args = parser.parse_args(args)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} is {value}: it must be {least} or more")
    for name in ("guidance_dropout_prob", "crop_background"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must lie in [0, 1]")
    if not 0 < args.first_timesteps <= 1:
        parser.error(f"--first_timesteps is {args.first_timesteps}: it must lie in (0, 1]")
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        parser.error(f"--resolution is {args.resolution}: it must be a multiple of 8")
    steps = SETTINGS["num_inference_steps"]
    if args.validation_steps and args.ddpm_num_steps % steps:
        parser.error(f"--ddpm_num_steps is {args.ddpm_num_steps}: validation needs a multiple of {steps}")
    return args


def command_of(args: Namespace) -> str:
    """Return the command of a run as others would type it: options that differ from the defaults, without local paths."""
    defaults = vars(parse_args(["--dataset", "DATASET", "--output_dir", "MODEL"]))
    words = ["accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL"]
    for name, value in vars(args).items():
        if name in OF_HERE or value == defaults[name]:
            continue
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


# fmt: off
def _add_model_options(add) -> None:
    add("--dataset", required=True, help="slice data set: a folder of `diffusers-cf prepare`, or user/name[@revision]")
    add("--output_dir", required=True, help="folder for the pipeline, with checkpoints and logs beside it")
    add("--unet_size", choices=list(UNET_SIZES), default="small", help="size of a new network; default: %(default)s")
    add("--conditioning", choices=CONDITIONINGS, default="attention", help="how a new network gets the class: attention,"
        " by tokens in keys and values; adagn, by the time embedding; default: %(default)s")
    add("--resolution", type=int, help="side of a new network's input in pixels, a multiple of 8; default: 64")
    add("--pretrained_model", help="model to fine-tune, on all or some of its modalities: folder, Hub id or name of a"
        " shipped model; its network is used instead of a new one; default: none")
    add("--renormalize", action="store_true", help="allow --pretrained_model to have another intensity scale than the"
        " data set; the new model has the data set's")
    add("--max_train_samples", type=int, help="train on the first so many slices; default: all")
    add("--random_flip", action="store_true", help="mirror half of the images left to right; default: off")
    add("--augment", action="store_true", help="apply small random rotations, scales, shifts and gains; default: off")
    add("--no_clip_input", action="store_true", help="keep intensities above 1 on the data set's scale, as the authors do,"
        " in training and inference; default: cut them at 1")
    add("--crop_background", type=float, metavar="SHARE", help="share of the images that are trained on in windows around"
        " their foreground, 0 to 1; above 0, inference computes in windows; default: 0, or 0.7 if the model to fine-tune"
        " computes in windows")
    add("--guidance_dropout_prob", type=float, default=0.35, help="probability that an image's class is replaced by null,"
        " for implicit guidance; default: %(default)s (the paper's)")
    add("--snr_gamma", type=float, help="gamma of min-SNR loss weighting, usually 5; default: no weighting")
    add("--first_timesteps", type=float, default=1.0, metavar="SHARE", help="share of the timesteps, from the lowest, to begin"
        " with; it rises to all of them; 0.2 learns the classes sooner; default: %(default)s")
    add("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon", help="what a new network predicts;"
        " default: %(default)s")
    add("--ddpm_num_steps", type=int, default=1000, help="timesteps of the diffusion process; default: %(default)s")
    add("--ddpm_beta_schedule", default="linear", choices=["linear", "scaled_linear", "squaredcos_cap_v2"],
        help="noise schedule; default: %(default)s")


def _add_optimisation_options(add) -> None:
    add("--seed", type=int, default=0, help="seed of everything random; default: %(default)s")
    add("--train_batch_size", type=int, default=32,
        help="images per process and accumulation step; default: %(default)s")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches per optimiser step; default: %(default)s")
    add("--max_train_steps", type=int, default=50_000, help="optimiser steps; default: %(default)s")
    add("--num_train_epochs", type=int,
        help="passes over the training set, instead of --max_train_steps; default: none")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate of AdamW; default: %(default)s")
    add("--scale_lr", action="store_true",
        help="multiply --learning_rate by the images per optimiser step; default: off")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup",
        help="course of the learning rate, as in diffusers; default: %(default)s")
    add("--lr_warmup_steps", type=int, default=500, help="optimiser steps of linear warm-up; default: %(default)s")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the mean gradient; default: %(default)s")
    add("--adam_beta2", type=float, default=0.999,
        help="AdamW's decay of the mean squared gradient; default: %(default)s")
    add("--adam_weight_decay", type=float, default=0.01, help="weight decay of AdamW; default: %(default)s")
    add("--adam_epsilon", type=float, default=1e-8, help="least denominator of AdamW; default: %(default)s")
    add("--max_grad_norm", type=float, default=1.0, help="norm to which gradients are clipped; default: %(default)s")
    add("--ema_max_decay", type=float, default=0.9999,
        help="highest decay of the averaged weights; default: %(default)s")
    add("--ema_inv_gamma", type=float, default=1.0,
        help="inv_gamma in the decay of the averaged weights; default: %(default)s")
    add("--ema_power", type=float, default=0.75, help="after n steps the averaged weights decay by"
        " 1 - (1 + n / inv_gamma) ** -power; default: %(default)s")


def _add_run_options(add) -> None:
    add("--gradient_checkpointing", action="store_true", help="recompute activations to save memory; default: off")
    add("--mixed_precision", choices=["auto", "no", "fp16", "bf16"], help="arithmetic of the network; auto is bf16 if the"
        " device computes in it; default: accelerate's configuration")
    add("--allow_tf32", action="store_true", help="allow TF32 matrix products on a GPU; default: off")
    add("--compile", action="store_true", help="compile the network; not for windows, whose sizes vary; default: off")
    add("--dataloader_num_workers", type=int, help="processes that read data; default: 4 with a GPU, else 0")
    add("--checkpointing_steps", type=int, default=1000,
        help="optimiser steps between checkpoints; default: %(default)s")
    add("--checkpoints_total_limit", type=int, help="checkpoints to keep, the latest; default: all")
    add("--resume_from_checkpoint", help="folder of a checkpoint, or `latest` of --output_dir; default: start anew")
    add("--validation_steps", type=int, default=1000, help="optimiser steps between validations, 0 for none; default:"
        " %(default)s")
    add("--num_validation_slices", type=int, default=64, help="validation slices, evenly spread; default: %(default)s")
    add("--logging_steps", type=int, default=25, help="optimiser steps between log entries; default: %(default)s")
    add("--report_to", choices=LoggerType.list(), metavar="TRACKER", help="tensorboard, wandb or another tracker of"
        " accelerate; default: none")
    add("--logging_dir", default="logs", help="folder of logs inside --output_dir; default: %(default)s")
    add("--tracker_project_name", default="diffusers_cf", help="project name for the tracker; default: %(default)s")
    add("--push_to_hub", action="store_true", help="publish the model when training ends; default: off")
    add("--hub_model_id", help="repository to publish to, user/name; default: the name of --output_dir")
    add("--hub_token", help="token for the Hub; default: that of `hf auth login`")
    add("--hub_private_repo", action="store_true", help="make the repository private; default: off")
# fmt: on
