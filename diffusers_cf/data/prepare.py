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
from diffusers_cf.data.preprocessing import VERSION, WITH_SIDES, read_preprocessing
from diffusers_cf.data.scans import BratsSource, DecathlonSource, check_patient_id
from diffusers_cf.data.slices import slices_to_table, write_tables
from diffusers_cf.data.source import Source, in_brief, noting_errors
from diffusers_cf.data.splits import SPLITS, read_splits, seeded_splits
from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, make_folder, new_file, read_json, write_json
from diffusers_cf.loading import PREPROCESSING


logger = logging.getLogger(__name__)

SOURCES = {source.name: source for source in (PhantomSource, BratsSource, DecathlonSource, ArraysSource, FolderSource)}
SHARD_BYTES = 400_000_000
WORK_FOLDER = ".prepare-"  # then a digest of all options


def check(
    source: Source, *, allow_missing_classes: bool = False, num_workers: int = 0, **options
) -> tuple[list[str], list[str]]:
    """Read every patient of a source as [`prepare`] does, and write nothing; arguments as there.

    Returns:
        `tuple`: every problem as `PATIENT: problem`, and the lines of [`describe`].

    Raises:
        InputError: the source or the splits can't be used.
    """
    splits, facts = _choose(source, **options)
    ids = sorted(patient for name in SPLITS for patient in splits[name])
    read = dict(_for_each(partial(_read, source, facts, None), ids, num_workers, "Checking"))
    found = [f"{patient}: {problem}" for patient, (problems, _) in read.items() for problem in problems]
    understood = _understood(source, splits, {patient: summary for patient, (_, summary) in read.items() if summary})
    if not found and not allow_missing_classes:
        found += _missing_classes(source, understood["splits"])
    return found, describe(source, understood)


def prepare(
    source: Source, output: str | Path, *, seed: int = 0, split_file: str | Path | None = None,
    patients: int | None = None, skip_bad: bool = False, allow_missing_classes: bool = False, num_workers: int = 0,
) -> dict:  # fmt: skip
    """Write the slice data set of a source. The result does not depend on the number of workers.

    Args:
        source (`Source`): an instance of a class of `SOURCES`.
        output (`str` or `Path`): the folder to write; a finished data set made with the same options is kept.
        seed (`int`): seed of the split by patient, unless a file or the source itself gives the split.
        split_file (`str` or `Path`, *optional*): JSON file of patient ids by split (`splits.read_splits`).
        patients (`int`, *optional*): use only this many, in the order of their ids.
        skip_bad (`bool`): leave out patients with a problem, instead of failing at the end.
        allow_missing_classes (`bool`): accept splits that have no slice of one of the classes.
        num_workers (`int`): processes; 0 and 1 both mean this one.

    Returns:
        `dict`: the content of preprocessing.json.

    Raises:
        InputError: a patient is bad, a split lacks a class, or the output holds something else or a data set made with
            other options.
        BusyError: another process is writing the output.
    """
    output = Path(output)
    splits, facts = _choose(source, seed, split_file, patients)
    # Patients finished with the same options are found again under the same name.
    work = output / f"{WORK_FOLDER}{_digest(facts | {'input': str(source.path)})[:16]}"
    with alone_at(output.resolve()):
        make_folder(output)
        unfinished = list(output.glob(f"{WORK_FOLDER}*"))
        if (output / PREPROCESSING).exists():
            preprocessing = read_preprocessing(output)
            other = [name for name in facts if preprocessing.get(name) != facts[name]]
            told = "; ".join(f"{name} is {preprocessing.get(name)} there, {facts[name]} here" for name in other[:4])
            if other:
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
            preprocessing = _fill(source, output, work, splits, facts, skip_bad, allow_missing_classes, num_workers)
        for folder in {*unfinished, work}:
            shutil.rmtree(folder, ignore_errors=True)
    return preprocessing


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _choose(
    source: Source, seed: int = 0, split_file: str | Path | None = None, patients: int | None = None
) -> tuple[dict[str, list[str]], dict]:
    """Return the patients of each split, and what preprocessing.json says before any patient is read."""
    fixed, limit = source.fixed_splits(), patients
    if limit is not None and (split_file is not None or fixed is not None):
        raise InputError("the number of patients can't be limited if a file or the source gives the splits")
    patients = [check_patient_id(name) for name in source.patients()][:limit]
    source.check_labels()
    for patient, reason in source.left_out.items():
        logger.warning("left out %s: %s", patient, reason)
    if split_file is not None:
        splits = read_splits(split_file, patients, source.left_out)
    elif fixed is not None:
        splits = fixed
    else:
        chosen = set(patients)
        parts = [seeded_splits([p for p in group if p in chosen], seed) for group in source.strata().values()]
        splits = {name: sorted(patient for part in parts for patient in part[name]) for name in SPLITS}
    if not any(splits.values()):
        raise InputError(f"{split_file or source.path}: no patient in any split")
    if empty := [name for name in SPLITS if not splits[name]]:
        logger.warning("%d patients: none is left for %s", len(patients), " and ".join(empty))
    facts = {
        "version": VERSION, "source": source.name, "input": source.path.name, "modalities": list(source.modalities),
        "class_names": list(source.class_names), "size": source.size, "channels": len(source.modalities),
        "dtype": "float16", "scale": 1, "field_mm": source.field_mm, "normalize": source.normalize,
        "orientation": WITH_SIDES, "has_masks": source.has_masks,
        "seed": seed, "split_sha256": _digest(splits),
    }  # fmt: skip
    return splits, facts | source.facts()


