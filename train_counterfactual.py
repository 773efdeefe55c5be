"""Trains the noise predictor of a CounterfactualDDIMPipeline on slices that carry image-level labels alone.

    accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL

Eq. 1 of the paper over all timesteps, with the condition dropped for 35 % of the images. The averaged (EMA) weights are
saved as a pipeline that `CounterfactualDDIMPipeline.from_pretrained(MODEL)` opens.
"""

import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_cf import CounterfactualDDIMPipeline, DynamicDDIMInverseScheduler, DynamicDDIMScheduler, InputError
from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.losses import drop_condition, noise_prediction_loss
from diffusers_cf.models import (
    CONDITIONINGS,
    UNET_SIZES,
    ClassTokenEncoder,
    ConditionalNoisePredictor,
    class_token_encoder,
    counterfactual_unet,
)
from diffusers_cf.training import PositionBatches, TrainingSlices, find_checkpoint, save_checkpoint
from diffusers_cf.validation import Validation


logger = get_logger("diffusers_cf")


def parse_args(args: list[str] | None = None):
    """Options, named as in diffusers' example scripts."""
    parser = ArgumentParser(prog="train_counterfactual.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, help="slice data set, written by `diffusers-cf prepare`")
    add("--output_dir", required=True, help="the pipeline, with checkpoints and logs beside it")
    add("--unet_size", choices=list(UNET_SIZES), default="small")
    add("--conditioning", choices=CONDITIONINGS, default="attention")
    add("--resolution", type=int, default=64, help="side of the network's input in pixels, a multiple of 8")
    add("--pretrained_model", help="pipeline folder to fine-tune instead of a new network")
    add("--seed", type=int, default=0)
    add("--train_batch_size", type=int, default=32, help="images a process and accumulation step")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--max_train_steps", type=int, default=50_000)
    add("--num_train_epochs", type=int, help="overrides --max_train_steps")
    add("--max_train_samples", type=int, help="train on the first so many slices only")
    add("--learning_rate", type=float, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the rate by processes, accumulation and batch size")
    add("--lr_scheduler", default="constant_with_warmup")
    add("--lr_warmup_steps", type=int, default=500)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.01)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_max_decay", type=float, default=0.9999)
    add("--ema_inv_gamma", type=float, default=1.0)
    add("--ema_power", type=float, default=0.75, help="decay after n steps is 1 - (1 + n / inv_gamma) ** -power")
    add("--guidance_dropout_prob", type=float, default=0.35, help="share of images whose condition is dropped")
    add("--snr_gamma", type=float, help="min-SNR weighting of the loss; 5.0 is usual")
    add("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon")
    add("--ddpm_num_steps", type=int, default=1000)
    add("--ddpm_beta_schedule", default="linear", choices=["linear", "scaled_linear", "squaredcos_cap_v2"])
    add("--random_flip", action="store_true", help="mirror left and right")
    add("--augment", action="store_true", help="small rotations, scales, shifts and gains")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="defaults to accelerate's configuration")
    add("--allow_tf32", action="store_true")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--dataloader_num_workers", type=int, default=0)
    add("--checkpointing_steps", type=int, default=1000)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    add("--validation_steps", type=int, default=1000, help="0 switches validation off")
    add("--num_validation_slices", type=int, default=64)
    add("--logging_steps", type=int, default=25)
    add("--report_to", default=None, help="trackers of accelerate, such as tensorboard or wandb")
    add("--logging_dir", default="logs", help="inside output_dir")
    add("--tracker_project_name", default="diffusers_cf")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", help="defaults to the name of output_dir")
    add("--hub_token")
    add("--hub_private_repo", action="store_true")
    args = parser.parse_args(args)
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must be 1 or more")
    if not 0 <= args.guidance_dropout_prob <= 1:
        parser.error(f"--guidance_dropout_prob is {args.guidance_dropout_prob}: it must lie in [0, 1]")
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution is {args.resolution}: it must be a multiple of 8")
    return args


def build_model(args, dataset: SliceDataset) -> ConditionalNoisePredictor:
    """A new network for the data set's channels and classes, or the one to fine-tune."""
    if args.pretrained_model:
        pipe = CounterfactualDDIMPipeline.from_pretrained(args.pretrained_model)
        model = ConditionalNoisePredictor(pipe.unet, pipe.class_encoder)
        _check_fits(args, model, dataset)
    else:
        channels = dataset.preprocessing["channels"]
        unet = counterfactual_unet(args.unet_size, args.conditioning, args.resolution, channels)
        conditional = args.conditioning != "unconditional"
        model = ConditionalNoisePredictor(
            unet, class_token_encoder(args.unet_size, dataset.class_names) if conditional else None
        )
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model.train()


def _check_fits(args, model: ConditionalNoisePredictor, dataset: SliceDataset) -> None:
    channels = model.unet.config.in_channels
    if channels != dataset.preprocessing["channels"]:
        raise InputError(
            f"{args.pretrained_model}: takes {channels} channels, {args.dataset} has {dataset.preprocessing['channels']}"
        )
    if model.class_encoder and tuple(model.class_encoder.config.class_names) != dataset.class_names:
        raise InputError(
            f"{args.pretrained_model}: knows the classes {list(model.class_encoder.config.class_names)},"
            f" {args.dataset} has {list(dataset.class_names)}"
        )


