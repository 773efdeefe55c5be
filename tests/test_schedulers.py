"""Dynamic normalisation against its formula, and encoding as the inverse of decoding."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepInverseScheduler
from gaussian_data import ALPHAS, STD, exact_epsilon, noise

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler, dynamic_normalize
from diffusers_cf.schedulers import authors_schedulers


TRAILING, RAW = {"timestep_spacing": "trailing"}, {"clip_sample": False}
BOTH = (DynamicDDIMScheduler, DynamicDDIMInverseScheduler)
SHORT = {"num_inference_steps": 10, "strength": 0.4}


def with_timesteps(steps, *schedulers):
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers


PAIRS = [(*BOTH, {}), (*BOTH, {"steps_offset": 3}), (*BOTH, TRAILING), (DDIMScheduler, DDIMInverseScheduler, RAW)]


@pytest.mark.parametrize("forward, inverse, options", PAIRS)
def test_round_trip_error_halves_with_the_step_size(forward, inverse, options):
    image, errors = STD * noise(2, 2, 16, 16), []
    for steps in (50, 100, 200):
        x = image
        for direction in with_timesteps(steps, inverse(**options), forward(**options)):
            for t in direction.timesteps:
                x = direction.step(exact_epsilon(x, t), t, x).prev_sample
        errors.append((x - image).abs().mean().item())
    assert errors[0] < 0.033
    assert 1.85 < errors[0] / errors[1] < 2.15 and 1.9 < errors[1] / errors[2] < 2.1


@pytest.mark.parametrize("steps", [100, 200])
@pytest.mark.parametrize("options", [{}, {"steps_offset": 3}, TRAILING])
def test_each_step_walks_between_the_two_noise_levels(options, steps):
    scheduler, inverse = with_timesteps(steps, *(scheduler_class(**options) for scheduler_class in BOTH))
    x0, epsilon = noise(1, 2, 8, 8, dtype=torch.float64).clamp(-1, 1), noise(1, 2, 8, 8, seed=1, dtype=torch.float64)
    for t in inverse.timesteps[:: steps // 100].tolist():
        levels = [torch.tensor(1.0, dtype=torch.float64) if i < 0 else ALPHAS[i] for i in (t - 1000 // steps, t)]
        nearer, noisier = (level.sqrt() * x0 + (1 - level).sqrt() * epsilon for level in levels)
        torch.testing.assert_close(inverse.step(epsilon, t, nearer).prev_sample, noisier, atol=2e-5, rtol=0)
        torch.testing.assert_close(scheduler.step(epsilon, t, noisier).prev_sample, nearer, atol=2e-5, rtol=0)


@pytest.mark.parametrize("train_steps", [1000, 240])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("leading", 999), ("trailing", 999)])
def test_timesteps_mirror_each_other(train_steps, spacing, offset):
    for steps in [n for n in range(1, train_steps + 1) if train_steps % n == 0]:
        stride = train_steps // steps
        shift = min(offset, stride - 1)
        options = {"num_train_timesteps": train_steps, "timestep_spacing": spacing}
        options["steps_offset"] = shift if spacing == "leading" else 0
        scheduler, inverse = with_timesteps(steps, *(scheduler_class(**options) for scheduler_class in BOTH))
        assert inverse.timesteps.tolist() == list(range(shift, train_steps, stride))
        assert scheduler.timesteps.tolist() == inverse.timesteps.tolist()[::-1]
        assert scheduler.timesteps.dtype == inverse.timesteps.dtype == torch.int64


@pytest.mark.parametrize(
    "options, steps, named",
    [
        ({}, 30, "num_inference_steps is 30"),
        ({}, 0, "num_inference_steps is 0"),
        ({"timestep_spacing": "linspace"}, 100, "timestep_spacing is 'linspace'"),
        ({"steps_offset": 10}, 100, r"steps_offset is 10: it must lie in \[0, 10\)"),
        ({"steps_offset": -1}, 100, "steps_offset is -1"),
        ({"dynamic_thresholding_ratio": 0}, 100, "dynamic_thresholding_ratio is 0: "),
        ({"dynamic_thresholding_ratio": 1.01}, 100, "dynamic_thresholding_ratio is 1.01"),
        ({"num_fixed_point_iterations": -1}, 100, "num_fixed_point_iterations is -1"),
        ({"solver_order": 3}, 100, "solver_order is 3"),
        ({"solver_order": 2, "rescale_betas_zero_snr": True}, 100, "infinite at zero terminal SNR"),
        ({"solver_order": 2, "num_fixed_point_iterations": 1}, 100, "num_fixed_point_iterations"),
        ({"solver_order": 2, "image_at_first_timestep": True}, 100, "image_at_first_timestep needs solver_order=1"),
        ({"thresholdin": True}, 100, "thresholdin"),
    ],
)
@pytest.mark.parametrize("scheduler_class", BOTH)
def test_bad_arguments_and_grids_without_a_mirror_image_are_refused(scheduler_class, options, steps, named):
    with pytest.raises((TypeError, ValueError), match=named):
        scheduler_class(**options).set_timesteps(steps)


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_a_step_without_timesteps_is_refused(scheduler_class):
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler_class().step(noise(1, 1, 2, 2), 0, noise(1, 1, 2, 2))


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 16, 16), (2, 3, 7, 9), (1, 4, 5), (2, 1, 4, 5, 6), (1, 1, 1, 1)])
def test_dynamic_normalisation_is_the_formula(shape, ratio):
    x = 2 * noise(*shape, dtype=torch.float64)
    for per_channel, start in ((True, 2), (False, 1)):
        quantile = torch.quantile(x.abs().flatten(start), ratio, dim=-1).clamp(min=1)
        threshold = quantile.reshape(quantile.shape + (1,) * (x.ndim - start)).expand_as(x)
        expected = torch.maximum(torch.minimum(x, threshold), -threshold) / threshold
        torch.testing.assert_close(dynamic_normalize(x, ratio, per_channel), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, epsilon = (3 * noise(1, 2, 16, 16)).to(dtype), noise(1, 2, 16, 16, seed=1).to(dtype)
    assert torch.equal(dynamic_normalize(x), dynamic_normalize(x.float()).to(dtype))
    for scheduler in with_timesteps(100, *(scheduler_class() for scheduler_class in BOTH)):
        # 1 - alpha is below half's resolution at the first timesteps
        for t in (0, 10, 500, 990):
            half, full = scheduler.step(epsilon, t, x), scheduler.step(epsilon.float(), t, x.float())
            assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
            assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))
    refined = []
    for given in ((epsilon, 500, x), (epsilon.float(), 500, x.float())):
        (inverse,) = with_timesteps(100, DynamicDDIMInverseScheduler(num_fixed_point_iterations=1))
        refined.append([inverse.step(*given).prev_sample for _ in range(2)][1])
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
    with_timesteps(50, scheduler, reference)
    for t in (20, 500, 980):
        output, x = noise(2, 2, 8, 8, seed=t), 1.5 * noise(2, 2, 8, 8, seed=t + 1)
        expected = reference.step(output, t, x, **extra)
        actual = scheduler.step(output, t, x)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_epsilon_is_derived_again_from_the_normalised_image_or_kept_raw(scheduler_class):
    t, x, epsilon = 500, 2 * noise(1, 2, 16, 16), noise(1, 2, 16, 16, seed=1)
    start, end = (ALPHAS[i].float() for i in ((500, 490) if scheduler_class is DynamicDDIMScheduler else (490, 500)))
    x0 = dynamic_normalize((x - (1 - start).sqrt() * epsilon) / start.sqrt())
    derived = (x - start.sqrt() * x0) / (1 - start).sqrt()
    assert (derived - epsilon).abs().max() > 0.5
    for option, used in ((True, derived), (False, epsilon)):
        (scheduler,) = with_timesteps(100, scheduler_class(use_clipped_model_output=option))
        expected = end.sqrt() * x0 + (1 - end).sqrt() * used
        torch.testing.assert_close(scheduler.step(epsilon, t, x).prev_sample, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scheduler.step(epsilon, t, x, return_dict=False)[1], x0, atol=1e-5, rtol=1e-4)


def test_peaks_survive_the_first_encoding_step_unless_asked_otherwise():
    image, epsilon = 2 * noise(1, 2, 16, 16), noise(1, 2, 16, 16, seed=1)
    assert image.abs().max() > 3
    for option, x0 in ((False, image), (True, dynamic_normalize(image))):
        (inverse,) = with_timesteps(100, DynamicDDIMInverseScheduler(threshold_clean_sample=option))
        out, expected = inverse.step(epsilon, 0, image), ALPHAS[0].sqrt() * x0 + (1 - ALPHAS[0]).sqrt() * epsilon
        torch.testing.assert_close(out.prev_sample, expected.float(), atol=1e-5, rtol=0)
        assert torch.equal(out.pred_original_sample, x0)


@pytest.mark.parametrize("scheduler_class", BOTH)
def test_without_alpha_one_the_image_is_the_first_level(scheduler_class):
    (scheduler,) = with_timesteps(100, scheduler_class(set_alpha_to_one=False))
    x = 0.3 * noise(1, 1, 8, 8)
    torch.testing.assert_close(scheduler.step(noise(1, 1, 8, 8, seed=1), 0, x).prev_sample, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("timestep", [20, 200, 500, 990])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_refinement_is_exact_also_where_normalisation_acts(kind, timestep):
    scheduler = DynamicDDIMScheduler(prediction_type=kind)
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config, num_fixed_point_iterations=60)
    with_timesteps(100, scheduler, inverse)
    x = 2 * noise(1, 2, 16, 16)
    origin = scheduler.step(0.1 * x, timestep, x).prev_sample
    alpha, encoded = ALPHAS[timestep].float(), origin
    clean = (x - (1 - alpha).sqrt() * 0.1 * x) / alpha.sqrt()
    assert kind != "epsilon" or (dynamic_normalize(clean) - clean).abs().max() > 1
    for _ in range(61):
        encoded = inverse.step(0.1 * encoded, timestep, encoded).prev_sample
    decoded = scheduler.step(0.1 * encoded, timestep, encoded).prev_sample
    torch.testing.assert_close(decoded, origin, atol=5e-6, rtol=0)


def test_the_authors_walk():
    """Encoding goes from level tau_k, where the network is told tau_k, to tau_k+1, and last of all to pure noise."""
    _, inverse = authors_schedulers(DynamicDDIMScheduler().config)
    inverse = DynamicDDIMInverseScheduler.from_config(inverse.config, thresholding=False)
    with_timesteps(100, inverse)
    assert inverse.timesteps.tolist() == list(range(0, 1000, 10))
    x, epsilon = noise(1, 2, 8, 8), noise(1, 2, 8, 8, seed=1)
    start, end = ALPHAS[500], ALPHAS[510]
    expected = end.sqrt() * (x - (1 - start).sqrt() * epsilon) / start.sqrt() + (1 - end).sqrt() * epsilon
    torch.testing.assert_close(inverse.step(epsilon, 500, x).prev_sample, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inverse.step(epsilon, 990, x).prev_sample, epsilon)


CHANGED = {
    "num_train_timesteps": 500, "beta_start": 0.0002, "beta_end": 0.03, "beta_schedule": "scaled_linear",
    "clip_sample": True, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
    "thresholding": False, "dynamic_thresholding_ratio": 0.9, "threshold_per_channel": False,
    "threshold_clean_sample": True, "clip_sample_range": 2.0, "use_clipped_model_output": False,
    "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "last", [{"num_fixed_point_iterations": 2}, {"solver_order": 2}, {"image_at_first_timestep": True}]
)
@pytest.mark.parametrize("scheduler_class", BOTH)
def test_every_argument_survives_saving(scheduler_class, last, tmp_path):
    options, default = CHANGED | last, scheduler_class()
    if "solver_order" in last:
        del options["rescale_betas_zero_snr"]  # can't be combined
    names = {*CHANGED, "num_fixed_point_iterations", "solver_order", "image_at_first_timestep"}
    assert {k for k in default.config if not k.startswith("_")} - {"trained_betas"} == names
    assert all(default.config[k] != value for k, value in options.items())
    scheduler_class(**options).save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert {k: loaded.config[k] for k in options} == options
    assert torch.equal(loaded.alphas_cumprod, scheduler_class(**options).alphas_cumprod)
    assert not torch.equal(loaded.alphas_cumprod, default.alphas_cumprod)


def test_made_from_a_stock_configuration():
    options = {"beta_start": 2e-4, "beta_end": 0.03, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    stock = DDIMScheduler(**options, steps_offset=1, prediction_type="v_prediction")
    for ours in (scheduler_class.from_config(stock.config) for scheduler_class in BOTH):
        assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)
        assert ours.config.steps_offset == 1
        assert ours.config.prediction_type == "v_prediction"
        # only what was asked for is taken over: the stock default of clipping was not
        assert ours.config.thresholding and not ours.config.clip_sample


# as saved: from_config keeps what is in a configuration, but not defaults
SAVED = {name: value for name, value in DynamicDDIMScheduler().config.items() if not name.startswith("_")}
STATIC = {"thresholding": False, "clip_sample": True}
OURS_DIFFER = {
    "steps_offset": 1, "beta_end": 0.01, "prediction_type": "v_prediction", "threshold_per_channel": False,
    "dynamic_thresholding_ratio": 0.9, "use_clipped_model_output": False, "threshold_clean_sample": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "forward, inverse",
    [
        *((DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(**{k: v})) for k, v in OURS_DIFFER.items()),
        (DynamicDDIMScheduler(timestep_spacing="trailing"), DynamicDDIMInverseScheduler()),
        (DynamicDDIMScheduler(thresholding=False), DynamicDDIMInverseScheduler()),
        (DDIMScheduler(timestep_spacing="trailing"), DDIMInverseScheduler()),
        (DDIMScheduler(num_train_timesteps=500), DDIMInverseScheduler()),
        (DDIMScheduler(clip_sample_range=2.0), DDIMInverseScheduler()),
        (DDIMScheduler.from_config(SAVED), DDIMInverseScheduler.from_config(SAVED)),
        (DynamicDDIMScheduler(), DDIMInverseScheduler()),
        (DynamicDDIMScheduler.from_config(SAVED), DDIMInverseScheduler.from_config(SAVED)),
        (DDIMScheduler(clip_sample=False), DynamicDDIMInverseScheduler()),
        (DDIMScheduler.from_config(SAVED), DynamicDDIMInverseScheduler()),
        (DDIMScheduler(clip_sample=True), DynamicDDIMInverseScheduler(**STATIC)),
        (DDIMScheduler(), DynamicDDIMInverseScheduler(**STATIC, use_clipped_model_output=False)),
        (DDIMScheduler(**TRAILING), DPMSolverMultistepInverseScheduler(**TRAILING)),
    ],
)
def test_schedulers_that_do_not_mirror_each_other_are_refused(make_pipeline, images, forward, inverse):
    with pytest.raises(ValueError, match="inverse_scheduler is a DPMSolver|scheduler and inverse_scheduler differ in"):
        make_pipeline((forward, inverse))(images, **SHORT)


@pytest.mark.parametrize(
    "options", [{"solver_order": 2}, {"thresholding": False}, STATIC, {**STATIC, "threshold_clean_sample": True}]
)
def test_normalisation_of_the_same_kind_mirrors_itself(make_pipeline, images, options):
    schedulers = DynamicDDIMScheduler(**options | {"solver_order": 1}), DynamicDDIMInverseScheduler(**options)
    assert make_pipeline(schedulers)(images, **SHORT).heatmaps.isfinite().all()


def test_a_static_clip_like_that_of_the_stock_scheduler_mirrors_it(make_pipeline, images):
    options = {**STATIC, "use_clipped_model_output": False, "threshold_clean_sample": True}
    inverses = DynamicDDIMInverseScheduler(**options), DDIMInverseScheduler()
    mixed, stock = (make_pipeline((DDIMScheduler(), inverse))(images, **SHORT) for inverse in inverses)
    torch.testing.assert_close(mixed.heatmaps, stock.heatmaps, atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed.latents, stock.latents, atol=1e-4, rtol=0)
