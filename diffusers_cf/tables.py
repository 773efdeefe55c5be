"""Tables 1 and 2 from the cells of a benchmark, one a method and seed: figures as JSON, the same to read as Markdown.

The paper's own figures do not stand in them: its data are others, and so is its protocol.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.baselines import ROWS, row_of
from diffusers_cf.bootstrap import AuprcBootstrap, mean_of_runs
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation import bootstrap_interval
from diffusers_cf.pixel_counts import CHAINS, renamed_when_whole


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
    seeds: Sequence[int] | None = None,
    ours: str = "ours",
) -> list[Path]:
    """Writes table1.json, table1.md, table2.json and table2.md into `folder` from the cells that are there.

    Args:
        folder: RESULTS of a benchmark that may be unfinished.
        methods: Ids of the methods that shall be measured; those without a cell are named as missing.
        seeds: The seeds that each method shall have; those found with any method if None.
        ours: The method that every other one is compared with.

    Returns:
        The files written.

    Raises:
        InputError: As `collect_cells`, or the patients of two cells differ.
    """
    cells = collect_cells(folder)
    seeds = sorted({cell["seed"] for cell in cells} if seeds is None else seeds)
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
        order = _methods_of_table(number, methods, by_method)
        rows = [_row(by_method[method], bootstraps, ours) for method in order if method in by_method]
        table = {"title": title, "ours": ours, "rows": rows, "missing": _missing(order, by_method, seeds), **facts}
        written += _write_table(table, Path(folder, f"table{number}.json"))
    return written


def _methods_of_table(number: int, planned: Sequence[str], by_method: Mapping[str, list[dict]]) -> list[str]:
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
        with renamed_when_whole(name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(texts)


class _Bootstraps:
    """The bootstraps that cells hold, averaged over the seeds that are asked for."""

    def __init__(self, by_method: Mapping[str, list[dict]]):
        self.by_method = by_method

    def seeds(self, method: str) -> set[int]:
        """Returns the seeds that a method is measured for."""
        return {cell["seed"] for cell in self.by_method.get(method, [])}

    def of(self, method: str, chain: str, seeds: set[int]) -> AuprcBootstrap:
        cells = [cell for cell in self.by_method[method] if cell["seed"] in seeds]
        return mean_of_runs([AuprcBootstrap.from_json(cell["bootstrap"][chain]) for cell in cells])

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
    patients = [
        dict(zip(p["per_patient_dice"]["patients"], p["per_patient_dice"]["values"], strict=True)) for p in parts
    ]
    # A patient's Dice is the mean over the seeds that tested it: the interval is that of patients alone.
    names = sorted({patient for dice in patients for patient in dice})
    means = [float(np.mean([dice[patient] for dice in patients if patient in dice])) for patient in names]
    thresholds = [part["per_patient_dice"].get("threshold") for part in parts]
    mean = float(np.mean(means)) if means else None
    values["per_patient_dice"] = {"mean": mean, "interval": bootstrap_interval(means), "thresholds": thresholds}
    return values


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


# Markdown

COLUMNS = {
    "auprc": "AUPRC",
    "ideal_dice": "ideal Dice",
    "foreground_auprc": "foreground AUPRC",
    "foreground_ideal_dice": "foreground ideal Dice",
    "per_patient_dice": "Dice per patient, validation's threshold [95 %]",
    "per_slice_dice": "Dice per lesion slice",
    "slice_auroc": "slice AUROC",
}
REMARKS = (
    "AUPRC, Dice and AUROC in percent: mean ± standard deviation over seeds (n - 1 in the denominator; none for one seed).",
    "Ideal Dice: the threshold is chosen on the test masks, an upper bound.",
    "Dice per patient: mean over patients with a lesion, their Dice averaged over seeds; at a threshold fixed beforehand.",
)


def table_markdown(table: dict) -> str:
    """Returns a table of `write_tables` as Markdown, raw and post-processed maps one below the other."""
    lines = [f"# {table['title']}", ""]
    for found in table["test_sets"]:
        share = "not defined" if found["prevalence"] is None else f"{100 * found['prevalence']:.2f} %"
        size = f"{found['n_slices']} slices of {found['n_patients']} patients"
        lines += [
            f"Test set of seeds {', '.join(map(str, found['seeds']))}: {size}, share of lesion pixels {share}.",
            "",
        ]
    for chain, name in zip(CHAINS, ("Maps as they are", "Post-processed maps"), strict=True):
        rows = [row for row in table["rows"] if chain in row]
        if rows:
            lines += [f"## {name}", "", *_markdown_rows(rows, chain), ""]
    lines += _cost_lines(table["rows"]) + _slice_score_lines(table["rows"])
    lines += ["## Remarks", "", *(f"- {remark}" for remark in _remarks(table)), ""]
    lines += ["## Protocol", ""]
    # Each cell's own interval is not shown: the table makes one over all seeds.
    protocol = {name: words for name, words in table["protocol"].items() if name != "interval"}
    lines += [f"- {name}: {' / '.join(words)}" for name, words in protocol.items()]
    return "\n".join(lines) + "\n"


def _markdown_rows(rows: Sequence[dict], chain: str) -> list[str]:
    header = ["method", "seeds", *COLUMNS.values(), "network evaluations", "s a slice", "trained on"]
    header.append("ours - this, AUPRC [95 %]")
    lines = ["| " + " | ".join(header) + " |", "|---" * 2 + "|---:" * (len(COLUMNS) + 2) + "|---|---:|"]
    for row in rows:
        values = row[chain]
        cells = [_marked(row), str(len(row["seeds"]))]
        cells += [_percent(values[name]) for name in COLUMNS]
        cells += [_evaluations(row), _seconds(row["seconds_per_slice"]["mean"]), row["trained_on"]]
        difference = values["ours_minus_this"] or {"difference": None, "interval": None}
        shown = {"mean": difference["difference"], "interval": difference["interval"]}
        lines.append("| " + " | ".join([*cells, _percent(shown, "+.1f")]) + " |")
    return lines


def _marked(row: dict) -> str:
    return row["row"] + (" (*)" if False in row["converged"] else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _percent(value: dict, form: str = ".1f") -> str:
    """Returns a mean in percent, with its standard deviation or else its interval."""
    if value["mean"] is None:
        return "-"
    text = f"{100 * value['mean']:{form}}"
    if value.get("std") is not None:
        return f"{text} ± {100 * value['std']:.1f}"
    interval = value.get("interval") if "values" not in value else None
    return text + (f" [{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]" if interval else "")


def _evaluations(row: dict) -> str:
    values = sorted({value for value in row["network_evaluations_per_slice"]["values"] if value is not None})
    return " to ".join(f"{value:g}" for value in dict.fromkeys([values[0], values[-1]])) if values else "-"


def _cost_lines(rows: Sequence[dict]) -> list[str]:
    trained = [row for row in rows if row["train_seconds"]["mean"]]
    if not trained:
        return []
    head = "| method | minutes a seed | images seen | settings of inference, a seed after the other |"
    lines = ["## Training and settings", "", head, "|---|---:|---:|---|"]
    for row in trained:
        images, settings = _number(row["images_seen"]["mean"], ",.0f"), "; ".join(map(_settings, row["settings"]))
        lines.append(f"| {_marked(row)} | {row['train_seconds']['mean'] / 60:.1f} | {images} | {settings} |")
    return [*lines, ""]


def _settings(settings: dict | None) -> str:
    short = {"guidance_scale": "w", "strength": "L", "num_inference_steps": "steps"}
    return ", ".join(f"{short.get(name, name)} {value}" for name, value in (settings or {}).items()) or "-"


def _slice_score_lines(rows: Sequence[dict]) -> list[str]:
    names = sorted({name for row in rows for name in row["slice_scores"]})
    if not names:
        return []
    header = ["## Slice AUROC of other scores of a slice", "", "| method | " + " | ".join(names) + " |"]
    lines = [*header, "|---" + "|---:" * len(names) + "|"]
    for row in (row for row in rows if row["slice_scores"]):
        scores = [row["slice_scores"].get(name, {"mean": None}) for name in names]
        lines.append(f"| {row['row']} | " + " | ".join(map(_percent, scores)) + " |")
    return [*lines, ""]


def _remarks(table: dict) -> list[str]:
    rows, bootstrap = table["rows"], table["bootstrap"]
    draws = f"({bootstrap['samples']} draws, seed {bootstrap['seed']})"
    remarks = [
        *REMARKS,
        f"[95 %] of a difference of AUPRC: paired bootstrap over patients {draws}, averaged over the seeds that both have: "
        "it holds no spread between trainings.",
    ]
    if len(table["test_sets"]) > 1:
        remarks.append("Seeds have test sets of their own: the deviation over seeds holds the spread between them.")
    if any(False in row["converged"] for row in rows):
        remarks.append("(*) Not converged: the validation loss of at least one seed still fell when training ended.")
    remarks += [
        f"{row['row']}: {100 * row['saturated_share']['mean']:.2f} % of the foreground is saturated in the clean image"
        " that the last step of encoding predicts."
        for row in rows
        if row["saturated_share"]["mean"] is not None
    ]
    remarks.append("Missing: " + ("; ".join(table["missing"]) or "nothing") + ".")
    seeds = "; ".join(f"{row['row']} {', '.join(map(str, row['seeds']))}" for row in rows)
    commits = sorted({commit for row in rows for commit in row["commit"] if commit})
    return [*remarks, f"Seeds: {seeds or 'none'}.", f"Commits: {', '.join(commits) or 'not known'}."]
