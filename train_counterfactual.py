"""Trains the noise predictor of a CounterfactualDDIMPipeline on slices that carry image-level labels alone.

    accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL

Eq. 1 of the paper over all timesteps, with the condition dropped for 35 % of the images. The averaged (EMA) weights are
saved as a pipeline that `CounterfactualDDIMPipeline.from_pretrained(MODEL)` opens.
"""

import math
import os
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_cf import CounterfactualDDIMPipeline, DynamicDDIMInverseScheduler, DynamicDDIMScheduler, InputError
from diffusers_cf.arguments import run_command
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.files import alone_at, make_folder
from diffusers_cf.hub.publishing import model_repository, push_model
from diffusers_cf.images import window_side
from diffusers_cf.inference import computes_in_bfloat16
from diffusers_cf.loading import SWITCHES
from diffusers_cf.losses import drop_condition, noise_prediction_loss, rising_timesteps
from diffusers_cf.models import (
    ClassTokenEncoder,
    ConditionalNoisePredictor,
    class_token_encoder,
    counterfactual_unet,
    fastest_layout,
)
from diffusers_cf.schedulers import NOISE_LEVELS
from diffusers_cf.training.fine_tuning import model_facts, open_base
from diffusers_cf.training.loop import (
    PositionBatches,
    Progress,
    TrainingSlices,
    averaged_weights,
    check_output_folder,
    check_weights,
    find_checkpoint,
    save_checkpoint,
)
from diffusers_cf.training.options import parse_args
from diffusers_cf.training.validation import Validation


WINDOWS_OF_BASE = 0.7  # share of the images that go on in windows, where the base computes in them
GPU_WORKERS = 4  # processes that read ahead for a GPU; on a CPU they would take the network's cores

logger = get_logger(__name__)


def start_accelerator(args, output: Path) -> Accelerator:
    """Processes, devices, precision and trackers.

    Raises:
        InputError: this machine lacks the precision or the tracker; accelerate would often go on without it.
    """
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    # Said here, and not left to the environment: in it accelerate looks for the number of parts first, and without
    # ACCELERATE_USE_CPU it lets each process of a CPU train alone.
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


def build_model(args, dataset: SliceDataset, base: CounterfactualDDIMPipeline | None) -> ConditionalNoisePredictor:
    """A new network for the data set's channels and classes, or that of the pipeline to fine-tune."""
    if base:
        model = ConditionalNoisePredictor(base.unet, base.class_encoder)
    else:
        unet = counterfactual_unet(
            args.unet_size, args.conditioning, args.resolution or 64, dataset.preprocessing["channels"]
        )
        conditional = args.conditioning != "unconditional"
        model = ConditionalNoisePredictor(
            unet, class_token_encoder(args.unet_size, dataset.class_names) if conditional else None
        )
    if model.class_encoder and model.class_encoder.tokens and "Cross" not in model.unet.config.mid_block_type:
        # AdaGN alone never reads the tokens, and several processes wait for every gradient that is asked for.
        model.class_encoder.tokens.requires_grad_(False)
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model.train()


@dataclass
class Run:
    """What one training run consists of; on each process the same.

    Attributes:
        args: options.
        accelerator: processes, devices, checkpoints and trackers.
        base: the pipeline that is fine-tuned.
        output: output folder.
        slices: training set.
        network: U-Net and class encoder.
        model: `network` as the accelerator prepared it.
        optimizer: AdamW, prepared.
        lr_scheduler: steps once an optimiser step.
        ema: average of the network's weights.
        facts: preprocessing.json of the model.
        global_batch: images an optimiser step.
    """

    args: Namespace
    accelerator: Accelerator
    base: CounterfactualDDIMPipeline | None
    output: Path
    slices: TrainingSlices
    network: ConditionalNoisePredictor
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel
    facts: dict
    global_batch: int

    @property
    def fingerprint(self) -> dict:
        """What must be the same for a checkpoint to go on as if never stopped."""
        facts = {"seed": self.args.seed, "global_batch": self.global_batch, "slices": self.slices.num_slices}
        return facts | {"crop_background": self.args.crop_background or None}  # older checkpoints have none

    def pipeline(self) -> CounterfactualDDIMPipeline:
        """The pipeline around the network as it is now."""
        return build_pipeline(self.args, self.network.unet, self.network.class_encoder, self.facts, self.base)

    def save_model(self, folder: Path) -> None:
        """Saves the averaged weights as a pipeline."""
        with averaged_weights(self.network, self.ema):
            self.pipeline().save_pretrained(folder)


