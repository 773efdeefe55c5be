"""The loops never ask a device for a number: on an accelerator each such question would wait for all work before it."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


WALK = {"strength": 0.5, "num_inference_steps": 10}


def stock():
    scheduler = DDIMScheduler(clip_sample=False)
    return scheduler, DDIMInverseScheduler.from_config(scheduler.config)


def dynamic(**options):
    scheduler = DynamicDDIMScheduler()
    return scheduler, DynamicDDIMInverseScheduler.from_config(scheduler.config, **options)


@pytest.fixture
def far(pipe):
    """A pipeline on a device that has shapes alone, and can't answer."""
    return pipe.to("meta")


@pytest.mark.parametrize(
    "schedulers",
    [stock, dynamic, lambda: dynamic(solver_order=2), lambda: dynamic(num_fixed_point_iterations=1)],
    ids=["stock", "ours", "second order", "fixed point"],
)
def test_the_loops_of_algorithm_1_run_ahead_of_the_device(far, schedulers):
    far.scheduler, far.inverse_scheduler = schedulers()
    far.inverse_scheduler.set_timesteps(10)
    latents = far.encode(torch.empty(3, 2, 8, 8, device="meta"), **WALK)
    for scale in (0, 3.0):
        decoded = far.denoise(latents, "healthy", scale, **WALK)
        assert decoded.device.type == "meta" and decoded.shape == (3, 2, 8, 8)


@pytest.mark.parametrize("map", ["reconstruction", "forward"])
def test_a_whole_call_reads_images_where_they_are_and_nothing_back(far, images, map):
    out = far(images, guidance_scale=3.0, map=map, **WALK)
    assert out.heatmaps.device.type == "meta" and out.heatmaps.shape == (4, 8, 8)
    assert out.counterfactuals.shape == images.shape
