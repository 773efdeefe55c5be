"""Train a method of the tables within a budget, with a validation curve; a killed training resumes."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from diffusers_cf.training.batches import TrainingSlices
from diffusers_cf.training.checkpoints import check_weights
from diffusers_cf.training.loop import Training


CHECKS = 12  # validation losses, evenly over the budget
FLAT_CHECKS = 2  # converged if none of the last two is better than those before
LEAST_GAIN = 0.005  # relative improvement that counts as better
SECONDS_PER_CHECKPOINT = 120
VALIDATION_SLICES = 128


@dataclass(frozen=True)
class Budget:
    """How long each method is trained: until the first limit is reached."""

    seconds: float  # of training, without validation and checkpoints
    steps: int  # batches
    batch_size: int = 32
    mixed_precision: str = "no"  # or bf16, as in accelerate
    augment: bool = False  # small rotations, scales, shifts and gains beside mirroring
    num_workers: int = 0  # processes that read data; 0 reads in this one


@dataclass
class TrainingRecord:
    """The course of a training; it is saved with the weights."""

    steps: int = 0
    images_seen: int = 0
    seconds: float = 0.0  # of training, without validation and checkpoints
    converged: bool | None = None  # whether the validation loss was flat at the end; None while training
    curve: list[list[float]] = field(default_factory=list)  # [images seen, seconds, validation loss] of each check

    def is_flat(self, comparable_from: float = 0.0) -> bool:
        """Return whether the last checks were no better than the earlier ones after this share of the training."""
        losses = [loss for _, _, loss in self.curve[math.ceil(CHECKS * comparable_from) :]]
        before, last = losses[:-FLAT_CHECKS], losses[-FLAT_CHECKS:]
        return bool(before) and min(last) >= min(before) * (1 - LEAST_GAIN)


def slices_of(dataset, trained_on: str):
    """Return the slices of a `SliceDataset` that a method is trained on: `all`, or only the `healthy` ones."""
    if trained_on == "all":
        return dataset
    subset = torch.utils.data.Subset(dataset, np.flatnonzero(np.asarray(dataset.labels) == 0).tolist())
    subset.labels, subset.collate, subset.folder = np.zeros(len(subset), int), dataset.collate, dataset.folder
    return subset


def set_up_training(
    method, train, folder: Path, budget: Budget, seed: int, device: str = "cpu", metadata: dict | None = None
) -> Training:
    """Return the training of a newly initialised [`TrainableMethod`] at step 0, to be run by [`train_method`].

    Args:
        method (`TrainableMethod`): newly initialised.
        train (`SliceDataset`): slices to train on.
        folder (`Path`): for checkpoints.
        budget (`Budget`): how long.
        seed (`int`): of weights, order and noise.
        device (`str`): `cpu`, `cuda` and so on.
        metadata (`dict`, *optional*): JSON values in which a checkpoint must agree to be resumed, beside seed, slices
            and batch size.
    """
    side = method.config.image_size
    slices = TrainingSlices(
        slices_of(train, method.trained_on), seed, (side, side), random_flip=True, augment=budget.augment,
        clip_input=method.clip_input,
    )  # fmt: skip
    accelerator = Accelerator(mixed_precision=budget.mixed_precision, cpu=device == "cpu")
    method.to(accelerator.device, memory_format=torch.channels_last).train()
    optimizers = method.optimizers()
    ema = None
    if method.averaged:
        ema = EMAModel(method.parameters(), 0.9999, use_ema_warmup=True, power=0.75, foreach=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    accelerator.register_for_checkpointing(method)
    resumable = {"seed": seed, "slices": slices.num_slices, "batch_size": budget.batch_size}
    training = Training(
        accelerator, method, method.losses, {name: accelerator.prepare(o) for name, o in optimizers.items()}, slices,
        Path(folder), resumable | (metadata or {}), budget.batch_size, budget.steps, budget.seconds, ema=ema,
        max_grad_norm=method.max_grad_norm, num_workers=budget.num_workers, autocast=method.mixed_precision,
    )  # fmt: skip
    training.lr_schedulers = [
        LambdaLR(optimizer, lambda _: method.learning_rate_factor(training.progress))
        for optimizer in optimizers.values()
    ]
    return training


def validation_of(method, validation, training: Training) -> Callable[[], float]:
    """Return a function that measures the validation loss of the averaged weights, always on the same slices and noise.

    Args:
        method (`TrainableMethod`): the one in training.
        validation (`SliceDataset`): slices for the loss.
        training (`Training`): from [`set_up_training`].
    """
    size, batch_size = training.slices.image_size, training.batch_size
    held_out = TrainingSlices(slices_of(validation, method.trained_on), 0, size, clip_input=method.clip_input)
    starts = range(0, min(VALIDATION_SLICES, held_out.num_slices), batch_size)
    positions = [list(range(start, start + batch_size)) for start in starts]
    batches = [held_out.collate(held_out.__getitems__(batch)) for batch in positions]

    def measure() -> float:
        check_weights(list(method.parameters()), training.step)
        device = training.accelerator.device
        with training.averaged():
            losses = [method.validation_loss({k: v.to(device) for k, v in batch.items()}).item() for batch in batches]
        return float(np.mean(losses))

    return measure


def train_method(method, validation, training: Training) -> TrainingRecord:
    """Train to the end of the budget; the method then holds its weights for inference.

    Args:
        method (`TrainableMethod`): the one that `training` was set up for.
        validation (`SliceDataset`): slices for the validation loss.
        training (`Training`): from [`set_up_training`].
    """
    validation_loss = validation_of(method, validation, training)
    set_seed(training.metadata["seed"])
    record = TrainingRecord(**training.resume("latest").get("record", {}))
    saved = training.seconds
    with tqdm(total=100, desc=type(method).__name__, unit="%", miniters=1, leave=False) as bar:
        for step in training.steps():
            record.steps, record.seconds, record.images_seen = step, training.seconds, step * training.batch_size
            bar.update(int(100 * training.progress) - bar.n)
            if training.progress >= (len(record.curve) + 1) / CHECKS:
                record.curve.append([record.images_seen, round(record.seconds, 1), validation_loss()])
                bar.set_postfix(loss=f"{record.curve[-1][2]:.4f}")
            if training.progress >= 1:
                record.converged = record.is_flat(method.comparable_from)
            elif record.seconds - saved > SECONDS_PER_CHECKPOINT:
                training.save(limit=1, record=asdict(record))
                saved = record.seconds
    if training.ema:
        training.ema.copy_to(method.parameters())
    method.eval()
    return record
