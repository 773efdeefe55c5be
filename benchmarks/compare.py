"""How far two settings or models are apart: results of `diffusers-cf evaluate` on the same patients, with paired intervals.

python benchmarks/compare.py --first A.json [A2.json ..] --second B.json [B2.json ..] --output DIFFERENCE.json
"""

import json
from pathlib import Path
from statistics import mean

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import bootstrap_auprc, mean_of_runs, read_patient_counts
from diffusers_cf.evaluation.pixel_counts import CHAINS
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.files import make_folder
from diffusers_cf.provenance import command_line, package_commit


FACTS = ("model", "method", "settings", "network_evaluations_per_slice", "dtype", "command", "commit")


def read_result(path: str) -> dict:
    """RESULT.json of `evaluate`.

    Raises:
        InputError: it can't be read, is something else, or has no counts beside it.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        [result[name] for name in ("auprc", "ideal_dice", "postprocessed")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no result of diffusers-cf evaluate ({error})") from None
    if not counts_of(path).is_file():
        raise InputError(f"{counts_of(path)}: missing, evaluate writes it beside {Path(path).name}")
    return result


def counts_of(path: str) -> Path:
    """The counts of each patient, which `evaluate` writes beside its result."""
    return Path(path).with_suffix(".counts.npz")


def compare(first: list[str], second: list[str]) -> dict[str, dict]:
    """For each chain AUPRC and ideal Dice of both, means over their results, and the paired difference of AUPRC."""
    results = [[read_result(path) for path in paths] for paths in (first, second)]
    found = {}
    for chain in CHAINS:
        parts = [[r if chain == "raw" else r["postprocessed"] for r in side] for side in results]
        runs = [
            mean_of_runs([bootstrap_auprc(read_patient_counts(counts_of(path), chain)) for path in paths])
            for paths in (first, second)
        ]
        found[chain] = {
            "auprc": [mean(part["auprc"] for part in side) for side in parts],
            "ideal_dice": [mean(part["ideal_dice"] for part in side) for side in parts],
            **runs[0].minus(runs[1]),
        }
    return found


def main(args) -> None:
    """Writes the comparison and prints it."""
    chains = compare(args.first, args.second)
    sides = {
        side: [{name: value for name, value in read_result(path).items() if name in FACTS} for path in paths]
        for side, paths in (("first", args.first), ("second", args.second))
    }
    make_folder(Path(args.output).parent)
    write_result({**chains, **sides, "command": command_line(), "commit": package_commit()}, Path(args.output))
    for chain, row in chains.items():
        low, high = row["interval"] or (float("nan"),) * 2
        values = " against ".join(f"{100 * value:.1f}" for value in row["auprc"])
        print(f"{chain:14} AUPRC {values}: {100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--first", nargs="+", required=True, metavar="RESULT.json", help="several: splits or seeds, their mean counts")
    add("--second", nargs="+", required=True, metavar="RESULT.json")
    add("--output", required=True, metavar="DIFFERENCE.json")
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
