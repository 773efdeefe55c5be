"""Tables 1 and 2 as Markdown: what `tables.py` keeps as JSON, to be read."""

from collections.abc import Sequence

from diffusers_cf.benchmark.protocol import CLASSIFIER_TIMESTEPS
from diffusers_cf.evaluation.pixel_counts import CHAINS


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
REMARKS = (
    "AUPRC, Dice and AUROC in percent: mean ± standard deviation over seeds (n - 1 in the denominator; none for one seed).",
    "Ideal Dice: the threshold is chosen on the test masks, an upper bound.",
    "AUPRC, Dice per patient: mean over patients with a lesion, then over seeds; Dice at a threshold fixed beforehand.",
    "[95 %]: bootstrap of the mean over seeds; both seeds and patients are drawn, so that three trainings are a sample, too.",
)
NOT_CONVERGED = (
    "(*) Not shown to have converged: the validation loss of at least one seed still fell at the end of its training, "
    "or the training left too few comparable checks to tell."
)
OWN_RULE = "the method's own rule"  # how `choice` of such a method begins, see `benchmark_protocol.choose_settings`
# The scores of a slice that no map gives: in words, and network evaluations a slice.
SLICE_SCORES = {
    "diffusion_classifier": (
        "diffusion classifier of our model",
        f"{2 * len(CLASSIFIER_TIMESTEPS)} ({len(CLASSIFIER_TIMESTEPS)} timesteps x 2 conditions)",
    ),
    "position": ("position of the slice alone", "0"),
}


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
            lines += _size_lines([row for row in rows if "by_lesion_size" in row[chain]], chain, name)
    lines += _cost_lines(table["rows"]) + _slice_score_lines(table["rows"])
    lines += ["## Remarks", "", *(f"- {remark}" for remark in _remarks(table)), ""]
    lines += ["## Protocol", ""]
    # Each cell's own interval is not shown: the table makes one over all seeds.
    protocol = {name: words for name, words in table["protocol"].items() if name != "interval"}
    lines += [f"- {name}: {' / '.join(words)}" for name, words in protocol.items()]
    return "\n".join(lines) + "\n"


def _markdown_rows(rows: Sequence[dict], chain: str) -> list[str]:
    header = ["method", "seeds", *COLUMNS.values(), "network evaluations", "s a slice", "trained on"]
    header.append("ours - this, AUPRC [95 %]; each seed")
    lines = ["| " + " | ".join(header) + " |", "|---" * 2 + "|---:" * (len(COLUMNS) + 2) + "|---|---:|"]
    for row in rows:
        values = row[chain]
        cells = [_marked(row), str(len(row["seeds"]))]
        cells += [_percent(values.get(name, {"mean": None})) for name in COLUMNS]
        cells += [_evaluations(row), _seconds(row["seconds_per_slice"]["mean"]), row["trained_on"]]
        difference = values["ours_minus_this"] or {"difference": None, "interval": None}
        shown = {"mean": difference["difference"], "interval": difference["interval"]}
        runs = difference.get("by_run") or []
        of_runs = (
            "; " + ", ".join("-" if run is None else f"{100 * run:+.1f}" for run in runs) if len(runs) > 1 else ""
        )
        lines.append("| " + " | ".join([*cells, _percent(shown, "+.1f") + of_runs]) + " |")
    return lines


def _size_lines(rows: Sequence[dict], chain: str, title: str) -> list[str]:
    """Small, medium and large lesions in columns of their own."""
    if not rows:
        return []
    sizes = rows[0][chain]["by_lesion_size"]
    measures = {"per_patient_auprc": "AUPRC per patient", "per_patient_dice": "Dice per patient"}
    columns = [
        f"{name} ({100 * size['share_of_foreground'][0]:g} to {100 * size['share_of_foreground'][1]:g} %,"
        f" {size['n_patients']} patients)"
        for name, size in sizes.items()
    ]
    header = ["method", *(f"{words}, {column}" for words in measures.values() for column in columns)]
    lines = [f"## {title}, by the lesion's share of the patient's foreground", "", "| " + " | ".join(header) + " |"]
    lines.append("|---" + "|---:" * 6 + "|")
    for row in rows:
        found = row[chain]["by_lesion_size"]
        values = [found[name][measure] for measure in measures for name in sizes]
        lines.append("| " + " | ".join([_marked(row), *(_percent({"mean": value}) for value in values)]) + " |")
    return [*lines, ""]


def _marked(row: dict) -> str:
    return row["row"] + (" (*)" if False in row["converged"] else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _percent(value: dict, form: str = ".1f") -> str:
    """Returns a mean in percent, with its standard deviation over seeds and its interval where it has them."""
    if value["mean"] is None:
        return "-"
    text = f"{100 * value['mean']:{form}}"
    if value.get("std") is not None:
        text += f" ± {100 * value['std']:.1f}"
    interval = value.get("interval")
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
    lines = ["## Slice AUROC without a map", "", "| score | slice AUROC | network evaluations |", "|---|---:|---:|"]
    for name in names:
        # the position's is the same in every row that has all seeds
        found = max((row["slice_scores"].get(name, {"values": []}) for row in rows), key=_number_of_seeds)
        words, cost = SLICE_SCORES.get(name, (name, "-"))
        lines.append(f"| {words} | {_percent(found)} | {cost} |")
    return [*lines, ""]


def _number_of_seeds(found: dict) -> int:
    return sum(value is not None for value in found["values"])


def _remarks(table: dict) -> list[str]:
    rows, bootstrap = table["rows"], table["bootstrap"]
    draws = f"{bootstrap['samples']} draws, seed {bootstrap['seed']}"
    remarks = [
        *REMARKS,
        f"[95 %] of AUPRC: {draws}; of a difference of AUPRC: the same draws for both, over the seeds that both have.",
        _choice_remark(rows),
    ]
    if len(table["test_sets"]) > 1:
        remarks.append("Seeds have test sets of their own: the deviation over seeds holds the spread between them.")
    if any(False in row["converged"] for row in rows):
        remarks.append(NOT_CONVERGED)
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


def _choice_remark(rows: Sequence[dict]) -> str:
    """Says what settings of inference were chosen on, and which methods are an exception."""
    text = "Settings of inference were chosen on the post-processed maps of validation slices and serve both tables, "
    text += "maps as they are and post-processed"
    rules = {row["row"]: choice["by"] for row in rows for choice in row["choice"] if choice}
    own = [f"; {row}: by {rule}" for row, rule in rules.items() if rule.startswith(OWN_RULE)]
    return text + "".join(own) + "."
