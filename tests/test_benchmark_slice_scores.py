import numpy as np
import pytest
import torch

from diffusers_cf.benchmark.slice_scores import diffusion_classifier_scores, position_scores, relative_positions


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


@pytest.fixture
def gaussian(make_pipeline, monkeypatch):
    """A pipeline with the exact noise predictor of pixels from N(mean, STD^2), and a list of its `(sample, t)`."""
    pipe, calls = make_pipeline(thresholding=False), []
    healthy = pipe.encode_classes("healthy", 1)[0]

    def predict_noise(sample, t, condition):
        calls.append((sample, t))
        alpha = pipe.scheduler.alphas_cumprod[t]
        is_healthy = (condition[0] == healthy).flatten(1).all(dim=1)
        mean = torch.where(is_healthy, *MEANS)[:, None, None, None]
        return (1 - alpha).sqrt() * (sample - alpha.sqrt() * mean) / (alpha * STD**2 + 1 - alpha)

    monkeypatch.setattr(pipe, "predict_noise", predict_noise)
    return pipe, calls


def test_the_diffusion_classifier_in_closed_form(images, gaussian):
    """e_h^2 - e_u^2 with e_k = eps - b (x_t - sqrt(abar) m_k), from the x_t that the network was given."""
    (pipe, calls), expected, clean, noises = gaussian, torch.zeros(4), 2 * images - 1, []
    scores = diffusion_classifier_scores(pipe, images, (100, 400, 700), seed=3)
    assert [t for _, t in calls] == [100, 400, 700]
    for sample, t in calls:
        (healthy, unhealthy), alpha = sample.chunk(2), pipe.scheduler.alphas_cumprod[t]
        assert torch.equal(healthy, unhealthy)
        noises.append((healthy - alpha.sqrt() * clean) / (1 - alpha).sqrt())
        factor = (1 - alpha).sqrt() / (alpha * STD**2 + 1 - alpha)
        errors = [(noises[-1] - factor * (healthy - alpha.sqrt() * mean)).pow(2) for mean in MEANS]
        expected += (errors[0] - errors[1])[:, :, 2:].sum(dim=(1, 2, 3)) / 3  # rows 0 and 1 are background
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    for noise in noises:  # the same for all slices, another for each t
        torch.testing.assert_close(noise, noise[:1].expand_as(noise), rtol=0, atol=1e-4)
    assert (noises[0] - noises[1]).abs().mean() > 0.5 and not scores.requires_grad


def test_a_score_depends_on_seed_and_slice_alone(pipe, images):
    images[1] = 0
    scores = diffusion_classifier_scores(pipe, images, (100, 500), seed=0)
    parts = [diffusion_classifier_scores(pipe, part, (100, 500), seed=0) for part in images.split((1, 3))]
    torch.testing.assert_close(torch.cat(parts), scores, rtol=1e-4, atol=1e-4)
    assert scores[1] == 0 and (scores[[0, 2, 3]] != 0).all()
    assert (diffusion_classifier_scores(pipe, images, (100, 500), seed=1) - scores).abs().max() > 1e-3
