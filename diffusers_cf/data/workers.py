"""Runs one function over all patients of a source, in this process or in several."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tqdm.auto import tqdm


def for_each(source, function: Callable, patients: list[str], num_workers: int, title: str) -> Iterator[tuple]:
    """Yields (patient, function(source, patient)) in the order of the patients, with a progress bar.

    Args:
        source: One of `diffusers_cf.data.SOURCES`, constructed; every worker gets a copy.
        function: A function of a module, or a partial of one: it travels to the workers by name.
        patients: Ids.
        num_workers: Processes; 0 and 1 both mean this one.
        title: What the progress bar says.
    """
    bar = partial(tqdm, total=len(patients), desc=title, unit="patient")
    if num_workers <= 1 or len(patients) < 2:
        for patient in bar(patients):
            yield patient, _call(source, function, patient)
        return
    context = _context()
    workers = min(num_workers, len(patients))
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(source, function)) as pool:
        yield from bar(zip(patients, pool.map(_call_in_worker, patients), strict=True))


def _context():
    """A server that has imported everything once and forks workers, where there is one; else fresh processes.

    Never a fork of this process: its libraries may have started threads, and a fork of those may hang.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers_cf.data"])
    return context


def _call(source, function: Callable, patient: str):
    from threadpoolctl import threadpool_limits

    # One thread each: several workers would fight for the cores, and rounding would depend on how many there are.
    with threadpool_limits(1):
        return function(source, patient)


def _start(source, function: Callable) -> None:
    global _job
    _job = source, function
    # A worker would outlive a killed parent, waiting for work.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _call_in_worker(patient: str):
    return _call(*_job, patient)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
