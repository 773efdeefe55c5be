"""What a slice's position alone says about its label, and how much of that `--match_positions` takes away.

    python benchmarks/position.py DATASET [DATASET ..] --output position.json

The predictor knows only the slice's position in the head, 0 lowest to 1 highest: its score is the share of unhealthy
slices among the training slices in the same of 24 parts. Slice AUROC on the test split, and on 8,192 slices as
`train_counterfactual.py` draws them without and with `--match_positions` (which matches within 12 parts).
"""

import argparse

import numpy as np
from sklearn.metrics import roc_auc_score

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.files import write_json
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.training.batches import TrainingSlices, relative_positions


PARTS, DRAWS = 24, 8192


def parts_of(slices: SliceDataset) -> np.ndarray:
    """Return the part of the head in which each slice lies, 0 the lowest."""
    return np.minimum((relative_positions(slices.patients, slices.slices) * PARTS).astype(int), PARTS - 1)


def measure(dataset: str) -> dict[str, float]:
    """Return the predictor's slice AUROC on the test split and on training slices as they are drawn."""
    train, test = (SliceDataset(dataset, split) for split in ("train", "test"))
    parts, unhealthy = parts_of(train), np.asarray(train.labels) > 0
    counts = np.bincount(parts, minlength=PARTS)
    scores = np.bincount(parts, unhealthy, PARTS) / np.maximum(counts, 1)
    result = {"test": roc_auc_score(np.asarray(test.labels) > 0, scores[parts_of(test)])}
    for name, matched in (("drawn", False), ("drawn, matched", True)):
        draws = TrainingSlices(train, 0, (train.preprocessing["size"],) * 2, match_positions=matched)
        rows = [draws.index_at(position) for position in range(DRAWS)]
        result[name] = roc_auc_score(unhealthy[rows], scores[parts[rows]])
    return {name: float(value) for name, value in result.items()}


def main(args: argparse.Namespace) -> None:
    """Write and print the slice AUROC of each data set."""
    found = {name: measure(name) for name in args.datasets}
    write_json(
        {"command": command_line(), "commit": package_commit(), "slice_auroc": list(found.values())}, args.output
    )
    for name, row in found.items():
        print(name, ", ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="slice data sets with labels")
    parser.add_argument("--output", required=True, metavar="RESULT.json", help="file for the figures")
    raise SystemExit(run_command(lambda: main(parser.parse_args())))
