import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import FakeDataset

from diffusers_cf.baselines import ROWS
from diffusers_cf.benchmark.networks import Method, methods_for
from diffusers_cf.benchmark.tables import DIFFERENCE, MEASURES, collect_cells, summary, table_markdown, write_tables
from diffusers_cf.evaluation.bootstrap import Bootstrap, bootstrap_mean, bootstraps_of_file, mean_of_runs
from diffusers_cf.evaluation.protocol import evaluate
from diffusers_cf.files import write_json


RESULTS = Path(__file__).parent.parent / "results"
PATIENTS, SLICES, SIDE = 4, 3, 16


class Slices(FakeDataset):
    """Every slice but the first of each patient has a lesion; patient p3 is healthy."""

    def __init__(self):
        self.patients = np.repeat([f"p{i}" for i in range(PATIENTS)], SLICES)
        self.slices = np.tile(np.arange(SLICES), PATIENTS)
        self.labels = ((self.slices > 0) & (self.patients != "p3")).astype(int)
        self.masks = np.zeros((PATIENTS * SLICES, SIDE, SIDE), dtype=np.uint8)
        self.masks[self.labels > 0, 5:11, 5:10] = 1
        self.images = np.zeros((PATIENTS * SLICES, 1, SIDE, SIDE), dtype=np.float32)
        self.images[:, :, 1:-1, 1:-1] = 0.5


