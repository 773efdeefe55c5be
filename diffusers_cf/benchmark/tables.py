"""Tables 1 and 2, as JSON and as Markdown, from the cells of a benchmark: one result per method and seed.

The paper's own numbers are not in them, because its data and its protocol differ.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.baselines import ROWS
from diffusers_cf.benchmark.networks import Method
from diffusers_cf.evaluation.bootstrap import Bootstrap, bootstrap_mean, mean_of_runs
from diffusers_cf.evaluation.pixel_counts import CHAINS
from diffusers_cf.files import new_file, read_json, write_json


TITLES = {1: "Table 1: methods", 2: "Table 2: what each part of the method adds"}
PARTS = dict(zip(CHAINS, ("Maps as they are", "Post-processed maps"), strict=True))
OURS = "ours"  # the method that every other one is compared with
TEST_SET = ("n_slices", "n_patients", "prevalence")
MEASURES = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "per_slice_dice", "slice_auroc")
COLUMNS = {
    "auprc": "AUPRC [95 %]",
    "ideal_dice": "ideal Dice",
    "foreground_auprc": "foreground AUPRC",
    "foreground_ideal_dice": "foreground ideal Dice",
    "per_patient_auprc": "AUPRC per patient [95 %]",
    "per_patient_dice": "Dice per patient, validation's threshold [95 %]",
    "per_slice_dice": "Dice per lesion slice",
    "slice_auroc": "slice AUROC",
}
DIFFERENCE = "ours - this, AUPRC [95 %]; each seed"
SIZE_MEASURES = {"per_patient_auprc": "AUPRC per patient", "per_patient_dice": "Dice per patient"}
REMARKS = (
    "AUPRC, Dice and AUROC in percent: mean ± sample standard deviation over seeds (none for one seed).",
    "Ideal Dice: at the threshold that is best on the test masks, an upper bound.",
    "AUPRC and Dice per patient: mean over patients with a lesion, then over seeds. The threshold of Dice was fixed before.",
    "[95 %]: bootstrap interval of the mean over seeds, with both patients and seeds resampled.",
)
CHOICE = (
    "Settings of inference were chosen on the post-processed maps of validation slices and serve both tables, "
    "maps as they are and post-processed; results with `postprocess` have post-processing that was chosen there, too"
)
OWN_RULE = "the method's own rule"  # how `by` begins for such a method in `protocol.choose_settings`
OWN_TEST_SETS = "Seeds have test sets of their own: the deviation over seeds includes the spread between test sets."
NOT_CONVERGED = (
    "(*) Not shown to have converged: the validation loss of at least one seed still fell at the end of training, "
    "or there were too few comparable checks to tell."
)


def collect_cells(folder: str | Path) -> list[dict]:
    """Return the cells of a benchmark, `cells/METHOD-seedS.json` in its folder, sorted by method and seed.

    Raises:
        InputError: a cell can't be read.
    """
    cells = [read_json(path) for path in Path(folder, "cells").glob("*.json")]
    return sorted(cells, key=lambda cell: (cell["method"], cell["seed"]))


def write_tables(folder: str | Path, methods: Sequence[Method] = (), seeds: Sequence[int] = ()) -> None:
    """Write table1.json, table1.md, table2.json and table2.md from the cells that are there.

    Args:
        folder (`str` or `Path`): a benchmark's folder with at least one cell. The benchmark may be unfinished.
        methods (`Sequence[Method]`): methods that are planned beside those of `ROWS`; without a cell they are listed as
            missing.
        seeds (`Sequence[int]`): seeds that are planned beside those found.

    Raises:
        InputError: a cell can't be read, or the test patients of two methods differ.
    """
    cells = collect_cells(folder)
    seeds = sorted({cell["seed"] for cell in cells} | set(seeds))
    # older cells do not name their modalities
    modalities = [cell.get("benchmark", {}).get("data", {}).get("modalities") or ["flair"] for cell in cells]
    has_flair = all("flair" in names for names in modalities)
    planned = {id: row.tables for id, row in ROWS.items() if has_flair or not id.startswith("threshold")}
    planned.pop("threshold-<modality>", None)
    planned |= {method.id: method.row.tables for method in methods}
    planned |= {cell["method"]: cell["tables"] for cell in cells}
    order = list(ROWS)  # the thresholds of single modalities stand where their placeholder is
    ids = sorted(planned, key=lambda id: (order.index(id if id in ROWS else "threshold-<modality>"), id))
    by_method = {id: [cell for cell in cells if cell["method"] == id] for id in ids}
    draws = cells[0]["bootstrap"]["raw"]
    common = {
        "test_sets": _test_sets(cells),
        "bootstrap": {"samples": len(draws["samples"]), "seed": draws["seed"]},
        "protocol": _protocol(cells),
    }
    for number, title in TITLES.items():
        of_table = {id: found for id, found in by_method.items() if number in planned[id]}
        rows = [_row(found, by_method.get(OURS, [])) for found in of_table.values() if found]
        missing = []
        for id, found in of_table.items():
            lacking = [seed for seed in seeds if seed not in {cell["seed"] for cell in found}]
            missing += [f"{id} seed {seed}" for seed in lacking] if found else [f"{id} (no cell)"]
        table = {"title": title, "ours": OURS, "rows": rows, "missing": missing, **common}
        path = Path(folder, f"table{number}.json")
        write_json(table, path)
        with new_file(path.with_suffix(".md")) as temporary:
            temporary.write_text(table_markdown(table), encoding="utf-8")


def _test_sets(cells: Sequence[dict]) -> list[dict]:
    """Return the size of each test set with its seeds; all seeds may share one test set."""
    sets: dict[tuple, set] = {}
    for cell in cells:
        sets.setdefault(tuple(cell[name] for name in TEST_SET), set()).add(cell["seed"])
    return [{**dict(zip(TEST_SET, size, strict=True)), "seeds": sorted(seeds)} for size, seeds in sets.items()]


def _protocol(cells: Sequence[dict]) -> dict[str, list[str]]:
    """Return every point of the protocol with all the wordings of the cells."""
    found: dict[str, dict] = {}
    for cell in cells:
        for name, words in cell["protocol"].items():
            found.setdefault(name, {})[words] = None  # a dict instead of a set keeps the order
    return {name: list(words) for name, words in found.items()}


def _row(cells: Sequence[dict], ours: Sequence[dict]) -> dict:
    """Return the JSON of one method: fractions from 0 to 1, with mean and deviation over its seeds."""
    row = {name: cells[0][name] for name in ("method", "row", "trained_on")}
    row |= {"seeds": [cell["seed"] for cell in cells], "converged": [cell.get("converged") for cell in cells]}
    row |= {chain: _chain(cells, ours, chain) for chain in CHAINS}
    for name in ("network_evaluations_per_slice", "seconds_per_slice", "train_seconds", "images_seen"):
        row[name] = summary([cell.get(name) for cell in cells])
    scores = [cell.get("slice_scores", {}) for cell in cells]
    row["slice_scores"] = {name: summary([s.get(name) for s in scores]) for name in sorted(set().union(*scores))}
    names = ("settings", "choice", "dataset", "commit", "command")
    return row | {name: [cell.get(name) for cell in cells] for name in names}


def _chain(cells: Sequence[dict], ours: Sequence[dict], chain: str) -> dict:
    """Return the scores of the maps as they are (`raw`) or of the `postprocessed` ones."""
    parts = [cell if chain == "raw" else cell[chain] for cell in cells]
    values = {name: summary([part[name] for part in parts]) for name in MEASURES}
    values["auprc"]["interval"] = _bootstrap(cells, chain).interval()
    values["per_patient_dice"] = _per_patient([part["per_patient_dice"] for part in parts])
    values["per_patient_dice"]["thresholds"] = [part["per_patient_dice"].get("threshold") for part in parts]
    if all("per_patient_auprc" in part for part in parts):  # older results lack it
        values["per_patient_auprc"] = _per_patient([part["per_patient_auprc"] for part in parts])
        values["by_lesion_size"] = {name: _of_size(parts, name) for name in parts[0]["by_lesion_size"]}
    values["ours_minus_this"] = None
    seeds = sorted({cell["seed"] for cell in cells} & {cell["seed"] for cell in ours})
    if seeds and cells[0]["method"] != OURS:
        first, second = (_bootstrap([c for c in side if c["seed"] in seeds], chain) for side in (ours, cells))
        values["ours_minus_this"] = first.minus(second) | {"seeds": seeds}
    return values


def _bootstrap(cells: Sequence[dict], chain: str) -> Bootstrap:
    return mean_of_runs([Bootstrap.from_json(cell["bootstrap"][chain]) for cell in cells])


def _per_patient(parts: Sequence[dict]) -> dict:
    """Return the mean over patients with a lesion of each seed, and over all seeds with its interval."""
    runs = [bootstrap_mean(_by_patient(part)) for part in parts if part["values"]]
    return summary([part["mean"] for part in parts]) | {"interval": mean_of_runs(runs).interval() if runs else None}


def _by_patient(part: dict) -> dict[str, float]:
    return dict(zip(part["patients"], part["values"], strict=True))


def _of_size(parts: Sequence[dict], name: str) -> dict:
    """Return means over the patients whose lesions have a size; each patient's own mean over seeds comes first."""
    sizes = [part["by_lesion_size"][name] for part in parts]
    patients = sorted({patient for size in sizes for patient in size["patients"]})
    found = {
        "share_of_foreground": sizes[0]["share_of_foreground"],
        "n_patients": len(patients),
        "auprc": summary([size["auprc"] for size in sizes]),
    }
    for measure in SIZE_MEASURES:
        scores: dict[str, list] = {patient: [] for patient in patients}
        for part, size in zip(parts, sizes, strict=True):
            run = _by_patient(part[measure])
            for patient in size["patients"]:
                scores[patient].append(run[patient])
        found[measure] = float(np.mean([np.mean(values) for values in scores.values()])) if scores else None
    return found


