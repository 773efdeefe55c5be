"""Tables from cells on disk: what stands in them is what the cells and their counts say, also when some are missing."""

import json

import numpy as np
import pytest

from diffusers_cf import InputError
from diffusers_cf.baselines import ROWS
from diffusers_cf.benchmark.protocol import CLASSIFIER_TIMESTEPS
from diffusers_cf.benchmark.tables import collect_cells, summary, write_tables
from diffusers_cf.evaluation.bootstrap import Bootstrap, bootstrap_mean, bootstraps_of_file, mean_of_runs
from diffusers_cf.evaluation.protocol import evaluate, write_result


METHODS = ("ours", "threshold", "dae", "cdpm-adagn")  # not in the order of the tables
PATIENTS, SLICES, SIDE = 4, 3, 16


class Slices:
    """What `evaluate` needs of a data set: a lesion in every slice but the first of each patient; one patient healthy."""

    has_masks = True

    def __init__(self):
        self.patients = np.repeat([f"p{i}" for i in range(PATIENTS)], SLICES)
        self.slices = np.tile(np.arange(SLICES), PATIENTS)
        self.labels = ((self.slices > 0) & (self.patients != "p3")).astype(int)
        self.masks = np.zeros((len(self), SIDE, SIDE), dtype=np.uint8)
        self.masks[self.labels > 0, 5:11, 5:10] = 1
        self.images = np.zeros((len(self), 1, SIDE, SIDE), dtype=np.float32)
        self.images[:, :, 1:-1, 1:-1] = 0.5

    def __len__(self):
        return len(self.patients)

    def __getitems__(self, rows):
        return rows

    def collate(self, rows):
        return {name: getattr(self, name)[rows] for name in ("images", "masks", "labels", "slices")}


def write_cell(folder, method, seed, signal, threshold=0.8, patients=PATIENTS, **facts):
    """Evaluates a map of noise plus `signal` in the lesion and writes its cell; returns the cell."""
    slices, rng = Slices(), np.random.default_rng([seed, len(method)])
    # A slice's row travels in its image, for the map to know the mask.
    slices.images[:, 0, 0, 0] = 0.001 * np.arange(1, len(slices) + 1)

    def anomaly_map(images):
        rows = (images[:, 0, 0, 0].numpy() * 1000).round().astype(int) - 1
        return rng.random((len(rows), SIDE, SIDE), dtype=np.float32) + np.float32(signal) * slices.masks[rows]

    path = folder / "cells" / f"{method}-seed{seed}.json"
    path.parent.mkdir(exist_ok=True)
    counts = folder / "counts.npz"
    result = evaluate(
        anomaly_map, slices, threshold=threshold, counts_path=counts, progress=False,
        indices=range(patients * SLICES), network_evaluations_per_slice=3 if method == "ours" else 1,
    )  # fmt: skip
    result |= {"method": method, "seed": seed, "row": method.upper(), "tables": [1, 2] if method == "ours" else [1]}
    result |= {"trained_on": "healthy", "converged": True, "train_seconds": 90.0, "images_seen": 1200}
    result |= {"bootstrap": bootstraps_of_file(counts, samples=50)}
    result |= {"settings": {"strength": 0.5}, "commit": "abc123", "command": f"benchmark {method}"}
    write_result(result | facts, path)
    return result | facts


@pytest.fixture
def finished(tmp_path):
    """A folder with every cell of two seeds."""
    untrained, cells = {"trained_on": "not trained", "train_seconds": None, "converged": None}, []
    for seed in (0, 1):
        cells.append(write_cell(tmp_path, "threshold", seed, 0.1, **untrained))
        cells.append(write_cell(tmp_path, "dae", seed, 0.3, converged=seed == 0))
        cells.append(write_cell(tmp_path, "cdpm-adagn", seed, 0.2, tables=[2], row="AdaGN"))
        cells.append(write_cell(tmp_path, "ours", seed, 0.5, slice_scores={"position": 0.7}, saturated_share=0.125))
    return tmp_path, {(cell["method"], cell["seed"]): cell for cell in cells}


