import numpy as np

from diffusers_cf.benchmark.protocol import position_scores
from diffusers_cf.training.batches import relative_positions


MEANS, STD = (-0.2, 0.3), 0.4  # of healthy and unhealthy pixels, in the network's range


def test_relative_positions_by_hand():
    """Two patients out of order, one with a gap; then one with a single slice."""
    patients, slices = ["b", "a", "b", "a", "b", "a", "c"], [12, 100, 10, 50, 18, 60, 7]
    np.testing.assert_allclose(relative_positions(patients, slices), [0.25, 1.0, 0.0, 0.0, 1.0, 0.2, 0.5])
    assert relative_positions([], []).shape == (0,)


def test_position_scores_are_the_odds_of_each_position():
    """Lesions in the middle: a bump that a straight line through the positions could not follow."""
    random = np.random.default_rng(0)

    def probability(position):
        return 0.05 + 0.8 * np.exp(-(((position - 0.6) / 0.15) ** 2))

    positions = random.random(5000)
    labels = random.random(5000) < probability(positions)
    asked = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(position_scores(labels, positions, asked), probability(asked), atol=0.07)


def test_position_scores_count_every_disease_as_unhealthy():
    positions = np.linspace(0, 1, 40)
    labels = np.where(positions > 0.5, np.arange(40) % 2 + 1, 0)
    scores = position_scores(labels, positions, [0.0, 0.2, 0.8, 1.0])
    assert (scores[:2] < 0.2).all() and (scores[2:] > 0.8).all()
    # single images, each a patient of its own: the prevalence
    np.testing.assert_allclose(position_scores([0, 0, 0, 1] * 50, np.full(200, 0.5), [0.5]), 0.25, atol=0.01)