def summary(values: Sequence[float | None]) -> dict:
    """Return `mean` and sample standard deviation `std` (None for fewer than two) of the defined values, and `values`."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "values": list(values),
    }


def table_markdown(table: dict) -> str:
    """Return the JSON of a table as Markdown."""
    rows, lines = {_name(row): row for row in table["rows"]}, [f"# {table['title']}", ""]
    for found in table["test_sets"]:
        size = f"{found['n_slices']} slices of {found['n_patients']} patients"
        share = f"share of lesion pixels {100 * found['prevalence']:.2f} %"
        lines += [f"Test set of seeds {', '.join(map(str, found['seeds']))}: {size}, {share}.", ""]
    for chain, title in PARTS.items():
        header = ["seeds", *COLUMNS.values(), "network evaluations", "s a slice", "trained on", DIFFERENCE]
        lines += _section(title, "method", header, {name: _scores(row, chain) for name, row in rows.items()})
        sizes = {name: row[chain]["by_lesion_size"] for name, row in rows.items() if "by_lesion_size" in row[chain]}
        header = [
            f"{words}, {name} ({100 * low:g} to {100 * high:g} %, {size['n_patients']} patients)"
            for words in SIZE_MEASURES.values()
            for name, size in next(iter(sizes.values()), {}).items()
            for low, high in [size["share_of_foreground"]]
        ]
        of_size = {
            name: [_percent(size[measure]) for measure in SIZE_MEASURES for size in found.values()]
            for name, found in sizes.items()
        }
        lines += _section(f"{title}, by the lesion's share of the patient's foreground", "method", header, of_size)
    header = ["minutes a seed", "images seen", "settings of inference, a seed after the other"]
    trained = {name: _training(row) for name, row in rows.items() if row["train_seconds"]["mean"]}
    lines += _section("Training and settings", "method", header, trained)
    lines += ["## Remarks", "", *(f"- {remark}" for remark in _remarks(table)), "", "## Protocol", ""]
    # the interval of a single cell is not shown: the table has one over all seeds
    protocol = {name: words for name, words in table["protocol"].items() if name != "interval"}
    return "\n".join([*lines, *(f"- {name}: {' / '.join(words)}" for name, words in protocol.items())]) + "\n"


def _section(title: str, corner: str, header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a Markdown heading and table, numbers aligned right; nothing for no rows."""
    if not rows:
        return []
    rule = ["---", *("---" if name.startswith(("trained", "settings")) else "---:" for name in header)]
    table = [[corner, *header], rule, *([name, *cells] for name, cells in rows.items())]
    return [f"## {title}", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]