def _fill(
    source: Source, output: Path, work: Path, splits: dict, facts: dict, skip_bad: bool, allow_missing_classes: bool,
    num_workers: int,
) -> dict:  # fmt: skip
    """Write one file per patient, then the shards, then preprocessing.json, whose content is returned."""
    patients = [patient for name in SPLITS for patient in splits[name]]
    waiting = [patient for patient in patients if not (work / f"{patient}.json").exists()]
    if len(waiting) < len(patients):
        logger.warning("%s: %d of %d patients are already done", output, len(patients) - len(waiting), len(patients))
    read = _for_each(partial(_read, source, facts, work), waiting, num_workers, "Preparing")
    bad = {patient: in_brief(problems) for patient, (problems, _) in read if problems}
    if bad and (len(bad) == len(patients) or not skip_bad):
        which = f"{len(bad)} of {len(patients)} patients can't be used: {', '.join(bad)}: " if len(bad) > 1 else ""
        raise InputError(which + next(iter(bad.values())))
    for patient, problem in bad.items():
        logger.warning("skipped %s: %s", patient, problem)
    summaries = {patient: read_json(work / f"{patient}.json") for patient in patients if patient not in bad}
    understood = _understood(source, splits, summaries)
    if not allow_missing_classes and (missing := _missing_classes(source, understood["splits"])):
        raise InputError(missing[0])
    _write_shards(work, splits, summaries, facts)
    preprocessing = facts | understood | {"skipped": sorted({*bad, *source.left_out})}
    shutil.rmtree(output / "data", ignore_errors=True)
    os.replace(work / "data", output / "data")
    write_json(preprocessing, output / PREPROCESSING)
    return preprocessing


def _understood(source: Source, splits: dict[str, list[str]], summaries: dict[str, dict]) -> dict:
    """Return the counts of each split and the range of each modality, over the patients that have a summary."""
    counts, ranges = {}, {}
    for split, patients in splits.items():
        found = [summaries[patient]["slices"] for patient in patients if patient in summaries]
        classes = {name: [slices[name] for slices in found if name in slices] for name in source.class_names}
        classes = {name: {"patients": len(slices), "slices": sum(slices)} for name, slices in classes.items()}
        slices = sum(count["slices"] for count in classes.values())
        unhealthy = slices - classes[source.class_names[0]]["slices"]
        counts[split] = {"patients": len(found), "slices": slices, "unhealthy": unhealthy, "classes": classes}
    for index, modality in enumerate(source.modalities):
        found = [summary["value_range"][index] for summary in summaries.values() if summary["value_range"]]
        if found:
            ranges[modality] = [min(low for low, _ in found), max(high for _, high in found)]
    return {"splits": counts, "value_range": ranges}


