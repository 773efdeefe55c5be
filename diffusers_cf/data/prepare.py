"""`diffusers-cf prepare`: from a source of images to the slice data set.

Every finished patient is kept as one file in a work folder inside the output, so that a killed run goes on where it
stopped; the shards and, last of all, preprocessing.json appear only when everything is there. A folder without
preprocessing.json is unfinished.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
from filelock import FileLock, Timeout

from diffusers_cf.data import SOURCES
from diffusers_cf.data.preprocessing import PREPROCESSING_FILE, SPLITS, VERSION, read_preprocessing
from diffusers_cf.data.slices import ORIENTATION, write_patient, write_tables
from diffusers_cf.data.splits import read_splits, seeded_splits
from diffusers_cf.data.workers import for_each
from diffusers_cf.errors import InputError
from diffusers_cf.files import new_file, write_json


logger = logging.getLogger(__name__)

SHARD_BYTES = 400_000_000
WORK_FOLDER = ".prepare"
LOCK_FILE = ".prepare.lock"
# Which options a source takes. --seed and --patients mean the split elsewhere, but what is made in the phantom.
SOURCE_OPTIONS = {
    "phantom": ("seed", "patients", "size", "field_mm", "normalize"),
    "brats": ("size", "field_mm", "normalize", "modalities", "labels", "lenient"),
    "decathlon": ("size", "field_mm", "normalize", "modalities", "labels", "lenient"),
    "arrays": ("size", "field_mm", "normalize", "modalities", "labels"),
    "folder": ("size", "field_mm", "normalize", "modalities", "labels", "class_names"),
}


def find_problems(source, *, patients: int | None = None, num_workers: int = 0) -> list[str]:
    """Lists every problem of every patient of a source, `PATIENT: problem`; empty if all is well. Writes nothing."""
    found = []
    for patient, problems in for_each(source, _problems, source.patients()[:patients], num_workers, "Checking"):
        found += [f"{patient}: {problem}" for problem in problems]
    return found


def prepare(
    source,
    output: str | Path,
    *,
    seed: int = 0,
    split_file: str | Path | None = None,
    patients: int | None = None,
    skip_bad: bool = False,
    num_workers: int = 0,
) -> dict:
    """Writes the slice data set of a source. The result does not depend on the number of workers.

    Args:
        source: One of `diffusers_cf.data.SOURCES`, constructed.
        output: The folder to write; a finished data set made with the same options is left as it is.
        seed: Of the split by patient, unless a file or the source itself says who goes where.
        split_file: JSON file of patient ids by split (`diffusers_cf.data.splits.read_splits`).
        patients: Use only so many, the first by id.
        skip_bad: Leave out patients with a problem, instead of failing once all are seen.
        num_workers: Processes; 0 and 1 both mean this one.

    Returns:
        The content of preprocessing.json.

    Raises:
        InputError: A patient is bad, the output belongs to something else or to other options, or can't be written.
    """
    output = Path(output)
    splits = _choose_splits(source, seed, split_file, patients)
    facts = _facts(source, seed, splits)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / LOCK_FILE, timeout=0):
            try:
                return _prepare(source, output, splits, facts, skip_bad, num_workers)
            finally:
                _tidy(output)
    except Timeout:
        raise InputError(f"{output}: another process is preparing this folder") from None
    except OSError as error:
        raise InputError(f"{output}: can't be written ({error.strerror or error})") from None


def _prepare(source, output: Path, splits: dict, facts: dict, skip_bad: bool, num_workers: int) -> dict:
    if (output / PREPROCESSING_FILE).exists():
        _check_agrees(output, facts)
        shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
        return read_preprocessing(output)
    work = _open_work(output, facts | {"input": str(getattr(source, "path", ""))})
    patients = [patient for name in SPLITS for patient in splits[name]]
    waiting = [patient for patient in patients if not (work / f"{patient}.parquet").exists()]
    if len(waiting) < len(patients):
        logger.warning("%s: going on, %d of %d patients are done", output, len(patients) - len(waiting), len(patients))
    written = for_each(source, partial(_write_one, work, facts), waiting, num_workers, "Preparing")
    bad = {patient: problem for patient, problem in written if problem}
    if bad and (len(bad) == len(patients) or not skip_bad):
        first = next(iter(bad.values()))
        raise InputError(
            f"{len(bad)} of {len(patients)} patients can't be used: {', '.join(bad)}: {first}"
            if len(bad) > 1
            else first
        )
    for patient, problem in bad.items():
        logger.warning("skipped %s: %s", patient, problem)
    kept = {name: [patient for patient in ids if patient not in bad] for name, ids in splits.items()}
    counts = _write_shards(work, kept, facts)
    preprocessing = facts | {"splits": counts, "skipped": sorted({*bad, *getattr(source, "left_out", ())})}
    _finish(output, work, preprocessing)
    return preprocessing


def _tidy(output: Path) -> None:
    """Leaves nothing behind that is of no use to a later run: only finished patients are."""
    work = output / WORK_FOLDER
    if work.exists() and not any(work.glob("*.parquet")):
        shutil.rmtree(work)
    (output / LOCK_FILE).unlink(missing_ok=True)
    if not any(output.iterdir()):
        output.rmdir()


def _choose_splits(source, seed: int, split_file, limit: int | None) -> dict[str, list[str]]:
    patients = source.patients()
    if limit is not None and (split_file is not None or source.fixed_splits() is not None):
        raise InputError("patients can't be limited where a file or the source says which are in each split")
    patients = patients[:limit]
    left_out = getattr(source, "left_out", {})
    for patient, reason in left_out.items():
        logger.warning("left out %s: %s", patient, reason)
    splits = read_splits(split_file, patients, left_out) if split_file is not None else source.fixed_splits()
    splits = seeded_splits(patients, seed) if splits is None else splits
    if not any(splits.values()):
        raise InputError(f"{split_file}: no patient in any split")
    empty = [name for name in SPLITS if not splits[name]]
    if empty:
        logger.warning("%d patients: none is left for %s", len(patients), " and ".join(empty))
    return splits


def _facts(source, seed: int, splits: dict) -> dict:
    """What preprocessing.json says beyond counts; two runs with equal facts are interchangeable."""
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    facts = {
        "version": VERSION,
        "source": source.name,
        "input": Path(getattr(source, "path", "")).name,
        "modalities": list(source.modalities),
        "class_names": list(source.class_names),
        "size": source.size,
        "channels": len(source.modalities),
        "dtype": "float16",
        "scale": 1,
        "field_mm": source.field_mm,
        "normalize": source.normalize,
        "orientation": ORIENTATION,
        "has_masks": source.has_masks,
        "seed": seed,
        "split_sha256": digest,
    }
    # The phantom has no more to tell than its seed.
    return facts | getattr(source, "facts", dict)()


def _check_agrees(output: Path, facts: dict) -> None:
    there = read_preprocessing(output)
    other = [name for name in facts if there.get(name) != facts[name]]
    if other:
        told = "; ".join(f"{name} is {there.get(name)} there, {facts[name]} here" for name in other[:4])
        raise InputError(f"{output}: holds a data set made with other options ({told}); choose another folder")
    logger.warning("%s: already prepared with the same options", output)


def _open_work(output: Path, options: dict) -> Path:
    """Opens the folder of finished patients; those of other options are thrown away."""
    work = output / WORK_FOLDER
    strangers = [f.name for f in output.iterdir() if f.name not in (WORK_FOLDER, LOCK_FILE)]
    if strangers and not work.exists():
        raise InputError(f"{output}: is not empty and no slice data set ({strangers[0]}); choose another folder")
    wanted, path = json.dumps(options, indent=2), work / "options.json"
    if work.exists() and not (path.exists() and path.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    return work


def _write_one(work: Path, facts: dict, source, patient: str) -> str | None:
    """Writes one patient's file; returns the problem if there is one."""
    try:
        slices = source.read(patient)
    except InputError as error:
        return str(error)
    with new_file(work / f"{patient}.parquet") as temporary:
        write_patient(temporary, slices, facts["class_names"], facts["dtype"], facts["scale"])
    return None