def read(folder, number):
    table = json.loads((folder / f"table{number}.json").read_text())
    return {row["method"]: row for row in table["rows"]}, table


def without_a_cell(number, *measured):
    """What a table lacks where these methods have every cell and nothing else was planned."""
    return [
        f"{method} (no cell)"
        for method, row in ROWS.items()
        if number in row.tables and "<" not in method and method not in measured
    ]


def markdown_rows(folder, number, section):
    """The cells of each row of a section of the Markdown, by its first column."""
    text = (folder / f"table{number}.md").read_text()
    lines = text.split(f"## {section}\n")[1].split("\n## ")[0].strip().splitlines()
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in (rule, *rows)} == {len(header)}
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_summary_is_mean_and_sample_deviation_of_what_is_defined():
    assert summary([0.2, None, 0.4]) == {
        "mean": pytest.approx(0.3),
        "std": pytest.approx(0.02**0.5),
        "values": [0.2, None, 0.4],
    }
    assert summary([0.2]) == {"mean": 0.2, "std": None, "values": [0.2]}
    assert summary([None]) == {"mean": None, "std": None, "values": [None]}


def test_cells_come_by_method_and_seed(finished):
    assert [(cell["method"], cell["seed"]) for cell in collect_cells(finished[0])] == [
        ("cdpm-adagn", 0), ("cdpm-adagn", 1), ("dae", 0), ("dae", 1), ("ours", 0), ("ours", 1), ("threshold", 0),
        ("threshold", 1),
    ]  # fmt: skip


def difference(folder, chain, method, seeds):
    """Ours minus a method by what their cells hold."""
    runs = [
        mean_of_runs([
            Bootstrap.from_json(cell["bootstrap"][chain])
            for cell in collect_cells(folder) if cell["method"] == name and cell["seed"] in seeds
        ])
        for name in ("ours", method)
    ]  # fmt: skip
    return runs[0].minus(runs[1]) | {"seeds": list(seeds)}


def test_a_table_holds_the_cells_in_the_order_given(finished):
    folder, cells = finished
    assert [path.name for path in write_tables(folder, METHODS)] == [
        "table1.json", "table1.md", "table2.json", "table2.md"
    ]  # fmt: skip
    rows, table = read(folder, 1)
    assert list(rows) == ["threshold", "dae", "ours"] and list(read(folder, 2)[0]) == ["cdpm-adagn", "ours"]
    for chain in ("raw", "postprocessed"):
        parts = [cells["dae", seed] if chain == "raw" else cells["dae", seed][chain] for seed in (0, 1)]
        for name in (
            "auprc",
            "ideal_dice",
            "foreground_auprc",
            "foreground_ideal_dice",
            "per_slice_dice",
            "slice_auroc",
        ):
            values = [part[name] for part in parts]
            assert rows["dae"][chain][name]["mean"] == pytest.approx(np.mean(values))
            assert rows["dae"][chain][name]["std"] == pytest.approx(np.std(values, ddof=1))
        per_patient = rows["dae"][chain]["per_patient_dice"]
        means = np.mean([part["per_patient_dice"]["values"] for part in parts], axis=0)
        assert per_patient["mean"] == pytest.approx(means.mean())
        assert per_patient["values"] == [part["per_patient_dice"]["mean"] for part in parts]
        assert per_patient["std"] == pytest.approx(np.std(per_patient["values"], ddof=1)) and per_patient["std"] > 0
        for measure in ("per_patient_dice", "per_patient_auprc"):
            found = [part[measure] for part in parts]
            runs = [bootstrap_mean(dict(zip(run["patients"], run["values"], strict=True))) for run in found]
            assert rows["dae"][chain][measure]["interval"] == mean_of_runs(runs).interval()
            assert rows["dae"][chain][measure]["mean"] == pytest.approx(np.mean([run["mean"] for run in found]))
    assert rows["dae"]["raw"] != rows["dae"]["postprocessed"]


