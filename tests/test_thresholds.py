"""Thresholds without masks: what each rule says of maps whose answer is known, and the command around them."""

import json

import numpy as np
import pytest
import torch
from evaluation_data import FakeDataset
from training_data import write_training_set

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.cli import main
from diffusers_cf.commands.calibrate import dice_of_rules, rules_of_labels
from diffusers_cf.evaluation.calibration import DivergenceRule, best_split, divergences, healthy_quantile, slice_scores
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask, postprocess_maps
from diffusers_cf.settings import PAPER_SETTINGS


def healthy(scores):
    counts = PixelCounts()
    counts.update(np.asarray(scores), np.zeros(len(scores)))
    return counts


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.98, 0.999])
def test_the_healthy_quantile_spares_just_that_share_of_healthy_pixels(quantile):
    scores = np.random.default_rng(0).exponential(size=10_000).astype(np.float32)
    threshold = healthy_quantile(healthy(scores), quantile)
    assert (scores < threshold).mean() == pytest.approx(quantile, abs=1e-4)
    before = scores[scores < threshold].max()
    assert (scores < before).mean() < quantile


def test_a_map_that_is_constant_on_healthy_slices_marks_none_of_them():
    assert 0.25 < healthy_quantile(healthy([0.25] * 50), 0.98) < 0.2500001
    assert 0 < healthy_quantile(healthy([0.0] * 50), 0.98) < 1e-30


def test_the_score_of_a_slice_is_where_too_few_pixels_are_left():
    """19 pixels above the score would be removed as a small component, 20 stay."""
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0].flat[:20] = np.arange(20, 0, -1)
    maps[1].flat[:19] = 9
    assert slice_scores(maps).tolist() == [1, 0]
    assert slice_scores(np.full((1, 2, 2), 0.5)).tolist() == [0.5]


def test_labels_choose_the_threshold_with_the_fewest_errors_of_both_kinds():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert best_split(scores, [0, 0, 0, 1, 1, 1]) == 0.4
    # one healthy slice above: two of three spared and all found, against all spared and one of three found
    assert best_split(scores, [0, 0, 1, 1, 0, 1]) == 0.3
    # one lesion that hardly shows: better missed than two of three healthy slices marked
    assert best_split(scores, [0, 1, 0, 0, 1, 1]) == 0.5
    with pytest.raises(ValueError, match="all have the same label"):
        best_split(scores, [1] * 6)


def test_the_divergence_is_the_mean_square_in_the_foreground():
    maps, inside = np.full((1, 4, 4), 2.0), np.zeros((1, 4, 4), bool)
    inside[0, :2] = True
    maps[0, 0] = 4
    assert divergences(maps, inside) == pytest.approx([(4 * 16 + 4 * 4) / 8])
    assert divergences(maps, ~inside & False).tolist() == [0]


def test_a_slice_further_from_healthy_gets_a_lower_quantile():
    """AnoFPDM: the quantile runs from the upper to the lower one as the divergence grows to the largest."""
    rng = np.random.default_rng(0)
    maps = rng.random((4, 20, 20)) * np.array([0.5, 1, 2, 4])[:, None, None]
    inside = np.ones(maps.shape, bool)
    inside[:, :2] = False
    values = divergences(maps, inside)
    rule = DivergenceRule(least=values[1], largest=values[2])
    found = rule.thresholds(maps, inside)
    quantiles = [0.98 - 0.08 * share for share in (values[1] / values[2], 1, 1)]
    expected = [np.quantile(maps[i][inside[i]], q) for i, q in zip((1, 2, 3), quantiles, strict=True)]
    assert found[0] == np.inf and found[1:].tolist() == pytest.approx(expected)
    learned = DivergenceRule.of_labels(values, [0, 1, 1, 1])
    assert (learned.least, learned.largest) == (values[1], values[3])


def batches(dataset, factor=1.0):
    """A map that shows the lesion well, with its batch."""
    heat = dataset.images[:, 1] * factor
    batch = {"images": torch.from_numpy(dataset.images), "labels": dataset.labels, "masks": dataset.masks}
    return iter([(postprocess_maps(heat, dataset.images), batch)])


