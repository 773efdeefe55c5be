"""`diffusers-cf demo`: the shipped model finds the lesion of a phantom patient that it has never seen."""

import argparse
from pathlib import Path

from diffusers_cf.commands.options import MODEL, add_device_arguments
from diffusers_cf.errors import InputError
from diffusers_cf.files import write_json


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf demo`."""
    add = parser.add_argument
    add("--output", default="demo_output", help="folder for scan, segmentation and scores; default: %(default)s")
    add("--model", default="phantom_small", help=f"{MODEL}; default: %(default)s")
    add("--seed", type=int, default=1, help="number of the phantom's cohort, 1 or more; default: %(default)s")
    add("--index", type=int, default=0, help="number of the patient in the cohort, 0 or more; default: %(default)s")
    add_device_arguments(parser)


def run_demo(args: argparse.Namespace) -> None:
    """Write a phantom patient as NIfTI, segment it, and print its scores beside those of a FLAIR threshold."""
    import nibabel
    import numpy as np

    from diffusers_cf.data.phantom import FROZEN_SEED, make_patient, write_patient
    from diffusers_cf.evaluation.pixel_counts import PixelCounts
    from diffusers_cf.inference import check_device_arguments, open_pipeline
    from diffusers_cf.segmentation.patient import segment_patient

    if args.seed <= FROZEN_SEED or args.index < 0:
        raise InputError("--seed must be 1 or more (the model was trained on cohort 0) and --index 0 or more")
    check_device_arguments(args)
    patient = make_patient(args.seed, args.index)
    if not patient.labels.any():
        raise InputError(f"patient {args.index} of cohort {args.seed} is healthy: there is no lesion to find")
    pipe = open_pipeline(args.model, args.device, args.dtype)
    output = Path(args.output)
    scan = write_patient(patient, output / "scan")
    report = segment_patient(pipe, scan, output / "segmentation", batch_size=args.batch_size, overwrite=True)
    result = output / "segmentation" / report["patient"]
    heatmap = np.asarray(nibabel.load(result / "heatmap.nii.gz").dataobj)
    scores = {}
    for name, values in (("this model", heatmap), ("FLAIR threshold", patient.volumes[0])):
        counts = PixelCounts()
        counts.update(values, patient.mask)
        scores[name] = {"auprc": counts.average_precision(), "ideal_dice": counts.ideal_dice()[0]}
    millilitres = float(patient.mask.sum() * abs(np.linalg.det(patient.affine[:3, :3])) / 1000)
    write_json(scores, output / "scores.json")
    print(f"patient {report['patient']}: {report['n_slices']} slices, {report['seconds']:.0f} s,")
    print(f"lesion {report['lesion_volume_ml']:.0f} ml by the model, {millilitres:.0f} ml in truth")
    print(f"{'':18}AUPRC  ideal Dice")
    for name, row in scores.items():
        print(f"{name:18}{row['auprc']:.3f}  {row['ideal_dice']:10.3f}")
    print(f"Dice of the mask at the recommended threshold: {report['dice']:.3f}")
    print(f"pictures: {result / 'preview.png'}")
