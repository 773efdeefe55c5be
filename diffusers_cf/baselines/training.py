"""The training loop of all methods of the tables: a budget, a validation curve, checkpoints, averaged weights."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_cf.errors import reading
from diffusers_cf.training.loop import (
    STATE_FILE,
    PositionBatches,
    TrainingSlices,
    averaged_weights,
    check_weights,
    find_checkpoint,
    save_checkpoint,
)


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


def training_step(
    method, optimizers: dict, batch: dict[str, torch.Tensor], progress: float, backward=torch.Tensor.backward,
    autocast=nullcontext,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Step, for each loss that the method yields, the optimiser that it names; return the losses.

    Args:
        method (`TrainableMethod`): in training mode.
        optimizers (`dict`): from the method's `optimizers()`.
        batch (`dict`): from [`training.loop.TrainingSlices`].
        progress (`float`): share of the training that is done.
        backward (`Callable`): an accelerator's, instead of the loss's own.
        autocast (`Callable`): an accelerator's; backward passes run outside of it.
    """
    values, losses = {}, method.losses(batch, progress)
    while True:
        with autocast():
            name, loss = next(losses, (None, None))
        if name is None:
            return values
        optimizers[name].zero_grad()
        backward(loss)
        if method.max_grad_norm:
            parameters = [p for group in optimizers[name].param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, method.max_grad_norm)
        optimizers[name].step()
        values[name] = loss.detach()


def slices_of(dataset, trained_on: str):
    """Return the slices of a `SliceDataset` that a method is trained on: `all`, or only the `healthy` ones."""
    if trained_on == "all":
        return dataset
    subset = torch.utils.data.Subset(dataset, np.flatnonzero(np.asarray(dataset.labels) == 0).tolist())
    subset.labels, subset.collate, subset.folder = np.zeros(len(subset), int), dataset.collate, dataset.folder
    return subset


class MethodTraining:
    """Train one method within a budget; a killed run resumes from its last checkpoint.

    Args:
        method (`TrainableMethod`): newly initialised.
        train (`SliceDataset`): slices to train on.
        validation (`SliceDataset`): slices for the validation loss.
        folder (`Path`): for checkpoints.
        budget (`Budget`): how long.
        seed (`int`): of weights, order and noise.
        device (`str`): `cpu`, `cuda` and so on.
        metadata (`dict`, *optional*): what a checkpoint must agree in to be resumed, beside seed, slices and batch
            size; JSON values.
    """

    def __init__(
        self, method, train, validation, folder: Path, budget: Budget, seed: int, device: str = "cpu",
        metadata: dict | None = None,
    ):  # fmt: skip
        self.method, self.folder, self.budget, self.seed = method, Path(folder), budget, seed
        side = method.config.image_size
        self.slices = TrainingSlices(
            slices_of(train, method.trained_on), seed, (side, side), random_flip=True, augment=budget.augment
        )
        held_out = TrainingSlices(slices_of(validation, method.trained_on), 0, (side, side))
        starts = range(0, min(VALIDATION_SLICES, held_out.num_slices), budget.batch_size)
        # the same positions, and so the same slices, noise and timesteps, at every check
        positions = [list(range(start, start + budget.batch_size)) for start in starts]
        self.validation_batches = [held_out.collate(held_out.__getitems__(batch)) for batch in positions]
        self.accelerator = Accelerator(mixed_precision=budget.mixed_precision, cpu=device == "cpu")
        self.method.to(self.accelerator.device, memory_format=torch.channels_last).train()
        self.optimizers = {name: self.accelerator.prepare(o) for name, o in method.optimizers().items()}
        self.rates = {name: [g["lr"] for g in o.param_groups] for name, o in self.optimizers.items()}
        self.ema = None
        if method.averaged:
            self.ema = EMAModel(method.parameters(), 0.9999, use_ema_warmup=True, power=0.75, foreach=True)
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.accelerator.register_for_checkpointing(method)
        self.record = TrainingRecord()
        self.metadata = {"seed": seed, "slices": self.slices.num_slices, "batch_size": budget.batch_size}
        self.metadata |= metadata or {}

    @property
    def progress(self) -> float:
        """Return the share of the budget that is used, from 0 to 1."""
        return min(1.0, max(self.record.seconds / self.budget.seconds, self.record.steps / self.budget.steps))

    def run(self) -> TrainingRecord:
        """Train to the end of the budget; the method then holds its weights for inference."""
        self._resume()
        saved, clock = self.record.seconds, time.perf_counter()
        with tqdm(total=100, desc=type(self.method).__name__, unit="%", miniters=1, leave=False) as bar:
            for batch in self._batches() if self.record.converged is None else ():
                self._step(batch)
                self.record.seconds += time.perf_counter() - clock
                bar.update(int(100 * self.progress) - bar.n)
                if self.progress >= (len(self.record.curve) + 1) / CHECKS:
                    self._check()
                    bar.set_postfix(loss=f"{self.record.curve[-1][2]:.4f}")
                if self.record.converged is not None:
                    break
                if self.record.seconds - saved > SECONDS_PER_CHECKPOINT:
                    metadata = self.metadata | {"record": asdict(self.record)}
                    save_checkpoint(self.accelerator, self.folder, self.record.steps, metadata, lambda folder: None, 1)
                    saved = self.record.seconds
                clock = time.perf_counter()
        if self.ema:
            self.ema.copy_to(self.method.parameters())
        self.method.eval()
        return self.record

    def _step(self, batch: dict[str, torch.Tensor]) -> None:
        factor = self.method.learning_rate_factor(self.progress)
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, self.rates[name], strict=True):
                group["lr"] = rate * factor
        batch = {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}
        autocast = self.accelerator.autocast if self.method.mixed_precision else nullcontext
        training_step(self.method, self.optimizers, batch, self.progress, self.accelerator.backward, autocast)
        if self.ema:
            self.ema.step(self.method.parameters())
        self.record.steps += 1
        self.record.images_seen += len(batch["images"])

    def _batches(self) -> torch.utils.data.DataLoader:
        positions = PositionBatches(self.record.steps, self.budget.steps, self.budget.batch_size, 1, 0, 1)
        return torch.utils.data.DataLoader(
            self.slices,
            batch_sampler=positions,
            collate_fn=self.slices.collate,
            num_workers=self.budget.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # by default a loader draws from the global generator, which a checkpoint has just restored
            generator=torch.Generator(),
        )

    def _check(self) -> None:
        """Add the validation loss to the curve and, at the end, record whether the training converged."""
        check_weights(list(self.method.parameters()), self.record.steps)
        with averaged_weights(self.method, self.ema) if self.ema else nullcontext():
            self.method.eval()
            losses = [
                self.method.validation_loss({k: v.to(self.accelerator.device) for k, v in batch.items()}).item()
                for batch in self.validation_batches
            ]
            self.method.train()
        self.record.curve.append([self.record.images_seen, round(self.record.seconds, 1), float(np.mean(losses))])
        if self.progress >= 1:
            self.record.converged = self.record.is_flat(self.method.comparable_from)

    def _resume(self) -> None:
        set_seed(self.seed)
        found = find_checkpoint(self.folder, "latest", self.metadata)
        if not found:
            return
        path, _ = found
        with reading(path, "checkpoint of this network"):
            self.accelerator.load_state(str(path))
        self.record = TrainingRecord(**json.loads((path / STATE_FILE).read_text())["record"])
        if self.ema:
            self.ema.to(self.accelerator.device)
