"""`diffusers-cf calibrate` from its command line."""

import json

import pytest
from model_files import edit_json
from training_data import write_training_set

from diffusers_cf.cli import main
from diffusers_cf.settings import PAPER_SETTINGS


def calibrate(files, *options):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "out" / "RESULT.json"]
    settings = ["--strength", 0.5, "--num_inference_steps", 10, "--dtype", "float32"]
    return main(["calibrate", *map(str, [*paths, *settings, *options])])


def document_of(files):
    return json.loads((files / "out" / "RESULT.json").read_text())


def preprocessing_of(files):
    return json.loads((files / "model" / "preprocessing.json").read_text())


def test_what_is_stored_is_what_segment_will_use(files):
    assert calibrate(files, "--store", "healthy-quantile", "--measure", "validation", "--max_slices", 6) == 0
    document, facts = document_of(files), preprocessing_of(files)
    assert facts["settings"]["threshold"] == document["thresholds"]["healthy-quantile"] > 0
    assert (facts["settings"]["strength"], facts["settings"]["postprocess"]) == (0.5, True)
    assert facts["threshold_chosen_by"]["rule"] == "healthy-quantile" and facts["evaluation_size"] == 16
    assert facts["modalities"] == ["flair", "t1"]
    assert document["n_slices"] == 6 and set(document["dice"]) == {*document["thresholds"], "ideal"}


CHOSEN = {"command": "sweep", "split": "validation", "n_slices": 9, "postprocessed_auprc": 0.5, "ideal_dice": 0.4}


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, {"postprocessed_auprc": 0.5, "command": "sweep"}), ({"guidance_scale": 2.0}, None)]
)
def test_what_chose_the_settings_stays_as_far_as_it_holds(files, changes, kept):
    """Its ideal Dice was that of another threshold; of other settings nothing holds."""
    settings = PAPER_SETTINGS | {"strength": 0.5, "num_inference_steps": 10, "threshold": 0.2} | changes
    edit_json(files / "model/preprocessing.json", settings=settings, settings_chosen_by=CHOSEN)
    assert calibrate(files, "--guidance_scale", 3.0, "--store") == 0
    facts = preprocessing_of(files)
    chosen = facts.get("settings_chosen_by")
    assert (chosen is None) if kept is None else (kept.items() <= chosen.items() and "ideal_dice" not in chosen)
    assert facts["threshold_chosen_by"]["rule"] == "slice-labels" and facts["settings"]["threshold"] != 0.2


def test_a_data_set_without_masks_gives_the_same_thresholds(files):
    assert calibrate(files) == 0
    thresholds = document_of(files)["thresholds"]
    write_training_set(files / "bare", masks=False)
    assert calibrate(files, "--dataset", files / "bare") == 0
    assert document_of(files)["thresholds"] == thresholds and document_of(files)["dice"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_slices", 0], "--max_slices must be at least 1"),
        (["--max_slices", 1], "slices chosen of the split validation are all healthy"),
        (["--num_inference_steps", 7], "7"), (["--strength", 2], "strength is 2.0"),
        (["--map", "signed"], "no `signs`"), (["--measure", "test"], "no slices in its split test"),
        (["--model", "user/name", "--store"], "stored in a model folder only"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line_before_any_pass(files, capsys, options, message):
    assert calibrate(files, *options) == 2
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line and "validation: " not in "".join(bars)
    assert not (files / "out").exists()