def _name(row: dict) -> str:
    return row["row"] + (" (*)" if False in row["converged"] else "")


def _scores(row: dict, chain: str) -> list[str]:
    """Return the cells of a method in the table of scores."""
    values, difference = row[chain], row[chain]["ours_minus_this"]
    costs = row["network_evaluations_per_slice"]["values"]
    evaluations = dict.fromkeys(f"{value:g}" for value in (min(costs), max(costs)))
    seconds = row["seconds_per_slice"]["mean"]
    cells = [str(len(row["seeds"])), *(_mean(values.get(name, {"mean": None})) for name in COLUMNS)]
    cells += [" to ".join(evaluations), f"{seconds:.3f}" if seconds >= 0.001 else "< 0.001", row["trained_on"]]
    if difference is None:
        return [*cells, "-"]
    words, runs = _percent(difference["difference"], "+.1f") + _interval(difference, "+.1f"), difference["by_run"]
    if len(runs) > 1:
        words += "; " + ", ".join(_percent(run, "+.1f") for run in runs)
    return [*cells, words]


def _training(row: dict) -> list[str]:
    """Return the cells of a method in the table of training and settings."""
    short = {"guidance_scale": "w", "strength": "L", "num_inference_steps": "steps"}
    settings = [
        ", ".join(f"{short.get(name, name)} {value}" for name, value in (found or {}).items()) or "-"
        for found in row["settings"]
    ]
    minutes, images = row["train_seconds"]["mean"] / 60, row["images_seen"]["mean"]
    return [f"{minutes:.1f}", f"{images:,.0f}", "; ".join(settings)]


