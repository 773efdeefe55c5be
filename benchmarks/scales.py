"""How well one FLAIR threshold fits all patients, by how their intensities are scaled; to choose a scale on training patients.

python benchmarks/scales.py --dataset DATASET [DATASET ..] --split train --output RESULT.json

DATASET is a slice data set of any scale: all of them here are computed anew from each patient's foreground.
"""

from pathlib import Path

import numpy as np

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.protocol import rows_by_patient, write_result
from diffusers_cf.files import make_folder
from diffusers_cf.provenance import command_line, package_commit


def scaled(values: np.ndarray) -> dict[str, np.ndarray]:
    """A patient's foreground intensities `(P,)` on each scale."""
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
    """For each scale AUPRC and ideal Dice of all patients' foreground pixels together, and the mean AUPRC per patient."""
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


def main(args) -> None:
    """Measures each data set, writes them, and prints a line a scale."""
    found = {}
    for folder in args.dataset:
        dataset = SliceDataset(folder, args.split)
        if not dataset.has_masks or not len(dataset) or "flair" not in dataset.preprocessing["modalities"]:
            raise InputError(f"{folder}: the split {args.split} needs slices of flair with lesion masks")
        facts = {"n_patients": len(set(dataset.patients)), "split_sha256": dataset.preprocessing.get("split_sha256")}
        found[Path(folder).name] = facts | {"scales": measure(dataset)}
        for name, scores in found[Path(folder).name]["scales"].items():
            print(f"{folder} {name:42}" + "".join(f"{100 * value:7.1f}" for value in scores.values()), flush=True)
    make_folder(Path(args.output).parent)
    facts = {"split": args.split, "command": command_line(), "commit": package_commit()}
    write_result({"datasets": found, **facts}, Path(args.output))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="+", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
