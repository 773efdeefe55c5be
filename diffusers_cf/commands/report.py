"""`diffusers-cf report`: one HTML page about the patients that `segment` has finished."""

import argparse
import sys
from pathlib import Path

from diffusers_cf.errors import InputError


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf report`."""
    add = parser.add_argument
    add("folders", nargs="+", metavar="OUT", help="output folder of segment, or the folder of one patient in it")
    add("--output", required=True, metavar="REPORT.html", help="the page")
    add("--scans", nargs="+", metavar="FOLDER", default=[], help="folders of the segmented patients or cohorts: the "
        "page shows heat over the scans in them instead of over counterfactuals")  # fmt: skip


def run_report(args: argparse.Namespace) -> int:
    """Write the page, which names every patient that can't be shown.

    Returns:
        `int`: 0, or 2 if a patient can't be shown completely.

    Raises:
        InputError: there is nothing to report.
    """
    from diffusers_cf.segmentation.report import finished_patients, unsegmented_patients, write_report

    output = Path(args.output)
    if output.suffix != ".html" or output.is_dir():
        raise InputError(f"{output}: the output must be a file REPORT.html")
    folders = [patient for folder in args.folders for patient in finished_patients(Path(folder))]
    unsegmented = [line for folder in args.folders for line in unsegmented_patients(Path(folder))]
    output.parent.mkdir(parents=True, exist_ok=True)
    count, failures = write_report(folders, output, args.scans, unsegmented)
    print(f"{count} patients, {len(failures)} failed -> {output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0
