"""Slices through a network in full batches, of several patients together, as many at a time as fit into memory."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from diffusers_cf.errors import InputError


# A CPU gains little from more; the largest batch of an accelerator is looked for from here downwards.
CPU_BATCH, LARGEST_BATCH = 64, 1024


class _Volume:
    """The slices of one key while they come back: how many are missing, and what is there."""

    def __init__(self, key: Hashable, count: int):
        self.key, self.missing, self.parts, self.seconds = key, count, [], 0.0

    def result(self) -> tuple[Hashable, tuple[np.ndarray, ...], float]:
        return self.key, tuple(np.concatenate(arrays) for arrays in zip(*self.parts, strict=True)), self.seconds


class _Batch(NamedTuple):
    """Slices (n, C, H, W), and the volume of each."""

    slices: torch.Tensor
    volumes: list[_Volume]


def map_in_batches(
    function: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]],
    volumes: Iterable[tuple[Hashable, np.ndarray]],
    batch_size: int | None,
    device: str | torch.device = "cpu",
    progress=None,
) -> Iterator[tuple[Hashable, tuple[np.ndarray, ...], float]]:
    """Yields `(key, results, seconds)` of each volume, in their order, once its last slice has come back.

    A batch is filled with slices of several volumes. Its results are read when the next one is on its way, so that an
    accelerator waits for nothing.

    Args:
        function: slices float32 (N, C, H, W) -> one tensor or several, with a row for each slice.
        volumes: `(key, slices (S, C, H, W))`, S at least 1; read one by one when they are needed.
        batch_size: slices a call. None = 64 on a CPU, on an accelerator the largest that fits: from 1024 on, halved
            where memory doesn't suffice.
        device: where the function computes.
        progress: a bar of slices.

    Raises:
        InputError: memory doesn't suffice for `batch_size` slices, or for one.
        ValueError: the function returns another number of rows than it was given.
    """
    caller, waiting, sent = _Caller(function, batch_size, device), deque(), None
    for batch in _full_batches(volumes, caller, waiting):
        for following in caller.send(batch):
            _receive(sent, progress)
            sent = following
        while not waiting[0].missing:
            yield waiting.popleft().result()
    _receive(sent, progress)
    yield from (volume.result() for volume in waiting)


def _full_batches(volumes: Iterable, caller: "_Caller", begun: deque) -> Iterator[_Batch]:
    """Yields as many slices as the caller takes at a time, the last ones as they are; notes each volume in `begun`."""
    parts, owners = [], []
    for key, slices in volumes:
        volume, rest = _Volume(key, len(slices)), torch.from_numpy(slices)
        begun.append(volume)
        while len(rest):
            free = caller.batch_size - len(owners)
            parts.append(rest[:free])
            owners += [volume] * len(parts[-1])
            rest = rest[free:]
            if len(owners) == caller.batch_size:
                yield _Batch(torch.cat(parts), owners)
                parts, owners = [], []
    if owners:
        yield _Batch(torch.cat(parts), owners)


class _Sent:
    """A batch whose results are on their way to the CPU."""

    def __init__(self, volumes: list[_Volume], results: tuple[torch.Tensor, ...], start: float):
        self.volumes = volumes
        self.results = [result.detach().float().to("cpu", non_blocking=result.is_cuda) for result in results]
        self.arrival = torch.cuda.Event() if results[0].is_cuda else None
        if self.arrival:
            self.arrival.record()
        self.seconds = time.perf_counter() - start

    def wait(self) -> None:
        start = time.perf_counter()
        if self.arrival:
            self.arrival.synchronize()
        self.seconds += time.perf_counter() - start


def _receive(sent: _Sent | None, progress) -> None:
    """Hands the results of a batch to its volumes, and each its share of the time."""
    if sent is None:
        return
    sent.wait()
    begin = 0
    for volume, rows in itertools.groupby(sent.volumes):
        end = begin + len(list(rows))
        volume.parts.append([result[begin:end].numpy() for result in sent.results])
        volume.seconds += sent.seconds * (end - begin) / len(sent.volumes)
        volume.missing -= end - begin
        begin = end
    if progress is not None:
        progress.update(begin)


class _Caller:
    """Calls the function with at most `batch_size` slices, fewer from the first time on that they don't fit."""

    def __init__(self, function: Callable, batch_size: int | None, device: str | torch.device):
        self.function, self.is_fixed = function, batch_size is not None
        self.batch_size = batch_size or (CPU_BATCH if torch.device(device).type == "cpu" else LARGEST_BATCH)

    def send(self, batch: _Batch) -> Iterator[_Sent]:
        """Yields the batch with its results, in several parts where it doesn't fit."""
        slices, volumes = batch
        while volumes:
            part = _Batch(slices[: self.batch_size], volumes[: self.batch_size])
            try:
                sent = self._call(part)
            except RuntimeError as error:
                self._reduce(error, len(part.slices))
                continue
            yield sent
            slices, volumes = slices[len(part.slices) :], volumes[len(part.volumes) :]

    def _call(self, batch: _Batch) -> _Sent:
        start, results = time.perf_counter(), self.function(batch.slices)
        results = results if isinstance(results, tuple) else (results,)
        if any(len(result) != len(batch.slices) for result in results):
            shapes = ", ".join(str(tuple(result.shape)) for result in results)
            raise ValueError(f"{len(batch.slices)} slices became {shapes}")
        return _Sent(batch.volumes, results, start)

    def _reduce(self, error: RuntimeError, count: int) -> None:
        """Halves the batch size; raises the error where it isn't for want of memory."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        if not should_reduce_batch_size(error):
            raise error
        if count == 1:
            raise InputError("out of memory with a single slice at a time") from None
        if self.is_fixed:
            raise InputError(f"out of memory with --batch_size {count}: try {count // 2}, or auto") from None
        clear_device_cache(garbage_collection=True)
        self.batch_size = -(-count // 2)
