"""`diffusers-cf prepare`: from scans, arrays, pictures or the phantom to a slice data set."""

import argparse
import sys

from diffusers_cf.errors import InputError


# The options that each source takes. For the phantom, --seed and --patients choose the patients instead of the split.
_SCAN_OPTIONS = ("size", "field_mm", "normalize", "modalities", "labels")
SOURCE_OPTIONS = {
    "phantom": ("seed", "patients", "size", "field_mm", "normalize"),
    "brats": (*_SCAN_OPTIONS, "lenient"),
    "decathlon": (*_SCAN_OPTIONS, "lenient"),
    "arrays": (*_SCAN_OPTIONS, "allow_missing_modalities"),
    "folder": (*_SCAN_OPTIONS, "class_names", "patient_pattern", "one_image_per_patient"),
}


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf prepare`."""
    add = parser.add_argument
    text = "the phantom, scans as in BraTS or the Decathlon, arrays in an .npz file, or pictures in a folder per class"
    add("--source", choices=list(SOURCE_OPTIONS), required=True, help=f"kind of data: {text}")
    add("--input", help="folder of the data, or the .npz file of arrays; required except for the phantom")
    add("--output", metavar="DATASET", help="folder for the slice data set; required except with --check")
    add("--size", type=int, help="side of a slice in pixels; default: 128, or as in the file of arrays")
    add("--field_mm", type=float, help="side of the square field of view in mm; default: 240")
    text = "intensity scale. median: 2.5 medians of a patient's foreground become 1. p99: its 99th percentile becomes "
    text += "1, as in the paper. none: values stay. Default: median; p99 for the phantom; none for pictures"
    add("--normalize", metavar="SCALE", help=text)
    add("--modalities", nargs="+", metavar="NAME", help="channels to use, in this order; default: all")
    text = "classes of pictures, the names of their folders, the healthy one first; default: the folders, if one is"
    add("--class_names", nargs="+", metavar="NAME", help=f"{text} called healthy, normal, control or no_tumor")
    text = "regular expression of pictures' names without suffix, with the groups (?P<patient>..) and (?P<slice>..)"
    add("--patient_pattern", metavar="REGEX", help=f"{text}; default: PATIENT_NUMBER, or PATIENT alone")
    add("--one_image_per_patient", action="store_true", help="each picture is a patient; default: its name says which")
    text = "labels in the columns patient, slice (empty for a whole patient), label; default: from masks or folders"
    add("--labels", metavar="FILE.csv", help=text)
    add("--seed", type=int, default=0, help="seed of the split by patient, or of the phantom, 0 or more; default: 0")
    add("--patients", type=int, help="number of patients to use or phantoms to make; default: all, or 340 phantoms")
    text = "patients of train, validation and test, as lists in JSON (under NAME); default: split by --seed"
    add("--split_file", metavar="FILE.json[:NAME]", help=text)
    add("--check", action="store_true", help="list every problem of the data and write nothing; default: off")
    add("--allow_missing_classes", action="store_true", help="accept splits that lack a class; default: refuse them")
    text = "use patients who lack some modalities, with an empty channel for each; default: leave them out"
    add("--allow_missing_modalities", action="store_true", help=text)
    add("--skip_bad", action="store_true", help="leave out patients with a problem; default: refuse the data")
    add(
        "--lenient", action="store_true", help="accept scans with a skull, and unknown label ids; default: refuse them"
    )
    add("--num_workers", type=int, default=0, help="number of worker processes; default: 0, no other process")


def run_prepare(args: argparse.Namespace) -> int:
    """Run `diffusers-cf prepare` and return the exit code."""
    from diffusers_cf.data.prepare import SOURCES, check, describe, prepare

    for name, least in (("seed", 0), ("patients", 1), ("num_workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    is_phantom, taken = args.source == "phantom", SOURCE_OPTIONS[args.source]
    names = {"input"} | {name for options in SOURCE_OPTIONS.values() for name in options} - {"seed", "patients"}
    given = {name: getattr(args, name) for name in sorted(names)}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    path = given.pop("input", None) if not is_phantom else None
    if foreign := [f"--{name}" for name in given if name not in taken]:
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
