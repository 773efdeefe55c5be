"""Intensities above the 99th percentile, which becomes 1 in the network's range: open question 6 of the method."""

import pytest
import torch


SHORT = {"num_inference_steps": 10, "strength": 0.4}


@pytest.mark.parametrize("fixed_point", [0, 3])
@pytest.mark.parametrize("share", [0.003, 0.03])
def test_peaks_above_the_99th_percentile_survive_an_unguided_round_trip(make_pipeline, share, fixed_point):
    """Else dynamic normalisation would cut every bright spot, and the map would be a threshold of the image."""
    pipe = make_pipeline(gaussian=True, fixed_point=fixed_point)
    pipe.unet.register_to_config(sample_size=64)
    pipe.register_to_config(clip_input=False)
    generator = torch.Generator().manual_seed(2)
    images = 0.5 + 0.1 * torch.randn(2, 2, 64, 64, generator=generator).clamp(-3, 3)
    peaks = torch.rand(images.shape, generator=generator) < share
    images[peaks] = 1.2
    out = pipe(images, strength=0.75, num_inference_steps=100)
    change = (out.counterfactuals - images).abs()
    assert change[peaks].max() < 0.01
    assert change[~peaks].mean() < 0.01


def test_the_input_is_cut_at_its_99th_percentile_unless_asked_otherwise(pipe, images):
    bright = images.clone()
    bright[0, 0, 5, 5] = 1.4
    cut = pipe(bright.clamp(max=1), **SHORT)
    torch.testing.assert_close(pipe(bright, **SHORT).latents, cut.latents)
    torch.testing.assert_close(pipe(bright, **SHORT).heatmaps, cut.heatmaps)
    change = pipe(bright, **SHORT).counterfactuals - bright
    torch.testing.assert_close(change, cut.counterfactuals - bright.clamp(max=1), atol=1e-5, rtol=0)
    pipe.register_to_config(clip_input=False)
    assert (pipe(bright, **SHORT).latents - cut.latents).abs().max() > 1e-3