def test_ours_is_compared_with_every_other_method_on_the_same_patients(finished):
    folder, _ = finished
    write_tables(folder, METHODS)
    for number, others in ((1, ("threshold", "dae")), (2, ("cdpm-adagn",))):
        rows, _ = read(folder, number)
        assert rows["ours"]["raw"]["ours_minus_this"] is None
        for method in others:
            for chain in ("raw", "postprocessed"):
                expected = difference(folder, chain, method, (0, 1))
                assert rows[method][chain]["ours_minus_this"] == expected
    raw = {method: row["raw"] for method, row in read(folder, 1)[0].items()}
    expected = raw["ours"]["auprc"]["mean"] - raw["dae"]["auprc"]["mean"]
    assert raw["dae"]["ours_minus_this"]["difference"] == pytest.approx(expected, abs=1e-6)


def test_markdown_says_what_the_json_says(finished):
    folder, cells = finished
    write_tables(folder, METHODS)
    rows, _ = read(folder, 1)
    for section, chain in (("Maps as they are", "raw"), ("Post-processed maps", "postprocessed")):
        shown = markdown_rows(folder, 1, section)
        assert list(shown) == ["THRESHOLD", "DAE (*)", "OURS"]
        for name, method in zip(shown, ("threshold", "dae", "ours"), strict=True):
            dice = "Dice per patient, validation's threshold [95 %]"
            for column, measure in (("AUPRC [95 %]", "auprc"), (dice, "per_patient_dice")):
                found = rows[method][chain][measure]
                mean, std, low, high = (100 * value for value in (found["mean"], found["std"], *found["interval"]))
                assert shown[name][column] == f"{mean:.1f} ± {std:.1f} [{low:.1f}, {high:.1f}]"
            # The others have no interval.
            found = rows[method][chain]["foreground_auprc"]
            expected = f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"
            assert shown[name]["foreground AUPRC"] == expected
        assert [shown[name]["seeds"] for name in shown] == ["2", "2", "2"]
        assert [shown[name]["network evaluations"] for name in shown] == ["1", "1", "3"]
        assert shown["THRESHOLD"]["trained on"] == "not trained"
        difference = rows["dae"][chain]["ours_minus_this"]
        low, high = (100 * limit for limit in difference["interval"])
        expected = f"{100 * difference['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        expected += "; " + ", ".join(f"{100 * run:+.1f}" for run in difference["by_run"])
        assert shown["DAE (*)"]["ours - this, AUPRC [95 %]; each seed"] == expected
        assert shown["OURS"]["ours - this, AUPRC [95 %]; each seed"] == "-"


def test_lesions_by_size(finished):
    """All lesions of these patients are a tenth of the foreground: large."""
    folder, cells = finished
    write_tables(folder, METHODS)
    rows, _ = read(folder, 1)
    for section, chain in (("Maps as they are", "raw"), ("Post-processed maps", "postprocessed")):
        sizes = rows["dae"][chain]["by_lesion_size"]
        assert [sizes[name]["n_patients"] for name in sizes] == [0, 0, 3] and sizes["small"][
            "per_patient_dice"
        ] is None
        assert sizes["large"]["share_of_foreground"] == [0.08, 1.0]
        shown = markdown_rows(folder, 1, f"{section}, by the lesion's share of the patient's foreground")["DAE (*)"]
        for measure, words in (("per_patient_auprc", "AUPRC"), ("per_patient_dice", "Dice")):
            assert sizes["large"][measure] == pytest.approx(rows["dae"][chain][measure]["mean"])
            assert (
                shown[f"{words} per patient, large (8 to 100 %, 3 patients)"] == f"{100 * sizes['large'][measure]:.1f}"
            )
            assert shown[f"{words} per patient, small (0 to 3 %, 0 patients)"] == "-"