def write_cell(folder, method, seed, signal, threshold=0.8, patients=PATIENTS, **facts):
    """Evaluate a map of noise plus `signal` in the lesion, write its cell and return it."""
    slices, rng = Slices(), np.random.default_rng([seed, len(method)])
    # the first pixel of an image tells the map which slice it is
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
    result |= {
        "method": method, "seed": seed, "row": method.upper(), "tables": [1, 2] if method == "ours" else [1],
        "trained_on": "healthy", "converged": True, "train_seconds": 90.0, "images_seen": 1200, "commit": "abc123",
        "settings": {"strength": 0.5}, "bootstrap": bootstraps_of_file(counts, samples=50),
    }  # fmt: skip
    write_json(result | facts, path)
    return result | facts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with every cell of two seeds and the tables, and the cells."""
    untrained, cells = {"trained_on": "not trained", "train_seconds": None, "converged": None}, []
    folder = tmp_path_factory.mktemp("finished")
    for seed in (0, 1):
        rule = {"by": "the method's own rule on healthy validation slices"}
        cells.append(write_cell(folder, "threshold", seed, 0.1, choice=rule, **untrained))
        cells.append(write_cell(folder, "dae", seed, 0.3, converged=seed == 0))
        cells.append(write_cell(folder, "cdpm-adagn", seed, 0.2, tables=[2], row="AdaGN"))
        cells.append(write_cell(folder, "ours", seed, 0.5, slice_scores={"position": 0.7}))
    write_tables(folder)
    return folder, {(cell["method"], cell["seed"]): cell for cell in cells}


def read(folder, number):
    table = json.loads((folder / f"table{number}.json").read_text())
    return {row["method"]: row for row in table["rows"]}, table


def markdown_rows(folder, number, section):
    """Return the cells of each row of a section of the Markdown, by its first column."""
    text = (folder / f"table{number}.md").read_text()
    lines = text.split(f"## {section}\n")[1].split("\n## ")[0].strip().splitlines()
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in (rule, *rows)} == {len(header)}
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_summary_is_mean_and_sample_deviation_of_what_is_defined():
    mean, std = pytest.approx(0.3), pytest.approx(0.02**0.5)
    assert summary([0.2, None, 0.4]) == {"mean": mean, "std": std, "values": [0.2, None, 0.4]}
    assert summary([0.2]) == {"mean": 0.2, "std": None, "values": [0.2]}
    assert summary([None]) == {"mean": None, "std": None, "values": [None]}


def difference(folder, chain, method, seeds):
    """Return ours minus a method, from the draws that their cells hold."""
    runs = {name: [] for name in ("ours", method)}
    for cell in collect_cells(folder):
        if cell["method"] in runs and cell["seed"] in seeds:
            runs[cell["method"]].append(Bootstrap.from_json(cell["bootstrap"][chain]))
    return mean_of_runs(runs["ours"]).minus(mean_of_runs(runs[method])) | {"seeds": list(seeds)}


def test_a_table_holds_the_cells_in_the_order_of_the_tables(finished):
    folder, cells = finished
    rows, _ = read(folder, 1)
    assert list(rows) == ["threshold", "dae", "ours"] and list(read(folder, 2)[0]) == ["cdpm-adagn", "ours"]
    for chain in ("raw", "postprocessed"):
        parts = [cells["dae", seed] if chain == "raw" else cells["dae", seed][chain] for seed in (0, 1)]
        found = rows["dae"][chain]
        for name in MEASURES:
            values = [part[name] for part in parts]
            assert found[name]["mean"] == pytest.approx(np.mean(values))
            assert found[name]["std"] == pytest.approx(np.std(values, ddof=1))
        draws = [Bootstrap.from_json(cells["dae", seed]["bootstrap"][chain]) for seed in (0, 1)]
        assert found["auprc"]["interval"] == mean_of_runs(draws).interval()
        for measure in ("per_patient_dice", "per_patient_auprc"):
            of_parts = [part[measure] for part in parts]
            runs = [bootstrap_mean(dict(zip(run["patients"], run["values"], strict=True))) for run in of_parts]
            assert found[measure]["interval"] == mean_of_runs(runs).interval()
            assert found[measure]["values"] == [run["mean"] for run in of_parts]
    assert rows["dae"]["raw"] != rows["dae"]["postprocessed"]


def test_ours_is_compared_with_every_other_method_on_the_same_patients(finished):
    folder, _ = finished
    for number, others in ((1, ("threshold", "dae")), (2, ("cdpm-adagn",))):
        rows, _ = read(folder, number)
        for chain in ("raw", "postprocessed"):
            assert rows["ours"][chain]["ours_minus_this"] is None
            for method in others:
                assert rows[method][chain]["ours_minus_this"] == difference(folder, chain, method, (0, 1))
    raw = {method: row["raw"] for method, row in read(folder, 1)[0].items()}
    expected = raw["ours"]["auprc"]["mean"] - raw["dae"]["auprc"]["mean"]
    assert raw["dae"]["ours_minus_this"]["difference"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("section", "chain"), [("Maps as they are", "raw"), ("Post-processed maps", "postprocessed")])
def test_markdown_shows_the_json(finished, section, chain):
    rows, _ = read(finished[0], 1)
    shown = markdown_rows(finished[0], 1, section)
    assert list(shown) == ["THRESHOLD", "DAE (*)", "OURS"]  # (*): not converged
    for name, method in zip(shown, ("threshold", "dae", "ours"), strict=True):
        for column, measure in (("AUPRC [95 %]", "auprc"), ("AUPRC per patient [95 %]", "per_patient_auprc")):
            found = rows[method][chain][measure]
            mean, std, low, high = (100 * value for value in (found["mean"], found["std"], *found["interval"]))
            assert shown[name][column] == f"{mean:.1f} ± {std:.1f} [{low:.1f}, {high:.1f}]"
    found = rows["dae"][chain]["ours_minus_this"]
    parts = [found["difference"], *found["interval"], *found["by_run"]]
    compared = shown["DAE (*)"][DIFFERENCE]
    assert re.findall(r"[+-]\d+\.\d", compared) == [f"{100 * part:+.1f}" for part in parts]
    assert shown["OURS"][DIFFERENCE] == "-"


@pytest.mark.parametrize(("section", "chain"), [("Maps as they are", "raw"), ("Post-processed maps", "postprocessed")])
def test_patients_are_grouped_by_the_size_of_their_lesions(finished, section, chain):
    """All lesions of these patients are a tenth of the foreground: large."""
    found = read(finished[0], 1)[0]["dae"][chain]
    sizes = found["by_lesion_size"]
    assert [sizes[name]["n_patients"] for name in sizes] == [0, 0, 3]
    shown = markdown_rows(finished[0], 1, f"{section}, by the lesion's share of the patient's foreground")["DAE (*)"]
    for measure in ("per_patient_auprc", "per_patient_dice"):
        assert sizes["small"][measure] is None
        assert sizes["large"][measure] == pytest.approx(found[measure]["mean"])
    values = [f"{100 * sizes['large'][measure]:.1f}" for measure in ("per_patient_auprc", "per_patient_dice")]
    assert list(shown.values()) == ["DAE (*)", "-", "-", values[0], "-", "-", values[1]]


def test_remarks_name_what_is_known_of_the_runs(finished):
    folder, cells = finished
    text = (folder / "table1.md").read_text()
    assert "- (*) " in text and "(*)" not in (folder / "table2.md").read_text()  # all methods there have converged
    for words in ("; THRESHOLD: by the method's own rule on", "50 draws, seed 0", "70.0", "abc123"):
        assert words in text
    assert "- Seeds: THRESHOLD 0, 1; DAE 0, 1; OURS 0, 1." in text
    for name, words in cells["ours", 0]["protocol"].items():
        assert (f"- {name}: {words}" in text) == (name != "interval")
    shown = markdown_rows(folder, 1, "Training and settings")
    assert list(shown) == ["DAE (*)", "OURS"]
    assert [list(row.values())[1:] for row in shown.values()] == [["1.5", "1,200", "L 0.5; L 0.5"]] * 2


def test_the_position_of_a_slice_stands_beside_the_maps(tmp_path):
    write_cell(tmp_path, "threshold", 0, 0.4, slice_scores={"position": 0.6})
    for seed in (0, 1):
        write_cell(tmp_path, "ours", seed, 0.5, slice_scores={"position": 0.7})
    write_tables(tmp_path)
    # it comes from the method with the most seeds
    assert "Slice AUROC of the position of a slice alone: 70.0 ± 0.0." in (tmp_path / "table1.md").read_text()


def test_every_row_is_missing_until_it_has_all_seeds(tmp_path):
    cell = write_cell(tmp_path, "dae", 0, 0.3)
    for method, row in ROWS.items():
        if "<" not in method:
            same = cell | {"method": method, "row": row.title, "tables": list(row.tables)}
            write_json(same, tmp_path / "cells" / f"{method}-seed0.json")
    write_tables(tmp_path, [Method.of("threshold-t1")], seeds=(0,))
    assert read(tmp_path, 1)[1]["missing"] == ["threshold-t1 (no cell)"] and read(tmp_path, 2)[1]["missing"] == []
    write_cell(tmp_path, "dae", 1, 0.3)  # a later command asks for one method and one more seed
    write_tables(tmp_path, [Method.of("dae")], seeds=(1,))
    for number in (1, 2):
        wanted = [m for m, row in ROWS.items() if number in row.tables and "<" not in m and m != "dae"]
        assert read(tmp_path, number)[1]["missing"] == [f"{method} seed 1" for method in wanted]


def test_thresholds_of_flair_are_not_missing_where_there_is_no_flair(tmp_path):
    write_cell(tmp_path, "ours", 0, 0.3, benchmark={"data": {"modalities": ["t1", "t2"]}})
    write_tables(tmp_path)
    missing = read(tmp_path, 1)[1]["missing"]
    assert "dae (no cell)" in missing and not any(name.startswith("threshold") for name in missing)
    ids = [method.id for method in methods_for(["t1", "t2"])]
    assert [id for id in ids if id.startswith("threshold")] == ["threshold-t1", "threshold-t2"]


def test_an_unfinished_benchmark_gives_the_rows_that_are_there(tmp_path):
    write_cell(tmp_path, "dae", 0, 0.3)
    write_cell(tmp_path, "dae", 1, 0.3)
    write_tables(tmp_path)
    assert read(tmp_path, 1)[0]["dae"]["raw"]["ours_minus_this"] is None
    assert read(tmp_path, 2)[0] == {}
    write_cell(tmp_path, "ours", 0, 0.5)
    write_cell(tmp_path, "threshold-t1", 0, 0.2, trained_on="not trained")
    write_tables(tmp_path)
    rows, table = read(tmp_path, 1)
    assert list(rows) == ["threshold-t1", "dae", "ours"] and list(read(tmp_path, 2)[0]) == ["ours"]
    assert {"threshold-t1 seed 1", "ours seed 1", "vae (no cell)"} < set(table["missing"])
    assert rows["dae"]["raw"]["ours_minus_this"] == difference(tmp_path, "raw", "dae", (0,))  # seeds that both have
    assert f"- Missing: {'; '.join(table['missing'])}." in (tmp_path / "table1.md").read_text()


def test_seeds_may_have_test_sets_of_their_own(tmp_path):
    cells = {}
    for seed, patients in ((0, PATIENTS), (1, 2)):
        for method, signal in (("dae", 0.3), ("ours", 0.6)):
            cells[method, seed] = write_cell(tmp_path, method, seed, signal, patients=patients)
    write_cell(tmp_path, "threshold", 1, 0.1, patients=2)
    write_tables(tmp_path)
    rows, table = read(tmp_path, 1)
    assert [(found["n_patients"], found["seeds"]) for found in table["test_sets"]] == [(4, [0]), (2, [1])]
    # patients p0 and p1 were tested twice, p2 once, and p3 has no lesion
    first, second = (cells["dae", seed]["per_patient_dice"] for seed in (0, 1))
    assert rows["dae"]["raw"]["per_patient_dice"]["mean"] == pytest.approx((first["mean"] + second["mean"]) / 2)
    large = rows["dae"]["raw"]["by_lesion_size"]["large"]
    first, second = first["values"], second["values"]
    expected = np.mean([(first[0] + second[0]) / 2, (first[1] + second[1]) / 2, first[2]])
    assert large["n_patients"] == 3 and large["per_patient_dice"] == pytest.approx(expected)
    assert rows["threshold"]["raw"]["ours_minus_this"]["seeds"] == [1]
    assert rows["dae"]["raw"]["ours_minus_this"]["seeds"] == [0, 1]


def test_one_seed_shows_no_deviation_and_costs_that_differ_show_as_a_range(tmp_path):
    cell = write_cell(tmp_path, "vae", 0, 0.3)
    write_cell(tmp_path, "dae", 0, 0.3, network_evaluations_per_slice=45)
    write_cell(tmp_path, "dae", 1, 0.3, network_evaluations_per_slice=15)
    write_tables(tmp_path)
    shown = markdown_rows(tmp_path, 1, "Maps as they are")
    assert shown["VAE"]["foreground AUPRC"] == f"{100 * cell['foreground_auprc']:.1f}"
    assert [shown[name]["network evaluations"] for name in ("VAE", "DAE")] == ["1", "15 to 45"]


@pytest.mark.parametrize("name", ["phantom", "msd_flair"])
def test_recorded_results_still_give_their_tables(name, tmp_path):
    """These cells are older than scores per patient and by lesion size; their intervals did not resample seeds."""
    (tmp_path / "cells").symlink_to(RESULTS / name / "cells")
    write_tables(tmp_path)
    for number in (1, 2):
        rows, table = read(tmp_path, number)
        recorded, _ = read(RESULTS / name, number)
        assert set(rows) == set(recorded)
        for method, row in rows.items():
            for chain in ("raw", "postprocessed"):
                for measure in MEASURES:
                    assert row[chain][measure]["mean"] == pytest.approx(recorded[method][chain][measure]["mean"])
        assert "by the lesion's share" not in table_markdown(table)
