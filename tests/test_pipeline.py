"""Algorithm 1 in the pipeline: guidance, cost, settings, shapes, and refused arguments."""

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from gaussian_data import noise
from torch.nn import functional

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler, implicit_guidance


SHORT = {"num_inference_steps": 10, "strength": 0.4}  # 4 steps each way
FIELDS = ("heatmaps", "counterfactuals", "latents")
MAPS = pytest.mark.parametrize("map", ["counterfactual", "reconstruction", "forward"])


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("strength", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_unguided_round_trip_returns_the_image(make_pipeline, record_calls, strength):
    pipe = make_pipeline(gaussian=True, fixed_point=3)
    calls = record_calls(pipe)
    images = 0.5 + 0.1 * noise(2, 2, 8, 8)  # mapped to [-1, 1], of mean 0 and standard deviation 0.2
    out = pipe(images, guidance_scale=0, strength=strength, num_inference_steps=50)
    assert (out.counterfactuals - images).abs().mean() < 5e-5
    assert out.heatmaps.mean() < 5e-5
    # the network is given the noisier end of the step in both directions
    grid = list(range(0, 1000, 20))[: round(50 * strength)]
    assert [call.timestep for call in calls] == [t for t in grid for _ in range(4)] + grid[::-1]


def test_guidance_is_linear_in_between_and_beyond(make_pipeline):
    null, target = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    for scale, expected in ((0, [1, -2]), (1, [3, 5]), (0.5, [2, 1.5]), (3, [7, 19])):
        assert implicit_guidance(null, target, scale).tolist() == expected
    # a single step without normalisation, from t = 500 to the image, keeps the linearity
    pipe = make_pipeline(thresholding=False, steps_offset=500)
    x = noise(2, 2, 8, 8)

    def decode(scale):
        return pipe.denoise(x, "unhealthy", guidance_scale=scale, strength=1, num_inference_steps=1)

    unconditional, conditional = decode(0), decode(1)
    assert (conditional - unconditional).abs().max() > 0.05
    for scale in (0.25, 0.999, 1.001, 3, 50):
        assert_close(decode(scale), unconditional + scale * (conditional - unconditional), 1e-4)


@pytest.mark.parametrize("scale, rows", [(3, 8), (0.5, 8), (1, 4), (0, 4)])
def test_both_branches_are_one_batched_call_and_one_branch_has_no_second(pipe, record_calls, images, scale, rows):
    calls = record_calls(pipe)
    pipe(images, guidance_scale=scale, **SHORT)
    assert [call.timestep for call in calls] == [0, 100, 200, 300, 300, 200, 100, 0]
    assert [len(call.sample) for call in calls] == [4] * 4 + [rows] * 4
    null, healthy = (pipe.class_encoder(torch.full((4,), row)) for row in (2, 0))
    wanted = {8: [torch.cat(pair) for pair in zip(null, healthy, strict=True)], 4: healthy if scale == 1 else null}
    for call, (tokens, vector) in zip(calls, [null] * 4 + [wanted[rows]] * 4, strict=True):
        assert_close(call.tokens, tokens)
        assert_close(call.vector, vector)
    for call in calls[4:]:
        assert torch.equal(call.sample[:4], call.sample[-4:])


@pytest.mark.parametrize("map", ["counterfactual", "reconstruction"])
@pytest.mark.parametrize("scale", [0, 1, 3])
@pytest.mark.parametrize("kind", ["conditional", "unconditional", "fixed-point"])
def test_network_evaluations_are_the_rows_that_the_network_gets(make_pipeline, record_calls, images, kind, scale, map):
    pipe = make_pipeline(unconditional=kind == "unconditional", fixed_point=2 if kind == "fixed-point" else 0)
    calls = record_calls(pipe)
    pipe(images, guidance_scale=scale, map=map, **SHORT)
    counted = sum(len(call.sample) for call in calls) / len(images)
    assert pipe.network_evaluations(guidance_scale=scale, map=map, **SHORT) == counted
    decoding = 2 if scale == 3 and kind != "unconditional" else 1
    assert counted == 4 * (1 + 2 * (kind == "fixed-point") + decoding + (map == "reconstruction"))


@MAPS
def test_empty_slices_never_reach_the_network(pipe, record_calls, images, map):
    images[[0, 2]] = 0
    calls = record_calls(pipe)
    out = pipe(images, ["unhealthy", "healthy", "healthy", "unhealthy"], guidance_scale=1, map=map, **SHORT)
    assert {len(call.sample) for call in calls} == {4 if map == "forward" else 2}  # both branches at once
    alone = pipe(images[[1, 3]], ["healthy", "unhealthy"], guidance_scale=1, map=map, **SHORT)
    for field in FIELDS:
        assert not out[field][[0, 2]].any()
        assert_close(out[field][[1, 3]], alone[field])
    calls.clear()
    assert not pipe(torch.zeros(2, 2, 8, 8), map=map, **SHORT).heatmaps.any()
    assert pipe(torch.zeros(0, 2, 8, 8), map=map, **SHORT).heatmaps.shape == (0, 8, 8)
    assert calls == []


@MAPS
@pytest.mark.parametrize("size", [8, 24, 4])
def test_zero_steps_change_nothing(pipe, images, map, size):
    images = functional.interpolate(images, (size, size))
    for settings in ({"strength": 0}, {"strength": 0.004, "num_inference_steps": 100}):
        out = pipe(images, map=map, **settings)
        assert not out.heatmaps.any()
        assert torch.equal(out.counterfactuals, images)


@MAPS
def test_a_batch_equals_its_samples(pipe, images, map):
    targets = ["healthy", "unhealthy", "healthy", "unhealthy"]
    together = pipe(images, targets, map=map, **SHORT)
    for i, target in enumerate(targets):
        alone = pipe(images[i : i + 1], target, map=map, **SHORT)
        for field in FIELDS:
            assert_close(together[field][i : i + 1], alone[field])
    swapped = pipe(images, targets[::-1], map=map, **SHORT)
    assert (together.counterfactuals - swapped.counterfactuals).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert_close(pipe(images, map=map, **SHORT).latents, together.latents)
    assert_close(pipe(images, map=map, **SHORT).heatmaps[::2], together.heatmaps[::2])  # the first class by default


def test_one_encoding_serves_decodings_whose_mean_absolute_differences_are_the_heatmaps(pipe, images):
    latents = pipe.invert(images, **SHORT)
    null = pipe.denoise(latents, guidance_scale=0, **SHORT)
    assert not latents.requires_grad and not null.requires_grad
    for target, scale in (("healthy", 3.0), ("unhealthy", 1.5), ("healthy", 0)):
        out = pipe(images, target, guidance_scale=scale, **SHORT)
        assert torch.equal(out.latents, latents)
        assert_close(pipe.denoise(latents, target, guidance_scale=scale, **SHORT), out.counterfactuals)
        assert_close(out.heatmaps, (images - out.counterfactuals).abs().mean(dim=1))
        again = pipe(images, target, guidance_scale=scale, map="reconstruction", **SHORT)
        assert_close(again.heatmaps, (null - out.counterfactuals).abs().mean(dim=1))
        assert_close(again.counterfactuals, out.counterfactuals)


@pytest.mark.parametrize("size", [16, 20, 4])
def test_input_of_another_size(pipe, size):
    images = torch.rand(2, 2, size, size, generator=torch.Generator().manual_seed(2))
    shrink, grow = {"mode": "area"}, {"mode": "bilinear", "align_corners": False}
    there, back = (shrink, grow) if size > 8 else (grow, shrink)
    seen = functional.interpolate(images, (8, 8), **there)
    out, inner = pipe(images, **SHORT), pipe(seen, **SHORT)
    assert out.heatmaps.shape == (2, size, size) and out.latents.shape == (2, 2, 8, 8)
    assert_close(out.heatmaps, functional.interpolate(inner.heatmaps[:, None], (size, size), **back)[:, 0])
    # detail of the input stays: only the change is resampled
    change = functional.interpolate(inner.counterfactuals - seen, (size, size), **back)
    assert_close(out.counterfactuals, images + change)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(2, 8, 8), r"shape \(2, 8, 8\): it must be \(N, 2, H, W\)"),
        (torch.rand(1, 3, 8, 8), r"it must be \(N, 2, H, W\)"),
        (torch.rand(1, 2, 8, 16), "its sides must be as 8 to 8"),
        (torch.ones(1, 2, 8, 8, dtype=torch.uint8), "uint8: it must be floating"),
        *((torch.full((1, 2, 8, 8), value), "NaN, infinite or negative") for value in (-0.01, np.nan, np.inf)),
    ],
)
def test_bad_images_are_refused(pipe, record_calls, images, message):
    calls = record_calls(pipe)
    for call in (pipe, pipe.invert):
        with pytest.raises(ValueError, match=f"images .*{message}"):
            call(images, **SHORT)
    assert calls == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "sick"}, "class 'sick' is unknown: this model knows healthy, unhealthy"),
        ({"target": ["healthy"]}, "1 names for 4 images"),
        ({"strength": 1.01}, "strength is 1.01"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_inference_steps": 30}, "num_inference_steps is 30"),
        ({"map": "sum"}, "map is 'sum': it must be one of counterfactual, reconstruction, signed, forward"),
        ({"output_type": "pil"}, "output_type is 'pil': it must be one of pt, np"),
        ({"settings": "papers"}, "settings is 'papers': it must be one of recommended, paper"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs holds 'noise'"),
    ],
)
def test_bad_arguments_are_refused(pipe, images, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(images, **SHORT | options)


def test_settings_come_from_the_call_else_the_model_else_the_paper(pipe, images):
    paper = {"guidance_scale": 3.0, "strength": 0.75, "num_inference_steps": 100, "map": "counterfactual"}
    assert pipe.resolve_settings() == paper | {"threshold": None} and pipe.network_evaluations() == 225
    recommended = {"strength": 0.2, "num_inference_steps": 10, "map": "reconstruction"}
    others = {"guidance_scale": None, "threshold": 0.1, "score": 1}
    pipe.preprocessing = {"settings": recommended | others, "paper_threshold": 0.3}
    assert pipe.resolve_settings() == recommended | {"guidance_scale": 3.0, "threshold": 0.1}
    given = {"guidance_scale": 0, "strength": 0.0, "num_inference_steps": 20, "map": "counterfactual"}
    assert pipe.resolve_settings(**given) == given | {"threshold": None}
    assert pipe.resolve_settings(**dict.fromkeys(given)) == pipe.resolve_settings("recommended")
    assert pipe.resolve_settings("paper") == paper | {"threshold": 0.3}
    assert pipe.resolve_settings("paper", **given) == given | {"threshold": 0.3}

    heatmaps = pipe.anomaly_map(images)
    assert torch.equal(heatmaps, pipe(images).heatmaps)
    assert torch.equal(heatmaps, pipe(images, guidance_scale=3.0, **recommended).heatmaps)
    named = pipe(images, settings="paper", num_inference_steps=20).heatmaps
    assert torch.equal(named, pipe(images, None, 3.0, 0.75, 20, "counterfactual").heatmaps)


def test_numpy_views_are_taken(pipe, images):
    """Negative strides and foreign byte orders, which torch refuses."""
    expected = pipe(images.flip(-1), **SHORT).heatmaps
    for given in (np.flip(images.numpy(), -1), np.flip(images.numpy(), -1).astype(">f4")):
        torch.testing.assert_close(pipe(given, **SHORT).heatmaps, expected)


def test_output_type_and_return_dict(pipe, images):
    tensors = pipe(images, **SHORT)
    arrays = pipe(images.numpy(), output_type="np", **SHORT)
    row = pipe(images, return_dict=False, **SHORT)
    assert isinstance(row, tuple) and len(row) == 3
    for field, value in zip(FIELDS, row, strict=True):
        assert torch.equal(tensors[field], value) and value.dtype == torch.float32
        assert isinstance(arrays[field], np.ndarray) and np.array_equal(arrays[field], value.numpy())


def test_callback_sees_each_step_and_may_replace_the_latents(pipe, images):
    steps = []

    def watch(pipeline, step, timestep, values):
        assert pipeline is pipe and values["latents"].shape == (4, 2, 8, 8)
        steps.append((step, int(timestep)))
        return {}

    plain = pipe(images, **SHORT)
    assert torch.equal(pipe(images, callback_on_step_end=watch, **SHORT).heatmaps, plain.heatmaps)
    assert steps == [(0, 0), (1, 100), (2, 200), (3, 300), (0, 300), (1, 200), (2, 100), (3, 0)]

    replacing = {"callback_on_step_end": lambda p, i, t, v: {"latents": v["latents"] * 0 + i}} | SHORT
    last = pipe.invert(images, **replacing)
    assert (last == 3).all() and (pipe.denoise(last, **replacing) == 2).all()


def test_an_interrupted_call_skips_its_steps_and_the_next_one_does_not(pipe, images):
    expected, steps = pipe.invert(images, **SHORT), []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    out = pipe(images, callback_on_step_end=stop, **SHORT)
    assert steps == [0, 1] and pipe.interrupt and out.heatmaps.isfinite().all()
    torch.testing.assert_close(pipe.invert(images, **SHORT), expected)
    pipe._interrupt = True
    assert not torch.equal(pipe.denoise(expected, None, 0, **SHORT), (expected + 1) / 2)


def test_stock_schedulers_are_accepted_as_the_refusal_of_others_advises(make_pipeline, images):
    scheduler = DDIMScheduler.from_config(DynamicDDIMScheduler().config, thresholding=False, clip_sample=False)
    stock = make_pipeline((scheduler, DDIMInverseScheduler.from_config(scheduler.config)))
    ours = make_pipeline(thresholding=False)
    assert stock.network_evaluations() == 225
    expected, actual = ours(images, **SHORT), stock(images, **SHORT)
    assert_close(actual.heatmaps, expected.heatmaps, 1e-4)
    assert_close(actual.latents, expected.latents, 1e-4)


def test_stochastic_scheduler_uses_the_generator(make_pipeline, images):
    pipe = make_pipeline((DDPMScheduler(clip_sample=False), DDIMInverseScheduler(clip_sample=False)))
    maps = [pipe(images, generator=torch.Generator().manual_seed(seed), **SHORT).heatmaps for seed in (0, 0, 1)]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_gets_float32_latents(pipe, record_calls, images, dtype):
    full = pipe(images, **SHORT)
    pipe.to(dtype)
    calls = record_calls(pipe)
    out = pipe(images.to(dtype), **SHORT)
    assert {call.sample.dtype for call in calls} == {dtype}
    for field in FIELDS:
        assert out[field].dtype == torch.float32
        assert_close(out[field], full[field], 0.05)  # one rounding of the image, and of each prediction
    assert not torch.equal(out.latents, out.latents.to(dtype).float())
    condition = pipe.encode_classes("healthy", 4)
    assert pipe.predict_guided(full.latents, 300, condition, condition, 3.0).dtype == torch.float32


def test_model_offload_hooks(pipe, images, monkeypatch):
    expected, freed, free = pipe(images, **SHORT), [], pipe.maybe_free_model_hooks
    # diffusers refuses to offload by itself where there is no accelerator; the hooks run on any device
    pipe.enable_model_cpu_offload(device=torch.accelerator.current_accelerator() or "cpu")
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(free()))
    for count in (1, 2):
        assert_close(pipe(images, **SHORT).heatmaps.cpu(), expected.heatmaps, 1e-3)
        assert len(freed) == count and len(pipe._all_hooks) == 2
        assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}
    pipe.remove_all_hooks()
    assert_close(pipe.to("cpu")(images, **SHORT).heatmaps, expected.heatmaps)


