"""Heatmaps of small images by hand; the forward map in closed form for Gaussian classes, its network calls."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffusers_cf import ClassTokenEncoder, DynamicDDIMInverseScheduler, implicit_guidance
from diffusers_cf.evaluation.trajectories import decode_images, encode_images, heatmaps_of_settings
from diffusers_cf.maps import anomaly_heatmap, heatmap, signed_heatmap
from diffusers_cf.models import predict_noise


MEANS, STD = (-0.2, 0.3, 0.1), 0.4  # of healthy, unhealthy, null, in the network's range
SHORT = {"guidance_scale": 3.0, "strength": 0.4, "num_inference_steps": 10, "map": "forward"}


def test_the_absolute_and_the_signed_map_by_hand():
    reference = torch.tensor([[[[1.0, 0.2]], [[0.5, 0.5]]]])
    counterfactual = torch.tensor([[[[0.6, 0.4]], [[0.7, 0.5]]]])
    # lesions are brighter in channel 0 and darker in channel 1: (0.4 + 0.2) / 2, and (-0.2 + 0) / 2, which is cut
    absolute, signed = torch.tensor([[[0.3, 0.1]]]), torch.tensor([[[0.3, 0.0]]])
    for found in (anomaly_heatmap(reference, counterfactual), heatmap("reconstruction", reference, counterfactual)):
        torch.testing.assert_close(found, absolute)
    torch.testing.assert_close(signed_heatmap(reference, counterfactual, [1, -1]), signed)
    torch.testing.assert_close(heatmap("signed", reference, counterfactual, [1, -1]), signed)


@pytest.mark.parametrize("signs", [None, [], [1]])
def test_the_signed_map_needs_a_sign_for_each_channel(pipe, images, record_calls, signs):
    pipe.preprocessing, calls = {"signs": signs}, record_calls(pipe)
    with pytest.raises(ValueError, match="signs"):
        pipe(images, map="signed", num_inference_steps=10)
    assert calls == []


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_map_of_gaussian_classes_in_closed_form(make_pipeline, images, scale):
    """The difference of the predicted noise doesn't depend on x, so neither does that of the clean images."""
    alphas, count = DDIMScheduler().alphas_cumprod.double(), 3
    pipe = make_pipeline(gaussian=True, thresholding=False)
    pipe.unet.register_to_config(std=STD)
    pipe.register_modules(class_encoder=ClassTokenEncoder(num_tokens=1, token_dim=1, vector_dim=1, embedding_dim=1))
    pipe.class_encoder.tokens.weight.data = torch.tensor(MEANS)[:, None]
    out = pipe(images, None, scale, 0.6, 5, "forward")
    changes = [0.0]  # the first step begins at the image itself, which has no noise to predict
    for t in (200, 400):
        nearer, alpha = alphas[t - 200], alphas[t]
        noise = (1 - alpha).sqrt() * alpha.sqrt() * (MEANS[2] - MEANS[0]) / (alpha * STD**2 + 1 - alpha)
        changes.append(((1 - nearer) / nearer).sqrt() * scale * noise)
    # half: the network's range is twice as wide as the input's
    expected = float(sum(changes)) / count / 2
    assert (out.heatmaps[:, :2] == 0).all() and expected > 0.01
    torch.testing.assert_close(out.heatmaps[:, 2:], torch.full((4, 6, 8), expected), rtol=1e-4, atol=0)
    # healthy pixels are darker than others, so the change has the sign of the difference of the means
    difference = (out.counterfactuals - images)[:, :, 2:]
    torch.testing.assert_close(difference, torch.full((4, 2, 6, 8), -expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(out.counterfactuals[:, :, :2], images[:, :, :2])


def test_the_delta_map_of_gaussian_classes_in_closed_form(make_pipeline, images):
    """At each level the clean images differ by w sqrt((1 - a) / a) (eps_null - eps_healthy), whatever the noise."""
    alphas, scale = DDIMScheduler().alphas_cumprod.double(), 2.5
    pipe = make_pipeline(gaussian=True, thresholding=False)
    pipe.unet.register_to_config(std=STD)
    pipe.register_modules(class_encoder=ClassTokenEncoder(num_tokens=1, token_dim=1, vector_dim=1, embedding_dim=1))
    pipe.class_encoder.tokens.weight.data = torch.tensor(MEANS)[:, None]
    out = pipe(images, None, scale, 0.6, 5, "delta")
    changes = [
        scale * (1 - alphas[t]) * (MEANS[2] - MEANS[0]) / (alphas[t] * STD**2 + 1 - alphas[t]) for t in (200, 400, 600)
    ]
    expected = float(sum(changes)) / 3 / 2
    torch.testing.assert_close(out.heatmaps[:, 2:], torch.full((4, 6, 8), expected), rtol=1e-4, atol=1e-6)
    assert (out.heatmaps[:, :2] == 0).all() and pipe.network_evaluations(
        strength=0.6, num_inference_steps=5, map="delta"
    ) == 12


def test_the_delta_map_of_an_image_does_not_depend_on_the_others(pipe, images):
    settings = {"guidance_scale": 2.0, "strength": 0.4, "num_inference_steps": 10, "map": "delta"}
    whole, one = pipe(images, **settings), pipe(images[2:3], **settings)
    torch.testing.assert_close(whole.heatmaps[2:3], one.heatmaps, rtol=1e-4, atol=1e-6)
    other = pipe(images[2:3], **settings, generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(other.heatmaps, one.heatmaps, rtol=1e-3)  # noise that is given is used


@pytest.mark.parametrize("target", ["healthy", "unhealthy"])
def test_the_map_of_an_untrained_network_step_by_step(pipe, images, target):
    inverse, changes, x = DynamicDDIMInverseScheduler(), [], 2 * images - 1
    inverse.set_timesteps(10)
    conditions = [pipe.encode_classes(name, 4) for name in (None, target)]
    with torch.no_grad():
        for t in (0, 100, 200, 300):
            null, wanted = (predict_noise(pipe.unet, x, t, condition) for condition in conditions)
            guided, step = inverse.step(implicit_guidance(null, wanted, 3.0), t, x), inverse.step(null, t, x)
            changes.append((guided.pred_original_sample - step.pred_original_sample) / 2)
            x = step.prev_sample
    sizes = sum(change.abs().mean(dim=1) for change in changes) / 4
    out, inside = pipe(images, target, **SHORT), (images > 0).any(dim=1)
    assert (sizes * inside).max() > 1e-3
    torch.testing.assert_close(out.heatmaps, sizes * inside, rtol=1e-4, atol=1e-6)
    expected = images + sum(changes) / 4 * inside[:, None]
    torch.testing.assert_close(out.counterfactuals, expected, rtol=1e-4, atol=1e-6)
    for latents in (out.latents, pipe.invert(images, 0.4, 10)):
        torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-5)
    assert not out.heatmaps.requires_grad


@pytest.mark.parametrize("order", [1, 2])
def test_the_forward_map_encodes_with_both_conditions_in_one_batch(pipe, images, record_calls, order):
    pipe.inverse_scheduler = DynamicDDIMInverseScheduler(solver_order=order)
    calls = record_calls(pipe)
    latents, encoding = pipe.invert(images, 0.4, 10), list(calls)
    calls.clear()
    out = pipe(images, **SHORT)
    assert [call.timestep for call in calls] == [call.timestep for call in encoding]
    for call, encoded in zip(calls, encoding, strict=True):
        torch.testing.assert_close(call.sample, encoded.sample.repeat(2, 1, 1, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=1e-4)
    counted = sum(len(call.sample) for call in calls) / len(images)
    assert pipe.network_evaluations(**SHORT) == counted == 2 * 4


def test_the_forward_map_needs_classes_and_unrefined_steps_of_our_scheduler(make_pipeline, pipe, images):
    with pytest.raises(ValueError, match="map is 'forward': .* this model has no class_encoder"):
        make_pipeline(unconditional=True)(images, **SHORT)
    pipe.inverse_scheduler = DDIMInverseScheduler()
    with pytest.raises(ValueError, match="map is 'forward': .* inverse_scheduler is DDIMInverseScheduler"):
        pipe.network_evaluations(**SHORT)
    pipe.inverse_scheduler = DynamicDDIMInverseScheduler(num_fixed_point_iterations=1)
    with pytest.raises(ValueError, match="map is 'forward': its steps are not refined"):
        pipe(images, **SHORT)


def test_the_forward_map_is_the_mean_over_the_channels_that_an_image_has(pipe, images, monkeypatch):
    """Two patients lack the second of two channels; Algorithm 1 by hand is the mean over both. Alike in a sweep."""
    images[:2, 1] = 0
    out = pipe(images, None, 3.0, 0.4, 10, "counterfactual")
    torch.testing.assert_close(out.heatmaps, (images - out.counterfactuals).abs().mean(dim=1))
    for kind in ("forward", "delta"):
        draws = [torch.Generator().manual_seed(0) for _ in range(2)]
        found = pipe(images, None, 3.0, 0.4, 10, kind, generator=draws[0]).heatmaps
        with monkeypatch.context() as patch:
            patch.setattr("diffusers_cf.pipeline_counterfactual_ddim.per_present_channel", lambda heat, images: heat)
            plain = pipe(images, None, 3.0, 0.4, 10, kind, generator=draws[1]).heatmaps
        torch.testing.assert_close(found, plain * torch.tensor([2, 2, 1, 1])[:, None, None])
    settings = [(0.4, 3.0, kind) for kind in ("counterfactual", "forward", "delta")]
    for (strength, scale, kind), heat in heatmaps_of_settings(pipe, images, settings, 10):
        single = pipe(images, None, scale, strength, 10, kind).heatmaps
        torch.testing.assert_close(torch.from_numpy(heat), single, rtol=0, atol=1e-6)
    encoding = encode_images(pipe, images, 0.4, 10)
    walk = {"guidance_scale": 3.0, "strength": 0.4, "num_inference_steps": 10, "map": "counterfactual"}
    torch.testing.assert_close(decode_images(pipe, encoding, walk)[1], out.heatmaps, rtol=0, atol=1e-6)


def test_other_maps_work_where_the_recommended_forward_map_does_not(pipe, images):
    pipe.preprocessing = {"settings": {"map": "forward", "strength": 0.4, "num_inference_steps": 10}}
    scheduler = DDIMScheduler(clip_sample=False)
    pipe.scheduler, pipe.inverse_scheduler = scheduler, DDIMInverseScheduler.from_config(scheduler.config)
    out = pipe(images, map="counterfactual")
    assert torch.equal(out.latents, pipe.invert(images))
    assert dict(heatmaps_of_settings(pipe, images, [(0.4, 3.0, "reconstruction")], 10))
    assert pipe(images, settings="paper", num_inference_steps=4).heatmaps.any()
    with pytest.raises(ValueError, match="map is 'forward'"):
        pipe(images)
