"""Dynamic normalisation against its formula, and encoding as the exact mirror image of decoding."""

import functools

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from gaussian_data import ALPHAS, STD, exact_epsilon, noise

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler, dynamic_normalize


PAIRS = {
    "dynamic-leading": (DynamicDDIMScheduler, DynamicDDIMInverseScheduler, {}),
    "dynamic-offset": (DynamicDDIMScheduler, DynamicDDIMInverseScheduler, {"steps_offset": 3}),
    "dynamic-trailing": (DynamicDDIMScheduler, DynamicDDIMInverseScheduler, {"timestep_spacing": "trailing"}),
    "stock-leading": (DDIMScheduler, DDIMInverseScheduler, {"clip_sample": False}),
    "stock-offset": (DDIMScheduler, DDIMInverseScheduler, {"clip_sample": False, "steps_offset": 3}),
    "stock-trailing": (DDIMScheduler, DDIMInverseScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
}
OURS = [name for name in PAIRS if name.startswith("dynamic")]
BOTH = (DynamicDDIMScheduler, DynamicDDIMInverseScheduler)
STRENGTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def pair(name, **options):
    forward, inverse, base = PAIRS[name]
    return forward(**base, **options), inverse(**base, **options)


@functools.cache
def encodings(name, steps, fixed_point):
    """Gaussian data, and what each encoding step makes of it."""
    _, inverse = pair(name, **({"num_fixed_point_iterations": fixed_point} if fixed_point else {}))
    inverse.set_timesteps(steps)
    levels = [STD * noise(2, 2, 16, 16)]
    for t in inverse.timesteps:
        levels.append(inverse.step(exact_epsilon(levels[-1], t), t, levels[-1]).prev_sample)
    return levels[:: 1 + fixed_point]


@functools.cache
def round_trip_error(name, steps, strength, fixed_point=0):
    """Mean |decode(encode(x)) - x| of Gaussian data."""
    scheduler, _ = pair(name)
    scheduler.set_timesteps(steps)
    walked = round(steps * strength)
    image, x = (encodings(name, steps, fixed_point)[i] for i in (0, walked))
    for t in scheduler.timesteps[steps - walked :]:
        x = scheduler.step(exact_epsilon(x, t), t, x).prev_sample
    return (x - image).abs().mean().item()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", PAIRS)
def test_round_trip_error_halves_with_the_step_size(name, strength):
    assert round_trip_error(name, 50, strength) < 0.033
    assert 1.85 < round_trip_error(name, 50, strength) / round_trip_error(name, 100, strength) < 2.15
    if strength in (0.1, 0.5, 1.0):
        assert 1.9 < round_trip_error(name, 100, strength) / round_trip_error(name, 200, strength) < 2.1


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", OURS)
def test_fixed_point_iterations_make_the_round_trip_exact(name, strength):
    assert round_trip_error(name, 50, strength, fixed_point=3) < 1e-4


def test_each_fixed_point_iteration_gains_a_factor():
    errors = [round_trip_error("dynamic-leading", 50, 1.0, fixed_point=k) for k in (0, 1, 3)]
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 25


@pytest.mark.parametrize("steps", [100, 200])
@pytest.mark.parametrize("name", PAIRS)
def test_each_step_walks_between_the_two_noise_levels(name, steps):
    scheduler, inverse = pair(name)
    scheduler.set_timesteps(steps)
    inverse.set_timesteps(steps)
    x0, epsilon = noise(1, 2, 8, 8, dtype=torch.float64).clamp(-1, 1), noise(1, 2, 8, 8, seed=1, dtype=torch.float64)
    for t in inverse.timesteps[:: steps // 100].tolist():
        levels = [torch.tensor(1.0, dtype=torch.float64) if i < 0 else ALPHAS[i] for i in (t - 1000 // steps, t)]
        nearer, noisier = (level.sqrt() * x0 + (1 - level).sqrt() * epsilon for level in levels)
        torch.testing.assert_close(inverse.step(epsilon, t, nearer).prev_sample, noisier, atol=2e-5, rtol=0)
        torch.testing.assert_close(scheduler.step(epsilon, t, noisier).prev_sample, nearer, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_decoding_undoes_encoding_for_a_fixed_epsilon(name):
    scheduler, inverse = pair(name)
    scheduler.set_timesteps(100)
    inverse.set_timesteps(100)
    image, epsilon = (
        noise(1, 2, 8, 8, dtype=torch.float64).clamp(-1, 1),
        noise(1, 2, 8, 8, seed=1, dtype=torch.float64),
    )
    x = image
    for t in inverse.timesteps:
        reached = inverse.step(epsilon, t, x).prev_sample
        torch.testing.assert_close(scheduler.step(epsilon, t, reached).prev_sample, x, atol=1e-6, rtol=0)
        x = reached
    for t in scheduler.timesteps:
        x = scheduler.step(epsilon, t, x).prev_sample
    torch.testing.assert_close(x, image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("train_steps", [1000, 240])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("leading", "last"), ("trailing", 0)])
def test_timesteps_mirror_each_other(train_steps, spacing, offset):
    for steps in [n for n in range(1, train_steps + 1) if train_steps % n == 0]:
        stride = train_steps // steps
        shift = stride - 1 if "trailing" in spacing or offset == "last" else min(offset, stride - 1)
        options = {"num_train_timesteps": train_steps, "timestep_spacing": spacing}
        options["steps_offset"] = shift if spacing == "leading" else 0
        scheduler, inverse = (scheduler_class(**options) for scheduler_class in BOTH)
        scheduler.set_timesteps(steps)
        inverse.set_timesteps(steps)
        assert inverse.timesteps.tolist() == list(range(shift, train_steps, stride))
        assert scheduler.timesteps.tolist() == inverse.timesteps.tolist()[::-1]
        assert scheduler.timesteps.dtype == inverse.timesteps.dtype == torch.int64
        assert scheduler.num_inference_steps == inverse.num_inference_steps == steps


@pytest.mark.parametrize(
    "steps, options, named",
    [
        (30, {}, "num_inference_steps is 30"),
        (2000, {}, "num_inference_steps is 2000"),
        (0, {}, "num_inference_steps is 0"),
        (-10, {}, "num_inference_steps is -10"),
        (100, {"timestep_spacing": "linspace"}, "timestep_spacing is 'linspace'"),
        (100, {"steps_offset": 10}, r"steps_offset is 10: it must lie in \[0, 10\)"),
        (100, {"steps_offset": -1}, "steps_offset is -1"),
    ],
)
@pytest.mark.parametrize("scheduler_class", BOTH)
def test_grids_without_a_mirror_image_are_refused(scheduler_class, steps, options, named):
    with pytest.raises(ValueError, match=named):
        scheduler_class(**options).set_timesteps(steps)


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_bad_arguments_are_refused(scheduler_class):
    for ratio in (0, -0.5, 1.01):
        with pytest.raises(ValueError, match="dynamic_thresholding_ratio"):
            scheduler_class(dynamic_thresholding_ratio=ratio)
    for unknown in ("sample_max_value", "set_alpha_to_zero", "thresholdin"):
        with pytest.raises(TypeError, match=unknown):
            scheduler_class(**{unknown: 1})
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler_class().step(noise(1, 1, 2, 2), 0, noise(1, 1, 2, 2))


def test_negative_fixed_point_iterations_are_refused():
    with pytest.raises(ValueError, match="num_fixed_point_iterations is -1"):
        DynamicDDIMInverseScheduler(num_fixed_point_iterations=-1)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 16, 16), (2, 3, 7, 9), (1, 4, 5), (2, 1, 4, 5, 6), (1, 1, 1, 1)])
def test_dynamic_normalisation_is_the_formula(shape, ratio):
    x = 2 * noise(*shape, dtype=torch.float64)
    for per_channel, start in ((True, 2), (False, 1)):
        quantile = torch.quantile(x.abs().flatten(start), ratio, dim=-1).clamp(min=1)
        threshold = quantile.reshape(quantile.shape + (1,) * (x.ndim - start)).expand_as(x)
        expected = torch.maximum(torch.minimum(x, threshold), -threshold) / threshold
        torch.testing.assert_close(dynamic_normalize(x, ratio, per_channel), expected, atol=1e-12, rtol=0)


def test_dynamic_normalisation_has_range_one_and_changes_nothing_below():
    within = noise(2, 3, 16, 16).clamp(-1, 1)
    assert torch.equal(dynamic_normalize(within), within)
    for scale in (0.1, 1, 3, 100):
        once = dynamic_normalize(scale * noise(2, 3, 16, 16))
        assert once.abs().max() <= 1
        assert torch.equal(dynamic_normalize(once), once)


def test_dynamic_normalisation_rescales_where_a_clip_saturates():
    x = 3 * noise(1, 1, 32, 32)
    normalised = dynamic_normalize(x)
    saturated = (normalised.abs() == 1).float().mean()
    assert 0 < saturated < 0.02 < 0.5 < (x.clamp(-1, 1).abs() == 1).float().mean()
    inside = normalised.abs() < 1
    ratio = x[inside] / normalised[inside]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    assert ratio[0] > 5


def test_dynamic_normalisation_ignores_the_scale_above_one():
    x = 3 * noise(2, 2, 16, 16)
    torch.testing.assert_close(dynamic_normalize(7 * x), dynamic_normalize(x), atol=1e-6, rtol=0)


def test_dynamic_normalisation_treats_samples_and_channels_apart():
    x = noise(2, 2, 16, 16)
    brighter = x.clone()
    brighter[0, 1] *= 10
    apart, pooled = dynamic_normalize(x), dynamic_normalize(x, per_channel=False)
    assert torch.equal(dynamic_normalize(brighter)[:, 0], apart[:, 0])
    assert torch.equal(dynamic_normalize(brighter)[1], apart[1])
    assert not torch.equal(dynamic_normalize(brighter, per_channel=False)[0, 0], pooled[0, 0])
    assert torch.equal(dynamic_normalize(brighter, per_channel=False)[1], pooled[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, epsilon = (3 * noise(1, 2, 16, 16)).to(dtype), noise(1, 2, 16, 16, seed=1).to(dtype)
    assert torch.equal(dynamic_normalize(x), dynamic_normalize(x.float()).to(dtype))
    for scheduler in (scheduler_class() for scheduler_class in BOTH):
        scheduler.set_timesteps(100)
        # 1 - alpha is below half's resolution at the first timesteps
        for t in (0, 10, 500, 990):
            half, full = scheduler.step(epsilon, t, x), scheduler.step(epsilon.float(), t, x.float())
            assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
            assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))
    refined = []
    for kind in (dtype, torch.float32):
        inverse, sample = DynamicDDIMInverseScheduler(num_fixed_point_iterations=1), x.to(kind)
        inverse.set_timesteps(100)
        inverse.step(epsilon.to(kind), 500, sample)
        refined.append(inverse.step(epsilon.to(kind), 500, sample).prev_sample)
    assert torch.equal(refined[0], refined[1].to(dtype))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "ours, stock, extra",
    [
        ({"thresholding": False}, {"clip_sample": False}, {}),
        ({"thresholding": False, "clip_sample": True}, {}, {"use_clipped_model_output": True}),
        ({"thresholding": False, "clip_sample": True, "clip_sample_range": 0.5, "use_clipped_model_output": False},
         {"clip_sample_range": 0.5}, {}),
        ({"threshold_per_channel": False, "dynamic_thresholding_ratio": 0.9},
         {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e6},
         {"use_clipped_model_output": True}),
    ],
    ids=["none", "static-clip", "static-clip-raw", "pooled"],
)  # fmt: skip
def test_options_of_decoding_equal_the_stock_scheduler(ours, stock, extra, kind):
    scheduler, reference = DynamicDDIMScheduler(**ours, prediction_type=kind), DDIMScheduler(**stock)
    reference.register_to_config(prediction_type=kind)
    scheduler.set_timesteps(50)
    reference.set_timesteps(50)
    for t in (20, 500, 980):
        output, x = noise(2, 2, 8, 8, seed=t), 1.5 * noise(2, 2, 8, 8, seed=t + 1)
        expected = reference.step(output, t, x, **extra)
        actual = scheduler.step(output, t, x)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_options_of_encoding_equal_the_stock_scheduler(clip):
    options = {"clip_sample": clip}
    inverse = DynamicDDIMInverseScheduler(**options, thresholding=False, use_clipped_model_output=False)
    reference = DDIMInverseScheduler(**options)
    inverse.set_timesteps(50)
    reference.set_timesteps(50)
    for t in (20, 500, 980):
        output, x = noise(2, 2, 8, 8, seed=t), 1.5 * noise(2, 2, 8, 8, seed=t + 1)
        expected = reference.step(output, t, x)
        torch.testing.assert_close(inverse.step(output, t, x).prev_sample, expected.prev_sample, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_epsilon_is_derived_again_from_the_normalised_image_or_kept_raw(scheduler_class):
    t, x, epsilon = 500, 2 * noise(1, 2, 16, 16), noise(1, 2, 16, 16, seed=1)
    start, end = (ALPHAS[i].float() for i in ((500, 490) if scheduler_class is DynamicDDIMScheduler else (490, 500)))
    x0 = dynamic_normalize((x - (1 - start).sqrt() * epsilon) / start.sqrt())
    derived = (x - start.sqrt() * x0) / (1 - start).sqrt()
    assert (derived - epsilon).abs().max() > 0.5
    for option, used in ((True, derived), (False, epsilon)):
        scheduler = scheduler_class(use_clipped_model_output=option)
        scheduler.set_timesteps(100)
        expected = end.sqrt() * x0 + (1 - end).sqrt() * used
        torch.testing.assert_close(scheduler.step(epsilon, t, x).prev_sample, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scheduler.step(epsilon, t, x, return_dict=False)[1], x0, atol=1e-5, rtol=1e-4)


def test_peaks_survive_the_first_encoding_step_unless_asked_otherwise():
    image, epsilon = 2 * noise(1, 2, 16, 16), noise(1, 2, 16, 16, seed=1)
    assert image.abs().max() > 3
    for option, x0 in ((False, image), (True, dynamic_normalize(image))):
        inverse = DynamicDDIMInverseScheduler(threshold_clean_sample=option)
        inverse.set_timesteps(100)
        expected = ALPHAS[0].sqrt() * x0 + (1 - ALPHAS[0]).sqrt() * epsilon
        torch.testing.assert_close(inverse.step(epsilon, 0, image).prev_sample, expected.float(), atol=1e-5, rtol=0)
        assert torch.equal(inverse.step(epsilon, 0, image).pred_original_sample, x0)


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_without_alpha_one_the_image_is_the_first_level(scheduler_class):
    scheduler = scheduler_class(set_alpha_to_one=False)
    scheduler.set_timesteps(100)
    x = 0.3 * noise(1, 1, 8, 8)
    torch.testing.assert_close(scheduler.step(noise(1, 1, 8, 8, seed=1), 0, x).prev_sample, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("timestep", [20, 200, 500, 990])
def test_refinement_is_exact_also_where_normalisation_acts(timestep):
    scheduler, inverse = DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(num_fixed_point_iterations=60)
    scheduler.set_timesteps(100)
    inverse.set_timesteps(100)

    def network(x):
        return 0.1 * x

    decoded = scheduler.step(network(x := 2 * noise(1, 2, 16, 16)), timestep, x).prev_sample
    alpha = ALPHAS[timestep].float()
    clean = (x - (1 - alpha).sqrt() * network(x)) / alpha.sqrt()
    assert (dynamic_normalize(clean) - clean).abs().max() > 1
    encoded = decoded
    for _ in range(61):
        encoded = inverse.step(network(encoded), timestep, encoded).prev_sample
    torch.testing.assert_close(
        scheduler.step(network(encoded), timestep, encoded).prev_sample, decoded, atol=5e-6, rtol=0
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_refinement_knows_what_the_network_predicts(kind):
    scheduler = DynamicDDIMScheduler(prediction_type=kind)
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config, num_fixed_point_iterations=60)
    scheduler.set_timesteps(100)
    inverse.set_timesteps(100)
    encoded, t = (decoded := 0.5 * noise(1, 2, 8, 8)), 500
    for _ in range(61):
        encoded = inverse.step(0.1 * encoded, t, encoded).prev_sample
    torch.testing.assert_close(scheduler.step(0.1 * encoded, t, encoded).prev_sample, decoded, atol=5e-6, rtol=0)


CHANGED = {
    "num_train_timesteps": 500, "beta_start": 0.0002, "beta_end": 0.03, "beta_schedule": "scaled_linear",
    "clip_sample": True, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
    "thresholding": False, "dynamic_thresholding_ratio": 0.9, "threshold_per_channel": False,
    "threshold_clean_sample": True, "clip_sample_range": 2.0, "use_clipped_model_output": False,
    "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
}  # fmt: skip


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_every_argument_survives_saving(scheduler_class, tmp_path):
    options = CHANGED | {"num_fixed_point_iterations": 2}
    default = scheduler_class()
    arguments = {k for k in default.config if not k.startswith("_")} - {"trained_betas"}
    assert arguments == set(options) | {"solver_order"}  # which fits neither of two others, and has a test of its own
    assert all(default.config[k] != value for k, value in options.items())
    scheduler_class(**options).save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert {k: loaded.config[k] for k in options} == options
    assert torch.equal(loaded.alphas_cumprod, scheduler_class(**options).alphas_cumprod)
    assert not torch.equal(loaded.alphas_cumprod, default.alphas_cumprod)


def test_each_direction_is_made_from_the_other():
    there = DynamicDDIMInverseScheduler.from_config(DynamicDDIMScheduler(**CHANGED).config)
    assert {k: there.config[k] for k in CHANGED} == CHANGED
    assert there.config.num_fixed_point_iterations == 0
    back = DynamicDDIMScheduler.from_config(there.config)
    assert {k: back.config[k] for k in CHANGED} == CHANGED


def test_made_from_a_stock_configuration():
    options = {"beta_start": 2e-4, "beta_end": 0.03, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    stock = DDIMScheduler(**options, steps_offset=1, prediction_type="v_prediction")
    for ours in (scheduler_class.from_config(stock.config) for scheduler_class in BOTH):
        assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)
        assert ours.config.steps_offset == 1
        assert ours.config.prediction_type == "v_prediction"
        # only what was asked for is taken over: the stock default of clipping was not
        assert ours.config.thresholding and not ours.config.clip_sample


def test_training_uses_the_same_noise_levels():
    timesteps, x0, epsilon = torch.tensor([0, 500, 999]), noise(3, 1, 4, 4), noise(3, 1, 4, 4, seed=1)
    alpha = ALPHAS[timesteps].float().reshape(-1, 1, 1, 1)
    noisy = DynamicDDIMScheduler().add_noise(x0, epsilon, timesteps)
    torch.testing.assert_close(noisy, alpha.sqrt() * x0 + (1 - alpha).sqrt() * epsilon, atol=1e-5, rtol=0)
