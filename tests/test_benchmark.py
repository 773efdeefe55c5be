"""`diffusers-cf benchmark` at preset smoke, on phantoms in BraTS layout: every row trains, maps and lands in its table."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_cf.baselines import NETWORKS, ROWS, row_of, training
from diffusers_cf.baselines.training import MethodTraining
from diffusers_cf.benchmark.presets import PRESETS
from diffusers_cf.benchmark.protocol import BenchmarkData, choose_settings
from diffusers_cf.benchmark.run import all_methods
from diffusers_cf.cli import main
from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "reproduce_brats2021.sh"
PATIENTS, SIZE = 5, 32
MODALITIES = ["flair", "t1", "t1ce", "t2"]
FIGURES = [f"figure{number}.png" for number in (1, 2, 3, 4)]


def reproduce(stage, folder, *more):
    """A stage of the script for BraTS 2021, on the patients and at the preset that a test can wait for."""
    tools = str(Path(sys.executable).parent)
    settings = {"BRATS": "brats", "WORK": ".", "PATIENTS_WANTED": "any", "SIZE": str(SIZE), "PRESET": "smoke"}
    environment = os.environ | settings | {"PATH": tools + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    subprocess.run([SCRIPT, stage, *more], cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    for index in range(PATIENTS):
        write_patient(make_patient(7, index), folder / "brats")
    reproduce("prepare", folder)
    return folder / "data"


def run(dataset, output, *more):
    return main(["benchmark", "--dataset", str(dataset), "--preset", "smoke", "--output", str(output), *more])


@pytest.fixture(scope="module")
def results(dataset):
    """The folder of a run of everything, and the seconds that it took."""
    start = time.perf_counter()
    reproduce("benchmark", dataset.parent, "--seeds", "1")
    return dataset.parent / "results", time.perf_counter() - start


def cells(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}


# the limit of a test holds its fixtures, too: with the usual one a slow run would end before it is judged
@pytest.mark.timeout(900)
def test_everything_takes_minutes(results):
    assert results[1] < 360


def test_every_row_is_measured_and_lands_in_its_tables(results):
    folder, _ = results
    measured = cells(folder)
    assert set(measured) == {f"{method}-seed1" for method in all_methods(MODALITIES)}
    for number in (1, 2):
        table = json.loads((folder / f"table{number}.json").read_text())
        wanted = {method for method in all_methods(MODALITIES) if number in row_of(method).tables}
        assert {row["method"] for row in table["rows"]} == wanted and not table["missing"]
        text = (folder / f"table{number}.md").read_text()
        assert all(row_of(method).title in text for method in wanted)
    assert all((folder / figure).stat().st_size > 10_000 for figure in FIGURES)


def test_every_network_is_saved_as_safetensors_and_no_checkpoint_stays(results):
    folder = results[0]
    assert {path.name for path in (folder / "models").iterdir()} == {f"{name}-seed1" for name in NETWORKS}
    files = {path.name for path in (folder / "models").rglob("*") if path.is_file()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "training.json"}


def test_a_cell_says_where_it_comes_from_and_what_was_chosen(results):
    cell = cells(results[0])["ours-seed1"]
    candidates = PRESETS["smoke"].grid.settings(PRESETS["smoke"].grid.guidance_scales)
    tried = [{k: v for k, v in point.items() if k != "auprc"} for point in cell["choice"]["tried"]]
    assert tried == candidates
    best = max(cell["choice"]["tried"], key=lambda point: point["auprc"])
    assert cell["settings"] == {k: v for k, v in best.items() if k != "auprc"}
    assert cell["commit"] == cell["trained_commit"] and cell["command"] and cell["seed"] == 1
    assert cell["trained_on"] == "all" and cell["benchmark"]["preset"] == "smoke"
    assert cell["converged"] in (True, False) and cell["images_seen"] == 8 * PRESETS["smoke"].budget.steps
    assert set(cell["slice_scores"]) == {"position", "diffusion_classifier"} and 0 <= cell["saturated_share"] <= 1
    assert all(
        other["slice_scores"]["position"] == cell["slice_scores"]["position"] for other in cells(results[0]).values()
    )


def test_thresholds_come_from_validation_and_not_from_test(results):
    for cell in cells(results[0]).values():
        assert "chosen before the evaluation" in cell["protocol"]["per_patient_dice"]
        assert cell["per_patient_dice"]["threshold"] != cell["ideal_threshold"] or cell["ideal_threshold"] in (0, 1)


def test_all_methods_are_measured_on_the_same_slices(results):
    measured = cells(results[0]).values()
    assert len({(cell["n_slices"], cell["n_patients"], cell["prevalence"]) for cell in measured}) == 1
    assert {cell["n_slices"] for cell in measured} == {PRESETS["smoke"].test_slices}


def test_rows_of_one_network_share_its_training(results):
    measured = cells(results[0])
    curves = {method: measured[f"{method}-seed1"]["curve"] for method in ROWS if f"{method}-seed1" in measured
              if row_of(method).network == "ours"}  # fmt: skip
    assert len(curves) == 7 and len({json.dumps(curve) for curve in curves.values()}) == 1


def test_what_is_finished_is_not_done_again(results, dataset):
    folder, _ = results
    before = {path: path.stat().st_mtime_ns for part in ("cells", "models") for path in (folder / part).rglob("*")}
    assert run(dataset, folder, "--seeds", "1", "--methods", "ours", "threshold-flair", "--no_pictures") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_later_seed_sees_as_many_images_on_a_machine_of_another_speed(results, dataset, tmp_path, capsys):
    cell = cells(results[0])["vae-seed1"] | {"images_seen": 24}
    path = tmp_path / "out" / "cells" / "vae-seed1.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(cell))
    options = ["--first_seed=2", "--seeds=1", "--images_of_seed=1", "--no_pictures", "--methods"]
    assert run(dataset, tmp_path / "out", *options, "vae") == 0
    assert cells(tmp_path / "out")["vae-seed2"]["images_seen"] == 24  # and not 8 * 12
    assert run(dataset, tmp_path / "out", *options, "vae", "dae") == 2
    assert "holds no cell of seed 1 with the network dae (dae)" in capsys.readouterr().err


def test_a_part_gives_a_table_of_what_is_there(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "part", "--methods", "threshold-t2", "vae", "--seeds", "1", "--no_pictures") == 0
    table = json.loads((tmp_path / "part" / "table1.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["threshold-t2", "vae"]
    assert "vae, seed 1: AUPRC" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "part").glob("*.png")) == ["figure4.png"]


def test_half_precision_at_inference(results, dataset, tmp_path):
    methods = ["dae", "ours", "cdpm-classifier", "forward-map"]
    options = ["--seeds", "1", "--dtype", "bfloat16", "--no_pictures", "--models", str(results[0] / "models")]
    assert run(dataset, tmp_path / "half", "--methods", *methods, *options) == 0
    half, full = cells(tmp_path / "half"), cells(results[0])
    for name in half:
        assert half[name]["foreground_auprc"] == pytest.approx(full[name]["foreground_auprc"], abs=0.02)
        same = half[name]["foreground_auprc"] == full[name]["foreground_auprc"]
        assert same == (name == "dae-seed1")  # diffusion networks alone change their precision


def test_another_data_set_a_seed(dataset, other_dataset, tmp_path):
    assert run(dataset, tmp_path / "two", "--methods", "threshold-flair", "cam", "--no_pictures", "--seeds", "2") == 0
    seeds = cells(tmp_path / "two")
    assert len({cell["auprc"] for name, cell in seeds.items() if name.startswith("cam")}) == 2
    assert len({json.dumps(cell["benchmark"]["data"]) for cell in seeds.values()}) == 1
    options = ["--dataset", str(dataset), str(other_dataset), "--preset", "smoke", "--methods", "threshold-t1"]
    assert main(["benchmark", *options, "--output", str(tmp_path / "splits"), "--no_pictures"]) == 0
    splits = cells(tmp_path / "splits")
    assert set(splits) == {"threshold-t1-seed1", "threshold-t1-seed2"}
    assert len({json.dumps(cell["benchmark"]["data"]) for cell in splits.values()}) == 2
    assert splits["threshold-t1-seed1"]["auprc"] != splits["threshold-t1-seed2"]["auprc"]


@pytest.mark.parametrize(
    "stage, settings, reason",
    [
        ("tables", {}, "tables: no such stage"),
        ("prepare", {"BRATS": "elsewhere"}, "elsewhere: no such folder"),
        ("prepare", {"PATIENTS_WANTED": "1251"}, "5 patients, BraTS 2021 has 1251"),
    ],
)
def test_the_script_says_what_is_wrong(dataset, stage, settings, reason):
    environment = os.environ | {"BRATS": "brats", "WORK": "elsewhere"} | settings
    done = subprocess.run([SCRIPT, stage], cwd=dataset.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and reason in done.stderr and not (dataset.parent / "elsewhere").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--methods", "gan"], "there is no method gan"),
        (["--image_size", "24"], "--image_size is 24: it must be a power of two"),
        (["--image_size", "64"], "has slices of 32 px, less than the networks' 64"),
        (["--train_seconds", "0"], "--train_seconds is 0.0: it must be above 0"),
        (["--train_seconds", "nan"], "--train_seconds is nan: it must be above 0"),
        (["--num_inference_steps", "30"], "--num_inference_steps is 30: it must divide 1000"),
        (["--num_inference_steps", "0"], "--num_inference_steps is 0: it must divide 1000"),
        (["--strengths", "0.5", "0"], "the strength 0.0 must lie in (0, 1]"),
        (["--num_inference_steps", "1"], "the strength 0.5 must lie in (0, 1] and be a step or more of 1"),
        (["--strengths", "1.5"], "the strength 1.5 must lie in (0, 1]"),
        (["--strengths", "0.1"], "the strength 0.1 must lie in (0, 1] and be a step or more of 4"),
        (["--first_seed", "-1"], "--first_seed is -1: it must be 0 or more"),
        (["--seeds", "0"], "--seeds is 0: it must be 1 or more"),
        (["--methods", "threshold-pd"], "needs the modality pd"),
        (["--device", "tpu9"], "--device tpu9 can't be used"),
    ],
)
def test_wrong_options_end_in_one_line_before_anything_is_written(dataset, tmp_path, capsys, options, reason):
    assert run(dataset, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    # datasets may announce the first opening of a folder above it
    assert reason in error.splitlines()[-1] and error.count("error: ") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_cells_of_another_benchmark_are_not_mixed_in(results, dataset, capsys):
    assert run(dataset, results[0], "--image_size", "32", "--methods", "vae") == 2
    assert "holds a benchmark with other image_size" in capsys.readouterr().err


@pytest.fixture(scope="module")
def other_dataset(dataset):
    """Other patients in the same layout."""
    for index in range(5, 10):
        write_patient(make_patient(7, index), dataset.parent / "others")
    tools = ["--source", "brats", "--input", str(dataset.parent / "others"), "--size", str(SIZE)]
    assert main(["prepare", *tools, "--output", str(dataset.parent / "other_data")]) == 0
    return dataset.parent / "other_data"


def test_nothing_is_taken_over_from_other_patients(results, dataset, other_dataset, tmp_path, capsys):
    """A network may have learned from what are test patients here; a cell may be of what were other test slices."""
    assert run(other_dataset, results[0], "--methods", "threshold-t1", "--seeds", "1") == 2
    assert "holds a benchmark with other slices for seed 1: choose another --output" in capsys.readouterr().err
    models = ["--models", str(results[0] / "models")]
    assert run(other_dataset, tmp_path / "out", "--methods", "cam", "--seeds", "1", *models) == 2
    assert "cam-seed1 was trained with other data: choose another --models" in capsys.readouterr().err
    assert run(dataset, tmp_path / "slow", "--methods", "cam", "--seeds", "1", "--train_seconds", "9", *models) == 2
    assert "cam-seed1 was trained with other budget: choose another --models" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_a_checkpoint_of_other_patients_is_not_gone_on_from(dataset, other_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "SECONDS_PER_CHECKPOINT", -1)
    step = MethodTraining._step
    monkeypatch.setattr(
        MethodTraining, "_step", lambda self, batch: step(self, batch) if not self.record.steps else 1 / 0
    )
    options = ["--methods", "cam", "--seeds", "1", "--models", str(tmp_path / "models")]
    with pytest.raises(ZeroDivisionError):
        run(dataset, tmp_path / "first", *options)
    assert len(list((tmp_path / "models" / "cam-seed1").glob("checkpoint-*"))) == 1
    assert run(other_dataset, tmp_path / "second", *options) == 2
    assert ": made with data = " in capsys.readouterr().err


def test_data_sets_of_one_table_are_of_one_kind(dataset, tmp_path, capsys):
    other = shutil.copytree(dataset, tmp_path / "copy")
    facts = json.loads((other / "preprocessing.json").read_text())
    (other / "preprocessing.json").write_text(json.dumps(facts | {"source": "folder"}))
    assert (
        main(
            [
                "benchmark",
                "--dataset",
                str(dataset),
                str(other),
                "--preset",
                "smoke",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "differ in source" in capsys.readouterr().err


def test_figures_train_nothing(results, dataset, tmp_path):
    """The networks of these cells lie elsewhere now."""
    folder = tmp_path / "results"
    shutil.copytree(results[0] / "cells", folder / "cells")
    assert run(dataset, folder, "--methods", "threshold-t1", "--seeds", "1") == 0
    assert not (folder / "models").exists()
    assert {path.name for path in folder.glob("*.png")} == {"figure2.png", "figure4.png"}  # thresholds need no network


def test_an_old_figure_3_is_drawn_anew(results, dataset, tmp_path):
    folder = shutil.copytree(results[0], tmp_path / "results")
    kept = json.loads((folder / "figure3.json").read_text())
    other = [point | {"ideal_dice": 0.123} for point in kept["points"]]
    (folder / "figure3.json").write_text(json.dumps(kept | {"seed": 5, "points": other}))
    assert run(dataset, folder, "--methods", "threshold-t1", "--seeds", "1", "--no_pictures") == 0
    again = json.loads((folder / "figure3.json").read_text())
    assert again["seed"] == 1 and [p["ideal_dice"] for p in again["points"]] == [
        p["ideal_dice"] for p in kept["points"]
    ]


def test_masks_without_a_lesion_can_not_be_measured(dataset, tmp_path, monkeypatch, capsys):
    collate = SliceDataset.collate
    monkeypatch.setattr(
        SliceDataset, "collate", lambda self, rows: (b := collate(self, rows)) | {"masks": b["masks"] * 0}
    )
    assert run(dataset, tmp_path / "out", "--methods", "threshold-t1") == 2
    assert "no lesion in the foreground of the split validation" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_named(dataset, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run(dataset, tmp_path / "out", "--methods", "threshold-t1") == 2
    assert "out: the output folder can't be made" in capsys.readouterr().err
    models = ["--models", str(tmp_path / "out")]
    assert run(dataset, tmp_path / "results", "--methods", "cam", *models) == 2
    assert "out: the output folder can't be made" in capsys.readouterr().err


def test_a_damaged_figure_3_is_drawn_anew(results, dataset, tmp_path):
    folder = shutil.copytree(results[0], tmp_path / "results")
    (folder / "figure3.json").write_text("{")
    assert run(dataset, folder, "--methods", "threshold-t1", "--seeds", "1", "--no_pictures") == 0
    assert json.loads((folder / "figure3.json").read_text())["points"]


def test_figure_3_falls_back_to_all_validation_slices(results, dataset, tmp_path, monkeypatch):
    """Among the few slices of Fig. 3 there may be no lesion."""
    folder = shutil.copytree(results[0], tmp_path / "results")
    (folder / "figure3.json").unlink()
    monkeypatch.setattr("diffusers_cf.benchmark.plots.has_lesion", lambda *_: False)
    assert run(dataset, folder, "--methods", "threshold-t1", "--seeds", "1", "--no_pictures") == 0
    assert json.loads((folder / "figure3.json").read_text())["n_slices"] == PRESETS["smoke"].validation_slices


def test_a_damaged_training_record_is_named(results, dataset, tmp_path, capsys):
    models = shutil.copytree(results[0] / "models" / "cam-seed1", tmp_path / "models" / "cam-seed1").parent
    (models / "cam-seed1" / "training.json").write_text("{")
    options = ["--methods", "cam", "--seeds", "1", "--models", str(models)]
    assert run(dataset, tmp_path / "results", *options) == 2
    assert "training.json: damaged" in capsys.readouterr().err


def test_what_a_killed_training_left_behind_is_removed(results, dataset, tmp_path):
    model = shutil.copytree(results[0] / "models" / "cam-seed1", tmp_path / "models" / "cam-seed1")
    for name in ("checkpoint-5", ".checkpoint-5.old", ".checkpoint-6.tmp"):
        (model / name).mkdir()
    options = ["--methods", "cam", "--seeds", "1", "--models", str(model.parent), "--no_pictures"]
    assert run(dataset, tmp_path / "results", *options) == 0
    assert {path.name for path in model.iterdir()} == {
        path.name for path in (results[0] / "models" / "cam-seed1").iterdir()
    }


def test_settings_whose_maps_are_not_finite_are_not_chosen(results, dataset):
    class Spoiled:
        candidates = ({"bad": True}, {"bad": False})
        settings = None

        def maps_of_candidates(self, images):
            yield 1, images[:, 0]
            yield 0, images[:, 0] * float("nan")

    method, data = Spoiled(), BenchmarkData(str(dataset), PRESETS["smoke"])
    assert [found["auprc"] is None for found in choose_settings(method, data)["tried"]] == [True, False]
    assert method.settings == {"bad": False}
    Spoiled.maps_of_candidates = lambda self, images: ((i, images[:, 0] * float("inf")) for i in range(2))
    with pytest.raises(InputError, match="Spoiled: the maps of every setting hold NaN or infinite values"):
        choose_settings(method, data)


def test_a_damaged_cell_is_named(results, dataset, tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "ours-seed1.json").write_text("{")
    assert run(dataset, tmp_path, "--methods", "threshold-t1", "--seeds", "1") == 2
    assert "ours-seed1.json" in capsys.readouterr().err


def test_data_without_masks_can_not_be_measured(tmp_path, capsys):
    from training_data import write_training_set

    folder = write_training_set(tmp_path / "data", masks=False, test=(3,))
    assert run(folder, tmp_path / "out") == 2
    assert "no lesion masks" in capsys.readouterr().err


def test_grid_of_inference_from_the_command_line(results, dataset, tmp_path):
    options = ["--models", str(results[0] / "models"), "--methods", "ours", "--seeds", "1", "--no_pictures"]
    grid = ["--num_inference_steps", "5", "--strengths", "0.6", "0.4", "0.6"]
    assert run(dataset, tmp_path / "grid", *options, *grid) == 0
    tried = cells(tmp_path / "grid")["ours-seed1"]["choice"]["tried"]
    assert [(t["strength"], t["guidance_scale"], t["num_inference_steps"]) for t in tried] == [
        (0.4, 1.5, 5), (0.4, 3.0, 5), (0.6, 1.5, 5), (0.6, 3.0, 5)
    ]  # fmt: skip
