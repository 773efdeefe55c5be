"""`diffusers-cf bids`: segment the participants of a BIDS dataset into a derivative dataset, as a BIDS-App."""

import argparse
from pathlib import Path

from diffusers_cf.commands import options
from diffusers_cf.commands.report import run_report
from diffusers_cf.commands.segment import add_run_arguments, segment_patients
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder


def add_bids_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf bids`, those of the BIDS-Apps first."""
    add = parser.add_argument
    add("bids_dir", type=Path, metavar="BIDS_DIR", help="a BIDS dataset of skull-stripped scans")
    add("output_dir", type=Path, metavar="OUT", help="folder for the derivative dataset")
    text = "participant segments every participant and session; group writes OUT/report.html about all of them"
    add("analysis_level", choices=("participant", "group"), help=text)
    text = "labels of participants, with or without sub-; default: all"
    add("--participant_label", nargs="+", metavar="LABEL", default=[], help=text)
    text = "labels of sessions, with or without ses-; default: all"
    add("--session_label", nargs="+", metavar="LABEL", default=[], help=text)
    add("--model", help=f"{options.MODEL}; the participant level needs it; default: none")
    add_run_arguments(parser)


def run_bids(args: argparse.Namespace) -> int:
    """Run one level of analysis.

    Returns:
        `int`: 0, or 2 if a participant failed.
    """
    from diffusers_cf.segmentation.bids import NATIVE, describe_derivatives, find_participants, write_derivatives

    source, output = args.bids_dir, args.output_dir
    args.output = output / NATIVE
    labels = args.participant_label, args.session_label
    if args.analysis_level == "group":
        if not args.output.is_dir():
            raise InputError(f"{output}: no participant is segmented yet")
        report = {"folders": [args.output], "output": output / "report.html", "scans": [source], "training": None}
        return run_report(argparse.Namespace(**vars(args) | report))
    if args.model is None:
        raise InputError("the participant level needs --model")

    def find(modalities: list[str]) -> tuple[list[tuple[str, Path]], dict[str, str]]:
        found, problems = find_participants(source, modalities, *labels)
        if found:
            make_folder(output)
            describe_derivatives(source, output)
        return found, problems

    def finish(name: str, folder: Path, report: dict) -> Path:
        return write_derivatives(name, folder, args.output / name, report, source, output)

    return segment_patients(args, find, finish)