def test_rules_look_at_labels_alone_and_their_dice_is_that_of_their_masks():
    dataset = FakeDataset((8, 8), size=32)
    hidden = FakeDataset((8, 8), size=32)
    hidden.masks[:] = 1
    rules = rules_of_labels(batches(dataset), 0.9)
    assert rules == rules_of_labels(batches(hidden), 0.9) and set(rules) == {
        "slice-labels", "healthy-quantile", "divergence",
    }  # fmt: skip
    found = dice_of_rules(batches(dataset), rules)
    (heat, batch) = next(batches(dataset))
    inside = foreground_mask(batch["images"])
    healthy_pixels = heat[dataset.labels == 0][inside[dataset.labels == 0]]
    assert rules["healthy-quantile"] == pytest.approx(np.quantile(healthy_pixels, 0.9), rel=0.01)
    for name in ("slice-labels", "healthy-quantile"):
        marked, lesion = (heat >= rules[name])[inside], dataset.masks[inside] > 0
        assert found[name] == pytest.approx(2 * (marked & lesion).sum() / (marked.sum() + lesion.sum()))
    assert 0.3 < found["divergence"] < found["ideal"] and found["slice-labels"] <= found["ideal"] < 1
    # twice the map, twice the threshold: nothing depends on its unit
    twice = rules_of_labels(batches(dataset, 2.0), 0.9)
    assert twice["healthy-quantile"] == pytest.approx(2 * rules["healthy-quantile"])
    assert dice_of_rules(batches(dataset, 2.0), twice) == pytest.approx(found)


@pytest.fixture
def files(make_pipeline, tmp_path):
    """A model that recommends nothing, and a data set."""
    pipe = make_pipeline()
    pipe.preprocessing = {"modalities": ["flair", "t1"]}
    pipe.save_pretrained(tmp_path / "model")
    write_training_set(tmp_path / "slices")
    return tmp_path


def calibrate(files, *options):
    paths = ["--model", files / "model", "--dataset", files / "slices", "--output", files / "out" / "RESULT.json"]
    settings = ["--strength", 0.5, "--num_inference_steps", 10, "--dtype", "float32"]
    return main(["calibrate", *map(str, [*paths, *settings, *options])])


def test_what_is_stored_is_what_segment_will_use(files, capsys):
    assert calibrate(files, "--store", "healthy-quantile", "--measure", "validation", "--max_slices", 6) == 0
    document = json.loads((files / "out" / "RESULT.json").read_text())
    facts = json.loads((files / "model" / "preprocessing.json").read_text())
    assert facts["settings"]["threshold"] == document["thresholds"]["healthy-quantile"] > 0
    assert (facts["settings"]["strength"], facts["settings"]["postprocess"]) == (0.5, True)
    assert facts["threshold_chosen_by"]["rule"] == "healthy-quantile" and facts["evaluation_size"] == 16
    assert facts["modalities"] == ["flair", "t1"]
    assert document["n_slices"] == 6 and set(document["dice"]) == {*document["thresholds"], "ideal"}
    out = capsys.readouterr().out
    assert f"ideal, chosen with masks: Dice {document['dice']['ideal']:.3f}" in out


CHOSEN = {"command": "sweep", "split": "validation", "n_slices": 9, "postprocessed_auprc": 0.5, "ideal_dice": 0.4}


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, {"postprocessed_auprc": 0.5, "command": "sweep"}), ({"guidance_scale": 2.0}, None)]
)
def test_what_chose_the_settings_stays_as_far_as_it_holds(files, changes, kept):
    """Its Dice was that of another threshold; of other settings nothing holds."""
    pipe = CounterfactualDDIMPipeline.from_pretrained(files / "model")
    settings = PAPER_SETTINGS | {"strength": 0.5, "num_inference_steps": 10, "threshold": 0.2} | changes
    pipe.preprocessing = pipe.preprocessing | {"settings": settings, "settings_chosen_by": CHOSEN}
    pipe.save_pretrained(files / "model")
    assert calibrate(files, "--guidance_scale", 3.0, "--store") == 0
    facts = json.loads((files / "model" / "preprocessing.json").read_text())
    chosen = facts.get("settings_chosen_by")
    assert (chosen is None) if kept is None else (kept.items() <= chosen.items() and "ideal_dice" not in chosen)
    assert facts["threshold_chosen_by"]["rule"] == "slice-labels" and facts["settings"]["threshold"] != 0.2


def test_a_data_set_without_masks_will_do(files):
    assert calibrate(files) == 0
    write_training_set(files / "bare", masks=False)
    thresholds = json.loads((files / "out" / "RESULT.json").read_text())["thresholds"]
    assert calibrate(files, "--dataset", files / "bare") == 0
    document = json.loads((files / "out" / "RESULT.json").read_text())
    assert document["thresholds"] == thresholds and document["dice"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantile", 1], "--quantile is 1.0: it must lie between 0 and 1"),
        (["--max_slices", 0], "--max_slices must be at least 1"),
        (["--max_slices", 1], "the 1 slices of the split validation all have the same label"),
        (["--num_inference_steps", 7], "7"),
        (["--strength", 2], "strength is 2.0"),
        (["--model", "user/name", "--store"], "stored in a model folder only"),
    ],
)
def test_bad_options_are_refused_in_one_line(files, capsys, options, message):
    assert calibrate(files, *options) == 2
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line and "validation: " not in "".join(bars)
    assert not (files / "out").exists()
