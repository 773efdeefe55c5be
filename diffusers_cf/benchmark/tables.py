"""Tables 1 and 2 from the cells of a benchmark, one a method and seed: figures as JSON, the same to read as Markdown.

The paper's own figures do not stand in them: its data are others, and so is its protocol.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.baselines import ROWS, row_of
from diffusers_cf.benchmark.tables_markdown import table_markdown
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import Bootstrap, bootstrap_mean, mean_of_runs
from diffusers_cf.evaluation.pixel_counts import CHAINS
from diffusers_cf.files import new_file


TITLES = {1: "Table 1: methods", 2: "Table 2: what each part of the method adds"}
MEASURES = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "per_slice_dice", "slice_auroc")
TEST_SET = ("n_slices", "n_patients", "prevalence")
NEEDED = (
    "method", "seed", "row", "tables", "trained_on", "protocol", "bootstrap", *TEST_SET,
    "network_evaluations_per_slice", "seconds_per_slice", "per_patient_dice", *MEASURES,
)  # fmt: skip


def collect_cells(folder: str | Path) -> list[dict]:
    """Reads what is done of a benchmark.

    Args:
        folder: RESULTS, with `cells/METHOD-seedS.json`.

    Returns:
        The cells sorted by method and seed.

    Raises:
        InputError: There is no cell, one can't be read or lacks a fact, or two of the same seed were measured on other slices.
    """
    cells = [_read_cell(path) for path in sorted(Path(folder, "cells").glob("*.json"))]
    if not cells:
        raise InputError(f"{folder}: no results of a benchmark in its folder cells")
    for cell in cells:
        other = next(other for other in cells if other["seed"] == cell["seed"])
        for name in TEST_SET:
            if cell[name] != other[name]:
                raise InputError(
                    f"{folder}: {_cell_name(cell)} and {_cell_name(other)} differ in {name}: other test slices"
                )
    return sorted(cells, key=lambda cell: (cell["method"], cell["seed"]))


def _read_cell(path: Path) -> dict:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not a JSON file") from None
    for name in NEEDED:
        if name not in cell:
            raise InputError(f"{path}: no {name}")
    return cell


def _cell_name(cell: dict) -> str:
    return f"{cell['method']} seed {cell['seed']}"


def write_tables(
    folder: str | Path,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    ours: str = "ours",
) -> list[Path]:
    """Writes table1.json, table1.md, table2.json and table2.md into `folder` from the cells that are there.

    Args:
        folder: RESULTS of a benchmark that may be unfinished.
        methods: Ids of methods that shall be measured beside all of `ROWS`, such as thresholds of modalities; those
            without a cell are named as missing.
        seeds: Seeds that each method shall have beside those found with any method.
        ours: The method that every other one is compared with.

    Returns:
        The files written.

    Raises:
        InputError: As `collect_cells`, or the patients of two cells differ.
    """
    cells = collect_cells(folder)
    seeds = sorted({cell["seed"] for cell in cells} | set(seeds))
    planned = {*methods, *_methods_for(cells)}
    by_method: dict[str, list[dict]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    bootstraps = _Bootstraps(by_method)
    facts = {
        "test_sets": _test_sets(cells),
        "bootstrap": {
            "samples": len(cells[0]["bootstrap"]["raw"]["samples"]),
            "seed": cells[0]["bootstrap"]["raw"]["seed"],
        },
        "protocol": _protocol(cells),
    }
    written = []
    for number, title in TITLES.items():
        order = _methods_of_table(number, planned, by_method)
        rows = [_row(by_method[method], bootstraps, ours) for method in order if method in by_method]
        table = {"title": title, "ours": ours, "rows": rows, "missing": _missing(order, by_method, seeds), **facts}
        written += _write_table(table, Path(folder, f"table{number}.json"))
    return written


def _methods_for(cells: Sequence[dict]) -> list[str]:
    """Returns the methods of `ROWS` that these data allow, but for thresholds of modalities: those must be planned."""
    modalities = [cell.get("benchmark", {}).get("data", {}).get("modalities") for cell in cells]
    without_flair = any(names and "flair" not in names for names in modalities)
    return [m for m in ROWS if "<" not in m and not (m.startswith("threshold") and without_flair)]


def _methods_of_table(number: int, planned: Iterable[str], by_method: Mapping[str, list[dict]]) -> list[str]:
    """Returns the methods planned for a table or with a cell for it, in the order of `ROWS`."""
    order = list(ROWS)

    def position(method: str) -> tuple[int, str]:
        known = method if method in order else "threshold-<modality>"
        return order.index(known), method

    tables = {m: row_of(m).tables for m in planned} | {m: found[0]["tables"] for m, found in by_method.items()}
    return sorted((method for method in tables if number in tables[method]), key=position)


def _write_table(table: dict, path: Path) -> list[Path]:
    texts = {
        path: json.dumps(table, indent=2, allow_nan=False) + "\n",
        path.with_suffix(".md"): table_markdown(table),
    }
    for name, text in texts.items():
        with new_file(name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(texts)


class _Bootstraps:
    """The bootstraps that cells hold, averaged over the seeds that are asked for."""

    def __init__(self, by_method: Mapping[str, list[dict]]):
        self.by_method = by_method

    def seeds(self, method: str) -> set[int]:
        """Returns the seeds that a method is measured for."""
        return {cell["seed"] for cell in self.by_method.get(method, [])}

    def of(self, method: str, chain: str, seeds: set[int]) -> Bootstrap:
        cells = [cell for cell in self.by_method[method] if cell["seed"] in seeds]
        return mean_of_runs([Bootstrap.from_json(cell["bootstrap"][chain]) for cell in cells])

    def interval(self, method: str, chain: str) -> list[float] | None:
        return self.of(method, chain, self.seeds(method)).interval()

    def difference(self, ours: str, method: str, chain: str) -> dict | None:
        """Returns the paired difference over the seeds that both have, None where there is none."""
        seeds = self.seeds(ours) & self.seeds(method)
        if method == ours or not seeds:
            return None
        return self.of(ours, chain, seeds).minus(self.of(method, chain, seeds)) | {"seeds": sorted(seeds)}


def _test_sets(cells: Sequence[dict]) -> list[dict]:
    """Returns the size of each test set and its seeds: all seeds have one in common, or each has its own."""
    sets: dict[tuple, set] = {}
    for cell in cells:
        sets.setdefault(tuple(cell[name] for name in TEST_SET), set()).add(cell["seed"])
    return [{**dict(zip(TEST_SET, facts, strict=True)), "seeds": sorted(seeds)} for facts, seeds in sets.items()]


def _part(cell: dict, chain: str) -> dict | None:
    return cell if chain == "raw" else cell.get(chain)


def _row(cells: Sequence[dict], bootstraps: _Bootstraps, ours: str) -> dict:
    """Returns what the JSON tells of one method: fractions from 0 to 1, mean and deviation over its seeds."""
    first = cells[0]
    row = {
        "method": first["method"],
        "row": first["row"],
        "seeds": [cell["seed"] for cell in cells],
        "trained_on": first["trained_on"],
        "converged": [cell.get("converged") for cell in cells],
    }
    for chain in CHAINS:
        if all(_part(cell, chain) for cell in cells):
            row[chain] = _chain(cells, chain)
            row[chain]["auprc"]["interval"] = bootstraps.interval(first["method"], chain)
            row[chain]["ours_minus_this"] = bootstraps.difference(ours, first["method"], chain)
    for name in ("network_evaluations_per_slice", "seconds_per_slice", "train_seconds", "images_seen"):
        row[name] = summary([cell.get(name) for cell in cells])
    names = sorted({name for cell in cells for name in cell.get("slice_scores") or {}})
    row["slice_scores"] = {n: summary([(cell.get("slice_scores") or {}).get(n) for cell in cells]) for n in names}
    row["saturated_share"] = summary([cell.get("saturated_share") for cell in cells])
    for name in ("settings", "choice", "dataset", "commit", "command"):
        row[name] = [cell.get(name) for cell in cells]
    return row


def _chain(cells: Sequence[dict], chain: str) -> dict:
    parts = [_part(cell, chain) for cell in cells]
    values = {name: summary([part[name] for part in parts]) for name in MEASURES}
    values["per_patient_dice"] = _of_patients([part["per_patient_dice"] for part in parts])
    values["per_patient_dice"]["thresholds"] = [part["per_patient_dice"].get("threshold") for part in parts]
    if all("per_patient_auprc" in part for part in parts):  # cells of before it was measured lack it
        values["per_patient_auprc"] = _of_patients([part["per_patient_auprc"] for part in parts])
        values["by_lesion_size"] = {name: _of_size(parts, name) for name in parts[0]["by_lesion_size"]}
    return values


def _of_patients(parts: Sequence[dict]) -> dict:
    """Mean of each run over its patients with a lesion, and of them all with its interval."""
    runs = [_by_patient(part) for part in parts if part["values"]]
    interval = mean_of_runs([bootstrap_mean(run) for run in runs]).interval() if runs else None
    return summary([part["mean"] for part in parts]) | {"interval": interval}


def _by_patient(part: dict) -> dict[str, float]:
    return dict(zip(part["patients"], part["values"], strict=True))


def _of_size(parts: Sequence[dict], name: str) -> dict:
    """Means over the patients of all runs whose lesions have a size, each patient's own mean over the runs first."""
    of_size = [set(part["by_lesion_size"][name]["patients"]) for part in parts]
    found = {
        "share_of_foreground": parts[0]["by_lesion_size"][name]["share_of_foreground"],
        "n_patients": len(set.union(*of_size)),
        "auprc": summary([part["by_lesion_size"][name]["auprc"] for part in parts]),
    }
    for measure in ("per_patient_auprc", "per_patient_dice"):
        runs = [_by_patient(part[measure]) for part in parts]
        means = [
            np.mean([run[p] for run, chosen in zip(runs, of_size, strict=True) if p in chosen])
            for p in sorted(set.union(*of_size))
        ]
        found[measure] = float(np.mean(means)) if means else None
    return found


def summary(values: Sequence[float | None]) -> dict:
    """Returns `mean` and sample standard deviation `std` (None for fewer than two) of what is defined, and `values`."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "values": list(values),
    }


def _missing(order: Sequence[str], by_method: Mapping[str, list[dict]], seeds: Sequence[int]) -> list[str]:
    """Returns in words what is still to come."""
    missing = []
    for method in order:
        found = by_method.get(method, [])
        if not found:
            missing.append(f"{method} (no cell)")
        else:
            missing += [f"{method} seed {seed}" for seed in seeds if seed not in {cell["seed"] for cell in found}]
    return missing


def _protocol(cells: Sequence[dict]) -> dict[str, list[str]]:
    """Returns each point of the protocol with all the wordings that the cells have."""
    names = dict.fromkeys(name for cell in cells for name in cell["protocol"])
    return {name: list(dict.fromkeys(c["protocol"][name] for c in cells if name in c["protocol"])) for name in names}
