"""`diffusers-cf sweep` from its command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import DDIMInverseScheduler, DDIMScheduler
from model_files import edit_json, files_of
from training_data import CLASSES, made_patient

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.cli import main
from diffusers_cf.commands.sweep import store_point
from diffusers_cf.data.slices import slices_to_table, write_tables
from diffusers_cf.evaluation.sweep import SweepPoint
from diffusers_cf.provenance import command_line


@pytest.fixture
def no_sweep(monkeypatch):
    """Fails the test if the sweep, or what comes before it and takes long, begins."""
    for name in ("sweep", "learn_signs"):
        monkeypatch.setattr(f"diffusers_cf.evaluation.sweep.{name}", lambda *_, **__: pytest.fail("it begins"))


def sweep(files, *options):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "out"]
    grid = ["--guidance_scales", 2, "--strengths", 0.2, 0.5, "--num_inference_steps", 10, "--max_slices", 6]
    return main(["sweep", *(str(part) for part in [*paths, *grid, *options])])


def document_of(files):
    return json.loads((files / "out" / "sweep.json").read_text())


def test_the_best_point_of_the_file_is_what_the_model_recommends(files):
    assert sweep(files, "--store", "--batch_size", 4) == 0
    document = document_of(files)
    assert document["n_slices"] == 6 and len(document["points"]) == 2 * 4 and document["command"] == command_line()
    best = max(document["points"], key=lambda point: point["postprocessed_auprc"])
    assert document["best"] == best
    assert (files / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((files / "model" / "preprocessing.json").read_text())
    for name in ("guidance_scale", "strength", "num_inference_steps", "map", "threshold"):
        assert facts["settings"][name] == document["stored"][name]
    assert facts["settings"]["postprocess"] == document["stored"]["postprocess"]
    assert len(facts["signs"]) == 2 and facts["evaluation_size"] == 16
    assert facts["settings_chosen_by"]["command"] == document["command"]


def test_a_model_that_knows_no_classes_is_swept_without_the_forward_map(files, make_pipeline, capsys):
    pipe = make_pipeline(unconditional=True)
    pipe.preprocessing = {"modalities": ["flair", "t1"]}
    pipe.save_pretrained(files / "model")
    assert sweep(files) == 0
    points = document_of(files)["points"]
    assert {point["map"] for point in points} == {"counterfactual", "reconstruction"}
    assert sweep(files, "--maps", "forward") == 2
    assert "map is 'forward': it compares conditions, and this model has no class_encoder" in capsys.readouterr().err


def test_both_directions_can_be_of_second_order(files):
    orders = ["--solver_order", 1, 2, "--decoding_solver_order", 1, 2]
    assert sweep(files, *orders, "--maps", "counterfactual", "--store") == 0
    document = document_of(files)
    found = {(point["solver_order"], point["decoding_solver_order"]): point["auprc"] for point in document["points"]}
    assert set(found) == {(1, 1), (1, 2), (2, 1), (2, 2)} and len(set(found.values())) == 4
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    stored = (pipe.inverse_scheduler.config.solver_order, pipe.scheduler.config.solver_order)
    assert stored == (document["best"]["solver_order"], document["best"]["decoding_solver_order"])


def test_what_is_stored_is_recommended(files):
    edit_json(files / "model/preprocessing.json", threshold_chosen_by={"rule": "of another threshold"})
    point = SweepPoint(2.0, 0.4, 20, "signed", 32, threshold=0.07, solver_order=2)
    more = {"signs": [1, -1], "evaluation_size": 16}
    store_point(files / "model", "recommended", point, {"split": "validation"}, more)
    names = ("guidance_scale", "strength", "num_inference_steps", "map", "threshold")
    loaded = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    assert loaded.resolve_settings() == dict(zip(names, (2.0, 0.4, 20, "signed", 0.07), strict=True))
    assert (loaded.inverse_scheduler.config.solver_order, loaded.scheduler.config.solver_order) == (2, 1)
    assert loaded.preprocessing["modalities"] == ["flair", "t1"] and loaded.preprocessing["signs"] == [1, -1]
    assert loaded.preprocessing["settings"]["postprocess"] and "threshold_chosen_by" not in loaded.preprocessing


def test_settings_and_solver_are_stored_together(files, monkeypatch):
    """By one call of `replace_json`, which writes all or nothing."""
    calls = []
    monkeypatch.setattr("diffusers_cf.loading.replace_json", lambda folder, changed: calls.append(set(changed)))
    point = SweepPoint(2.0, 0.4, 20, "forward", 32, threshold=0.07, solver_order=2)
    store_point(files / "model", "recommended", point, {}, {})
    assert calls == [{"preprocessing.json", "inverse_scheduler/scheduler_config.json"}]


PAPER = ("--guidance_scales", 3, "--strengths", 0.75, "--maps", "counterfactual", "--num_inference_steps", 100)


def test_the_threshold_of_the_papers_setting_is_stored_beside_the_recommended_ones(files):
    assert sweep(files, "--store") == 0
    assert sweep(files, *PAPER, "--store", "paper") == 0
    document = document_of(files)
    found = document["best"]
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    paper = pipe.resolve_settings(settings="paper")
    assert paper == {name: found[name] for name in paper} and paper["threshold"] > 0
    assert pipe.resolve_settings()["num_inference_steps"] == 10
    assert pipe.preprocessing["paper_threshold_chosen_by"]["command"] == document["command"]


@pytest.mark.parametrize(
    "option, other",
    [
        ("--guidance_scales", 0.5), ("--strengths", 0.5), ("--maps", "reconstruction"), ("--num_inference_steps", 10),
        ("--solver_order", 2),
    ],
)  # fmt: skip
def test_the_threshold_of_another_setting_is_not_stored_as_the_papers(option, other, files, no_sweep, capsys):
    assert sweep(files, *PAPER, option, other, "--store", "paper") == 2
    assert "--store paper needs a sweep of the paper's setting alone" in capsys.readouterr().err


def test_the_order_of_encoding_is_swept_and_stored(files):
    before = files_of(files / "model")
    assert sweep(files, "--solver_order", 2) == 0
    swept = document_of(files)["points"]
    assert files_of(files / "model") == before
    assert sweep(files, "--solver_order", 2, "--store") == 0
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    assert pipe.inverse_scheduler.config.solver_order == 2
    assert sweep(files) == 0
    assert document_of(files)["points"] == swept


@pytest.mark.slow
def test_one_sweep_chooses_among_steps_and_orders(files):
    """Its points are those of a sweep each, and the best of all is what the model recommends, solver included."""
    single = {}
    for order in (1, 2):
        for steps in (10, 20):
            assert sweep(files, "--solver_order", order, "--num_inference_steps", steps, "--maps", "forward") == 0
            single[order, steps] = document_of(files)["points"]
    both = ["--num_inference_steps", 10, 20, "--solver_order", 1, 2, "--maps", "forward", "--store"]
    assert sweep(files, *both) == 0
    document = document_of(files)
    assert document["points"] == [point for points in single.values() for point in points]
    assert {(p["solver_order"], p["num_inference_steps"]) for p in document["points"]} == set(single)
    best = max(document["points"], key=lambda point: point["postprocessed_auprc"])
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    assert document["best"] == best and pipe.inverse_scheduler.config.solver_order == best["solver_order"]
    assert pipe.resolve_settings()["num_inference_steps"] == best["num_inference_steps"]
    assert sweep(files, *both, "--solver_order", 2, 1) == 0  # whatever solver came last
    assert document_of(files)["best"] == best
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    assert pipe.inverse_scheduler.config.solver_order == best["solver_order"]


def test_signs_are_learned_from_the_most_exact_encoding(files, monkeypatch):
    seen = []

    def learn_signs(pipe, *_, num_inference_steps, **__):
        seen.append((pipe.inverse_scheduler.config.solver_order, num_inference_steps))
        return {"signs": [1, 1], "t": [5.0, 5.0]}

    monkeypatch.setattr("diffusers_cf.evaluation.sweep.learn_signs", learn_signs)
    options = ["--solver_order", 2, 1, "--num_inference_steps", 10, 20, 5, "--maps", "signed", "--strengths", 0.4]
    assert sweep(files, *options) == 0 and seen == [(2, 20)]
    points = document_of(files)["points"]
    assert [(p["solver_order"], p["num_inference_steps"]) for p in points] == [
        (order, steps) for order in (2, 1) for steps in (10, 20, 5)
    ]


def test_an_order_that_the_model_cannot_have_is_refused(files, no_sweep, capsys):
    edit_json(files / "model/inverse_scheduler/scheduler_config.json", num_fixed_point_iterations=1)
    assert sweep(files, "--solver_order", 2) == 2
    assert f"{files / 'model'}: num_fixed_point_iterations refine steps" in capsys.readouterr().err
    for name, stock in (("scheduler", DDIMScheduler), ("inverse_scheduler", DDIMInverseScheduler)):
        edit_json(files / "model/model_index.json", **{name: ["diffusers", stock.__name__]})
        stock(clip_sample=False).save_pretrained(files / "model" / name)
    assert sweep(files, "--solver_order", 2) == 2
    assert "a DDIMInverseScheduler has no solver_order" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--strengths", "0", "0.5"], "(0, 1]"), (["--num_inference_steps", "7"], "7"),
        (["--split", "test"], "split test"), (["--batch_size", "0"], "at least 1"),
        (["--device", "abacus"], "abacus"), (["--model", "nowhere/missing"], "missing"),
        (["--max_evaluations", "1"], "at most 1"), (["--max_slices", "0"], "--max_slices must be at least 1, not 0"),
        (["--max_slices", "1"], "the 1 slices chosen of the split validation are all healthy"),
        (["--model", "user/name", "--store"], "user/name: settings can be stored in a model folder only"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(files, options, reason, no_sweep, capsys):
    assert sweep(files, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and reason in error
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "labels, lesion, reason",
    [
        ([0] * 5 + [1] * 3, (0, 0), "have no lesion pixel in their foreground"),  # outside the disc
        ([0] * 8, (8, 8), "are all healthy"),
        ([1] * 8, (8, 8), "are all unhealthy"),
    ],
)
def test_slices_that_tell_no_setting_from_another_are_refused(files, labels, lesion, reason, no_sweep, capsys):
    masks = np.zeros((8, 16, 16), dtype=np.uint8)
    masks[5:, *lesion] = 1
    patient = replace(made_patient(2, 2, True, 16), labels=np.array(labels), masks=masks)
    path = files / "slices" / "data" / "validation-00000-of-00001.parquet"
    write_tables(path, [slices_to_table(patient, CLASSES)], CLASSES)
    before = (files / "model" / "preprocessing.json").read_bytes()
    assert sweep(files, "--store") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"slices: the 6 slices chosen of the split validation {reason}" in errors[0]
    assert (files / "model" / "preprocessing.json").read_bytes() == before and not (files / "out").exists()
