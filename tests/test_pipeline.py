"""Algorithm 1 as the pipeline runs it: guidance, cost, settings, shapes, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch.nn import functional

from diffusers_cf import (
    DynamicDDIMInverseScheduler,
    DynamicDDIMScheduler,
    anomaly_heatmap,
    implicit_guidance,
    pipeline_counterfactual_ddim,
)


SHORT = {"num_inference_steps": 10, "strength": 0.4}  # 4 steps each way


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def gaussian_images(seed=0):
    """Images whose pixels, mapped to [-1, 1], have the mean 0 and the standard deviation 0.2."""
    return 0.5 + 0.1 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_unguided_round_trip_returns_the_image(make_pipeline, record_calls, strength):
    pipe = make_pipeline(gaussian=True, fixed_point=3)
    calls = record_calls(pipe)
    images = gaussian_images()
    out = pipe(images, guidance_scale=0, strength=strength, num_inference_steps=50)
    assert (out.counterfactuals - images).abs().mean() < 5e-5
    assert out.heatmaps.mean() < 5e-5
    # the network is told the noisier end of the step in both directions
    grid = list(range(0, 1000, 20))[: round(50 * strength)]
    assert [call.timestep for call in calls] == [t for t in grid for _ in range(4)] + grid[::-1]


def test_encoding_is_the_scheduler_under_the_null_condition(pipe, images):
    inverse = DynamicDDIMInverseScheduler()
    inverse.set_timesteps(10)
    x, (tokens, vector) = 2 * images - 1, pipe.class_encoder(torch.full((4,), 2))
    with torch.no_grad():
        for t in (0, 100, 200, 300):
            epsilon = pipe.unet(x, t, encoder_hidden_states=tokens, class_labels=vector).sample
            x = inverse.step(epsilon, t, x).prev_sample
    assert_close(pipe.invert(images, **SHORT), x)


@pytest.mark.parametrize("scale, row", [(0, 2), (1, 1)])
def test_guidance_of_0_and_1_is_decoding_by_one_condition(pipe, scale, row):
    scheduler, x = DynamicDDIMScheduler(), torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    decoded = pipe.denoise(x, "unhealthy", guidance_scale=scale, **SHORT)
    tokens, vector = pipe.class_encoder(torch.full((4,), row))
    with torch.no_grad():
        for t in (300, 200, 100, 0):
            epsilon = pipe.unet(x, t, encoder_hidden_states=tokens, class_labels=vector).sample
            x = scheduler.step(epsilon, t, x).prev_sample
    assert_close(decoded, (x + 1) / 2)


def test_guidance_is_linear_in_between_and_beyond(make_pipeline):
    null, target = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    assert torch.equal(implicit_guidance(null, target, 0), null)
    assert torch.equal(implicit_guidance(null, target, 1), target)
    assert implicit_guidance(null, target, 0.5).tolist() == [2.0, 1.5]
    assert implicit_guidance(null, target, 3).tolist() == [7.0, 19.0]
    # a single step without normalisation, from t = 500 to the image, keeps the linearity
    pipe = make_pipeline(thresholding=False, steps_offset=500)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))

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
def test_network_evaluations_are_those_that_happen(make_pipeline, record_calls, images, kind, scale, map):
    pipe = make_pipeline(unconditional=kind == "unconditional", fixed_point=2 if kind == "fixed-point" else 0)
    calls = record_calls(pipe)
    pipe(images, guidance_scale=scale, map=map, **SHORT)
    counted = sum(len(call.sample) for call in calls) / len(images)
    assert pipe.network_evaluations(guidance_scale=scale, map=map, **SHORT) == counted
    decoding = 2 if scale == 3 and kind != "unconditional" else 1
    assert counted == 4 * (1 + 2 * (kind == "fixed-point") + decoding + (map == "reconstruction"))


def test_cost_of_the_papers_settings(pipe):
    assert pipe.network_evaluations() == 225


@pytest.mark.parametrize("map", ["counterfactual", "reconstruction", "forward"])
def test_empty_slices_never_reach_the_network(pipe, record_calls, images, map):
    images[[0, 2]] = 0
    calls = record_calls(pipe)
    out = pipe(images, ["unhealthy", "healthy", "healthy", "unhealthy"], guidance_scale=1, map=map, **SHORT)
    assert {len(call.sample) for call in calls} == {4 if map == "forward" else 2}  # both branches at once
    assert not out.heatmaps[[0, 2]].any() and not out.counterfactuals[[0, 2]].any() and not out.latents[[0, 2]].any()
    alone = pipe(images[[1, 3]], ["healthy", "unhealthy"], guidance_scale=1, map=map, **SHORT)
    for field in ("heatmaps", "counterfactuals", "latents"):
        assert_close(out[field][[1, 3]], alone[field])
    calls.clear()
    assert not pipe(torch.zeros(2, 2, 8, 8), map=map, **SHORT).heatmaps.any()
    assert pipe(torch.zeros(0, 2, 8, 8), map=map, **SHORT).heatmaps.shape == (0, 8, 8)
    assert calls == []


@pytest.mark.parametrize("map", ["counterfactual", "reconstruction", "forward"])
@pytest.mark.parametrize("size", [8, 24, 4])
def test_zero_steps_change_nothing(pipe, images, map, size):
    images = functional.interpolate(images, (size, size))
    for settings in ({"strength": 0}, {"strength": 0.004, "num_inference_steps": 100}):
        out = pipe(images, map=map, **settings)
        assert not out.heatmaps.any()
        assert torch.equal(out.counterfactuals, images)


@pytest.mark.parametrize("map", ["counterfactual", "reconstruction", "forward"])
def test_a_batch_equals_its_samples(pipe, images, map):
    targets = ["healthy", "unhealthy", "healthy", "unhealthy"]
    together = pipe(images, targets, map=map, **SHORT)
    for i, target in enumerate(targets):
        alone = pipe(images[i : i + 1], target, map=map, **SHORT)
        for field in ("heatmaps", "counterfactuals", "latents"):
            assert_close(together[field][i : i + 1], alone[field])
    swapped = pipe(images, targets[::-1], map=map, **SHORT)
    assert (together.counterfactuals - swapped.counterfactuals).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_target_defaults_to_the_first_class(pipe, images):
    default = pipe(images, **SHORT).counterfactuals
    assert torch.equal(default, pipe(images, "healthy", **SHORT).counterfactuals)
    assert not torch.equal(default, pipe(images, "unhealthy", **SHORT).counterfactuals)


def test_heatmaps_are_mean_absolute_differences_in_input_units(pipe, images):
    out = pipe(images, **SHORT)
    assert_close(out.heatmaps, (images - out.counterfactuals).abs().mean(dim=1))
    assert anomaly_heatmap(torch.tensor([[[[1.0]], [[2.0]]]]), torch.tensor([[[[0.5]], [[4.0]]]])).tolist() == [
        [[1.25]]
    ]
    again = pipe(images, map="reconstruction", **SHORT)
    null = pipe.denoise(out.latents, guidance_scale=0, **SHORT)
    assert_close(again.heatmaps, (null - out.counterfactuals).abs().mean(dim=1))
    assert_close(again.counterfactuals, out.counterfactuals)


def test_one_encoding_serves_many_decodings(pipe, images):
    latents = pipe.invert(images, **SHORT)
    for target, scale in (("healthy", 3.0), ("unhealthy", 1.5), ("healthy", 0)):
        out = pipe(images, target, guidance_scale=scale, **SHORT)
        assert torch.equal(out.latents, latents)
        assert_close(pipe.denoise(latents, target, guidance_scale=scale, **SHORT), out.counterfactuals)
    assert torch.equal(latents, pipe.invert(images, **SHORT))  # decoding left them as they were


@pytest.mark.parametrize("size", [16, 20, 4])
def test_input_of_another_size(pipe, size):
    images = torch.rand(2, 2, size, size, generator=torch.Generator().manual_seed(2))
    mode = {"mode": "area"} if size > 8 else {"mode": "bilinear", "align_corners": False}
    seen = functional.interpolate(images, (8, 8), **mode)
    out, inner = pipe(images, **SHORT), pipe(seen, **SHORT)
    back = {"mode": "bilinear", "align_corners": False} if size > 8 else {"mode": "area"}
    assert out.heatmaps.shape == (2, size, size) and out.latents.shape == (2, 2, 8, 8)
    assert_close(out.heatmaps, functional.interpolate(inner.heatmaps[:, None], (size, size), **back)[:, 0])
    # detail of the input stays: only the change is resampled
    change = functional.interpolate(inner.counterfactuals - seen, (size, size), **back)
    assert_close(out.counterfactuals, images + change)


BAD_IMAGES = {
    "three dimensions": (torch.rand(2, 8, 8), r"\(2, 8, 8\): it must be \(N, 2, H, W\)"),
    "channels": (torch.rand(1, 3, 8, 8), r"it must be \(N, 2, H, W\)"),
    "aspect": (torch.rand(1, 2, 8, 16), "its sides must be as 8 to 8"),
    "integers": (torch.ones(1, 2, 8, 8, dtype=torch.uint8), "uint8: it must be floating"),
    "negative": (torch.full((1, 2, 8, 8), -0.01), "negative"),
    "nan": (torch.full((1, 2, 8, 8), float("nan")), "NaN"),
    "infinite": (torch.full((1, 2, 8, 8), float("inf")), "infinite"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(pipe, record_calls, name):
    images, message = BAD_IMAGES[name]
    calls = record_calls(pipe)
    for call in (pipe, pipe.invert):
        with pytest.raises(ValueError, match=f"images .*{message}"):
            call(images, **SHORT)
    assert calls == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "sick"}, "class 'sick' is unknown: this model knows healthy, unhealthy"),
        ({"target": ["healthy", "sick", "healthy", "healthy"]}, "class 'sick' is unknown"),
        ({"target": ["healthy"]}, "1 names for 4 images"),
        ({"strength": 1.01}, "strength is 1.01"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_inference_steps": 30}, "num_inference_steps is 30"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"map": "sum"}, "map is 'sum': it must be one of counterfactual, reconstruction, signed, forward"),
        ({"output_type": "pil"}, "output_type is 'pil': it must be one of pt, np"),
    ],
)
def test_bad_arguments_are_refused(pipe, images, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(images, **SHORT | options)


def test_the_papers_settings_by_name(pipe, images, record_calls):
    pipe.preprocessing = {"settings": {"strength": 0.1, "num_inference_steps": 10}}
    calls = record_calls(pipe)
    named = pipe(images, settings="paper", num_inference_steps=20).heatmaps
    assert len(calls) == 2 * 15
    assert torch.equal(named, pipe(images, None, 3.0, 0.75, 20, "counterfactual").heatmaps)
    assert pipe.network_evaluations(settings="paper") == 225
    with pytest.raises(ValueError, match="settings is 'papers': it must be one of recommended, paper"):
        pipe(images, settings="papers")


def test_settings_come_from_the_call_else_the_model_else_the_paper(pipe, record_calls, images):
    paper = {"guidance_scale": 3.0, "strength": 0.75, "num_inference_steps": 100, "map": "counterfactual"}
    assert pipe.resolve_settings() == paper | {"threshold": None}
    pipe.preprocessing = {"size": 8, "settings": {"strength": 0.2, "num_inference_steps": 10, "map": "reconstruction",
                                                  "guidance_scale": None, "threshold": 0.1, "score": 1}}  # fmt: skip
    recommended = {"guidance_scale": 3.0, "strength": 0.2, "num_inference_steps": 10, "map": "reconstruction"}
    assert pipe.resolve_settings() == recommended | {"threshold": 0.1}
    given = {"guidance_scale": 0, "strength": 0.0, "num_inference_steps": 20, "map": "counterfactual"}
    assert pipe.resolve_settings(**given) == given | {"threshold": None}
    assert pipe.resolve_settings(**dict.fromkeys(given)) == pipe.resolve_settings()
    pipe.preprocessing |= {"paper_threshold": 0.3}
    assert pipe.resolve_settings(settings="paper") == paper | {"threshold": 0.3}
    assert pipe.resolve_settings(settings="paper", **given) == given | {"threshold": 0.3}
    assert pipe.resolve_settings(settings="recommended") == pipe.resolve_settings()
    calls = record_calls(pipe)
    heatmaps = pipe.anomaly_map(images)
    assert [(call.timestep, len(call.sample)) for call in calls] == [
        (0, 4), (100, 4), (100, 8), (0, 8), (100, 4), (0, 4)
    ]  # fmt: skip
    assert torch.equal(heatmaps, pipe(images).heatmaps)


def test_output_type_and_return_dict(pipe, images):
    tensors = pipe(images, **SHORT)
    arrays = pipe(images.numpy(), output_type="np", **SHORT)
    row = pipe(images, return_dict=False, **SHORT)
    assert isinstance(row, tuple) and len(row) == 3
    for field, value in zip(("heatmaps", "counterfactuals", "latents"), row, strict=True):
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

    last = pipe.invert(images, callback_on_step_end=lambda p, i, t, v: {"latents": v["latents"] * 0 + i}, **SHORT)
    assert torch.equal(last, torch.full_like(last, 3))
    decoded = pipe.denoise(last, callback_on_step_end=lambda p, i, t, v: {"latents": v["latents"] * 0 + i}, **SHORT)
    assert torch.equal(decoded, torch.full_like(decoded, 2))


def test_stock_schedulers_are_accepted(make_pipeline, images):
    stock = make_pipeline((DDIMScheduler(clip_sample=False), DDIMInverseScheduler(clip_sample=False)))
    ours = make_pipeline(thresholding=False)
    assert stock.network_evaluations() == 225
    expected, actual = ours(images, **SHORT), stock(images, **SHORT)
    assert_close(actual.heatmaps, expected.heatmaps, 1e-4)
    assert_close(actual.latents, expected.latents, 1e-4)


def test_stochastic_scheduler_uses_the_generator(make_pipeline, images):
    pipe = make_pipeline((DDPMScheduler(clip_sample=False), DDIMInverseScheduler(clip_sample=False)))
    maps = [pipe(images, generator=torch.Generator().manual_seed(seed), **SHORT).heatmaps for seed in (0, 0, 1)]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_unconditional_pipeline_reconstructs(make_pipeline, record_calls, images):
    pipe = make_pipeline(unconditional=True)
    assert pipe.class_encoder is None
    calls = record_calls(pipe)
    out = pipe(images, **SHORT)
    assert len(calls) == 8 and all(call.tokens is None and call.vector is None for call in calls)
    assert torch.equal(out.counterfactuals, pipe(images, guidance_scale=0, **SHORT).counterfactuals)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network_keeps_float32_latents(pipe, record_calls, images, dtype, monkeypatch):
    full = pipe(images, **SHORT)
    pipe.to(dtype)
    calls = record_calls(pipe)
    out = pipe(images.to(dtype), **SHORT)
    assert {call.sample.dtype for call in calls} == {dtype}
    for field in ("heatmaps", "counterfactuals", "latents"):
        assert out[field].dtype == torch.float32
        # one rounding of the image, and of each prediction
        assert_close(out[field], full[field], 0.05)
    latents = pipe.invert(images, **SHORT)
    assert latents.dtype == torch.float32
    guided = []
    monkeypatch.setattr(
        pipeline_counterfactual_ddim, "implicit_guidance", lambda *given: guided.append(given) or given[0]
    )
    pipe.denoise(latents, **SHORT)
    assert {given[0].dtype for given in guided} == {torch.float32}
    assert not torch.equal(latents, latents.to(dtype).float())


def test_gradients_are_not_recorded(pipe, images):
    latents = pipe.invert(images, **SHORT)
    assert not latents.requires_grad and not pipe.denoise(latents, **SHORT).requires_grad


def test_model_offload_hooks(pipe, images, monkeypatch):
    expected = pipe(images, **SHORT)
    # diffusers refuses to offload by itself where there is no accelerator; the hooks run on any device
    pipe.enable_model_cpu_offload(device=torch.accelerator.current_accelerator() or "cpu")
    for _ in range(2):
        assert_close(pipe(images, **SHORT).heatmaps.cpu(), expected.heatmaps, 1e-3)
        assert len(pipe._all_hooks) == 2
        assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    pipe(images, **SHORT)
    assert freed == [True]
    pipe.remove_all_hooks()
    assert_close(pipe.to("cpu")(images, **SHORT).heatmaps, expected.heatmaps)


def test_preprocessing_is_read_from_the_model_folder(pipe, tmp_path):
    facts = {"modalities": ["a", "b"], "settings": {"strength": 0.2, "num_inference_steps": 10}}
    pipe.preprocessing = facts
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessing.json").read_text(encoding="utf-8")) == facts
    loaded = type(pipe).from_pretrained(tmp_path)
    assert loaded.preprocessing == facts
    assert loaded.resolve_settings()["strength"] == 0.2
    assert loaded.image_size == (8, 8)