def _problems(source, patient: str) -> list[str]:
    return source.problems(patient)


def _write_shards(work: Path, splits: dict[str, list[str]], facts: dict) -> dict[str, dict[str, int]]:
    """Merges the patients' files to shards of about 400 MB, uncompressed; returns the counts of each split."""
    shutil.rmtree(work / "data", ignore_errors=True)
    (work / "data").mkdir()
    pixels = facts["size"] ** 2
    row_bytes = pixels * (facts["channels"] * np.dtype(facts["dtype"]).itemsize + facts["has_masks"])
    counts = {}
    for split, patients in splits.items():
        shards, labels, filled = [], [], 0
        for patient in patients:
            own = pyarrow.parquet.read_table(work / f"{patient}.parquet", columns=["label"])["label"].to_numpy()
            labels.append(own)
            if not shards or filled + len(own) * row_bytes > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(patient)
            filled += len(own) * row_bytes
        for number, shard in enumerate(shards):
            tables = (pyarrow.parquet.read_table(work / f"{patient}.parquet") for patient in shard)
            name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            write_tables(work / "data" / name, tables, facts["class_names"])
        joined = np.concatenate([np.zeros(0, dtype=np.int64), *labels])
        counts[split] = {"patients": len(patients), "slices": len(joined), "unhealthy": int((joined > 0).sum())}
    return counts