def _percent(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else f"{100 * value:{form}}"


def _interval(value: dict, form: str = ".1f") -> str:
    limits = value.get("interval")
    return f" [{_percent(limits[0], form)}, {_percent(limits[1], form)}]" if limits else ""


def _mean(value: dict) -> str:
    """Return a mean in percent, with its standard deviation over seeds and its interval if there are any."""
    deviation = "" if value.get("std") is None else f" ± {_percent(value['std'])}"
    return _percent(value["mean"]) + deviation + _interval(value)


def _remarks(table: dict) -> list[str]:
    rows, bootstrap = table["rows"], table["bootstrap"]
    rules = {row["row"]: choice["by"] for row in rows for choice in row["choice"] if choice}
    own = [f"; {name}: by {rule}" for name, rule in rules.items() if rule.startswith(OWN_RULE)]
    draws = f"{bootstrap['samples']} draws, seed {bootstrap['seed']}"
    remarks = [
        *REMARKS,
        f"[95 %] of AUPRC: {draws}; of a difference of AUPRC: the same draws for both, over the seeds that both have.",
        CHOICE + "".join(own) + ".",
        *([OWN_TEST_SETS] if len(table["test_sets"]) > 1 else []),
        *([NOT_CONVERGED] if any(False in row["converged"] for row in rows) else []),
    ]
    positions = [row["slice_scores"]["position"] for row in rows if "position" in row["slice_scores"]]
    if positions:  # the same in all rows with all seeds
        most = max(positions, key=lambda found: sum(value is not None for value in found["values"]))
        remarks.append(f"Slice AUROC of the position of a slice alone: {_mean(most)}.")
    seeds = "; ".join(f"{row['row']} {', '.join(map(str, row['seeds']))}" for row in rows) or "none"
    commits = ", ".join(sorted({commit for row in rows for commit in row["commit"] if commit})) or "not known"
    missing = "; ".join(table["missing"]) or "nothing"
    return [*remarks, f"Missing: {missing}.", f"Seeds: {seeds}.", f"Commits: {commits}."]