@pytest.mark.parametrize("fixed_point", [0, 3])
@pytest.mark.parametrize("share", [0.003, 0.03])
def test_peaks_above_1_survive_an_unguided_round_trip(make_pipeline, share, fixed_point):
    """Otherwise dynamic normalisation would cut bright spots, and the heatmap would be a threshold of the image."""
    pipe = make_pipeline(gaussian=True, fixed_point=fixed_point)
    pipe.unet.register_to_config(sample_size=64)
    pipe.register_to_config(clip_input=False)
    images = 0.5 + 0.1 * noise(2, 2, 64, 64).clamp(-3, 3)
    peaks = torch.rand(images.shape, generator=torch.Generator().manual_seed(2)) < share
    images[peaks] = 1.2
    change = (pipe(images, strength=0.75, num_inference_steps=100).counterfactuals - images).abs()
    assert change[peaks].max() < 0.01 and change[~peaks].mean() < 0.01


def test_the_input_is_clipped_at_1_unless_asked_otherwise(pipe, images):
    bright = images.clone()
    bright[0, 0, 5, 5] = 1.4
    clipped, out = pipe(bright.clamp(max=1), **SHORT), pipe(bright, **SHORT)
    assert_close(out.latents, clipped.latents)
    assert_close(out.heatmaps, clipped.heatmaps)
    assert_close(out.counterfactuals - bright, clipped.counterfactuals - bright.clamp(max=1))
    pipe.register_to_config(clip_input=False)
    assert (pipe(bright, **SHORT).latents - clipped.latents).abs().max() > 1e-3


@pytest.mark.parametrize("options", [None, {}, {"solver_order": 2}, {"num_fixed_point_iterations": 1}])
def test_the_loops_never_read_from_the_device(pipe, images, options):
    """On an accelerator each reading would wait for its queue. The device `meta` has shapes only and can't answer."""
    pipe.to("meta")
    if options is None:
        pipe.scheduler, options = DDIMScheduler(clip_sample=False), {"clip_sample": False}
        pipe.inverse_scheduler = DDIMInverseScheduler(**options)
    else:
        pipe.inverse_scheduler = DynamicDDIMInverseScheduler(**options)
        for map in ("reconstruction", *(["forward"] if pipe.inverse_scheduler.order == 1 else [])):
            out = pipe(images, map=map, **SHORT)
            assert out.heatmaps.device.type == "meta" and out.heatmaps.shape == (4, 8, 8)
            assert out.counterfactuals.shape == images.shape
    latents = pipe.encode(torch.empty(3, 2, 8, 8, device="meta"), **SHORT)
    for scale in (0, 3.0):
        decoded = pipe.denoise(latents, "healthy", scale, **SHORT)
        assert decoded.device.type == "meta" and decoded.shape == (3, 2, 8, 8)
