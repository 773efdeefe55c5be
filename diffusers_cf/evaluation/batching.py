"""Run a function on the slices of many patients in full batches, as large as fit into memory."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator

import numpy as np
import torch

from diffusers_cf.errors import InputError


# A CPU gains little from larger batches. On an accelerator the search for the largest batch starts at LARGEST_BATCH.
CPU_BATCH, LARGEST_BATCH = 64, 1024


class _Volume:
    """The results of one volume, collected slice by slice."""

    def __init__(self, key: Hashable, count: int):
        self.key, self.count, self.rows, self.seconds = key, count, [], 0.0

    def result(self) -> tuple[Hashable, tuple[np.ndarray, ...], float]:
        return self.key, tuple(np.stack(column) for column in zip(*self.rows, strict=True)), self.seconds


def map_in_batches(
    function: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]],
    volumes: Iterable[tuple[Hashable, np.ndarray]],
    batch_size: int | None,
    device: str | torch.device = "cpu",
    progress=None,
) -> Iterator[tuple[Hashable, tuple[np.ndarray, ...], float]]:
    """Yield `(key, results, seconds)` of each volume in order, as soon as its last slice is computed.

    A batch may hold slices of several volumes. It is started before the results of the previous batch are read, so an
    accelerator never waits for the caller.

    Args:
        function (`Callable`): slices float32 `(N, C, H, W)` -> one tensor or a tuple of tensors, one row per slice.
        volumes (`Iterable`): `(key, slices)` with slices `(S, C, H, W)`, S at least 1; read only when needed.
        batch_size (`int`, *optional*): slices per call. None means 64 on a CPU; on an accelerator 1024, halved
            whenever memory runs out.
        device (`str` or `torch.device`): where the function computes.
        progress (`tqdm`, *optional*): a progress bar that counts slices.

    Raises:
        InputError: out of memory with `batch_size` slices, or with a single one.
        ValueError: the function returned a wrong number of rows.
    """
    size = batch_size or (CPU_BATCH if torch.device(device).type == "cpu" else LARGEST_BATCH)
    begun, sent = deque(), None

    def read_slices() -> Iterator[tuple[_Volume, torch.Tensor]]:
        for key, slices in volumes:
            begun.append(_Volume(key, len(slices)))
            yield from ((begun[-1], one) for one in torch.from_numpy(slices))

    waiting = read_slices()
    while batch := list(itertools.islice(waiting, size)):
        try:
            following = _Sent(function, batch)
        except RuntimeError as error:
            size = _smaller_batch(error, len(batch), fixed=batch_size is not None)
            waiting = itertools.chain(batch, waiting)
            continue
        if sent:
            sent.receive(progress)
        sent = following
        while len(begun[0].rows) == begun[0].count:
            yield begun.popleft().result()
    if sent:
        sent.receive(progress)
    yield from (volume.result() for volume in begun)


class _Sent:
    """A batch whose results are being computed and copied to the CPU."""

    def __init__(self, function: Callable, batch: list[tuple[_Volume, torch.Tensor]]):
        start = time.perf_counter()
        self.volumes, slices = zip(*batch, strict=True)
        results = function(torch.stack(slices))
        results = results if isinstance(results, tuple) else (results,)
        if any(len(result) != len(batch) for result in results):
            shapes = ", ".join(str(tuple(result.shape)) for result in results)
            raise ValueError(f"the function returned {shapes} for {len(batch)} slices")
        self.results = [result.detach().float().to("cpu", non_blocking=result.is_cuda) for result in results]
        self.arrival = torch.cuda.Event() if results[0].is_cuda else None
        if self.arrival:
            self.arrival.record()
        self.seconds = time.perf_counter() - start

    def receive(self, progress) -> None:
        """Wait for the results and give each volume its rows and its share of the time."""
        start = time.perf_counter()
        if self.arrival:
            self.arrival.synchronize()
        seconds = (self.seconds + time.perf_counter() - start) / len(self.volumes)
        for volume, *rows in zip(self.volumes, *(result.numpy() for result in self.results), strict=True):
            volume.rows.append(rows)
            volume.seconds += seconds
        if progress is not None:
            progress.update(len(self.volumes))


def _smaller_batch(error: RuntimeError, count: int, fixed: bool) -> int:
    """Return the next batch size to try after an error with `count` slices; raise if the error is final."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    if not should_reduce_batch_size(error):
        raise error
    if count == 1:
        raise InputError("out of memory with a single slice at a time") from None
    if fixed:
        raise InputError(f"out of memory with --batch_size {count}: try {count // 2}, or auto") from None
    clear_device_cache(garbage_collection=True)
    return -(-count // 2)
