"""Rows of the tables that are diffusion models: what differs in training, and that each finds the trivial phantom."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from trivial_phantom import train_briefly, trivial_auprc, trivial_batch

from diffusers_cf.baselines import ROWS, Grid, make_baseline, network_of_data, row_of
from diffusers_cf.benchmark.presets import PRESETS


GRID = Grid(num_inference_steps=20, guidance_scales=(3.0,), strengths=(0.4,), classifier_scales=(30.0,))


def trained_row(row: str, steps: int):
    """A row of the tables whose network saw `steps` batches of the trivial phantom."""
    torch.manual_seed(0)
    network = network_of_data(ROWS[row].network, "small", 1, 16, ("healthy", "unhealthy"))
    return row_of(row).make(train_briefly(network, steps), GRID)


@pytest.mark.parametrize("row", ["ours", "cdpm-adagn-guided", "cdpm-healthy", "cdpm-classifier"])
def test_it_finds_the_square_of_the_trivial_phantom(row):
    auprc, prevalence = trivial_auprc(trained_row(row, 100))
    assert auprc > 5 * prevalence


@pytest.mark.parametrize("method", ["threshold", "threshold-flair"])
def test_thresholds_find_it_without_training(method):
    auprc, prevalence = trivial_auprc(make_baseline(method, ["flair"]))
    assert auprc > 5 * prevalence


def test_the_classifier_is_told_how_noisy_its_images_are():
    """At the middle of training it gets x_t at half of t, together with half of t."""
    torch.manual_seed(0)
    network = network_of_data("cdpm-classifier", "small", 1, 16, ("healthy", "unhealthy"))
    batch, seen = trivial_batch(4, 0, "all"), {}
    network.classifier.register_forward_pre_hook(lambda _, given: seen.update(sample=given[0], timestep=given[1]))
    dict(network.losses(batch, 0.5))
    half = batch["timesteps"] // 2
    assert torch.equal(seen["timestep"], half)
    alphas = network.noise_scheduler.alphas_cumprod[half].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * batch["images"] + (1 - alphas).sqrt() * batch["noise"]
    torch.testing.assert_close(seen["sample"], expected)


def test_the_network_begins_with_low_timesteps_and_is_validated_on_all():
    torch.manual_seed(0)
    network = network_of_data("ours", "small", 1, 16, ("healthy", "unhealthy"))
    batch, seen = trivial_batch(4, 0, "all"), []
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    dict(network.losses(batch, 0.0))
    network.validation_loss(batch)
    assert seen[0].max() < 200 and torch.equal(seen[0], (batch["timesteps"] * 0.2).long())
    assert torch.equal(seen[1], batch["timesteps"])
    # so the validation loss rises meanwhile, and says nothing until all timesteps are trained
    dict(network.losses(batch, network.comparable_from))
    assert torch.equal(seen[2], batch["timesteps"])
    dict(network.losses(batch, network.comparable_from - 0.01))
    assert not torch.equal(seen[3], batch["timesteps"])
    network.register_to_config(first_timesteps=1.0)
    assert network.comparable_from == 0


@pytest.mark.parametrize(
    ("row", "both", "encoding"),
    [
        ("cdpm-healthy", {"thresholding": False, "clip_sample": True}, {}),
        ("cdpm-classifier", {"thresholding": False, "clip_sample": True}, {}),
        ("cdpm-adagn", {"thresholding": False, "clip_sample": True}, {}),
        ("cdpm-adagn-guided", {"thresholding": False, "clip_sample": True}, {}),
        ("ours-clipped", {"thresholding": False, "clip_sample": True}, {}),
        ("ours-unclipped", {"thresholding": False, "clip_sample": False}, {}),
        ("ours", {"thresholding": True, "use_clipped_model_output": True}, {}),
        ("ours-reconstruction", {"thresholding": True, "use_clipped_model_output": True}, {}),
        ("forward-map", {"thresholding": True, "use_clipped_model_output": True}, {}),
        ("ours-raw-epsilon", {"thresholding": True, "use_clipped_model_output": False}, {}),
        ("ours-fixed-point", {"thresholding": True}, {"num_fixed_point_iterations": 3}),
    ],
)
def test_a_row_is_what_its_title_says(row, both, encoding):
    network = network_of_data(ROWS[row].network, "small", 1, 16, ("healthy", "unhealthy"))
    pipe = row_of(row).make(network, GRID).pipe
    for scheduler in (pipe.scheduler, pipe.inverse_scheduler):
        assert both.items() <= dict(scheduler.config).items()
    expected = {"num_fixed_point_iterations": 0, "solver_order": 1} | encoding
    assert expected.items() <= dict(pipe.inverse_scheduler.config).items() and pipe.scheduler.config.solver_order == 1
    assert not pipe.config.crop_background


@pytest.mark.parametrize(
    ("row", "scales", "kind"),
    [
        ("cdpm-healthy", {0.0}, "counterfactual"),
        ("cdpm-adagn", {1.0}, "counterfactual"),
        ("cdpm-adagn-guided", {3.0}, "counterfactual"),
        ("cdpm-classifier", {30.0}, "counterfactual"),
        ("ours", {3.0}, "counterfactual"),
        ("ours-reconstruction", {3.0}, "reconstruction"),
        ("forward-map", {3.0}, "forward"),
    ],
)
def test_a_row_chooses_among_its_own_scales(row, scales, kind):
    method = row_of(row).make(network_of_data(ROWS[row].network, "small", 1, 16, ("healthy", "unhealthy")), GRID)
    assert {c["guidance_scale"] for c in method.candidates} == scales
    assert {c["map"] for c in method.candidates} == {kind}


@pytest.mark.parametrize("steps", [3, 500])
def test_restoration_goes_as_far_in_any_number_of_steps(steps):
    vae = network_of_data("vae", "small", 1, 16, ("healthy", "unhealthy"))
    ways = [row_of("vae-restoration").make(vae, replace(GRID, restoration_steps=n)) for n in (None, steps)]
    lengths = [[c["num_steps"] * c["step_size"] for c in way.candidates] for way in ways]
    assert lengths[0] == pytest.approx(lengths[1])
    assert {c["num_steps"] for c in ways[1].candidates} == {steps}


def test_the_class_activation_map_of_every_preset_has_locations():
    for preset in PRESETS.values():
        with torch.device("meta"):
            network = network_of_data("cam", preset.size, 4, preset.image_size, ("healthy", "unhealthy"))
            images = torch.rand(1, 4, preset.image_size, preset.image_size)
            assert min(network.activation_map(images).shape[1:]) >= 4


def test_settings_of_the_grid_are_every_combination():
    grid = PRESETS["cpu"].grid
    settings = grid.settings((1.5, 3.0))
    assert len(settings) == 2 * len(grid.strengths) == len({json.dumps(s) for s in settings})
    assert {s["num_inference_steps"] for s in settings} == {20}
    assert np.isin([s["strength"] for s in settings], grid.strengths).all()