def _finish(output: Path, work: Path, preprocessing: dict) -> None:
    if (output / "data").exists():
        shutil.rmtree(output / "data")
    os.replace(work / "data", output / "data")
    write_json(preprocessing, output / PREPROCESSING_FILE)
    shutil.rmtree(work)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf prepare`; each may be written with `_` or `-`."""

    def option(name: str, **settings) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **settings)

    option("source", choices=list(SOURCES), required=True, help="what kind of data this is")
    option("input", help="the data: a folder, or the .npz file of --source arrays")
    option("output", help="folder to write the slice data set to (not needed with --check)")
    option("size", type=_at_least(1), help="pixels along each side of a slice (128; arrays: as in the file)")
    option("field_mm", type=_above_zero, help="side of the square in-plane field in mm (240)")
    option(
        "normalize", metavar="SCALE",
        help="intensity scale, by each patient's foreground: median, 2.5 medians become 1 (the default); p99, the 99th"
        " percentile becomes 1, as in the paper (the phantom's default); none, for --source arrays and folder: values"
        " as they are (folder's default)",
    )  # fmt: skip
    option("modalities", nargs="+", metavar="NAME", help="channels to use, in this order")
    option("class_names", nargs="+", metavar="NAME", help="order of the classes of --source folder")
    option("labels", metavar="FILE.csv", help="labels instead of masks: columns patient, slice (or empty), label")
    option("seed", type=_at_least(0), default=0, help="seed of the split by patient, or of the phantom")
    option("patients", type=_at_least(1), help="use only so many patients; how many phantoms to make")
    option("split_file", metavar="FILE.json[:NAME]", help="ids of train, validation and test instead of a seed")
    option("check", action="store_true", help="list every problem of the data and write nothing")
    option("skip_bad", action="store_true", help="leave out patients with a problem")
    option("lenient", action="store_true", help="accept scans with their skull and unknown label ids")
    option("num_workers", type=_at_least(0), default=0, help="processes (this one only)")


def run_prepare(args: argparse.Namespace) -> int:
    """Runs `diffusers-cf prepare`; returns the exit code.

    Raises:
        InputError: As in `prepare`, and for options that the source does not take.
    """
    source = build_source(args)
    # The phantom has made as many as it was asked for.
    limit = None if args.source == "phantom" else args.patients
    if args.check:
        problems = find_problems(source, patients=limit, num_workers=args.num_workers)
        print("\n".join(problems) or f"{len(source.patients()[:limit])} patients, no problem")
        if problems:
            print(f"{args.input}: {len(problems)} problems, the first: {problems[0]}", file=sys.stderr)
        return 2 if problems else 0
    if args.output is None:
        raise InputError("--output is needed (or --check)")
    preprocessing = prepare(
        source,
        args.output,
        seed=args.seed,
        split_file=args.split_file,
        patients=limit,
        skip_bad=args.skip_bad,
        num_workers=args.num_workers,
    )
    for name, counts in preprocessing["splits"].items():
        print(f"{name}: {counts['patients']} patients, {counts['slices']} slices, {counts['unhealthy']} unhealthy")
    if preprocessing["skipped"]:
        print(f"skipped: {', '.join(preprocessing['skipped'])}", file=sys.stderr)
    return 0


def build_source(args: argparse.Namespace):
    """Constructs the source that the command line describes.

    Raises:
        InputError: An option does not apply to it, or --input is missing.
    """
    taken = SOURCE_OPTIONS[args.source]
    names = sorted({name for options in SOURCE_OPTIONS.values() for name in options} - {"seed", "patients"})
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, False)}
    foreign = [f"--{name}" for name in given if name not in taken]
    if args.source == "phantom":
        foreign += ["--input"] if args.input else []
        given |= {"seed": args.seed} | ({} if args.patients is None else {"patients": args.patients})
    if foreign:
        raise InputError(f"--source {args.source} takes no {', '.join(foreign)}")
    if args.source == "phantom":
        return SOURCES["phantom"](**given)
    if args.input is None:
        raise InputError(f"--source {args.source} needs --input")
    return SOURCES[args.source](args.input, **given)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return parse


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value