def build_pipeline(
    args,
    unet: UNet2DConditionModel,
    class_encoder: ClassTokenEncoder | None,
    facts: dict,
    base: CounterfactualDDIMPipeline | None = None,
) -> CounterfactualDDIMPipeline:
    """The pipeline around a network, with the schedulers that belong to its training, or those of what is fine-tuned."""
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
    # in windows where it was trained on them, with peaks where it has seen them
    switches |= {"crop_background": bool(args.crop_background), "clip_input": not args.no_clip_input}
    pipe = CounterfactualDDIMPipeline(unet, class_encoder, scheduler, inverse, **switches)
    pipe.preprocessing = facts
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(args: Namespace) -> None:
    """Trains; every number of the run is in `args`."""
    output = Path(args.output_dir)
    make_folder(output)
    accelerator = start_accelerator(args, output)
    with alone_at(output) if accelerator.is_main_process else nullcontext():  # one run a folder
        check_output_folder(output, args.resume_from_checkpoint)
        run_training(args, accelerator, output)


def run_training(args: Namespace, accelerator: Accelerator, output: Path) -> None:
    """From set-up to the finished pipeline, in an output folder that no other run writes to."""
    if args.push_to_hub and accelerator.is_main_process:
        name = args.hub_model_id or output.resolve().name
        repository, _ = model_repository(name, args.hub_token, args.hub_private_repo or None)
    run = set_up(args, accelerator, output)
    step = resume(run)
    if args.report_to:
        config = {k: v for k, v in vars(args).items() if k != "hub_token"}
        accelerator.init_trackers(args.tracker_project_name, config)
    train(run, step)
    if accelerator.is_main_process:
        run.save_model(output)
        if args.push_to_hub:
            push_model(output, repository, token=args.hub_token)
    accelerator.end_training()


def set_up(args: Namespace, accelerator: Accelerator, output: Path) -> Run:
    """Data, model, optimiser, schedule and average, at step 0."""
    # 1. Data: a slice data set with labels; masks, if there are any, are for validation alone.
    with accelerator.main_process_first():
        dataset = SliceDataset(args.dataset, "train")
    set_seed(args.seed)
    base = open_base(args, dataset)
    if args.crop_background is None and base and base.config.crop_background:
        args.crop_background = WINDOWS_OF_BASE
    args.no_clip_input |= bool(base) and not base.config.clip_input
    network = build_model(args, dataset, base).to(memory_format=fastest_layout(accelerator.device, args.compile))
    slices = training_slices(args, dataset, network)

    # 2. Model, optimiser, schedule, average.
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.num_train_epochs:
        args.max_train_steps = args.num_train_epochs * math.ceil(slices.num_slices / global_batch)
    facts = model_facts(args, slices, global_batch, base)
    rate = args.learning_rate * (global_batch if args.scale_lr else 1)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(
        network.parameters(), rate, betas, args.adam_epsilon, args.adam_weight_decay, fused=True
    )
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
    network = accelerator.unwrap_model(model)
    return Run(
        args, accelerator, base, output, slices, network, model, optimizer, lr_scheduler, ema, facts, global_batch
    )


def training_slices(args: Namespace, dataset: SliceDataset, network: ConditionalNoisePredictor) -> TrainingSlices:
    """What the network is trained on, at its size.

    Raises:
        InputError: there is no slice of one of its classes, or its images have no smaller windows.
    """
    config = network.unet.config
    size = (config.sample_size, config.sample_size)
    side = window_side(size, len(config.block_out_channels) - 1)
    if args.crop_background and side >= size[0]:
        raise InputError(f"--crop_background: images of {size[0]} pixels are too small to be cut to windows")
    options = {
        "num_train_timesteps": args.ddpm_num_steps, "random_flip": args.random_flip, "augment": args.augment,
        "crop_background": args.crop_background or 0.0, "window_side": side, "clip_input": not args.no_clip_input,
    }  # fmt: skip
    slices = TrainingSlices(dataset, args.seed, size, args.max_train_samples, **options)
    if network.class_encoder and (missing := set(range(len(dataset.class_names))) - slices.classes()):
        names = ", ".join(dataset.class_names[index] for index in sorted(missing))
        raise InputError(f"{args.dataset}: no slice to train on is labelled {names}")
    return slices


