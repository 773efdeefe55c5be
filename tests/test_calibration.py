"""Each rule on maps whose threshold is known."""

import numpy as np
import pytest
from evaluation_data import FakeDataset

from diffusers_cf.evaluation.calibration import (
    best_split,
    dice_of_thresholds,
    healthy_quantile,
    slice_scores,
    thresholds_of_labels,
)
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.98, 0.999])
def test_the_healthy_quantile_spares_just_that_share_of_healthy_pixels(quantile):
    scores = np.random.default_rng(0).exponential(size=10_000).astype(np.float32)
    threshold = healthy_quantile(scores, quantile)
    assert (scores < threshold).mean() == pytest.approx(quantile, abs=1e-4)
    before = scores[scores < threshold].max()
    assert (scores < before).mean() < quantile


def test_a_map_that_is_constant_on_healthy_slices_marks_none_of_them():
    assert 0.25 < healthy_quantile(np.full(50, 0.25, np.float32), 0.98) < 0.2500001
    assert 0 < healthy_quantile(np.zeros(50, np.float32), 0.98) < 1e-30


def test_the_score_of_a_slice_is_that_of_its_20th_brightest_pixel():
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0].flat[:20] = np.arange(20, 0, -1)
    maps[1].flat[:19] = 9
    assert slice_scores(maps).tolist() == [1, 0]
    assert slice_scores(np.full((1, 2, 2), 0.5)).tolist() == [0.5]


def test_labels_choose_the_threshold_with_the_fewest_errors_of_both_kinds():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert best_split(scores, [0, 0, 0, 1, 1, 1]) == 0.4
    # one healthy slice has a high score: 2 of 3 spared and all found is better than all spared and 1 found
    assert best_split(scores, [0, 0, 1, 1, 0, 1]) == 0.3
    # one lesion hardly shows: missing it is better than marking 2 of 3 healthy slices
    assert best_split(scores, [0, 1, 0, 0, 1, 1]) == 0.5


def batches(dataset):
    """Yield a map that shows the lesion well, with its batch."""
    yield PostProcessing().apply(dataset.images[:, 1], dataset.images), dataset.collate(np.arange(len(dataset)))


def test_rules_use_labels_alone_and_their_dice_is_that_of_the_masks():
    dataset, hidden = (FakeDataset((8, 8), size=32) for _ in range(2))
    hidden.masks[:] = 1
    thresholds = thresholds_of_labels(batches(dataset), 0.9)
    assert thresholds == thresholds_of_labels(batches(hidden), 0.9)
    found = dice_of_thresholds(batches(dataset), thresholds)
    ((heat, batch),) = batches(dataset)
    inside = foreground_mask(batch["images"])
    healthy_pixels = heat[dataset.labels == 0][inside[dataset.labels == 0]]
    assert thresholds["healthy-quantile"] == pytest.approx(np.quantile(healthy_pixels, 0.9), rel=0.01)
    assert set(found) == {"slice-labels", "healthy-quantile", "ideal"}
    for name, threshold in thresholds.items():
        marked, lesion = (heat >= threshold)[inside], dataset.masks[inside] > 0
        assert found[name] == pytest.approx(2 * (marked & lesion).sum() / (marked.sum() + lesion.sum()))
        assert found[name] <= found["ideal"] < 1
