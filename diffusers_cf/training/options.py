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


# Options that say nothing about the model.
OF_HERE = {
    "dataset", "output_dir", "pretrained_model", "resume_from_checkpoint", "report_to", "logging_dir",
    "tracker_project_name", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
}  # fmt: skip


def parse_args(args: list[str] | None = None) -> Namespace:
    """Options, named as in diffusers' example scripts."""
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
    """The command of a run as others would type it: what differs from the defaults, without paths and names of here."""
    defaults = vars(parse_args(["--dataset", "DATASET", "--output_dir", "MODEL"]))
    words = ["accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL"]
    for name, value in vars(args).items():
        if name in OF_HERE or value == defaults[name]:
            continue
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


def _add_model_options(add) -> None:
    add(
        "--dataset",
        required=True,
        help="slice data set: a folder of `diffusers-cf prepare`, or user/name[@revision] on the Hub",
    )
    add("--output_dir", required=True, help="the pipeline, with checkpoints and logs beside it")
    add("--unet_size", choices=list(UNET_SIZES), default="small")
    add("--conditioning", choices=CONDITIONINGS, default="attention")
    add("--resolution", type=int, help="side of the network's input in pixels, a multiple of 8 (64)")
    add(
        "--pretrained_model",
        help="pipeline folder or Hub id to fine-tune, on all or some of its modalities: its"
        " network replaces the three above",
    )
    add(
        "--renormalize", action="store_true",
        help="fine-tune a model of another intensity scale than the data set's: the new model has the data set's",
    )  # fmt: skip
    add("--max_train_samples", type=int, help="train on the first so many slices only")
    add("--random_flip", action="store_true", help="mirror left and right")
    add("--augment", action="store_true", help="small rotations, scales, shifts and gains")
    add(
        "--no_clip_input", action="store_true",
        help="leave in what is brighter than 1 on the data set's intensity scale, as the authors do, in training and later",
    )  # fmt: skip
    add(
        "--crop_background", type=float, metavar="SHARE",
        help="train on so many of the images in windows round their foreground, and compute in windows later"
        " (0; in fine-tuning 0.7, if the base computes in windows)",
    )  # fmt: skip
    add("--guidance_dropout_prob", type=float, default=0.35, help="share of images whose condition is dropped")
    add("--snr_gamma", type=float, help="min-SNR weighting of the loss; 5.0 is usual")
    add(
        "--first_timesteps", type=float, default=1.0, metavar="SHARE",
        help="begin with the lowest SHARE of the timesteps and let it rise to all; 0.2 learns the classes sooner (1: off)",
    )  # fmt: skip
    add("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon")
    add("--ddpm_num_steps", type=int, default=1000)
    add("--ddpm_beta_schedule", default="linear", choices=["linear", "scaled_linear", "squaredcos_cap_v2"])


def _add_optimisation_options(add) -> None:
    add("--seed", type=int, default=0)
    add("--train_batch_size", type=int, default=32, help="images a process and accumulation step")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=50_000)
    add("--num_train_epochs", type=int, help="overrides --max_train_steps")
    add("--learning_rate", type=float, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the rate by processes, accumulation and batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup")
    add("--lr_warmup_steps", type=int, default=500)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.01)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_max_decay", type=float, default=0.9999)
    add("--ema_inv_gamma", type=float, default=1.0)
    add("--ema_power", type=float, default=0.75, help="decay after n steps is 1 - (1 + n / inv_gamma) ** -power")


def _add_run_options(add) -> None:
    add("--gradient_checkpointing", action="store_true")
    text = "auto: bf16 where the device computes in it; defaults to accelerate's configuration"
    add("--mixed_precision", choices=["auto", "no", "fp16", "bf16"], help=text)
    add("--allow_tf32", action="store_true")
    add("--compile", action="store_true", help="torch.compile the network; not made for windows, whose sizes vary")
    add("--dataloader_num_workers", type=int, help="default: 4 where a GPU computes, else 0")
    add("--checkpointing_steps", type=int, default=1000)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    add("--validation_steps", type=int, default=1000, help="0 switches validation off")
    add("--num_validation_slices", type=int, default=64)
    add("--logging_steps", type=int, default=25)
    add("--report_to", choices=LoggerType.list(), metavar="TRACKER", help="tensorboard, wandb, ..")
    add("--logging_dir", default="logs", help="inside output_dir")
    add("--tracker_project_name", default="diffusers_cf")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", help="defaults to the name of output_dir")
    add("--hub_token")
    add("--hub_private_repo", action="store_true")
