"""Pixel counts against scikit-learn and brute force."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from diffusers_cf.evaluation.pixel_counts import PixelCounts, average_precision


def counted(scores, masks, **kwargs):
    counts = PixelCounts(**kwargs)
    counts.update(scores, masks)
    return counts


def dice(scores, masks, threshold):
    above = scores >= threshold
    return 2 * (above & masks).sum() / (above.sum() + masks.sum())


def heatmap_pixels(n, seed=0, prevalence=0.03, zeros=0.6):
    """Pixels like those of a heatmap: most are exactly 0, lesion pixels are brighter and overlap with the others."""
    rng = np.random.default_rng(seed)
    masks = rng.random(n) < prevalence
    scores = np.abs(rng.normal(0.05, 0.08, n)) + masks * np.abs(rng.normal(0.1, 0.12, n))
    scores[~masks & (rng.random(n) < zeros)] = 0
    return scores.astype(np.float32), masks


TRANSFORMS = {
    "as they are": lambda scores: scores,
    "negative": lambda scores: -1 / (0.1 + scores) + 3,
    "large": lambda scores: 1e5 * scores**3,
    "shifted": lambda scores: 1000 + scores,
    "tied": lambda scores: np.round(scores, 2),
    "few positives": lambda scores: scores,
}


@pytest.fixture(params=TRANSFORMS)
def case(request):
    """Function of the number of pixels that makes scores and masks."""

    def make(n):
        scores, masks = heatmap_pixels(n, seed=1, prevalence=0.001 if request.param == "few positives" else 0.03)
        return TRANSFORMS[request.param](scores).astype(np.float32), masks

    return make


def test_few_pixels_are_measured_exactly(case):
    scores, masks = case(3000)
    counts = counted(scores, masks)
    assert counts.shift == 0
    assert counts.average_precision() == pytest.approx(average_precision_score(masks, scores), abs=1e-12)
    values = {threshold: dice(scores, masks, threshold) for threshold in np.unique(scores)}
    best = max(values, key=values.get)  # the lowest of them
    assert counts.ideal_dice() == (pytest.approx(values[best], abs=1e-12), best)


def test_many_pixels_are_measured_closely_in_few_bins(case):
    scores, masks = case(100_000)
    counts = counted(scores, masks, max_bins=2**14)
    assert len(counts.bins) <= 2**14
    assert counts.average_precision() == pytest.approx(average_precision_score(masks, scores), abs=5e-4)
    found, threshold = counts.ideal_dice()
    assert found == pytest.approx(dice(scores, masks, threshold), abs=1e-12)
    assert found > max(dice(scores, masks, t) for t in np.quantile(scores, np.linspace(0.5, 1, 200))) - 2e-3


def test_a_hard_map_keeps_its_average_precision_at_the_default_resolution():
    rng = np.random.default_rng(0)
    masks = rng.random(400_000) < 0.03
    scores = np.abs(rng.normal(0.3, 0.12, masks.size) + 0.22 * masks).astype(np.float32)
    exact = average_precision_score(masks, scores)
    assert 0.3 < exact < 0.5
    counts = counted(scores, masks)
    assert 65_536 <= len(counts.bins) <= 2**18
    assert abs(counts.average_precision() - exact) < 3e-5


def test_counts_of_parts_add_up_to_counts_of_the_whole():
    scores, masks = heatmap_pixels(60_000)
    whole = counted(scores, masks, max_bins=4096)
    assert whole.shift > 0
    streamed = PixelCounts(4096)
    for part in np.array_split(np.random.default_rng(1).permutation(len(scores)), 7):
        streamed.update(scores[part], masks[part])
    # parts of different size and range have different shifts before they are added
    low = scores < 0.01
    added = counted(scores[low], masks[low], max_bins=4096) + counted(scores[~low], masks[~low], max_bins=4096)
    for counts in (streamed, added):
        assert counts.shift == whole.shift
        for name in ("bins", "positives", "negatives"):
            np.testing.assert_array_equal(getattr(counts, name), getattr(whole, name))
    assert whole.positives.sum() == masks.sum() and whole.negatives.sum() == (~masks).sum()
    coarsened = PixelCounts(4096) + counted(scores, masks)
    np.testing.assert_array_equal(coarsened.positives, whole.positives)


def test_bins_hold_the_scores_from_their_own_up_to_the_next():
    scores = np.random.default_rng(0).normal(0, 1, 50_000).astype(np.float32)
    counts = counted(scores, scores > 1, max_bins=4096)
    assert counts.shift > 0
    assert (np.diff(counts.scores) > 0).all() and counts.scores[0] < 0 < counts.scores[-1]
    index = np.searchsorted(counts.scores, scores, side="right") - 1
    np.testing.assert_array_equal(np.bincount(index), counts.positives + counts.negatives)


def test_zero_and_minus_zero_are_one_score_that_no_other_shares():
    scores = np.array([0.0, -0.0, 1e-30, -1e-30], dtype=np.float32)
    counts = counted(scores, [1, 0, 0, 0])
    np.testing.assert_array_equal(counts.scores, np.sort(scores)[[0, 1, 3]])
    assert counts.positives.tolist() == [0, 1, 0] and counts.negatives.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [0.0, -2.5, 7.0])
def test_a_constant_map_scores_the_prevalence(value):
    masks = np.arange(1000) < 50
    counts = counted(np.full(1000, value), masks)
    assert counts.average_precision() == pytest.approx(0.05)
    assert counts.prevalence == 0.05
    assert counts.ideal_dice() == (pytest.approx(2 * 0.05 / 1.05), value)


def test_average_precision_of_many_histograms_is_scikit_learns():
    rng = np.random.default_rng(0)
    # Bins are empty, hold one class alone, or both: ties across the classes.
    positives, negatives = rng.poisson(0.4, (5, 200)), rng.poisson(0.9, (5, 200))
    expected = []
    for positive, negative in zip(positives, negatives, strict=True):
        scores = np.concatenate([np.repeat(-np.arange(200), positive), np.repeat(-np.arange(200), negative)])
        expected.append(average_precision_score(np.repeat([1, 0], [positive.sum(), negative.sum()]), scores))
    np.testing.assert_allclose(average_precision(positives, negatives), expected, rtol=0, atol=1e-12)


def test_measures_are_none_without_lesion_or_pixels():
    for counts in (counted(np.ones(10), np.zeros(10)), PixelCounts()):
        assert counts.average_precision() is None
        assert counts.ideal_dice() == (None, None)
    assert counted(np.ones(10), np.zeros(10)).prevalence == 0 and PixelCounts().prevalence is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"), np.errstate(over="ignore"):
        counted(np.array([0.0, bad, 1.0]), np.zeros(3))


@pytest.mark.parametrize("max_bins", [4096, 2**18])
def test_arrays_give_back_the_counts(max_bins):
    scores, masks = heatmap_pixels(30_000)
    counts = counted(scores - 0.1, masks, max_bins=max_bins)
    read = PixelCounts.from_arrays(counts.to_arrays("p/raw/"), "p/raw/")
    assert read.shift == counts.shift
    for name in ("bins", "positives", "negatives", "scores"):
        np.testing.assert_array_equal(getattr(read, name), getattr(counts, name))


def test_dice_at_a_threshold_and_the_lowest_of_equally_good_ones():
    counts = counted([3, 2, 2, 1], [1, 0, 0, 1])
    assert counts.ideal_dice() == (pytest.approx(2 / 3), 1.0)
    assert counts.dice(0) == counts.dice(1) == pytest.approx(2 / 3) and counts.dice(1.5) == pytest.approx(2 / 5)
    assert counts.dice(4) == 0 and PixelCounts().dice(1) is None
