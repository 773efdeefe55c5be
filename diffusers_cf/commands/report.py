"""`diffusers-cf report`: one HTML page about the patients that `segment` has finished, or about a training."""

import argparse
import sys
from pathlib import Path

from diffusers_cf.commands.options import add_convention_argument
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf report`."""
    add = parser.add_argument
    add("folders", nargs="*", metavar="OUT", help="output folder of segment, or the folder of one patient in it")
    text = "--output_dir of a training, finished or not, to report instead of patients"
    add("--training", metavar="MODEL", help=f"{text}; default: none")
    add("--output", required=True, metavar="REPORT.html", help="file for the page")
    text = "folders of the segmented patients, whose scans the heatmaps are shown over; default: over counterfactuals"
    add("--scans", nargs="+", metavar="FOLDER", default=[], help=text)
    add_convention_argument(parser)


def run_report(args: argparse.Namespace) -> int:
    """Write the page about a training, or about patients; it names every patient that can't be shown.

    Returns:
        `int`: 0, or 2 if a patient can't be shown completely.
    """
    from diffusers_cf.commands.training_report import write_training_report
    from diffusers_cf.segmentation.cohorts import read_summary
    from diffusers_cf.segmentation.report import write_report

    output = Path(args.output)
    if output.suffix != ".html" or output.is_dir():
        raise InputError(f"{output}: the output must be a file REPORT.html")
    if bool(args.folders) == bool(args.training):
        raise InputError("give either folders of segment or --training MODEL")
    if args.training:
        make_folder(output.parent)
        write_training_report(Path(args.training), output)
        print(f"training of {args.training} -> {output}")
        return 0
    folders = [patient for folder in args.folders for patient in _finished_patients(Path(folder))]
    outcomes = [item for folder in args.folders for item in read_summary(Path(folder)).items()]
    unsegmented = [f"{name}: {outcome['reason']}" for name, outcome in outcomes if "reason" in outcome]
    make_folder(output.parent)
    count, failures = write_report(folders, output, args.scans, unsegmented, args.convention)
    print(f"{count} patients, {len(failures)} failed -> {output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def _finished_patients(folder: Path) -> list[Path]:
    """Return the given folder if it is a patient's result, or else the results in it."""
    below = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # without temporary folders
    found = [path for path in (folder, *below) if (path / "report.json").exists()]
    if not found:
        raise InputError(f"{folder}: segment has written nothing in it (report.json is missing)")
    return found[:1] if found[0] == folder else found
