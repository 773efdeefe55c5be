import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import edit_json
from training_data import write_training_set

from diffusers_cf.baselines import NETWORKS, AnomalyMethod, training
from diffusers_cf.benchmark import protocol
from diffusers_cf.benchmark.networks import Method, methods_for
from diffusers_cf.benchmark.presets import PRESETS
from diffusers_cf.benchmark.protocol import BenchmarkData, choose_settings
from diffusers_cf.cli import main
from diffusers_cf.commands.benchmark import PRESET_NAMES
from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.errors import InputError
from diffusers_cf.training.loop import Training


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "reproduce_brats2021.sh"
SIZE = 32
MODALITIES = ["flair", "t1", "t1ce", "t2"]
SOME = ("threshold", "threshold-t1", "vae", "vae-restoration", "cam")  # of two networks that train in seconds


def prepare(folder, seed):
    options = ["--seed", str(seed), "--patients", "5", "--size", str(SIZE), "--output", str(folder)]
    assert main(["prepare", "--source", "phantom", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("phantoms") / "data", 7)


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory):
    """Other patients of the same kind."""
    return prepare(tmp_path_factory.mktemp("others") / "data", 8)


def run(dataset, output, *more):
    options = ["--preset", "smoke", "--output", output, "--dataset", dataset, *more]
    return main(["benchmark", *map(str, options)])


@pytest.fixture(scope="module")
def results(dataset, tmp_path_factory):
    """Return the folder of a run of some methods."""
    folder = tmp_path_factory.mktemp("benchmark") / "results"
    assert run(dataset, folder, "--seeds", 1, "--methods", *SOME) == 0
    return folder


def cells(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_every_method_has_a_cell_and_a_row(results):
    assert set(cells(results)) == {f"{method}-seed1" for method in SOME}
    table = json.loads((results / "table1.json").read_text())
    assert {row["method"] for row in table["rows"]} == set(SOME) and "ours (no cell)" in table["missing"]
    assert {path.name for path in results.glob("*.png")} == {
        "figure2.png",
        "figure4.png",
    }  # the others show diffusion models
    assert names(results / "models") == {"cam-seed1", "vae-seed1"}
    files = {path.name for path in (results / "models").rglob("*") if path.is_file()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "training.json"}  # no checkpoint


def test_all_methods_share_slices_networks_and_protocol(results):
    measured = cells(results)
    of_test = {(cell["n_slices"], cell["n_patients"], cell["prevalence"]) for cell in measured.values()}
    assert len(of_test) == 1 and {cell["n_slices"] for cell in measured.values()} == {PRESETS["smoke"].test_slices}
    assert measured["vae-seed1"]["curve"] == measured["vae-restoration-seed1"]["curve"]
    assert len({cell["slice_scores"]["position"] for cell in measured.values()}) == 1
    for cell in measured.values():  # the threshold comes from validation slices, not from these
        assert cell["per_patient_dice"]["threshold"] != cell["ideal_threshold"]
    vae = measured["vae-seed1"]
    assert vae["commit"] == vae["trained_commit"] and vae["benchmark"]["preset"] == "smoke"
    assert vae["trained_on"] == "healthy" and vae["images_seen"] == 8 * PRESETS["smoke"].budget.steps


def test_what_is_finished_is_not_done_again(results, dataset):
    before = {path: path.stat().st_mtime_ns for part in ("cells", "models") for path in (results / part).rglob("*")}
    assert run(dataset, results, "--seeds", 1, "--methods", "VAE", "threshold-t1", "--no_pictures") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_shards_measure_each_method_once(dataset, tmp_path, capsys):
    options = ["--seeds", 1, "--methods", "threshold", "threshold-t1", "vae"]
    found = []
    for shard in ("1/2", "2/2"):
        assert run(dataset, tmp_path / "out", *options, "--shard", shard) == 0
        found.append([line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "AUPRC" in line])
        assert not (tmp_path / "out" / "table1.json").exists()
    assert sorted(found) == [["threshold", "threshold-t1"], ["vae"]]
    assert run(dataset, tmp_path / "out", *options) == 0
    assert "AUPRC" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "table1.json").read_text())["rows"]) == 3


