"""Windows around the foreground, and that the pipeline computes Algorithm 1 in each of them."""

import itertools

import pytest
import torch

from diffusers_cf.evaluation.trajectories import heatmaps_of_settings
from diffusers_cf.images import MARGIN, foreground_windows, window_side


SIDE = 48
SHORT = {"guidance_scale": 3.0, "strength": 0.3, "num_inference_steps": 10}
# top, bottom, left, right of the foreground of each image; the third is empty, the last two only differ in place
BOXES = [(0, 48, 0, 48), (10, 30, 5, 33), None, (20, 21, 46, 48), (30, 40, 30, 38), (3, 13, 2, 10)]


@pytest.fixture
def images():
    """Images `(6, 2, 48, 48)` in [0, 1]."""
    images = torch.zeros(len(BOXES), 2, SIDE, SIDE)
    values = 0.1 + 0.9 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    for image, filled, box in zip(images, values, BOXES, strict=True):
        if box:
            top, bottom, left, right = box
            image[:, top:bottom, left:right] = filled[:, top:bottom, left:right]
    return images


@pytest.fixture
def large(pipe):
    """A pipeline whose network computes windows of 48 x 48 images."""
    pipe.register_to_config(crop_background=True)
    pipe.unet.register_to_config(sample_size=SIDE)
    return pipe


@pytest.mark.parametrize("short", [24, 32, 40])
def test_a_window_holds_the_foreground_and_a_margin(images, short):
    groups = foreground_windows((images > 0).any(dim=1), short)
    assert sorted(number for group in groups for number in group.index) == [0, 1, 3, 4, 5]
    for group in groups:
        height, width = group.size
        assert set(group.size) <= {short, SIDE}
        for number, (y, x) in zip(group.index, group.corners, strict=True):
            top, bottom, left, right = BOXES[number]
            assert 0 <= y <= max(0, top - MARGIN) and min(SIDE, bottom + MARGIN) <= y + height <= SIDE
            assert 0 <= x <= max(0, left - MARGIN) and min(SIDE, right + MARGIN) <= x + width <= SIDE


def test_windows_are_as_small_as_their_foreground_allows(images):
    inside = (images > 0).any(dim=1)
    sizes = {n: g.size for g in foreground_windows(inside, 24) for n in g.index}
    assert sizes == {0: (48, 48), 1: (24, 48), 3: (24, 24), 4: (24, 24), 5: (24, 24)}
    (group,) = foreground_windows(inside, None)
    assert group.index == [0, 1, 3, 4, 5] and group.size == (SIDE, SIDE)
    assert foreground_windows(torch.zeros(2, 4, 4, dtype=torch.bool), None) == []


def test_a_window_has_three_quarters_of_a_side_rounded_up_for_the_network():
    found = {side: window_side((side, side), 3) for side in (16, 40, 48, 56, 64, 80, 128, 240)}
    assert found == {16: 16, 40: 32, 48: 40, 56: 48, 64: 48, 80: 64, 128: 96, 240: 184}
    assert window_side((32, 64), 3) == 48 and window_side((48, 48), 2) == 36


def test_the_network_computes_windows_alone(large, images, record_calls):
    calls = record_calls(large)
    out = large(images, **SHORT)
    assert {tuple(call.sample.shape[-2:]) for call in calls} == {(48, 48), (36, 36)}  # three quarters
    outside = torch.ones_like(images[:, 0], dtype=torch.bool)
    for group in large.windows(2 * images - 1):
        group.paste(outside, torch.zeros(len(group.index), *group.size, dtype=torch.bool))
    assert not out.heatmaps[outside].any() and out.heatmaps[~outside].any()
    assert torch.equal(out.counterfactuals[:, 0][outside], images[:, 0][outside])
    large.register_to_config(crop_background=False)
    calls.clear()
    large(images, **SHORT)
    assert {tuple(call.sample.shape) for call in calls} == {(5, 2, 48, 48), (10, 2, 48, 48)}


@pytest.mark.parametrize("map", ["counterfactual", "forward"])
def test_a_window_equals_an_image_of_its_size(large, images, map):
    cropped = large(images[1:2], map=map, **SHORT)
    (group,) = large.windows(2 * images[1:2] - 1)
    (top, left), (height, width) = group.corners[0], group.size
    large.register_to_config(crop_background=False)
    large.unet.register_to_config(sample_size=(height, width))
    alone = large(group.cut(images[1:2]), map=map, **SHORT)
    part = (slice(None), slice(top, top + height), slice(left, left + width))
    torch.testing.assert_close(cropped.heatmaps[part], alone.heatmaps, rtol=0, atol=1e-5)
    torch.testing.assert_close(group.cut(cropped.counterfactuals), alone.counterfactuals, rtol=0, atol=1e-5)
    torch.testing.assert_close(group.cut(cropped.latents), alone.latents, rtol=0, atol=1e-4)


def test_the_other_images_of_a_batch_change_nothing(large, images):
    together = large(images, target=["healthy", "unhealthy"] * 3, **SHORT)
    for number, target in enumerate(["healthy", "unhealthy"] * 3):
        alone = large(images[number : number + 1], target=target, **SHORT)
        torch.testing.assert_close(together.heatmaps[number], alone.heatmaps[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        list(itertools.product([0.1, 0.3], [1.0, 3.0], ["counterfactual", "reconstruction", "forward"])),
        [(0.3, 3.0, "reconstruction"), (0.1, 1.0, "forward"), (0.3, 2.0, "counterfactual")],
    ],
    ids=["grid", "no grid"],
)
def test_a_sweep_computes_the_same_windows_as_a_call(large, images, settings):
    found = dict(heatmaps_of_settings(large, images, settings, 10))
    assert set(found) == set(settings)
    for (strength, scale, kind), heat in found.items():
        single = large(images, None, scale, strength, 10, kind).heatmaps
        torch.testing.assert_close(torch.from_numpy(heat), single, rtol=0, atol=1e-5)
