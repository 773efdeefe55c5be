"""How well one FLAIR threshold fits all patients, for several intensity scales; choose a scale on training patients.

python benchmarks/scales.py --dataset DATASET [DATASET ..] --split train --output RESULT.json

The data sets may have any scale: every scale is computed from each patient's foreground.
"""

from pathlib import Path

import numpy as np
from common import run_script

from diffusers_cf.arguments import ArgumentParser
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.protocol import rows_by_patient


def scaled(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return a patient's foreground intensities `(P,)` on each scale."""
    low, median, high = np.percentile(values, [25, 50, 75])
    counts, edges = np.histogram(values, bins=256)
    mode = edges[np.convolve(counts, np.ones(9), "same").argmax()]
    return {
        "p99": values / np.percentile(values, 99),
        "median": values / median,
        "mean": values / values.mean(),
        "interquartile mean": values / values[(values > low) & (values < high)].mean(),
        "histogram mode": values / mode,
        "(v - median) / interquartile range": (values - median) / (high - low),
        "(v - median) / median absolute deviation": (values - median) / np.median(np.abs(values - median)),
    }


def measure(dataset: SliceDataset) -> dict[str, dict]:
    """Return for each scale AUPRC and ideal Dice over all patients' foreground, and the mean AUPRC per patient."""
    pooled, per_patient = {}, {}
    channel = dataset.preprocessing["modalities"].index("flair")
    for rows in rows_by_patient(dataset, np.arange(len(dataset))).values():
        (batch,) = batches_of(dataset, rows.tolist(), len(rows))
        flair, masks = batch["images"][:, channel].numpy(), batch["masks"].numpy()
        inside = flair > 0
        for name, scores in scaled(flair[inside]).items():
            counts = PixelCounts()
            counts.update(scores.astype(np.float32), masks[inside])
            pooled[name] = pooled.get(name, PixelCounts()) + counts
            per_patient.setdefault(name, []).append(counts.average_precision())
    return {
        name: {
            "auprc": counts.average_precision(),
            "ideal_dice": counts.ideal_dice()[0],
            "per_patient_auprc": float(np.mean([value for value in per_patient[name] if value is not None])),
        }
        for name, counts in pooled.items()
    }


def main(args) -> dict:
    """Return the scores of each data set and print a line per scale."""
    found = {}
    for folder in args.dataset:
        dataset = SliceDataset(folder, args.split)
        if not dataset.has_masks or not len(dataset) or "flair" not in dataset.preprocessing["modalities"]:
            raise InputError(f"{folder}: the split {args.split} needs slices of flair with lesion masks")
        facts = {"n_patients": len(set(dataset.patients)), "split_sha256": dataset.preprocessing.get("split_sha256")}
        found[Path(folder).name] = facts | {"scales": measure(dataset)}
        for name, scores in found[Path(folder).name]["scales"].items():
            print(f"{folder} {name:42}" + "".join(f"{100 * value:7.1f}" for value in scores.values()), flush=True)
    return {"datasets": found, "split": args.split}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="+", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    raise SystemExit(run_script(main, parser.parse_args()))
