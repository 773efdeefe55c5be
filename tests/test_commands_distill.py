"""`diffusers-cf distill` from its command line: the student's model, a stopped run, bad input."""

import json

import numpy as np
import pytest
from model_files import edit_json
from training_data import write_training_set

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.baselines.training import TrainingRecord
from diffusers_cf.cli import main
from diffusers_cf.training.loop import Training


def distill(files, *options):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "student"]
    settings = ["--strength", 0.5, "--num_inference_steps", 10, "--dtype", "float32", "--max_train_steps", 6]
    return main(["distill", *map(str, [*paths, *settings, *options])])


def test_the_model_with_its_student_segments_and_is_evaluated(files):
    assert distill(files, "--map", "reconstruction", "--guidance_scale", 2, "--slice_sigma", 1) == 0
    facts = json.loads((files / "student/preprocessing.json").read_text())
    assert facts["settings"]["map"] == "student" and 0 < facts["settings"]["threshold"] < 1
    assert facts["student"]["settings"]["map"] == "reconstruction" and facts["student"]["images"] == 48
    assert facts["student"]["postprocess"] == {"median_size": 5, "slice_sigma": 1.0, "clear_rim": True}
    assert facts["student"]["patients"] == 2 and facts["threshold_chosen_by"]["n_slices"] == 8
    assert not [*(files / "student").glob("*checkpoint*"), *(files / "student").glob("targets")]
    options = ["--dataset", files / "slices", "--split", "train", "--output", files / "RESULT.json"]
    chosen = ["--choose_on_validation", "--map", "forward"]
    assert main(["evaluate", "--model", str(files / "student"), *map(str, options), *chosen]) == 0
    result = json.loads((files / "RESULT.json").read_text())
    assert result["postprocess"] is not None and set(result["settings"]["threshold"]) == {"raw", "postprocessed"}
    assert result["postprocessed"]["per_patient_dice"]["threshold"] == result["settings"]["threshold"]["postprocessed"]
    assert main(["evaluate", "--model", str(files / "student"), *map(str, options)]) == 0
    result = json.loads((files / "RESULT.json").read_text())
    assert result["network_evaluations_per_slice"] == 1 and result["settings"]["map"] == "student"
    more = ["--map", "forward", "--keep_rim", "--slice_sigma", "0.5"]
    assert main(["evaluate", "--model", str(files / "student"), *map(str, options), *more]) == 0
    result = json.loads((files / "RESULT.json").read_text())
    assert result["postprocess"] == {"median_size": 5, "slice_sigma": 0.5, "clear_rim": False}
    assert "outside the foreground, 5 x 5 median filter, Gaussian of 0.5 slices" in result["protocol"]["postprocessed"]


def test_the_students_own_map_is_weighted_by_brightness_and_the_taught_one_is_not(files):
    assert distill(files, "--bright_channel", 1) == 0
    facts = json.loads((files / "student/preprocessing.json").read_text())
    assert facts["settings"]["postprocess"]["bright_channel"] == 1
    assert facts["student"]["postprocess"] is True  # the paper's
    options = ["--dataset", files / "slices", "--split", "train", "--output", files / "RESULT.json"]
    for more, expected in (([], 1), (["--choose_on_validation"], 1), (["--with_intensity"], None)):
        assert main(["evaluate", "--model", str(files / "student"), *map(str, options), *more]) == 0
        result = json.loads((files / "RESULT.json").read_text())
        chain = result["postprocess"]
        assert (chain is True and expected is None) or chain.get("bright_channel") == expected, more
        text = "weighted by brightness of channel 1, cleared outside the"
        assert (text in result["protocol"]["postprocessed"]) == (expected == 1)


@pytest.mark.parametrize("more", [("--teacher", "threshold-robust-z"), ("--with_intensity", "--strength", "0.5")])
def test_who_taught_is_written_down(files, more):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "student"]
    options = ["--max_train_steps", 2, "--num_inference_steps", 10][: 2 if "--teacher" in more else 4]
    assert main(["distill", *map(str, [*paths, *options, *more])]) == 0
    taught_by = json.loads((files / "student/preprocessing.json").read_text())["student"]
    if "--teacher" in more:
        assert taught_by["teacher"] == "threshold-robust-z" and "settings" not in taught_by
    else:
        assert taught_by["with_intensity"] is True and taught_by["settings"]["map"] == "counterfactual"


def test_a_stopped_run_goes_on_to_the_same_student(files, monkeypatch):
    assert distill(files) == 0
    (files / "student").rename(files / "whole")
    steps, calls = Training.steps, []

    def stop(self):
        for step in steps(self):
            yield step
            if step == 3:
                self.save(limit=1, record=vars(TrainingRecord()))
                raise KeyboardInterrupt

    monkeypatch.setattr(Training, "steps", stop)
    assert distill(files) == 130
    monkeypatch.setattr(Training, "steps", steps)
    monkeypatch.setattr("diffusers_cf.evaluation.chains.maps_of_split", lambda *_: calls.append(1))
    assert distill(files) == 0 and calls == []  # neither maps nor steps are computed again
    weights = [
        CounterfactualDDIMPipeline.from_pretrained(files / name).student.conv_in.weight.detach().numpy()
        for name in ("whole", "student")
    ]
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--max_train_steps", 0), "--max_train_steps is 0: it must be 1 or more"),
        (("--image_size", 20), "--image_size is 20: it must be a multiple of 8, at most the data set's 16"),
        (("--teacher", "threshold-robust-z"), "has no settings"),
        (("--map", "student"), "this model has no student"),
        (("--median_size", 4), "median_size is 4"),
        (("--bright_channel", 2), "bright_channel is 2: the images have 2 channels, 0 the first"),
        (("--model", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(files, options, reason, capsys):
    assert distill(files, *options) == 2
    assert reason in capsys.readouterr().err and not (files / "student").exists()


def test_other_teachers_maps_and_a_finished_student_are_not_taken(files, capsys):
    write_training_set(files / "one_label", test=(3,))
    (files / "student").mkdir()
    edit_json(files / "model/model_index.json")
    (files / "student/model_index.json").write_text("{}")
    assert distill(files) == 2 and "holds a finished model" in capsys.readouterr().err
