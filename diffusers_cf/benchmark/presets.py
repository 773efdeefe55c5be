"""The sizes at which `diffusers-cf benchmark` runs, as literals: everything that decides how long it takes."""

from dataclasses import dataclass

from diffusers_cf.baselines import Grid
from diffusers_cf.baselines.training import Budget


@dataclass(frozen=True)
class Preset:
    """One size of the benchmark.

    Attributes:
        image_size (`int`): side of every network's input in pixels. Maps are measured at the data set's size.
        size (`str`): of the networks, `small` or `paper`, as in `baselines.NETWORKS`.
        budget (`Budget`): of the training of each network.
        grid (`Grid`): settings of inference to choose from on validation slices.
        validation_slices (`int`): largest number of slices to choose settings on (256 in the paper).
        test_slices (`int`, *optional*): largest number of test slices, evenly spread over the split; None for all.
        figure_strengths (`tuple[float, ...]`): strengths L on the axis of Fig. 3.
        figure_slices (`int`): number of validation slices that Fig. 3 is measured on.
    """

    image_size: int
    size: str
    budget: Budget
    grid: Grid
    validation_slices: int
    test_slices: int | None
    figure_strengths: tuple[float, ...]
    figure_slices: int


STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

PRESETS = {
    # minutes on 2 CPU cores: shows that everything runs, not how well
    "smoke": Preset(
        image_size=16,
        size="small",
        budget=Budget(seconds=6, steps=12, batch_size=8),
        grid=Grid(4, guidance_scales=(1.5, 3.0), strengths=(0.5,), classifier_scales=(30.0,), restoration_steps=3),
        validation_slices=12,
        test_slices=24,
        figure_strengths=(0.25, 0.5),
        figure_slices=4,
    ),
    # about two hours per seed on 2 CPU cores; small batches, because learning the conditions takes about 1,000 steps
    "cpu": Preset(
        image_size=32,
        size="small",
        budget=Budget(seconds=600, steps=10**6, batch_size=16),
        grid=Grid(
            num_inference_steps=20,
            guidance_scales=(1.5, 3.0, 6.0, 9.0, 12.0, 16.0),
            strengths=(0.2, 0.35, 0.5, 0.75),
            classifier_scales=(3.0, 6.0, 10.0, 15.0, 30.0, 100.0),
        ),
        validation_slices=128,
        test_slices=None,
        figure_strengths=STRENGTHS,
        figure_slices=64,
    ),
    # the sizes of the paper, for a GPU
    "paper": Preset(
        image_size=64,
        size="paper",
        budget=Budget(seconds=10**6, steps=50_000, batch_size=32, mixed_precision="bf16", num_workers=8),
        grid=Grid(
            num_inference_steps=100,
            guidance_scales=(1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0, 12.0),
            strengths=(0.2, 0.35, 0.5, 0.65, 0.75, 0.85),
            classifier_scales=(3.0, 6.0, 10.0, 15.0, 30.0, 60.0, 100.0, 300.0),
            restoration_steps=500,
        ),
        validation_slices=256,
        test_slices=None,
        figure_strengths=STRENGTHS,
        figure_slices=256,
    ),
}