def _missing_classes(source: Source, counts: dict[str, dict]) -> list[str]:
    """Return a line for each split, except empty ones that are not for training, that lacks a class."""
    hint = "if that is meant, --allow_missing_classes"
    if source.name == "folder":
        hint += "; if each image is a patient of its own, --one_image_per_patient"
    return [
        f"{source.path}: {split} has {count['patients']} patients and no {name} slice ({hint})"
        for split, count in counts.items()
        for name, of_class in count["classes"].items()
        if (count["patients"] or split == "train") and not of_class["slices"]
    ]


def describe(source: Source, understood: dict) -> list[str]:
    """Return lines that say what was understood of a source: `splits` and `value_range` of preprocessing.json."""
    lines = [*source.summary, f"healthy class: {source.class_names[0]}"]
    for name, count in understood["splits"].items():
        line = f"{name}: {count['patients']} patients, {count['slices']} slices, {count['unhealthy']} unhealthy"
        of_class = [
            f"{n} {c['slices']} slices of {c['patients']} patients" for n, c in count.get("classes", {}).items()
        ]
        lines.append(f"{line} ({', '.join(of_class)})" if of_class else line)
    if ranges := understood.get("value_range"):
        told = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ranges.items())
        lines.append(f"value range before scaling ({source.normalize}): {told}")
    if source.unused:
        more = f" and {len(source.unused) - 5} more" if len(source.unused) > 5 else ""
        lines.append(f"not used: {', '.join(source.unused[:5])}{more}")
    return lines


def _write_shards(work: Path, splits: dict[str, list[str]], summaries: dict[str, dict], facts: dict) -> None:
    """Merge the patients' files to shards of about 400 MB, uncompressed."""
    shutil.rmtree(work / "data", ignore_errors=True)
    make_folder(work / "data")
    pixels = facts["size"] ** 2
    row_bytes = pixels * (facts["channels"] * np.dtype(facts["dtype"]).itemsize + facts["has_masks"])
    for split, patients in splits.items():
        patients = [patient for patient in patients if patient in summaries]
        ends = np.cumsum([sum(summaries[patient]["slices"].values()) for patient in patients]) * row_bytes
        _, shard_of = np.unique((ends - 1) // SHARD_BYTES, return_inverse=True)
        count = shard_of.max(initial=-1) + 1
        for number in range(count):
            own = [patient for patient, shard in zip(patients, shard_of, strict=True) if shard == number]
            tables = (pyarrow.parquet.read_table(work / f"{patient}.parquet") for patient in own)
            write_tables(work / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet", tables, facts["class_names"])


def _read(source: Source, facts: dict, work: Path | None, patient: str) -> tuple[list[str], dict | None]:
    """Return the problems of a patient and, if there is none, its summary; write both its files into `work`."""
    # One thread: workers would compete for the cores, and rounding would depend on the number of threads.
    with threadpool_limits(1):
        slices, problems = source.examine(patient)
    if not problems:
        with noting_errors(problems):
            table = slices_to_table(slices, facts["class_names"], facts["dtype"], facts["scale"])
    if problems:
        return problems, None
    counts = zip(*np.unique(slices.labels, return_counts=True), strict=True)
    of_class = {source.class_names[label]: int(count) for label, count in counts}
    summary = {"slices": of_class, "value_range": slices.value_range}
    if work is not None:
        with new_file(work / f"{patient}.parquet") as temporary:
            write_tables(temporary, [table], facts["class_names"])
        write_json(summary, work / f"{patient}.json")  # last: it says that the patient is done
    return [], summary


def _for_each(function: Callable, patients: list[str], num_workers: int, title: str) -> Iterator[tuple[str, object]]:
    """Yield (patient, function(patient)) in the order of the patients, with a progress bar."""
    bar = partial(tqdm, total=len(patients), desc=title, unit="patient")
    if num_workers <= 1:
        yield from bar((patient, function(patient)) for patient in patients)
        return
    # No fork of this process: its libraries may have started threads, and such a fork may hang.
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    context.set_forkserver_preload(["diffusers_cf.data.prepare"])  # imported once, not by every worker
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(function,)) as pool:
        yield from bar(zip(patients, pool.map(_call_in_worker, patients), strict=True))


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    # A worker would wait for work forever if its parent is killed.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _call_in_worker(patient: str) -> object:
    return _function(patient)