def test_cells_of_before_patients_and_sizes_were_measured(tmp_path):
    cell = write_cell(tmp_path, "dae", 0, 0.3)
    for part in (cell, cell["postprocessed"]):
        del part["per_patient_auprc"], part["by_lesion_size"]
    write_result(cell, tmp_path / "cells" / "dae-seed0.json")
    write_tables(tmp_path)
    shown = markdown_rows(tmp_path, 1, "Maps as they are")["DAE"]
    assert shown["AUPRC per patient [95 %]"] == "-" and shown["ideal Dice"] != "-"
    assert "by the lesion's share" not in (tmp_path / "table1.md").read_text()


def test_remarks_name_convergence_protocol_seeds_commits_and_extras(finished):
    folder, cells = finished
    write_tables(folder, METHODS)
    text = (folder / "table1.md").read_text()
    assert (
        "- (*) Not shown to have converged: the validation loss of at least one seed still fell at the end of its "
        in text
    )
    assert "training, or the training left too few comparable checks to tell." in text
    assert "- [95 %] of AUPRC: 50 draws, seed 0; of a difference of AUPRC: the same draws for both" in text
    assert "- OURS: 12.50 % of the foreground is saturated in the clean image" in text
    assert "- Seeds: THRESHOLD 0, 1; DAE 0, 1; OURS 0, 1." in text and "- Commits: abc123." in text
    for name in ("resolution", "pixels", "ideal_threshold", "postprocessed"):
        assert f"- {name}: {cells['ours', 0]['protocol'][name]}" in text
    facts = {"minutes a seed": "1.5", "images seen": "1,200"}
    facts |= {"settings of inference, a seed after the other": "L 0.5; L 0.5"}
    shown = markdown_rows(folder, 1, "Training and settings")
    assert shown == {name: {"method": name, **facts} for name in ("DAE (*)", "OURS")}
    # Everything in the second table has converged.
    assert "(*)" not in (folder / "table2.md").read_text()


def test_other_scores_of_a_slice_say_what_they_cost(tmp_path):
    position = {"position": 0.7}
    scores = position | {"diffusion_classifier": 0.9, "another": 0.8}
    write_cell(tmp_path, "threshold", 0, 0.4, slice_scores={"position": 0.6})
    write_cell(tmp_path, "cam", 0, 0.4)
    write_cell(tmp_path, "ours", 0, 0.5, slice_scores=scores)
    write_cell(tmp_path, "ours", 1, 0.5, slice_scores=scores)
    write_tables(tmp_path)
    shown = markdown_rows(tmp_path, 1, "Slice AUROC without a map")
    names = {"another": "another", "diffusion classifier of our model": "diffusion_classifier"}
    names["position of the slice alone"] = "position"
    assert list(shown) == list(names) and len(CLASSIFIER_TIMESTEPS) == 6
    found = [(row["slice AUROC"], row["network evaluations"]) for row in shown.values()]
    # the row with all seeds speaks for the position
    assert found == [("80.0 ± 0.0", "-"), ("90.0 ± 0.0", "12 (6 timesteps x 2 conditions)"), ("70.0 ± 0.0", "0")]


def test_a_remark_says_what_settings_were_chosen_on(tmp_path):
    by = "AUPRC in the foreground of post-processed validation slices"
    write_cell(tmp_path, "ours", 0, 0.5, choice={"by": by})
    write_cell(tmp_path, "cam", 0, 0.5, choice={"by": "nothing to choose"})
    common = (
        "- Settings of inference were chosen on the post-processed maps of validation slices and serve both tables, "
    )
    common += "maps as they are and post-processed"
    write_tables(tmp_path)
    assert f"{common}.\n" in (tmp_path / "table1.md").read_text()
    rule = "the method's own rule on healthy validation slices"
    write_cell(tmp_path, "dae", 0, 0.5, choice={"by": rule})
    write_tables(tmp_path)
    assert f"{common}; DAE: by {rule}.\n" in (tmp_path / "table1.md").read_text()


