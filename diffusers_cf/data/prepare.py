"""From a source of images to the slice data set.

Every finished patient is kept as one file in a work folder inside the output, so that a killed run continues where it
stopped. The shards and then preprocessing.json are written last: a folder without preprocessing.json is unfinished.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from diffusers_cf.data.arrays import ArraysSource
from diffusers_cf.data.folder import FolderSource
from diffusers_cf.data.phantom import PhantomSource
from diffusers_cf.data.preprocessing import PREPROCESSING_FILE, VERSION, read_preprocessing
from diffusers_cf.data.scans import BratsSource, DecathlonSource, check_patient_id
from diffusers_cf.data.slices import ORIENTATION, slices_to_table, write_tables
from diffusers_cf.data.source import Source
from diffusers_cf.data.splits import SPLITS, read_splits, seeded_splits
from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, make_folder, new_file, write_json


logger = logging.getLogger(__name__)

SOURCES = {source.name: source for source in (PhantomSource, BratsSource, DecathlonSource, ArraysSource, FolderSource)}
SHARD_BYTES = 400_000_000
WORK_FOLDER = ".prepare-"  # then a digest of all options


def find_problems(source: Source, *, patients: int | None = None, num_workers: int = 0) -> list[str]:
    """Return every problem of every patient of a source as `PATIENT: problem`; empty if there is none.

    Args:
        source (`Source`): an instance of a class of `SOURCES`.
        patients (`int`, *optional*): check only this many, in the order of their ids.
        num_workers (`int`): processes; 0 and 1 both mean this one.
    """
    ids = [check_patient_id(name) for name in source.patients()][:patients]
    checked = _for_each(source.problems, ids, num_workers, "Checking")
    return [f"{patient}: {problem}" for patient, problems in checked for problem in problems]


def prepare(
    source: Source, output: str | Path, *, seed: int = 0, split_file: str | Path | None = None,
    patients: int | None = None, skip_bad: bool = False, num_workers: int = 0,
) -> dict:  # fmt: skip
    """Write the slice data set of a source. The result does not depend on the number of workers.

    Args:
        source (`Source`): an instance of a class of `SOURCES`.
        output (`str` or `Path`): the folder to write; a finished data set made with the same options is kept.
        seed (`int`): seed of the split by patient, unless a file or the source itself gives the split.
        split_file (`str` or `Path`, *optional*): JSON file of patient ids by split (`splits.read_splits`).
        patients (`int`, *optional*): use only this many, in the order of their ids.
        skip_bad (`bool`): leave out patients with a problem, instead of failing at the end.
        num_workers (`int`): processes; 0 and 1 both mean this one.

    Returns:
        `dict`: the content of preprocessing.json.

    Raises:
        InputError: a patient is bad, or the output holds something else or a data set made with other options.
        BusyError: another process is writing the output.
    """
    output = Path(output)
    splits = _choose_splits(source, seed, split_file, patients)
    facts = {
        "version": VERSION, "source": source.name, "input": source.path.name, "modalities": list(source.modalities),
        "class_names": list(source.class_names), "size": source.size, "channels": len(source.modalities),
        "dtype": "float16", "scale": 1, "field_mm": source.field_mm, "normalize": source.normalize,
        "orientation": ORIENTATION, "has_masks": source.has_masks, "seed": seed,
        "split_sha256": _digest(splits),
    } | source.facts()  # fmt: skip
    # Patients finished with the same options are found again under the same name.
    work = output / f"{WORK_FOLDER}{_digest(facts | {'input': str(source.path)})[:16]}"
    with alone_at(output.resolve()):
        make_folder(output)
        unfinished = list(output.glob(f"{WORK_FOLDER}*"))
        if (output / PREPROCESSING_FILE).exists():
            preprocessing = read_preprocessing(output)
            if other := [name for name in facts if preprocessing.get(name) != facts[name]]:
                told = "; ".join(
                    f"{name} is {preprocessing.get(name)} there, {facts[name]} here" for name in other[:4]
                )
                raise InputError(f"{output}: holds a data set made with other options ({told}); choose another folder")
            logger.warning("%s: already prepared with the same options", output)
        else:
            if not unfinished and (strangers := [file.name for file in output.iterdir()]):
                raise InputError(
                    f"{output}: is not empty and no slice data set ({strangers[0]}); choose another folder"
                )
            for folder in set(unfinished) - {work}:
                shutil.rmtree(folder)
            make_folder(work)
            preprocessing = _fill(source, output, work, splits, facts, skip_bad, num_workers)
        for folder in {*unfinished, work}:
            shutil.rmtree(folder, ignore_errors=True)
    return preprocessing


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _choose_splits(source: Source, seed: int, split_file, limit: int | None) -> dict[str, list[str]]:
    fixed = source.fixed_splits()
    if limit is not None and (split_file is not None or fixed is not None):
        raise InputError("the number of patients can't be limited if a file or the source gives the splits")
    patients = [check_patient_id(name) for name in source.patients()][:limit]
    for patient, reason in source.left_out.items():
        logger.warning("left out %s: %s", patient, reason)
    if split_file is not None:
        splits = read_splits(split_file, patients, source.left_out)
    else:
        splits = fixed or seeded_splits(patients, seed)
    if not any(splits.values()):
        raise InputError(f"{split_file or source.path}: no patient in any split")
    if empty := [name for name in SPLITS if not splits[name]]:
        logger.warning("%d patients: none is left for %s", len(patients), " and ".join(empty))
    return splits


def _fill(
    source: Source, output: Path, work: Path, splits: dict, facts: dict, skip_bad: bool, num_workers: int
) -> dict:
    """Write one file per patient, then the shards, then preprocessing.json, whose content is returned."""
    patients = [patient for name in SPLITS for patient in splits[name]]
    waiting = [patient for patient in patients if not (work / f"{patient}.parquet").exists()]
    if len(waiting) < len(patients):
        logger.warning("%s: %d of %d patients are already done", output, len(patients) - len(waiting), len(patients))
    written = _for_each(partial(_write_patient, source, work, facts), waiting, num_workers, "Preparing")
    bad = {patient: problem for patient, problem in written if problem}
    if bad and (len(bad) == len(patients) or not skip_bad):
        which = f"{len(bad)} of {len(patients)} patients can't be used: {', '.join(bad)}: " if len(bad) > 1 else ""
        raise InputError(which + next(iter(bad.values())))
    for patient, problem in bad.items():
        logger.warning("skipped %s: %s", patient, problem)
    kept = {name: [patient for patient in ids if patient not in bad] for name, ids in splits.items()}
    preprocessing = facts | {
        "splits": _write_shards(work, kept, facts), "skipped": sorted({*bad, *source.left_out})
    }  # fmt: skip
    shutil.rmtree(output / "data", ignore_errors=True)
    os.replace(work / "data", output / "data")
    write_json(preprocessing, output / PREPROCESSING_FILE)
    return preprocessing


def _write_shards(work: Path, splits: dict[str, list[str]], facts: dict) -> dict[str, dict[str, int]]:
    """Merge the patients' files to shards of about 400 MB, uncompressed; return the counts of each split."""
    shutil.rmtree(work / "data", ignore_errors=True)
    make_folder(work / "data")
    pixels = facts["size"] ** 2
    row_bytes = pixels * (facts["channels"] * np.dtype(facts["dtype"]).itemsize + facts["has_masks"])
    counts = {}
    for split, patients in splits.items():
        shards, labels, filled = [], [], 0
        for patient in patients:
            path = work / f"{patient}.parquet"
            own = pyarrow.parquet.read_table(path, columns=["label"])["label"].to_pylist()
            labels += own
            if not shards or filled + len(own) * row_bytes > SHARD_BYTES:
                shards, filled = [*shards, []], 0
            shards[-1].append(path)
            filled += len(own) * row_bytes
        for number, shard in enumerate(shards):
            tables = (pyarrow.parquet.read_table(path) for path in shard)
            name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            write_tables(work / "data" / name, tables, facts["class_names"])
        unhealthy = sum(label > 0 for label in labels)
        counts[split] = {"patients": len(patients), "slices": len(labels), "unhealthy": unhealthy}
    return counts


