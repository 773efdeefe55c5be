"""Records tests/recorded_maps.npz: what the shipped model makes of two slices of a phantom, for tests/test_recorded_maps.py.

python tests/record_maps.py
"""

from pathlib import Path

import numpy as np
import torch

from diffusers_cf import CounterfactualDDIMPipeline, DynamicDDIMInverseScheduler
from diffusers_cf.data.phantom import PhantomSource


RECORDED = Path(__file__).parent / "recorded_maps.npz"
MODEL = Path(__file__).parents[1] / "diffusers_cf" / "pretrained" / "phantom_small"
STEP = 4  # every fourth pixel along each side is kept
VARIANTS = {
    "recommended": ({}, {}),
    "algorithm-1": ({"solver_order": 1}, {"map": "counterfactual", "guidance_scale": 3.0, "num_inference_steps": 20}),
    "fixed-point": (
        {"solver_order": 1, "num_fixed_point_iterations": 2},
        {"map": "counterfactual", "strength": 0.5, "num_inference_steps": 10},
    ),
    "forward": ({"solver_order": 1}, {"map": "forward"}),
    "signed": ({}, {"map": "signed", "strength": 0.5}),
}


def shipped_maps() -> dict[str, np.ndarray]:
    """Heatmaps `(2, 32, 32)`, counterfactuals `(2, 4, 32, 32)` and latents `(2, 4, 16, 16)` of each variant."""
    slices = PhantomSource(seed=1, patients=3).read("phantom-s1-0000")
    chosen = np.argsort(slices.masks.sum(axis=(1, 2)))[[0, -1]]
    images, found = torch.from_numpy(slices.images[chosen]), {}
    for name, (options, settings) in VARIANTS.items():
        pipe = CounterfactualDDIMPipeline.from_pretrained(MODEL)
        pipe.set_progress_bar_config(disable=True)
        pipe.preprocessing = pipe.preprocessing | {"signs": [1, -1, 1, 1]}
        pipe.inverse_scheduler = DynamicDDIMInverseScheduler.from_config(pipe.inverse_scheduler.config, **options)
        for field, value in pipe(images, output_type="np", **settings).items():
            found[f"{name}/{field}"] = value[..., ::STEP, ::STEP]
    return found


if __name__ == "__main__":
    np.savez_compressed(RECORDED, **shipped_maps())