def test_every_row_of_a_table_is_missing_until_it_has_all_seeds_of_the_folder(tmp_path):
    for method, row in ROWS.items():
        if "<" not in method:
            write_cell(tmp_path, method, 0, 0.3, tables=list(row.tables))
    write_tables(tmp_path, ["threshold-t1"], seeds=(0,))
    assert read(tmp_path, 1)[1]["missing"] == ["threshold-t1 (no cell)"] and read(tmp_path, 2)[1]["missing"] == []
    assert "- Missing: nothing." in (tmp_path / "table2.md").read_text()
    # A later command that asks for one method and another seed alone.
    write_cell(tmp_path, "dae", 1, 0.3)
    write_tables(tmp_path, ["dae"], seeds=(1,))
    for number in (1, 2):
        wanted = [m for m, row in ROWS.items() if number in row.tables and "<" not in m and m != "dae"]
        assert read(tmp_path, number)[1]["missing"] == [f"{method} seed 1" for method in wanted]
    # And one that waits for a seed that no method has yet.
    write_tables(tmp_path, ["dae"], seeds=(0, 1, 2))
    assert "dae seed 2" in read(tmp_path, 1)[1]["missing"] and "ours seed 2" in read(tmp_path, 2)[1]["missing"]
    # And one that asks for what is there: the rest is as far off as before.
    write_tables(tmp_path, ["dae"], seeds=(0,))
    assert "fanogan seed 1; vae seed 1;" in (tmp_path / "table1.md").read_text()


def test_equalised_flair_is_not_missing_where_there_is_no_flair(tmp_path):
    write_cell(tmp_path, "ours", 0, 0.3, benchmark={"data": {"modalities": ["t1", "t2"]}})
    write_tables(tmp_path)
    assert read(tmp_path, 1)[1]["missing"] == without_a_cell(
        1, "ours", "threshold", "threshold-median", "threshold-robust-z"
    )
    write_cell(tmp_path, "ours", 0, 0.3, benchmark={"data": {"modalities": ["t1", "flair"]}})
    write_tables(tmp_path)
    assert read(tmp_path, 1)[1]["missing"] == without_a_cell(1, "ours")


def test_an_unfinished_benchmark_gives_the_rows_that_are_there(tmp_path):
    write_cell(tmp_path, "dae", 0, 0.3)
    write_cell(tmp_path, "dae", 1, 0.3)
    write_cell(tmp_path, "ours", 0, 0.5)
    write_cell(tmp_path, "threshold-t1", 0, 0.2, trained_on="not trained")
    write_tables(tmp_path, METHODS, seeds=(0, 1))
    rows, table = read(tmp_path, 1)
    assert list(rows) == ["threshold-t1", "dae", "ours"]
    never = ["fanogan", "vae", "vae-restoration", "cdpm-healthy", "cdpm-classifier"]
    missing = [
        "threshold (no cell)",
        "threshold-median (no cell)",
        "threshold-robust-z (no cell)",
        "threshold-t1 seed 1",
    ]
    missing += [f"{method} (no cell)" for method in never]
    missing += ["ours seed 1", "forward-map (no cell)", "cam (no cell)"]
    assert table["missing"] == missing
    # Compared on the seeds that both have.
    assert rows["dae"]["raw"]["ours_minus_this"] == difference(tmp_path, "raw", "dae", (0,))
    assert rows["threshold-t1"]["raw"]["ours_minus_this"]["difference"] > 0
    assert f"- Missing: {'; '.join(missing)}." in (tmp_path / "table1.md").read_text()
    assert list(read(tmp_path, 2)[0]) == ["ours"]


