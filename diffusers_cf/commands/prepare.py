"""`diffusers-cf prepare`: from scans, arrays, pictures or the phantom to a slice data set."""

import argparse
import sys

from diffusers_cf.errors import InputError


# The options that each source takes. --seed and --patients choose the split of other sources, and what the phantom makes.
SOURCE_OPTIONS = {
    "phantom": ("seed", "patients", "size", "field_mm", "normalize"),
    "brats": ("size", "field_mm", "normalize", "modalities", "labels", "lenient"),
    "decathlon": ("size", "field_mm", "normalize", "modalities", "labels", "lenient"),
    "arrays": ("size", "field_mm", "normalize", "modalities", "labels"),
    "folder": (
        "size",
        "field_mm",
        "normalize",
        "modalities",
        "labels",
        "class_names",
        "patient_pattern",
        "one_image_per_patient",
    ),
}


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf prepare`."""
    add = parser.add_argument
    add("--source", choices=list(SOURCE_OPTIONS), required=True, help="kind of data")
    add("--input", help="the data: a folder, or the .npz file of --source arrays; the phantom has none")
    add("--output", help="folder for the slice data set; not needed with --check")
    add("--size", type=int, help="pixels along each side of a slice (default: 128; arrays: as in the file)")
    add("--field_mm", type=float, help="side of the square in-plane field in mm (default: 240)")
    add(
        "--normalize", metavar="SCALE",
        help="intensity scale, by each patient's foreground. median: 2.5 medians become 1 (default). p99: the 99th"
        " percentile becomes 1, as in the paper (default of the phantom). none: values as they are, for --source arrays"
        " and folder (default of folder)",
    )  # fmt: skip
    add("--modalities", nargs="+", metavar="NAME", help="channels to use, in this order (default: all)")
    add("--class_names", nargs="+", metavar="NAME", help="classes of --source folder in order, the healthy one first"
        " (default: the sub-folders, if one is called healthy, normal, control or no_tumor)")  # fmt: skip
    add("--patient_pattern", metavar="REGEX", help="regular expression for the names of --source folder without suffix, with"
        " the groups (?P<patient>..) and (?P<slice>..) (default: PATIENT_NUMBER, or PATIENT alone)")  # fmt: skip
    add("--one_image_per_patient", action="store_true", help="each file of --source folder is a patient of its own")
    add(
        "--labels",
        metavar="FILE.csv",
        help="labels for images without masks: columns patient, slice (or empty), label",
    )
    add("--seed", type=int, default=0, help="seed of the split by patient, or of the phantom (default: 0)")
    add("--patients", type=int, help="number of patients to use, or of phantoms to make (default: all; 340 phantoms)")
    add("--split_file", metavar="FILE.json[:NAME]", help="JSON file with the ids of train, validation and test")
    add("--check", action="store_true", help="list every problem of the data and write nothing")
    add("--allow_missing_classes", action="store_true", help="accept splits without any slice of one of the classes")
    add("--skip_bad", action="store_true", help="leave out patients with a problem")
    add("--lenient", action="store_true", help="accept scans that are not skull-stripped and unknown label ids")
    add("--num_workers", type=int, default=0, help="number of worker processes (default: 0, only this process)")


def run_prepare(args: argparse.Namespace) -> int:
    """Run `diffusers-cf prepare` and return the exit code.

    Raises:
        InputError: as in `prepare`, and for options that the source does not take.
    """
    from diffusers_cf.data.prepare import SOURCES, check, describe, prepare

    for name, least in (("seed", 0), ("patients", 1), ("num_workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    is_phantom, taken = args.source == "phantom", SOURCE_OPTIONS[args.source]
    names = {"input"} | {name for options in SOURCE_OPTIONS.values() for name in options} - {"seed", "patients"}
    given = {name: getattr(args, name) for name in sorted(names)}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    path = given.pop("input", None) if not is_phantom else None
    foreign = [f"--{name}" for name in given if name not in taken]
    if foreign:
        raise InputError(f"--source {args.source} takes no {', '.join(foreign)}")
    if is_phantom:
        given |= {"seed": args.seed} | ({} if args.patients is None else {"patients": args.patients})
        source, limit = SOURCES["phantom"](**given), None
    elif path is None:
        raise InputError(f"--source {args.source} needs --input")
    else:
        source, limit = SOURCES[args.source](path, **given), args.patients

    options = {"seed": args.seed, "split_file": args.split_file, "patients": limit, "num_workers": args.num_workers}
    options["allow_missing_classes"] = args.allow_missing_classes
    if args.check:
        problems, understood = check(source, **options)
        print("\n".join([*(problems or ["no problem"]), *understood]))
        if problems:
            print(f"{args.input}: {len(problems)} problems, the first: {problems[0]}", file=sys.stderr)
        return 2 if problems else 0
    if args.output is None:
        raise InputError("--output is needed (or --check)")
    preprocessing = prepare(source, args.output, skip_bad=args.skip_bad, **options)
    print("\n".join(describe(source, preprocessing)))
    if preprocessing["skipped"]:
        print(f"skipped: {', '.join(preprocessing['skipped'])}", file=sys.stderr)
    return 0
