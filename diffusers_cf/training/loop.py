"""The training loop that `train_counterfactual.py` and every trainable method of the benchmark share."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_cf.errors import InputError, reading
from diffusers_cf.training.batches import PositionBatches, TrainingSlices
from diffusers_cf.training.checkpoints import ADVICE, check_weights, find_checkpoint, save_checkpoint
from diffusers_cf.training.curves import LOSSES, add_to_curve


GPU_WORKERS = 4  # processes that read ahead for a GPU; on a CPU they would take the network's cores


@dataclass
class Training:
    """Train until a number of optimiser steps or seconds is reached.

        for step in training.steps():
            if step % 1000 == 0:
                training.save(save_model)

    Attributes:
        accelerator (`Accelerator`): processes, devices, precision, gradient accumulation.
        model (`torch.nn.Module`): the trained network, as `accelerator.prepare` returned it, or unwrapped.
        losses (`Callable`): `(batch, progress) -> iterator of (name of an optimiser, scalar loss)`. Each named optimiser
            steps before the next loss is computed; with gradient accumulation, a loss must have no gradients for the
            weights of another optimiser. `batch` is a `dict` from [`TrainingSlices.collate`] on the device;
            `progress` is the share of the training that is done, in [0, 1).
        optimizers (`dict[str, torch.optim.Optimizer]`): by name, prepared by the accelerator.
        slices (`TrainingSlices`): training set.
        folder (`Path`): for checkpoints.
        metadata (`dict`): JSON values in which a checkpoint must agree to be resumed.
        batch_size (`int`): images per process and accumulation step.
        max_steps (`int`): optimiser steps.
        max_seconds (`float`): of training, without the time that the caller spends between steps.
        lr_schedulers (`Sequence`): each steps once per optimiser step.
        ema (`EMAModel`, *optional*): average of the network's weights.
        max_grad_norm (`float`, *optional*): gradients are clipped to this norm; None for no clipping.
        num_workers (`int`, *optional*): processes that read data; by default 4 with a GPU, else 0.
        autocast (`bool`): whether to compute the losses under `accelerator.autocast()`.
        step (`int`): optimiser steps done.
        seconds (`float`): spent on them.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    losses: Callable
    optimizers: dict[str, torch.optim.Optimizer]
    slices: TrainingSlices
    folder: Path
    metadata: dict
    batch_size: int
    max_steps: int
    max_seconds: float = math.inf
    lr_schedulers: Sequence = ()
    ema: EMAModel | None = None
    max_grad_norm: float | None = 1.0
    num_workers: int | None = None
    autocast: bool = True
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self._loss_sum = torch.zeros((), device=self.accelerator.device)
        self._reported = 0, 0.0  # step and seconds of the last report

    @property
    def network(self) -> torch.nn.Module:
        """The network without what the accelerator wraps round it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all processes and accumulation steps."""
        return self.batch_size * self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def progress(self) -> float:
        """Share of the training that is done, from 0 to 1."""
        return min(1.0, max(self.step / self.max_steps, self.seconds / self.max_seconds))

    def steps(self) -> Iterator[int]:
        """Train, and yield the number of optimiser steps done after each of them."""
        start = time.perf_counter()
        for batch in self._batches() if self.progress < 1 else ():
            self._loss_sum += self.accumulate(batch)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            for lr_scheduler in self.lr_schedulers:
                lr_scheduler.step()
            if self.ema:
                self.ema.step(self.network.parameters())
            self.seconds += time.perf_counter() - start
            yield self.step
            if self.progress >= 1:
                return
            start = time.perf_counter()

    def accumulate(self, batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Do one accumulation step, and the optimisers' steps where the last one is due.

        Args:
            batch (`list[dict]`): images of one size each; see [`TrainingSlices.collate_parts`].

        Returns:
            `torch.Tensor`: the sum of the losses, each a mean over all images of the batch; a scalar.
        """
        count, total = sum(len(part["images"]) for part in batch), 0.0
        losses = [self.losses(part, self.progress) for part in batch]
        with self.accelerator.accumulate(self.model):
            while True:
                named = [self._next_loss(part_losses) for part_losses in losses]
                if named[0] is None:
                    return total
                parts = zip(batch, named, strict=True)
                loss = torch.stack([value * len(part["images"]) / count for part, (_, value) in parts]).sum()
                self.accelerator.backward(loss)
                optimizer = self.optimizers[named[0][0]]
                if self.accelerator.sync_gradients and self.max_grad_norm:
                    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
                    self.accelerator.clip_grad_norm_(weights, self.max_grad_norm)
                optimizer.step()
                for each in self.optimizers.values():  # a loss can have gradients for the weights of the others, too
                    each.zero_grad()
                total = total + loss.detach()

    def _next_loss(self, losses: Iterator) -> tuple[str, torch.Tensor] | None:
        # One context per part: weights cast for two parts would add up their gradients in the lower precision.
        with self.accelerator.autocast() if self.autocast else nullcontext():
            return next(losses, None)

    def _batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Yield this process's batches on its device, from the current step to the last one."""
        accelerator, device = self.accelerator, self.accelerator.device
        positions = PositionBatches(
            self.step, self.max_steps, self.batch_size, accelerator.gradient_accumulation_steps,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        on_gpu = device.type == "cuda"
        workers = GPU_WORKERS * on_gpu if self.num_workers is None else self.num_workers
        for batch in self.slices.batches(positions, workers, on_gpu):
            yield [{key: value.to(device, non_blocking=True) for key, value in part.items()} for part in batch]

    def report(self) -> dict[str, float]:
        """Return the mean loss, the learning rate and the speed since the last report, and add them to losses.json.

        Raises:
            InputError: the loss is NaN or infinite.
        """
        since, before = self._reported
        parts = self.accelerator.gradient_accumulation_steps
        loss = self.accelerator.reduce(self._loss_sum, "mean").item() / (self.step - since) / parts
        if not math.isfinite(loss):
            raise InputError(f"the loss became {loss} between steps {since} and {self.step}: {ADVICE}")
        speed = (self.step - since) * self.global_batch / (self.seconds - before)
        self._loss_sum.zero_()
        self._reported = self.step, self.seconds
        (rate, *_) = (group["lr"] for optimizer in self.optimizers.values() for group in optimizer.param_groups)
        logs = {"loss": loss, "lr": rate, "images_per_second": speed}
        if self.accelerator.is_main_process:
            add_to_curve(self.folder / LOSSES, {"step": self.step, "images": self.step * self.global_batch, **logs})
        return logs

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """Keep the network in evaluation mode, with its averaged weights if there are any, within this context."""
        network = self.network.eval()
        if self.ema:
            self.ema.store(network.parameters())
            self.ema.copy_to(network.parameters())
        try:
            yield network
        finally:
            if self.ema:
                self.ema.restore(network.parameters())
            network.train()

    def save(self, save_model: Callable[[Path], None] | None = None, limit: int | None = None, **state) -> None:
        """Save a checkpoint that `resume` finds.

        Args:
            save_model (`Callable`, *optional*): `(folder) -> None`, saves a pipeline into the checkpoint.
            limit (`int`, *optional*): how many checkpoints to keep.
            **state: more JSON values to find again in what `resume` returns.

        Raises:
            InputError: the weights are NaN or infinite.
            OSError: the checkpoint can't be written; nothing of it is left.
        """
        check_weights(self.ema.shadow_params if self.ema else list(self.network.parameters()), self.step)
        state |= self.metadata | {"step": self.step, "seconds": self.seconds}
        save_checkpoint(self.accelerator, self.folder, state, save_model, limit)

    def resume(self, name: str | None) -> dict:
        """Restore a checkpoint and return its state; {} without one.

        Args:
            name (`str`, *optional*): a path, a name in the folder, or `latest`.

        Raises:
            InputError: the checkpoint is missing, damaged or of another training.
        """
        found = find_checkpoint(self.folder, name, self.metadata)
        if found is None:
            return {}
        path, state = found
        with reading(path, "checkpoint of this network"):
            self.accelerator.load_state(str(path))
        if self.ema:
            self.ema.to(self.accelerator.device)  # accelerate loads it to the CPU
        self.step, self.seconds = state["step"], state.get("seconds", 0.0)  # older checkpoints have no seconds
        self._reported = self.step, self.seconds
        return state
