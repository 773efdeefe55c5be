"""Run a function on the slices of many volumes in full batches, as large as fit into memory."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from diffusers_cf.errors import InputError


# A CPU gains little from larger batches. On an accelerator the search for the largest batch starts at LARGEST_BATCH.
CPU_BATCH, LARGEST_BATCH = 64, 1024


@dataclass
class _Volume:
    """The results of one volume so far: `rows` holds one tuple per slice."""

    key: Hashable
    count: int
    rows: list = field(default_factory=list)
    seconds: float = 0.0

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
    unfinished, receive = deque(), None

    def read_slices() -> Iterator[tuple[_Volume, torch.Tensor]]:
        for key, slices in volumes:
            unfinished.append(_Volume(key, len(slices)))
            yield from ((unfinished[-1], one) for one in torch.from_numpy(slices))

    waiting = read_slices()
    while batch := list(itertools.islice(waiting, size)):
        try:
            receive_next = _start(function, batch, progress)
        except RuntimeError as error:
            size = _smaller_batch(error, len(batch), fixed=batch_size is not None)
            waiting = itertools.chain(batch, waiting)
            continue
        if receive:
            receive()
        receive = receive_next
        while len(unfinished[0].rows) == unfinished[0].count:
            yield unfinished.popleft().result()
    if receive:
        receive()
    yield from (volume.result() for volume in unfinished)


def _start(function: Callable, batch: list[tuple[_Volume, torch.Tensor]], progress) -> Callable[[], None]:
    """Start a batch; return a function that waits for it and gives each volume its rows and its share of the time."""
    start = time.perf_counter()
    volumes, slices = zip(*batch, strict=True)
    results = function(torch.stack(slices))
    results = results if isinstance(results, tuple) else (results,)
    if any(len(result) != len(batch) for result in results):
        shapes = ", ".join(str(tuple(result.shape)) for result in results)
        raise ValueError(f"the function returned {shapes} for {len(batch)} slices")
    copies = [result.detach().float().to("cpu", non_blocking=result.is_cuda) for result in results]
    arrival = torch.cuda.Event() if results[0].is_cuda else None
    if arrival:
        arrival.record()
    started = time.perf_counter() - start

    def receive() -> None:
        start = time.perf_counter()
        if arrival:
            arrival.synchronize()
        seconds = (started + time.perf_counter() - start) / len(batch)
        for volume, *rows in zip(volumes, *(copy.numpy() for copy in copies), strict=True):
            volume.rows.append(rows)
            volume.seconds += seconds
        if progress is not None:
            progress.update(len(batch))

    return receive


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
