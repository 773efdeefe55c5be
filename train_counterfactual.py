"""Train the noise predictor of a CounterfactualDDIMPipeline on slices that have only image-level labels.

    accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL

Eq. 1 of the paper over all timesteps, with the condition dropped for 35 % of the images. The averaged (EMA) weights are
saved as a pipeline that `CounterfactualDDIMPipeline.from_pretrained(MODEL)` opens.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, LoggerType, ProjectConfiguration, set_seed
from diffusers import UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_cf import CounterfactualDDIMPipeline, DynamicDDIMInverseScheduler, DynamicDDIMScheduler, InputError
from diffusers_cf.arguments import ArgumentParser, add_log_level, run_command
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.files import alone_at, make_folder
from diffusers_cf.hub.publishing import open_repository, push_model
from diffusers_cf.inference import computes_in_bfloat16
from diffusers_cf.loading import SWITCHES
from diffusers_cf.losses import drop_condition, noise_prediction_loss, rising_timesteps
from diffusers_cf.models import (
    CONDITIONINGS,
    UNET_SIZES,
    ClassTokenEncoder,
    ConditionalNoisePredictor,
    class_token_encoder,
    counterfactual_unet,
    fastest_layout,
)
from diffusers_cf.training.batches import TrainingSlices
from diffusers_cf.training.checkpoints import check_output_folder
from diffusers_cf.training.fine_tuning import model_metadata, open_base
from diffusers_cf.training.loop import Training
from diffusers_cf.training.validation import SETTINGS, Validation


logger = get_logger(__name__)

# piecewise_constant needs rules that no option gives
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
LEAST = {
    "seed": 0, "train_batch_size": 1, "gradient_accumulation_steps": 1, "max_train_steps": 1, "num_train_epochs": 1,
    "max_train_samples": 1, "learning_rate": 0, "lr_warmup_steps": 0, "ddpm_num_steps": 1, "dataloader_num_workers": 0,
    "checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_steps": 0, "num_validation_slices": 1,
    "logging_steps": 1,
}  # fmt: skip

# Paths, logs and the Hub: left out of the recorded command.
LOCAL_OPTIONS = {
    "dataset", "output_dir", "pretrained_model", "resume_from_checkpoint", "report_to", "logging_dir",
    "tracker_project_name", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "log_level",
}  # fmt: skip


def main(args: Namespace) -> None:
    """Train, and save the pipeline. Every number of the run is in `args`."""
    output = Path(args.output_dir)
    make_folder(output)
    accelerator = start_accelerator(args, output)
    with alone_at(output) if accelerator.is_main_process else nullcontext():  # one run per folder
        check_output_folder(output, args.resume_from_checkpoint)
        if args.push_to_hub and accelerator.is_main_process:
            name = args.hub_model_id or output.resolve().name
            repository, _ = open_repository(name, args.hub_token, args.hub_private_repo or None)

        training, pipeline = set_up(args, accelerator, output)

        def save_model(folder: Path) -> None:
            with training.averaged():
                pipeline().save_pretrained(folder)

        train(args, training, pipeline, save_model)
        if accelerator.is_main_process:
            save_model(output)
            if args.push_to_hub:
                push_model(output, repository, token=args.hub_token)
        accelerator.end_training()


def start_accelerator(args, output: Path) -> Accelerator:
    """Return the accelerator with the run's processes, devices, precision and trackers.

    Raises:
        InputError: this machine lacks the precision or the tracker; accelerate would often go on without it.
    """
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    # Set here: accelerate would prefer the environment's number of steps, and without ACCELERATE_USE_CPU it would let
    # each process of a CPU train alone.
    parts = GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps)
    wanted = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if wanted not in ("auto", str(parts.num_steps)):
        raise InputError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {wanted} in the environment, and --gradient_accumulation_steps"
            f" {parts.num_steps}: give both the same number"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    on_cpus = started > 1 and not torch.accelerator.is_available()
    precision = args.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_in_bfloat16(PartialState(cpu=on_cpus).device) else "no"
    try:
        accelerator = Accelerator(
            cpu=on_cpus,
            gradient_accumulation_plugin=parts,
            mixed_precision=precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / args.logging_dir)),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if accelerator.num_processes != started:
        raise InputError(f"{started} processes were started, but accelerate counts {accelerator.num_processes}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU: this run has a CPU, for which there is auto")
    if accelerator.mixed_precision == "bf16" and not computes_in_bfloat16(accelerator.device):
        logger.warning("bf16 is emulated on this machine and many times slower than --mixed_precision no or auto")
    if args.report_to and not accelerator.log_with:
        raise InputError(f"--report_to {args.report_to}: this tracker is not installed")
    return accelerator


def build_network(args, dataset: SliceDataset, base: CounterfactualDDIMPipeline | None) -> ConditionalNoisePredictor:
    """Return a new network for the data set's channels and classes, or that of the pipeline to fine-tune."""
    if base:
        network = ConditionalNoisePredictor(base.unet, base.class_encoder)
    else:
        channels, conditional = dataset.preprocessing["channels"], args.conditioning != "unconditional"
        unet = counterfactual_unet(args.unet_size, args.conditioning, args.resolution or 64, channels)
        encoder = class_token_encoder(args.unet_size, dataset.class_names) if conditional else None
        network = ConditionalNoisePredictor(unet, encoder)
    if network.class_encoder and network.class_encoder.tokens and "Cross" not in network.unet.config.mid_block_type:
        # AdaGN alone never reads the tokens, and several processes wait for every gradient that is asked for.
        network.class_encoder.tokens.requires_grad_(False)
    if args.gradient_checkpointing:
        network.unet.enable_gradient_checkpointing()
    return network.train()