def _write_patient(source: Source, work: Path, facts: dict, patient: str) -> str | None:
    """Write one patient's file; return the problem if there is one."""
    try:
        slices = source.read(patient)
    except InputError as error:
        return str(error)
    table = slices_to_table(slices, facts["class_names"], facts["dtype"], facts["scale"])
    with new_file(work / f"{patient}.parquet") as temporary:
        write_tables(temporary, [table], facts["class_names"])
    return None


def _for_each(function: Callable, patients: list[str], num_workers: int, title: str) -> Iterator[tuple[str, object]]:
    """Yield (patient, function(patient)) in the order of the patients, with a progress bar."""
    bar = partial(tqdm, total=len(patients), desc=title, unit="patient")
    if num_workers <= 1:
        yield from bar((patient, _call(function, patient)) for patient in patients)
        return
    # No fork of this process: its libraries may have started threads, and such a fork may hang.
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    context.set_forkserver_preload(["diffusers_cf.data.prepare"])  # imported once, not by every worker
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(function,)) as pool:
        yield from bar(zip(patients, pool.map(_call_in_worker, patients), strict=True))


def _call(function: Callable, patient: str) -> object:
    # One thread: workers would compete for the cores, and rounding would depend on the number of threads.
    with threadpool_limits(1):
        return function(patient)


def _start_worker(function: Callable) -> None:
    global _function
    _function = function

    def exit_with_parent() -> None:  # a worker would wait for work forever if its parent is killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _call_in_worker(patient: str) -> object:
    return _call(_function, patient)
