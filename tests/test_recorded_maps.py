"""Recorded outputs of the shipped model (`python tests/test_recorded_maps.py` records them) and the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import tiny_unet

from diffusers_cf import ClassTokenEncoder, CounterfactualDDIMPipeline
from diffusers_cf.data.phantom import PhantomSource
from diffusers_cf.loading import PRETRAINED
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


RECORDED = Path(__file__).parent / "recorded_maps.npz"
ROUNDING = 1e-4  # processors add in another order: outputs of AVX2 and two with AVX512 differ by up to 4.2e-5
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
            np.testing.assert_allclose(found, recorded[name], rtol=0, atol=ROUNDING, err_msg=name)
            assert np.abs(recorded[name]).max() > 0.01, name


AUTHORS = Path(__file__).parent / "recorded_authors.npz"


@pytest.mark.parametrize("suffix, settings", [("", (0.75, 3.0)), ("_b", (0.3, 1.5))])
def test_the_authors_sampler(suffix, settings):
    """Latents and counterfactuals of Diff-SCM (vios-s/Diff-SCM) around this network, of random weights, agree.

    The file holds weights, images in the network's range and outputs of their code on the CPU in float32.
    """
    recorded = {name: torch.from_numpy(value) for name, value in np.load(AUTHORS).items()}
    sizes = {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 32}
    unet = tiny_unet(**sizes, attention_head_dim=64, cross_attention_dim=128)
    encoder = ClassTokenEncoder(num_tokens=None, token_dim=128, vector_dim=128, embedding_dim=32)
    for part, name in ((unet, "unet."), (encoder, "class_encoder.")):
        weights = {key.removeprefix(name): value for key, value in recorded.items() if key.startswith(name)}
        part.eval().load_state_dict(weights)
    scheduler = DynamicDDIMScheduler(solver_order=2)
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config)
    ours = CounterfactualDDIMPipeline(unet, encoder, scheduler, inverse, crop_background=True)
    pipe = ours.with_authors_sampler()
    pipe.set_progress_bar_config(disable=True)
    (strength, w), steps = settings, 100
    latents = pipe.encode(recorded["images"], strength, steps)
    torch.testing.assert_close(latents, recorded["latents" + suffix], rtol=1e-4, atol=1e-4)
    out = pipe((recorded["images"] + 1) / 2, None, w, strength, steps, "counterfactual")
    torch.testing.assert_close(out.counterfactuals * 2 - 1, recorded["counterfactuals" + suffix], rtol=0, atol=1e-4)
    again = CounterfactualDDIMPipeline(**ours.components)  # what is built of the same U-Net later is not the authors'
    assert again.config.crop_background is ours.config.crop_background is True and again.config.clip_input is True


if __name__ == "__main__":
    np.savez_compressed(RECORDED, **{k: v for variant in VARIANTS for k, v in shipped_maps(variant).items()})