def build_pipeline(
    args, unet: UNet2DConditionModel, class_encoder: ClassTokenEncoder | None, preprocessing: dict,
    base: CounterfactualDDIMPipeline | None = None,
) -> CounterfactualDDIMPipeline:  # fmt: skip
    """Return the pipeline of a network, with the schedulers of its training, or those of the base model."""
    if base:
        scheduler, inverse = base.scheduler, base.inverse_scheduler
    else:
        scheduler = DynamicDDIMScheduler(
            num_train_timesteps=args.ddpm_num_steps,
            beta_schedule=args.ddpm_beta_schedule,
            prediction_type=args.prediction_type,
        )
        inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config)
    switches = {name: base.config[name] for name in SWITCHES} if base else {}
    # inference gets the input of the training: windows or whole images, peaks cut or not
    switches |= {"crop_background": bool(args.crop_background), "clip_input": not args.no_clip_input}
    pipe = CounterfactualDDIMPipeline(unet, class_encoder, scheduler, inverse, **switches)
    pipe.preprocessing = preprocessing
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_up(
    args: Namespace, accelerator: Accelerator, output: Path
) -> tuple[Training, Callable[[], CounterfactualDDIMPipeline]]:
    """Return the training at step 0, and a function that builds the pipeline with the network's current weights."""
    # 1. Data: slices with labels. Masks, if there are any, are only for validation.
    with accelerator.main_process_first():
        dataset = SliceDataset(args.dataset, "train")
    set_seed(args.seed)
    base = open_base(args, dataset)  # None without --pretrained_model
    network = build_network(args, dataset, base).to(memory_format=fastest_layout(accelerator.device, args.compile))
    encoder, size = network.class_encoder, network.unet.config.sample_size
    slices = TrainingSlices(
        dataset, args.seed, (size, size), args.max_train_samples, num_train_timesteps=args.ddpm_num_steps,
        random_flip=args.random_flip, augment=args.augment, clip_input=not args.no_clip_input,
        match_positions=args.match_positions, channel_dropout=args.channel_dropout,
        crop_background=args.crop_background or 0.0, halvings=len(network.unet.config.block_out_channels) - 1,
    )  # fmt: skip
    if encoder and (missing := set(range(len(dataset.class_names))) - set(slices.labels.tolist())):
        names = ", ".join(dataset.class_names[index] for index in sorted(missing))
        raise InputError(f"{args.dataset}: no slice to train on is labelled {names}")

    # 2. Optimiser, schedule, averaged weights.
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.num_train_epochs:
        args.max_train_steps = args.num_train_epochs * math.ceil(slices.num_slices / global_batch)
    optimizer = torch.optim.AdamW(
        network.parameters(), args.learning_rate * (global_batch if args.scale_lr else 1),
        (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay, fused=True,
    )  # fmt: skip
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    ema = EMAModel(
        network.parameters(), args.ema_max_decay, use_ema_warmup=True, inv_gamma=args.ema_inv_gamma,
        power=args.ema_power, foreach=True,
    )  # fmt: skip
    ema.to(accelerator.device)
    if args.compile:  # before autocast is put around it: a graph with it inside would not be cached for the next run
        network.forward = torch.compile(network.forward)
    model, optimizer = accelerator.prepare(network, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    metadata = model_metadata(args, slices, global_batch, base, command_of(args))

    def pipeline() -> CounterfactualDDIMPipeline:
        return build_pipeline(args, network.unet, network.class_encoder, metadata, base)

    # 3. The objective: Eq. 1, with the noise levels that the pipeline decodes.
    noise_scheduler = pipeline().scheduler

    def losses(batch: dict[str, torch.Tensor], progress: float) -> Iterator[tuple[str, torch.Tensor]]:
        timesteps = rising_timesteps(batch["timesteps"], progress, args.first_timesteps)
        null_id = encoder.null_id if encoder else 0
        class_ids = drop_condition(batch["labels"], null_id, args.guidance_dropout_prob, batch["uniform"])
        images, noise = batch["images"], batch["noise"]  # images in [-1, 1]
        loss = noise_prediction_loss(model, noise_scheduler, images, class_ids, noise, timesteps, args.snr_gamma)
        yield "network", loss

    resumable = {"seed": args.seed, "global_batch": global_batch, "slices": slices.num_slices}
    # None, since older checkpoints have neither
    resumable |= {name: getattr(args, name) or None for name in ("crop_background", "channel_dropout")}
    training = Training(
        accelerator, model, losses, {"network": optimizer}, slices, output,
        metadata=resumable, batch_size=args.train_batch_size, max_steps=args.max_train_steps,
        lr_schedulers=[lr_scheduler], ema=ema, max_grad_norm=args.max_grad_norm, num_workers=args.dataloader_num_workers,
    )  # fmt: skip
    return training, pipeline


def train(args: Namespace, training: Training, pipeline: Callable, save_model: Callable[[Path], None]) -> None:
    """Train to the last step, with checkpoints, logs and validation on the way."""
    accelerator = training.accelerator
    if training.resume(args.resume_from_checkpoint):
        accelerator.print(f"resumed at step {training.step}")
    if args.report_to:
        config = {name: value for name, value in vars(args).items() if name != "hub_token"}
        accelerator.init_trackers(args.tracker_project_name, config)
    validation = Validation(args, accelerator, training.folder, training.global_batch)

    def validate() -> None:
        if validation.is_due(training.step):
            with training.averaged():
                validation.run(pipeline(), training.step)

    if training.step and not validation.is_done(training.step):  # stopped between checkpoint and scores
        validate()
    hidden = not accelerator.is_main_process
    with tqdm(total=args.max_train_steps, initial=training.step, disable=hidden, desc="step") as bar:
        for step in training.steps():
            bar.update()
            save_now = step == args.max_train_steps or step % args.checkpointing_steps == 0
            if save_now or step % args.logging_steps == 0:
                logs = training.report()
                bar.set_postfix(loss=f"{logs['loss']:.4f}", images_per_second=f"{logs['images_per_second']:.1f}")
                accelerator.log(logs, step)
            if save_now:
                training.save(save_model, args.checkpoints_total_limit)
            validate()


def parse_args(args: list[str] | None = None) -> Namespace:
    """Return the options, named as in diffusers' example scripts."""
    parser = ArgumentParser(prog="train_counterfactual.py", description=__doc__.splitlines()[0])
    _add_model_options(parser.add_argument_group("data and model").add_argument)
    _add_optimisation_options(parser.add_argument_group("optimisation").add_argument)
    _add_run_options(parser.add_argument_group("machine, checkpoints, logs").add_argument)
    args = parser.parse_args(args)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} is {value}: it must be {least} or more")
    for name in ("guidance_dropout_prob", "crop_background", "channel_dropout"):
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
        if name in LOCAL_OPTIONS or value == defaults[name]:
            continue
        words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words + ["--pretrained_model BASE"] * bool(args.pretrained_model))


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
    add("--match_positions", action="store_true", help="draw all classes at the same heights in the head; default: off")
    add("--no_clip_input", action="store_true", help="keep intensities above 1 on the data set's scale, as the authors do,"
        " in training and inference; default: cut them at 1")
    add("--crop_background", type=float, metavar="SHARE", help="share of the images that are trained on in windows around"
        " their foreground, 0 to 1; above 0, inference computes in windows; default: 0, or 0.7 if the model to fine-tune"
        " computes in windows")
    add("--channel_dropout", type=float, default=0.0, metavar="SHARE", help="share of the images in which some channels"
        " are empty, 0 to 1, so that the network knows patients who lack modalities; default: %(default)s")
    add("--guidance_dropout_prob", type=float, default=0.35, help="probability that an image's class is replaced by null,"
        " for implicit guidance; default: %(default)s (the paper's)")
    add("--snr_gamma", type=float, help="gamma of min-SNR loss weighting, usually 5; default: no weighting")
    add("--first_timesteps", type=float, default=1.0, metavar="SHARE", help="share of the timesteps, from the lowest, to begin"
        " with; it rises to all of them; 0.2 learns the classes sooner; default: %(default)s")
    add("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon", help="what a new network predicts;"
        " default: %(default)s")
    add("--ddpm_num_steps", type=int, default=1000, help="timesteps of the diffusion process; default: %(default)s")
    add("--ddpm_beta_schedule", choices=["linear", "scaled_linear", "squaredcos_cap_v2"], default="linear",
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
    add("--scale_lr", action="store_true", help="multiply that rate by the images per optimiser step; default: off")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup",
        help="course of the learning rate, as in diffusers; default: %(default)s")
    add("--lr_warmup_steps", type=int, default=500, help="optimiser steps of linear warm-up; default: %(default)s")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the mean gradient; default: %(default)s")
    add("--adam_beta2", type=float, default=0.999, help="decay of the mean squared gradient; default: %(default)s")
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
    add_log_level(add)
    add("--logging_dir", default="logs", help="folder of logs inside --output_dir; default: %(default)s")
    add("--tracker_project_name", default="diffusers_cf", help="project name for the tracker; default: %(default)s")
    add("--push_to_hub", action="store_true", help="publish the model when training ends; default: off")
    add("--hub_model_id", help="repository to publish to, user/name; default: the name of --output_dir")
    add("--hub_token", help="token for the Hub; default: that of `hf auth login`")
    add("--hub_private_repo", action="store_true", help="make the repository private; default: off")
# fmt: on


if __name__ == "__main__":
    arguments = parse_args()
    raise SystemExit(run_command(lambda: main(arguments), arguments.log_level))
