"""Run a function on the slices of many volumes in full batches, as large as fit into memory."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from diffusers_cf.errors import InputError


# A CPU gains little from larger batches. On an accelerator the search for the largest batch starts at LARGEST_BATCH.
CPU_BATCH, LARGEST_BATCH = 64, 1024


def map_in_batches(
    function: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]],
    volumes: Iterable[tuple[Hashable, np.ndarray]], batch_size: int | None, device: str | torch.device = "cpu",
    progress=None,
) -> Iterator[tuple[Hashable, tuple[np.ndarray, ...], float]]:  # fmt: skip
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
    started = deque()  # key and number of slices of each volume that has been read, but not yielded

    def read_slices() -> Iterator[torch.Tensor]:
        for key, slices in volumes:
            started.append((key, len(slices)))
            yield from torch.from_numpy(slices)

    rows = _map_slices(function, read_slices(), batch_size, device, progress)
    for first in rows:
        key, count = started.popleft()
        seconds, *columns = zip(first, *itertools.islice(rows, count - 1), strict=True)
        yield key, tuple(map(np.stack, columns)), sum(seconds)


def _map_slices(function: Callable, slices: Iterator, batch_size: int | None, device, progress) -> Iterator[tuple]:
    """Yield `(seconds, result, ..)` of each slice; halve a batch that does not fit into memory."""
    size = batch_size or (CPU_BATCH if torch.device(device).type == "cpu" else LARGEST_BATCH)
    previous = ()
    while batch := list(itertools.islice(slices, size)):
        try:
            current = _start(function, batch, progress)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size or len(batch) == 1:
                hint = ": try a smaller --batch_size" if len(batch) > 1 else ""
                raise InputError(f"out of memory with a batch of {len(batch)}{hint}") from None
            clear_device_cache(garbage_collection=True)
            size, slices = -(-len(batch) // 2), itertools.chain(batch, slices)
            continue
        yield from previous
        previous = current
    yield from previous


def _start(function: Callable, batch: list[torch.Tensor], progress) -> Iterator[tuple]:
    """Start a batch; return an iterator that waits for it and yields `(seconds, result, ..)` of each slice."""
    start = time.perf_counter()
    results = function(torch.stack(batch))
    results = results if isinstance(results, tuple) else (results,)
    if any(len(result) != len(batch) for result in results):
        raise ValueError(f"the function returned {[len(result) for result in results]} rows for {len(batch)} slices")
    copies = [result.detach().float().to("cpu", non_blocking=result.is_cuda) for result in results]
    arrival = torch.cuda.Event() if results[0].is_cuda else None
    if arrival:
        arrival.record()
    spent = time.perf_counter() - start

    def receive() -> Iterator[tuple]:
        start = time.perf_counter()
        if arrival:
            arrival.synchronize()
        seconds = (spent + time.perf_counter() - start) / len(batch)
        if progress is not None:
            progress.update(len(batch))
        yield from zip([seconds] * len(batch), *(copy.numpy() for copy in copies), strict=True)

    return receive()
