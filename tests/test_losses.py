"""Eq. 1 and the dropout of the condition, compared with values computed by hand."""

from unittest.mock import Mock

import pytest
import torch

from diffusers_cf import DynamicDDIMScheduler, drop_condition, noise_prediction_loss
from diffusers_cf.losses import min_snr_weight, rising_timesteps, training_target


# One image of two pixels and one noise level: alpha-bar 0.64, so x_t = 0.8 x_0 + 0.6 eps = (1.1, 0.4).
IMAGE = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2)
NOISE = torch.tensor([0.5, 2.0]).reshape(1, 1, 1, 2)
T0 = torch.tensor([0])
SNR = 0.64 / 0.36

# Mean squared error of a network that returns x_t itself, against (0.5, 2), (-0.2, 2.2) and (1, -1).
BY_HAND = {"epsilon": (0.6**2 + 1.6**2) / 2, "v_prediction": (1.3**2 + 1.8**2) / 2, "sample": (0.1**2 + 1.4**2) / 2}


def scheduler(prediction_type="epsilon", alphas=(0.64,)):
    """Return a scheduler with these cumulative alphas."""
    betas = [1 - alpha / before for before, alpha in zip((1.0, *alphas), alphas, strict=False)]
    return DynamicDDIMScheduler(len(alphas), trained_betas=betas, prediction_type=prediction_type)


def identity(noisy, timesteps, class_ids):
    return noisy


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", BY_HAND)
def test_loss_by_hand(kind, dtype, tolerance):
    images, noise = IMAGE.to(dtype).repeat(3, 1, 1, 1), NOISE.to(dtype).repeat(3, 1, 1, 1)
    loss = noise_prediction_loss(identity, scheduler(kind), images, torch.zeros(3).long(), noise, T0.repeat(3))
    assert loss.item() == pytest.approx(BY_HAND[kind], rel=tolerance)
    assert loss.dtype == torch.float32 and loss.ndim == 0


@pytest.mark.parametrize("gamma, capped", [(1.0, 1.0), (5.0, SNR)])
@pytest.mark.parametrize("kind, divisor", [("epsilon", SNR), ("v_prediction", SNR + 1), ("sample", 1)])
def test_min_snr_weight_by_hand(kind, divisor, gamma, capped):
    weight = capped / divisor
    assert min_snr_weight(scheduler(kind), T0, gamma).tolist() == pytest.approx([weight], rel=1e-5)
    loss = noise_prediction_loss(identity, scheduler(kind), IMAGE, torch.tensor([0]), NOISE, T0, snr_gamma=gamma)
    assert loss.item() == pytest.approx(weight * BY_HAND[kind], rel=1e-5)


def test_each_sample_has_its_own_timestep_weight_and_condition():
    levels, images, noise = scheduler(alphas=(0.64, 0.36)), IMAGE.repeat(2, 1, 1, 1), NOISE.repeat(2, 1, 1, 1)
    timesteps, class_ids = torch.tensor([0, 1]), torch.tensor([1, 2])
    network = Mock(side_effect=lambda noisy, timesteps, class_ids: torch.zeros_like(noisy))
    loss = noise_prediction_loss(network, levels, images, class_ids, noise, timesteps, snr_gamma=1.0)
    noisy, given_timesteps, given_ids = network.call_args.args
    torch.testing.assert_close(noisy.flatten(), torch.tensor([1.1, 0.4, 1.0, 1.0]))
    assert torch.equal(given_timesteps, timesteps) and torch.equal(given_ids, class_ids)
    # snr 1.78 and 0.5625: only the first is above gamma; the noise has the mean square 2.125
    assert loss.item() == pytest.approx(2.125 * (1 / SNR + 1) / 2, rel=1e-5)
    velocities = training_target(scheduler("v_prediction", alphas=(0.64, 0.36)), images, noise, timesteps)
    torch.testing.assert_close(velocities.flatten(), torch.tensor([-0.2, 2.2, -0.5, 2.0]))


def test_unknown_prediction_type_is_refused():
    unknown = scheduler()
    unknown.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        training_target(unknown, IMAGE, NOISE, T0)


@pytest.mark.parametrize("probability, expected", [(0.0, [0, 1, 0, 1]), (0.35, [2, 2, 0, 1]), (1.0, [2, 2, 2, 2])])
def test_each_sample_is_dropped_by_its_own_draw(probability, expected):
    classes, uniform = torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 0.34, 0.35, 1 - 2**-24])
    dropped = drop_condition(classes, 2, probability, uniform)
    assert dropped.tolist() == expected and dropped.dtype == torch.int64
    assert classes.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "progress, first, expected",
    [
        (0.0, 0.0, [0, 0, 0, 0]),
        (0.25, 0.2, [0, 2, 80, 199]),
        (0.5, 0.2, [0, 6, 240, 599]),
        (0.75, 0.2, [0, 10, 400, 999]),
        (0.0, 1.0, [0, 10, 400, 999]),
    ],
)
def test_the_range_of_timesteps_grows_during_training(progress, first, expected):
    risen = rising_timesteps(torch.tensor([0, 10, 400, 999]), progress, first)
    assert risen.dtype == torch.int64 and risen.tolist() == expected
