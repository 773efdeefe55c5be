"""Steps of second order: their error on a flow that is known exactly, their arithmetic, and prediction types."""

from itertools import pairwise

import pytest
import torch
from gaussian_data import ALPHAS, STD, exact_epsilon, noise

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler, dynamic_normalize


BOTH = (DynamicDDIMScheduler, DynamicDDIMInverseScheduler)


def flow_error(scheduler_class, order, steps, strength=0.5):
    """Return the mean of |x - exact| after the steps between 0.1 and L, on the flow x_t ~ sqrt(variance of x_t)."""
    scheduler = scheduler_class(solver_order=order, thresholding=False)
    scheduler.set_timesteps(steps)
    grid = scheduler.grid[steps // 10 : round(steps * strength)].tolist()
    exact = {t: (ALPHAS[t] * STD**2 + 1 - ALPHAS[t]).sqrt() * noise(2, 2, 16, 16, dtype=torch.float64) for t in grid}
    rises = scheduler_class is DynamicDDIMInverseScheduler
    x = exact[grid[0] if rises else grid[-1]]
    # a step of encoding begins at its timestep for order 2 and ends there for order 1
    rising = grid[:-1] if order == 2 else grid[1:]
    for t in rising if rises else grid[:0:-1]:
        x = scheduler.step(exact_epsilon(x, t), t, x).prev_sample
    return (x - exact[grid[-1] if rises else grid[0]]).abs().mean().item()


@pytest.mark.parametrize("scheduler_class", BOTH)
@pytest.mark.parametrize("order", [1, 2])
def test_error_is_proportional_to_the_step_size_to_the_power_of_the_order(scheduler_class, order):
    coarse, fine, finest = (flow_error(scheduler_class, order, steps) for steps in (100, 200, 500))
    assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order
    assert 0.8 * 2.5**order < fine / finest < 1.25 * 2.5**order
    assert order == 1 or flow_error(scheduler_class, 2, 50) < flow_error(scheduler_class, 1, 50) / 3


def test_steps_of_second_order_written_out():
    """From the clean image one of first order, then one that is repeated by the trapezoidal rule, then two more."""
    inverse = DynamicDDIMInverseScheduler(solver_order=2, thresholding=False)
    inverse.set_timesteps(20)
    assert inverse.timesteps[:4].tolist() == [0, 0, 50, 100] and len(inverse.timesteps) == 20
    timesteps, slopes = (0, 50, 100, 150), [noise(1, 1, 4, 4, seed=i) for i in range(4)]
    image = x = STD * noise(1, 1, 4, 4, seed=9)
    for t, slope in zip(inverse.timesteps[:4], slopes, strict=True):
        x = inverse.step(slope, t, x).prev_sample
    rho = [0.0, *((1 / ALPHAS[t] - 1).sqrt().item() for t in timesteps)]
    lengths = [after - before for before, after in pairwise(rho)]
    first = lengths[0] * slopes[0] + lengths[1] * (slopes[1] + slopes[2]) / 2
    middles = [slopes[i] + lengths[i] / lengths[i - 1] / 2 * (slopes[i] - slopes[i - 1]) for i in (2, 3)]
    expected = image + first + lengths[2] * middles[0] + lengths[3] * middles[1]
    torch.testing.assert_close(x / ALPHAS[150].sqrt().float(), expected, atol=1e-5, rtol=1e-4)


def test_the_step_to_the_clean_image_is_of_first_order():
    scheduler, x = DynamicDDIMScheduler(solver_order=2), noise(1, 1, 8, 8)
    scheduler.set_timesteps(20)
    for t in (100, 50):
        x = scheduler.step(noise(1, 1, 8, 8, seed=t), t, x).prev_sample
    expected = (x - (1 - ALPHAS[0]).sqrt() * noise(1, 1, 8, 8, seed=7)) / ALPHAS[0].sqrt()
    reached = scheduler.step(noise(1, 1, 8, 8, seed=7), 0, x).prev_sample
    torch.testing.assert_close(reached, expected.float(), atol=1e-5, rtol=1e-4)


def test_predict_original_is_the_clean_image_at_the_start_of_the_next_step():
    inverse, x, output = DynamicDDIMInverseScheduler(solver_order=2), noise(1, 2, 8, 8), noise(1, 2, 8, 8, seed=1)
    inverse.set_timesteps(20)
    inverse.step(output, 0, x)
    expected = dynamic_normalize((x - (1 - ALPHAS[50]).sqrt() * 2 * output) / ALPHAS[50].sqrt())
    torch.testing.assert_close(inverse.predict_original(2 * output, 50, x), expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("edited", [0, 1, 2])
@pytest.mark.parametrize("scheduler_class", BOTH)
def test_an_edit_between_steps_moves_the_result_as_much_with_either_order(scheduler_class, edited, order):
    """Without normalisation steps are linear in x, so an edit is only scaled by the change of the signal's level."""
    scheduler = scheduler_class(solver_order=order, thresholding=False)
    ends = []
    for edit in (0.0, 1.0):
        scheduler.set_timesteps(20)
        x, walk = noise(1, 1, 4, 4, dtype=torch.float64), scheduler.timesteps[5:10].tolist()
        for step, t in enumerate(walk):
            x = scheduler.step(noise(1, 1, 4, 4, seed=t, dtype=torch.float64), t, x).prev_sample
            x = x + edit * (step == edited)
        ends.append(x)
    stride = -50 if scheduler_class is DynamicDDIMScheduler else 50 * (order == 2)
    at, end = (ALPHAS[walk[step] + stride] for step in (edited, -1))
    torch.testing.assert_close(ends[1] - ends[0], torch.full_like(x, (end / at).sqrt()), atol=1e-6, rtol=1e-6)


def exact_output(kind, sample, timestep):
    """Return the exact prediction of this type for Gaussian data."""
    alpha, epsilon = ALPHAS[int(timestep)], exact_epsilon(sample, timestep)
    x0 = (sample - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
    return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha.sqrt() * epsilon - (1 - alpha).sqrt() * x0}[kind]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [8, 20, 100])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_round_trip_does_not_depend_on_what_the_network_predicts(kind, steps, order):
    image, trips = STD * noise(2, 2, 8, 8, dtype=torch.float64), {}
    for name in ("epsilon", kind):
        options = {"prediction_type": name, "solver_order": order, "thresholding": False}
        inverse, scheduler, x = DynamicDDIMInverseScheduler(**options), DynamicDDIMScheduler(**options), image
        for direction in (inverse, scheduler):
            direction.alphas_cumprod = ALPHAS  # float64, as the samples
            direction.set_timesteps(steps)
        for t in inverse.timesteps:
            x = inverse.step(exact_output(name, x, t), t, x).prev_sample
        latent = x
        for t in scheduler.timesteps:
            x = scheduler.step(exact_output(name, x, t), t, x).prev_sample
        trips[name] = latent, x
    for found, expected in zip(trips[kind], trips["epsilon"], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    if steps == 100:
        assert (trips[kind][1] - image).abs().mean() < 0.1 * STD