def test_seeds_may_have_test_sets_of_their_own(tmp_path):
    cells = {}
    for seed, patients in ((0, PATIENTS), (1, 2)):
        for method, signal in (("dae", 0.3), ("ours", 0.6)):
            cells[method, seed] = write_cell(tmp_path, method, seed, signal, patients=patients)
    write_cell(tmp_path, "threshold", 1, 0.1, patients=2)
    write_tables(tmp_path, METHODS)
    rows, table = read(tmp_path, 1)
    assert [(found["n_patients"], found["seeds"]) for found in table["test_sets"]] == [(4, [0]), (2, [1])]
    # Patients p0 and p1 were tested twice, p2 once, and p3 has no lesion.
    first, second = (cells["dae", seed]["per_patient_dice"] for seed in (0, 1))
    assert rows["dae"]["raw"]["per_patient_dice"]["mean"] == pytest.approx((first["mean"] + second["mean"]) / 2)
    large = rows["dae"]["raw"]["by_lesion_size"]["large"]
    first, second = first["values"], second["values"]
    expected = np.mean([(first[0] + second[0]) / 2, (first[1] + second[1]) / 2, first[2]])
    assert large["n_patients"] == 3 and large["per_patient_dice"] == pytest.approx(expected)
    assert rows["threshold"]["raw"]["ours_minus_this"]["seeds"] == [1]
    assert rows["dae"]["raw"]["ours_minus_this"]["seeds"] == [0, 1]
    text = (tmp_path / "table1.md").read_text()
    assert "Test set of seeds 1: 6 slices of 2 patients" in text and "test sets of their own" in text


def test_one_seed_shows_no_deviation(tmp_path):
    cell = write_cell(tmp_path, "dae", 0, 0.3)
    write_tables(tmp_path)
    shown = markdown_rows(tmp_path, 1, "Maps as they are")["DAE"]
    low, high = (100 * limit for limit in read(tmp_path, 1)[0]["dae"]["raw"]["auprc"]["interval"])
    assert low < high and shown["AUPRC [95 %]"] == f"{100 * cell['auprc']:.1f} [{low:.1f}, {high:.1f}]"
    assert shown["foreground AUPRC"] == f"{100 * cell['foreground_auprc']:.1f}"
    dice = cell["per_patient_dice"]
    low, high = (100 * limit for limit in dice["interval"])
    expected = f"{100 * dice['mean']:.1f} [{low:.1f}, {high:.1f}]"
    assert shown["Dice per patient, validation's threshold [95 %]"] == expected
    assert "test sets of their own" not in (tmp_path / "table1.md").read_text()


def test_without_ours_nothing_is_compared(tmp_path):
    write_cell(tmp_path, "dae", 0, 0.3)
    write_tables(tmp_path, METHODS)
    rows, table = read(tmp_path, 1)
    assert rows["dae"]["raw"]["ours_minus_this"] is None
    assert markdown_rows(tmp_path, 1, "Maps as they are")["DAE"]["ours - this, AUPRC [95 %]; each seed"] == "-"
    assert read(tmp_path, 2)[1]["missing"] == without_a_cell(2)


def test_settings_that_cost_differently_show_as_a_range(tmp_path):
    write_cell(tmp_path, "dae", 0, 0.3, network_evaluations_per_slice=45)
    write_cell(tmp_path, "dae", 1, 0.3, network_evaluations_per_slice=15)
    write_tables(tmp_path, METHODS)
    assert markdown_rows(tmp_path, 1, "Maps as they are")["DAE"]["network evaluations"] == "15 to 45"


def test_wrong_cells_are_named(tmp_path):
    with pytest.raises(InputError, match="no results of a benchmark"):
        collect_cells(tmp_path)
    write_cell(tmp_path, "dae", 0, 0.3)
    write_cell(tmp_path, "ours", 0, 0.3, n_slices=5)
    with pytest.raises(InputError, match="ours seed 0 and dae seed 0 differ in n_slices"):
        collect_cells(tmp_path)
    path = tmp_path / "cells" / "ours-seed0.json"
    path.write_text('{"method": "ours"}')
    with pytest.raises(InputError, match="ours-seed0.json: no seed"):
        collect_cells(tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="ours-seed0.json: not a JSON file"):
        collect_cells(tmp_path)