def resume(run: Run) -> int:
    """Restores the checkpoint that is asked for; the number of optimiser steps done, 0 without one."""
    checkpoint = find_checkpoint(run.output, run.args.resume_from_checkpoint, run.fingerprint)
    if checkpoint is None:
        return 0
    path, step = checkpoint
    try:
        run.accelerator.load_state(str(path))
    except Exception as error:  # the formats raise whatever they like
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{path}: damaged, or made with other options for the network ({type(error).__name__}: {reason})"
        ) from error
    run.ema.to(run.accelerator.device)  # accelerate loads it to the CPU
    run.accelerator.print(f"resumed from {path} at step {step}")
    return step


def train(run: Run, step: int) -> None:
    """Trains from a step to the last one, with checkpoints, logs and validation on the way."""
    args, accelerator = run.args, run.accelerator
    levels = run.pipeline().scheduler.config  # those that decoding walks
    noise_scheduler = DDPMScheduler(**{name: levels[name] for name in NOISE_LEVELS})
    validation = Validation(args, accelerator, run.output, run.global_batch)
    if (
        step and validation.is_due(step) and not validation.is_done(step)
    ):  # the run was stopped between checkpoint and scores
        validate(run, validation, step)
    with tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, desc="step") as bar:
        progress = Progress(accelerator, bar, step, args.gradient_accumulation_steps, run.global_batch)
        for batch in batches(run, step):
            progress.add(train_on_batch(run, noise_scheduler, batch, step / args.max_train_steps))
            if not accelerator.sync_gradients:
                continue
            run.lr_scheduler.step()
            run.ema.step(run.network.parameters())
            step += 1
            bar.update()

            last = step == args.max_train_steps
            save_now = last or step % args.checkpointing_steps == 0
            if save_now or step % args.logging_steps == 0:
                progress.report(step, run.lr_scheduler.get_last_lr()[0])
            with progress.paused():
                if save_now:
                    save(run, step)
                if validation.is_due(step):
                    validate(run, validation, step)


def validate(run: Run, validation: Validation, step: int) -> None:
    """Scores of the averaged weights at a step."""
    with averaged_weights(run.network, run.ema):
        validation.run(run.pipeline(), step)


def save(run: Run, step: int) -> None:
    """A checkpoint that `resume` finds, of weights that are numbers."""
    check_weights(run.ema.shadow_params, step)
    limit = run.args.checkpoints_total_limit
    save_checkpoint(run.accelerator, run.output, step, run.fingerprint, run.save_model, limit)


def batches(run: Run, step: int):
    """This process's batches on its device, each in parts of one image size, from a step to the last one."""
    args, accelerator = run.args, run.accelerator
    positions = PositionBatches(
        step, args.max_train_steps, args.train_batch_size, args.gradient_accumulation_steps,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    on_gpu, workers = accelerator.device.type == "cuda", args.dataloader_num_workers
    workers = GPU_WORKERS * on_gpu if workers is None else workers
    loader = run.slices.batches(positions, workers, on_gpu)
    for batch in loader:
        yield [{k: v.to(accelerator.device, non_blocking=True) for k, v in part.items()} for part in batch]


def train_on_batch(
    run: Run, noise_scheduler: DDPMScheduler, batch: list[dict[str, torch.Tensor]], progress: float
) -> torch.Tensor:
    """One accumulation step of Eq. 1, and of the optimiser where the last one is due; the loss."""
    accelerator, count = run.accelerator, sum(len(part["images"]) for part in batch)
    with accelerator.accumulate(run.model):
        losses = [loss_of_part(run, noise_scheduler, part, progress) * len(part["images"]) / count for part in batch]
        loss = torch.stack(losses).sum()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(run.model.parameters(), run.args.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return loss.detach()


def loss_of_part(
    run: Run, noise_scheduler: DDPMScheduler, part: dict[str, torch.Tensor], progress: float
) -> torch.Tensor:
    """Eq. 1 for images of one size: the mean over them."""
    args, encoder = run.args, run.network.class_encoder
    timesteps = rising_timesteps(part["timesteps"], progress, args.first_timesteps)
    null_id = encoder.null_id if encoder else 0
    class_ids = drop_condition(part["labels"], null_id, args.guidance_dropout_prob, part["uniform"])
    return noise_prediction_loss(
        run.model, noise_scheduler, part["images"], class_ids, part["noise"], timesteps, args.snr_gamma
    )


if __name__ == "__main__":
    arguments = parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
