"""`diffusers-cf demo`: the shipped model finds the lesion of a phantom patient that it has never seen."""

import argparse
from pathlib import Path

from diffusers_cf.commands.options import MODEL, add_convention_argument, add_device_arguments
from diffusers_cf.errors import InputError
from diffusers_cf.files import write_json


# Not the best patient, but the median: of the 22 test patients of cohort 0 with a lesion, the lower of the middle two by
# the shipped model's Dice per patient, post-processed (results/phantom/phantom_small.json).
MEDIAN_PATIENT = 324


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf demo`."""
    add = parser.add_argument
    add("--output", default="demo_output", help="folder for scan, segmentation and scores; default: %(default)s")
    add("--model", default="phantom_small", help=f"{MODEL}; default: %(default)s")
    text = "number of the phantom's cohort, 0 or more; of cohort 0 the model has seen all but the test patients"
    add("--seed", type=int, default=0, help=f"{text}; default: %(default)s")
    text = "number of the patient in the cohort; default: %(default)s, the median test patient by Dice"
    add("--index", type=int, default=MEDIAN_PATIENT, help=text)
    add_convention_argument(parser)
    add_device_arguments(parser)


def run_demo(args: argparse.Namespace) -> None:
    """Write a phantom patient as NIfTI, segment it, and print its scores beside those of a FLAIR threshold.

    The model's Dice is that of its mask; the threshold's is the highest possible for this very patient.
    """
    import numpy as np

    from diffusers_cf.data.phantom import FROZEN_SEED, FROZEN_SPLITS, make_patient, write_patient
    from diffusers_cf.evaluation.pixel_counts import PixelCounts
    from diffusers_cf.inference import check_device_arguments, open_pipeline
    from diffusers_cf.segmentation.patient import segment_patient

    first = sum(FROZEN_SPLITS.values()) - FROZEN_SPLITS["test"] if args.seed == FROZEN_SEED else 0
    if args.seed < 0 or args.index < first:
        raise InputError(
            f"--seed and --index must be 0 or more; of cohort 0 the model knows patients 0 to {first - 1}"
        )
    check_device_arguments(args)
    patient = make_patient(args.seed, args.index)
    if not patient.labels.any():
        raise InputError(f"patient {args.index} of cohort {args.seed} is healthy: there is no lesion to find")
    pipe = open_pipeline(args.model, args.device, args.dtype)
    output = Path(args.output)
    scan = write_patient(patient, output / "scan")
    options = {"batch_size": args.batch_size, "overwrite": True, "convention": args.convention}
    report = segment_patient(pipe, scan, output / "segmentation", **options)
    flair = PixelCounts()
    flair.update(patient.volumes[0], patient.mask)
    scores = {
        "this model": {"auprc": report["auprc"], "dice": report["dice"]},
        "FLAIR threshold": {"auprc": flair.average_precision(), "ideal_dice": flair.ideal_dice()[0]},
    }
    write_json(scores, output / "scores.json")
    millilitres = float(patient.mask.sum() * abs(np.linalg.det(patient.affine[:3, :3])) / 1000)
    print(f"patient {report['patient']}: {report['n_slices']} slices, {report['seconds']:.0f} s,")
    print(f"lesion {report['lesion_volume_ml']:.0f} ml by the model, {millilitres:.0f} ml in truth")
    print(f"{'':18}AUPRC   Dice")
    notes = ("of the mask, at the recommended threshold", "at the threshold that is best for this very patient")
    for (name, row), note in zip(scores.items(), notes, strict=True):
        auprc, dice = row.values()
        print(f"{name:18}{auprc:.3f}  {dice:.3f}  {note}")
    print(f"pictures: {output / 'segmentation' / report['patient'] / 'preview.png'}")
