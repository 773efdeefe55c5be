"""Which pairs of schedulers the pipeline takes: those whose decoding can undo their encoding."""

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
)

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


# as it is saved: from_config takes over what was given, not what is a default
SAVED = {name: value for name, value in DynamicDDIMScheduler().config.items() if not name.startswith("_")}
STATIC = {"thresholding": False, "clip_sample": True}
SHORT = {"num_inference_steps": 10, "strength": 0.4}


@pytest.mark.parametrize(
    "forward, backward",
    [
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(steps_offset=1)),
        (DynamicDDIMScheduler(timestep_spacing="trailing"), DynamicDDIMInverseScheduler()),
        (DDIMScheduler(timestep_spacing="trailing"), DDIMInverseScheduler()),
        (DDIMScheduler(timestep_spacing="linspace"), DDIMInverseScheduler()),
        (DDIMScheduler(num_train_timesteps=500), DDIMInverseScheduler()),
        (DynamicDDIMScheduler(), DDIMInverseScheduler()),
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(beta_end=0.01)),
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(prediction_type="v_prediction")),
        (DDIMScheduler(clip_sample=False), DynamicDDIMInverseScheduler()),
        (DynamicDDIMScheduler(thresholding=False), DynamicDDIMInverseScheduler()),
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(threshold_per_channel=False)),
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(dynamic_thresholding_ratio=0.9)),
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(use_clipped_model_output=False)),
        (DynamicDDIMScheduler(), DynamicDDIMInverseScheduler(threshold_clean_sample=True)),
        (DDIMScheduler.from_config(SAVED), DynamicDDIMInverseScheduler()),
        (
            DDIMScheduler.from_config(SAVED),
            DDIMInverseScheduler.from_config(SAVED),
        ),
        (DDIMScheduler(clip_sample=True), DynamicDDIMInverseScheduler(thresholding=False, clip_sample=True)),
        (DDIMScheduler(clip_sample_range=2.0), DDIMInverseScheduler()),
        (DynamicDDIMScheduler.from_config(SAVED), DDIMInverseScheduler.from_config(SAVED)),
        (DDIMScheduler(), DynamicDDIMInverseScheduler(**STATIC, use_clipped_model_output=False)),
    ],
)
def test_schedulers_that_do_not_mirror_each_other_are_refused(make_pipeline, images, forward, backward):
    with pytest.raises(ValueError, match="scheduler and inverse_scheduler differ in"):
        make_pipeline((forward, backward))(images, **SHORT)


def test_an_inverse_scheduler_whose_steps_begin_at_their_timestep_is_refused(make_pipeline, images):
    multistep = {"timestep_spacing": "trailing"}
    pair = DPMSolverMultistepScheduler(**multistep), DPMSolverMultistepInverseScheduler(**multistep)
    with pytest.raises(ValueError, match="inverse_scheduler is a DPMSolverMultistepInverseScheduler: only a DDIM"):
        make_pipeline(pair)(images, **SHORT)


@pytest.mark.parametrize(
    "options", [{"solver_order": 2}, {"thresholding": False}, STATIC, {**STATIC, "threshold_clean_sample": True}]
)
def test_normalisation_of_the_same_kind_mirrors_itself(make_pipeline, images, options):
    pair = DynamicDDIMScheduler(**options | {"solver_order": 1}), DynamicDDIMInverseScheduler(**options)
    assert make_pipeline(pair)(images, **SHORT).heatmaps.isfinite().all()


def test_a_static_clip_as_the_stock_scheduler_has_it_mirrors_that(make_pipeline, images):
    options = {**STATIC, "use_clipped_model_output": False, "threshold_clean_sample": True}
    pairs = [(DDIMScheduler(), DynamicDDIMInverseScheduler(**options)), (DDIMScheduler(), DDIMInverseScheduler())]
    mixed, stock = (make_pipeline(pair)(images, **SHORT).heatmaps for pair in pairs)
    torch.testing.assert_close(mixed, stock, atol=1e-4, rtol=0)
