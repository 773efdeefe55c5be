"""The shipped model returns the recorded maps of a phantom. `python tests/test_recorded_maps.py` records them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_cf import CounterfactualDDIMPipeline, DynamicDDIMInverseScheduler
from diffusers_cf.data.phantom import PhantomSource
from diffusers_cf.loading import PRETRAINED


RECORDED = Path(__file__).parent / "recorded_maps.npz"
STEP = 4  # every fourth pixel along each side is kept
VARIANTS = {  # options of the inverse scheduler, and settings
    "recommended": ({}, {}),
    "algorithm-1": ({"solver_order": 1}, {"map": "counterfactual", "guidance_scale": 3.0, "num_inference_steps": 20}),
    "fixed-point": (
        {"solver_order": 1, "num_fixed_point_iterations": 2},
        {"map": "counterfactual", "strength": 0.5, "num_inference_steps": 10},
    ),
    "forward": ({"solver_order": 1}, {"map": "forward"}),
    "signed": ({}, {"map": "signed", "strength": 0.5}),
}


def shipped_maps(variant: str) -> dict[str, np.ndarray]:
    """Return the pipeline's output for two slices, heatmaps `(2, 32, 32)` and others, under `VARIANT/FIELD`."""
    slices = PhantomSource(seed=1, patients=3).read("phantom-s1-0000")
    chosen = np.argsort(slices.masks.sum(axis=(1, 2)))[[0, -1]]
    options, settings = VARIANTS[variant]
    pipe = CounterfactualDDIMPipeline.from_pretrained(PRETRAINED / "phantom_small")
    pipe.set_progress_bar_config(disable=True)
    pipe.preprocessing = pipe.preprocessing | {"signs": [1, -1, 1, 1]}
    pipe.inverse_scheduler = DynamicDDIMInverseScheduler.from_config(pipe.inverse_scheduler.config, **options)
    out = pipe(torch.from_numpy(slices.images[chosen]), output_type="np", **settings)
    return {f"{variant}/{field}": value[..., ::STEP, ::STEP] for field, value in out.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shipped_model_returns_the_recorded_maps(variant):
    with np.load(RECORDED) as recorded:
        assert len(recorded.files) == 3 * len(VARIANTS)
        for name, found in shipped_maps(variant).items():
            np.testing.assert_allclose(found, recorded[name], rtol=0, atol=1e-5, err_msg=name)
            assert np.abs(recorded[name]).max() > 0.01, name


if __name__ == "__main__":
    np.savez_compressed(RECORDED, **{k: v for variant in VARIANTS for k, v in shipped_maps(variant).items()})