def build_pipeline(args, unet: UNet2DConditionModel, class_encoder: ClassTokenEncoder | None, facts: dict):
    """The pipeline around a network, with the schedulers that belong to its training."""
    scheduler = DynamicDDIMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
    )
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config)
    pipe = CounterfactualDDIMPipeline(unet, class_encoder, scheduler, inverse)
    pipe.preprocessing = facts
    pipe.set_progress_bar_config(disable=True)
    return pipe


class averaged_weights:
    """Within this context the model holds its EMA weights; afterwards the ones in training again."""

    def __init__(self, model: torch.nn.Module, ema: EMAModel):
        self.model, self.ema = model, ema

    def __enter__(self):
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        return self.model.eval()

    def __exit__(self, *exception):
        self.ema.restore(self.model.parameters())
        self.model.train()


def main(args) -> None:
    """Trains; every number of the run is in `args`."""
    output = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / args.logging_dir)),
    )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # 1. Data: a slice data set with labels; masks, if there are any, are for validation alone.
    with accelerator.main_process_first():
        dataset = SliceDataset(args.dataset, "train")
    parts, world = args.gradient_accumulation_steps, accelerator.num_processes
    global_batch = args.train_batch_size * parts * world
    if args.num_train_epochs:
        args.max_train_steps = args.num_train_epochs * math.ceil(len(dataset) / global_batch)
    slices = TrainingSlices(
        dataset, args.seed, (args.resolution, args.resolution), args.ddpm_num_steps, args.random_flip, args.augment,
        args.max_train_samples,
    )  # fmt: skip

    # 2. Model, optimiser, schedule, average.
    set_seed(args.seed)
    model = build_model(args, dataset)
    rate = args.learning_rate * (global_batch if args.scale_lr else 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay
    )
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
    ema = EMAModel(
        model.parameters(), args.ema_max_decay, use_ema_warmup=True, inv_gamma=args.ema_inv_gamma, power=args.ema_power
    )
    ema.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    unwrapped = accelerator.unwrap_model(model)
    if args.compile:
        unwrapped.compile()
    null_id = unwrapped.class_encoder.null_id if unwrapped.class_encoder else 0
    noise_scheduler = DDPMScheduler(
        args.ddpm_num_steps, beta_schedule=args.ddpm_beta_schedule, prediction_type=args.prediction_type
    )
    facts = {k: v for k, v in dataset.preprocessing.items() if k != "splits"} | {"size": args.resolution}

    def save_model(folder: Path) -> None:
        with averaged_weights(unwrapped, ema):
            build_pipeline(args, unwrapped.unet, unwrapped.class_encoder, facts).save_pretrained(folder)

    # 3. Resume.
    run_facts = {"seed": args.seed, "global_batch": global_batch, "slices": len(dataset)}
    step = 0
    checkpoint = find_checkpoint(output, args.resume_from_checkpoint, run_facts)
    if checkpoint:
        path, step = checkpoint
        accelerator.load_state(str(path))
        logger.info(f"resumed from {path} at step {step}", main_process_only=True)
    if args.report_to:
        accelerator.init_trackers(args.tracker_project_name, config=vars(args))

    # 4. Train.
    loader = torch.utils.data.DataLoader(
        slices,
        batch_sampler=PositionBatches(
            step, args.max_train_steps, args.train_batch_size, parts, accelerator.process_index, world
        ),
        collate_fn=slices.collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    validation = Validation(args, accelerator, output)
    bar = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, desc="step")
    running, since, start = torch.zeros((), device=accelerator.device), step, time.perf_counter()
    for batch in loader:
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
        with accelerator.accumulate(model):
            class_ids = drop_condition(batch["labels"], null_id, args.guidance_dropout_prob, batch["uniform"])
            loss = noise_prediction_loss(
                model, noise_scheduler, batch["images"], class_ids, batch["noise"], batch["timesteps"], args.snr_gamma
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        running += loss.detach() / parts
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(unwrapped.parameters())
        step += 1
        bar.update()

        last = step == args.max_train_steps
        save_now = last or step % args.checkpointing_steps == 0
        if save_now or step % args.logging_steps == 0:
            mean_loss = accelerator.reduce(running, "mean").item() / (step - since)
            if not math.isfinite(mean_loss):
                raise InputError(
                    f"the loss became {mean_loss} between steps {since} and {step}: lower --learning_rate or use bf16;"
                    f" checkpoints up to step {since} are good"
                )
            speed = (step - since) * global_batch / (time.perf_counter() - start)
            bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_second=f"{speed:.1f}")
            accelerator.log({"loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0], "images_per_second": speed}, step)
            running.zero_()
            since, start = step, time.perf_counter()
        if save_now:
            save_checkpoint(accelerator, output, step, run_facts, save_model, args.checkpoints_total_limit)
        if args.validation_steps and (last or step % args.validation_steps == 0):
            with averaged_weights(unwrapped, ema):
                validation.run(build_pipeline(args, unwrapped.unet, unwrapped.class_encoder, facts), step)
            start = time.perf_counter()
    bar.close()

    # 5. The pipeline.
    if accelerator.is_main_process:
        save_model(output)
        if args.push_to_hub:
            pipe = CounterfactualDDIMPipeline.from_pretrained(output)
            pipe.push_to_hub(args.hub_model_id or output.name, token=args.hub_token, private=args.hub_private_repo)
    accelerator.end_training()


if __name__ == "__main__":
    arguments = parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