@pytest.mark.slow
def test_several_processes_share_the_networks(dataset, tmp_path):
    methods = ["threshold", "threshold-t1", "vae", "vae-restoration", "dae"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "diffusers_cf.cli", "benchmark", "--dataset", str(dataset), "--preset", "smoke", "--seeds", "1"]
    command += ["--output", str(tmp_path / "two"), "--methods", *methods]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("tables and figures -> ") == 1
    assert set(cells(tmp_path / "two")) == {f"{method}-seed1" for method in methods}
    assert names(tmp_path / "two" / "models") == {"vae-seed1", "dae-seed1"}


def test_a_later_seed_sees_as_many_images_on_a_machine_of_another_speed(results, dataset, tmp_path, capsys):
    path = tmp_path / "cells" / "vae-seed1.json"
    path.parent.mkdir()
    path.write_text(json.dumps(cells(results)["vae-seed1"] | {"images_seen": 24}))
    options = ["--first_seed", 2, "--seeds", 1, "--images_of_seed", 1, "--no_pictures", "--methods", "vae"]
    assert run(dataset, tmp_path, *options) == 0
    assert cells(tmp_path)["vae-seed2"]["images_seen"] == 24  # and not 8 * 12
    assert run(dataset, tmp_path, *options, "dae") == 2
    assert "no result of seed 1 with the network dae" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_train_anew_and_may_have_a_data_set_each(dataset, other_dataset, tmp_path):
    options = ["--methods", "threshold-flair", "cam", "--no_pictures", "--seeds", 2]
    assert run(dataset, tmp_path / "two", *options) == 0
    seeds = cells(tmp_path / "two")
    assert seeds["cam-seed1"]["auprc"] != seeds["cam-seed2"]["auprc"]
    assert seeds["threshold-flair-seed1"]["auprc"] == seeds["threshold-flair-seed2"]["auprc"]
    options = ["--methods", "threshold-t1", "--no_pictures"]
    assert run(dataset, tmp_path / "splits", other_dataset, *options) == 0
    splits = cells(tmp_path / "splits")
    assert set(splits) == {"threshold-t1-seed1", "threshold-t1-seed2"}
    assert splits["threshold-t1-seed1"]["auprc"] != splits["threshold-t1-seed2"]["auprc"]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--methods", "gan"], "there is no method gan"),
        (["--methods", "threshold-pd"], "needs the modality pd"),
        (["--image_size", "24"], "--image_size is 24"),
        (["--image_size", "64"], "has slices of 32 px"),
        (["--train_seconds", "0"], "--train_seconds is 0.0"),
        (["--train_seconds", "nan"], "--train_seconds is nan"),
        (["--num_inference_steps", "30"], "--num_inference_steps is 30"),
        (["--strengths", "0.5", "0"], "the strength 0.0"),
        (["--num_inference_steps", "1"], "the strength 0.5"),
        (["--first_seed", "-1"], "--first_seed must be 0 or more"),
        (["--seeds", "0"], "--seeds 1 or more"),
        (["--device", "tpu9"], "--device tpu9"),
    ],
)
def test_wrong_options_end_in_one_line_before_anything_is_written(dataset, tmp_path, capsys, options, reason):
    assert run(dataset, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    # datasets may announce the first opening of a folder in the lines before
    assert reason in error.splitlines()[-1] and error.count("error: ") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_presets_of_the_command_line_are_those_of_the_benchmark():
    assert tuple(PRESETS) == PRESET_NAMES


def test_nothing_is_taken_from_another_benchmark(results, dataset, other_dataset, tmp_path, capsys):
    """A network may have learned from what are test patients here; a cell may be of other test slices."""
    models = ["--models", results / "models", "--methods", "cam", "--seeds", 1]
    for arguments, reason in [
        ((dataset, results, "--image_size", 32, "--methods", "vae"), "holds a benchmark with other image_size"),
        ((other_dataset, results, "--methods", "threshold-t1"), "holds a benchmark with other slices for seed 1"),
        ((other_dataset, tmp_path / "out", *models), "cam-seed1 was trained with other data"),
        ((dataset, tmp_path / "slow", "--train_seconds", 9, *models), "cam-seed1 was trained with other budget"),
    ]:
        assert run(*arguments) == 2
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_a_checkpoint_of_other_patients_is_not_continued(dataset, other_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "SECONDS_PER_CHECKPOINT", -1)
    accumulate = Training.accumulate
    monkeypatch.setattr(Training, "accumulate", lambda self, batch: 1 / 0 if self.step else accumulate(self, batch))
    options = ["--methods", "cam", "--seeds", 1, "--models", tmp_path / "models"]
    with pytest.raises(ZeroDivisionError):
        run(dataset, tmp_path / "first", *options)
    assert len(list((tmp_path / "models" / "cam-seed1").glob("checkpoint-*"))) == 1
    assert run(other_dataset, tmp_path / "second", *options) == 2
    assert "checkpoint-1: made with" in capsys.readouterr().err


def test_a_finished_network_is_used_again_and_figures_train_nothing(results, dataset, tmp_path):
    model = shutil.copytree(results / "models" / "cam-seed1", tmp_path / "models" / "cam-seed1")
    shutil.copytree(results / "cells", tmp_path / "results" / "cells")
    (tmp_path / "results" / "cells" / "cam-seed1.json").unlink()
    for name in ("checkpoint-5", ".checkpoint-5.old", ".checkpoint-6.tmp"):  # of a training that was killed
        (model / name).mkdir()
    assert run(dataset, tmp_path / "results", "--methods", "cam", "--seeds", 1, "--models", model.parent) == 0
    assert names(model) == names(results / "models" / "cam-seed1") and names(model.parent) == {"cam-seed1"}
    pictures = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert pictures == {"figure2.png", "figure4.png"}  # of cells whose network is there


def test_data_sets_of_one_table_are_of_one_kind(dataset, tmp_path, capsys):
    other = shutil.copytree(dataset, tmp_path / "copy")
    edit_json(other / "preprocessing.json", source="folder")
    assert run(dataset, tmp_path / "out", other) == 2
    assert "differ in source" in capsys.readouterr().err


def test_data_without_lesions_can_not_be_measured(dataset, tmp_path, monkeypatch, capsys):
    folder = write_training_set(tmp_path / "data", masks=False, test=(3,))
    assert run(folder, tmp_path / "out") == 2
    assert "no lesion masks" in capsys.readouterr().err
    monkeypatch.setattr(protocol, "has_lesion", lambda *_: False)
    assert run(dataset, tmp_path / "out", "--methods", "threshold-t1") == 2
    assert "the split validation has unhealthy labels but no lesion pixels" in capsys.readouterr().err


def test_settings_whose_maps_are_not_finite_are_not_chosen(dataset):
    method = AnomalyMethod()
    method.candidates = [{"bad": True}, {"bad": False}]
    data = BenchmarkData(dataset, PRESETS["smoke"])
    method.maps_of_candidates = lambda images: [(1, images[:, 0]), (0, images[:, 0] * float("nan"))]
    assert [found["auprc"] is None for found in choose_settings(method, data)["tried"]] == [True, False]
    assert method.settings == {"bad": False}
    method.maps_of_candidates = lambda images: [(i, images[:, 0] * float("inf")) for i in range(2)]
    with pytest.raises(InputError, match="the maps of every setting"):
        choose_settings(method, data)


def reproduce(stage, folder, *more):
    """Run a stage of the script on few patients and at the preset smoke."""
    tools = str(Path(sys.executable).parent)
    settings = {"BRATS": "brats", "WORK": ".", "PATIENTS_WANTED": "any", "SIZE": str(SIZE), "PRESET": "smoke"}
    environment = os.environ | settings | {"PATH": tools + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    subprocess.run([SCRIPT, stage, *more], cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder with `data` and the `results` of every method."""
    folder = tmp_path_factory.mktemp("whole")
    for index in range(5):
        write_patient(make_patient(7, index), folder / "brats")
    reproduce("prepare", folder)
    reproduce("benchmark", folder, "--seeds", "1")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)  # with the fixture
def test_every_method_is_measured_and_lands_in_its_tables(whole):
    folder, methods = whole / "results", methods_for(MODALITIES)
    measured = cells(folder)
    assert set(measured) == {f"{method.id}-seed1" for method in methods}
    for number in (1, 2):
        table = json.loads((folder / f"table{number}.json").read_text())
        wanted = {method.id for method in methods if number in method.row.tables}
        assert {row["method"] for row in table["rows"]} == wanted and not table["missing"]
        text = (folder / f"table{number}.md").read_text()
        assert all(Method.of(id).row.title in text for id in wanted)
    assert all((folder / f"figure{number}.png").stat().st_size > 10_000 for number in (1, 2, 3, 4))
    assert names(folder / "models") == {f"{name}-seed1" for name in NETWORKS}
    ours = measured["ours-seed1"]
    assert set(ours["slice_scores"]) == {"position"}
    best = max(ours["choice"]["tried"], key=lambda point: point["auprc"])
    tried = [{k: v for k, v in point.items() if k != "auprc"} for point in [best, *ours["choice"]["tried"]]]
    assert tried.pop(0) == ours["settings"]
    assert tried == PRESETS["smoke"].grid.settings(PRESETS["smoke"].grid.guidance_scales)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_precision_changes_diffusion_networks_alone(whole, tmp_path):
    options = ["--seeds", 1, "--dtype", "bfloat16", "--no_pictures", "--models", whole / "results" / "models"]
    assert run(whole / "data", tmp_path, "--methods", "dae", "ours", "cdpm-classifier", "forward-map", *options) == 0
    half, full = cells(tmp_path), cells(whole / "results")
    for name in half:
        assert half[name]["foreground_auprc"] == pytest.approx(full[name]["foreground_auprc"], abs=0.02)
        assert (half[name]["foreground_auprc"] == full[name]["foreground_auprc"]) == (name == "dae-seed1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_figure_3_is_measured_again_for_other_slices(whole, tmp_path, monkeypatch):
    """Without a lesion among its few slices, Fig. 3 takes all validation slices."""
    folder = shutil.copytree(whole / "results", tmp_path / "results")
    kept = json.loads((folder / "figure3.json").read_text())
    (folder / "figure3.json").write_text(json.dumps(kept | {"seed": 5, "points": []}))
    monkeypatch.setattr("diffusers_cf.benchmark.figures.has_lesion", lambda *_: False)
    assert run(whole / "data", folder, "--methods", "threshold-t1", "--seeds", 1, "--no_pictures") == 0
    again = json.loads((folder / "figure3.json").read_text())
    assert again["seed"] == 1 and len(again["points"]) == len(kept["points"])
    assert again["n_slices"] == PRESETS["smoke"].validation_slices > kept["n_slices"]


@pytest.mark.parametrize(
    "stage, settings, reason",
    [
        ("tables", {}, "tables: no such stage"),
        ("prepare", {"BRATS": "elsewhere"}, "elsewhere: no such folder"),
        ("prepare", {"PATIENTS_WANTED": "1251"}, "5 patients, BraTS 2021 has 1251"),
    ],
)
def test_the_script_says_what_is_wrong(tmp_path, stage, settings, reason):
    for index in range(5):
        (tmp_path / "brats" / f"patient{index}").mkdir(parents=True)
    environment = os.environ | {"BRATS": "brats", "WORK": "elsewhere"} | settings
    done = subprocess.run([SCRIPT, stage], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and reason in done.stderr and not (tmp_path / "elsewhere").exists()
