"""How much two settings or models differ: results of `diffusers-cf evaluate` on the same patients, with paired intervals.

python benchmarks/compare.py --first A.json [A2.json ..] --second B.json [B2.json ..] --output DIFFERENCE.json
"""

from pathlib import Path
from statistics import mean

from common import run_script

from diffusers_cf.arguments import ArgumentParser
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import Bootstrap, bootstrap_auprc, mean_of_runs, read_patient_counts
from diffusers_cf.evaluation.pixel_counts import CHAINS
from diffusers_cf.files import read_json


FACTS = ("model", "method", "settings", "network_evaluations_per_slice", "dtype", "command", "commit")


def read_result(path: str) -> dict:
    """Return a RESULT.json of `evaluate`.

    Raises:
        InputError: it can't be read, is something else, or its counts are missing.
    """
    result = read_json(path)
    if not {"auprc", "ideal_dice", "postprocessed"} <= set(result):
        raise InputError(f"{path}: not a result of diffusers-cf evaluate")
    if not counts_of(path).is_file():
        raise InputError(f"{counts_of(path)}: missing; evaluate writes it beside {Path(path).name}")
    return result


def counts_of(path: str) -> Path:
    """Return the file of each patient's counts, which `evaluate` writes beside its result."""
    return Path(path).with_suffix(".counts.npz")


def bootstrap(paths: list[str], chain: str) -> Bootstrap:
    """Return the bootstrap of the mean AUPRC of some results."""
    return mean_of_runs([bootstrap_auprc(read_patient_counts(counts_of(path), chain)) for path in paths])


def main(args) -> dict:
    """Return AUPRC and ideal Dice of both sides, means over their results, and the paired difference of AUPRC."""
    sides = {"first": args.first, "second": args.second}
    results = {side: [read_result(path) for path in paths] for side, paths in sides.items()}
    found = {side: [{k: v for k, v in result.items() if k in FACTS} for result in results[side]] for side in sides}
    for chain in CHAINS:
        parts = [[r if chain == "raw" else r[chain] for r in of_side] for of_side in results.values()]
        scores = {name: [mean(p[name] for p in side) for side in parts] for name in ("auprc", "ideal_dice")}
        found[chain] = scores | bootstrap(args.first, chain).minus(bootstrap(args.second, chain))
        values = " against ".join(f"{100 * value:.1f}" for value in scores["auprc"])
        interval = [f"{100 * limit:+.2f}" for limit in found[chain]["interval"] or ()]
        print(f"{chain:14} AUPRC {values}: {100 * found[chain]['difference']:+.2f} [{', '.join(interval)}]")
    return found


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    help = "one result, or several of different splits or seeds, which are averaged"
    parser.add_argument("--first", nargs="+", required=True, metavar="RESULT.json", help=help)
    parser.add_argument("--second", nargs="+", required=True, metavar="RESULT.json", help=help)
    parser.add_argument("--output", required=True, metavar="DIFFERENCE.json")
    raise SystemExit(run_script(main, parser.parse_args()))
