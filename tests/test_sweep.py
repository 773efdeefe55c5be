"""The scores of a sweep are those of single calls of the pipeline."""

import numpy as np
import pytest
import torch
from evaluation_data import FakeDataset

from diffusers_cf import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask
from diffusers_cf.evaluation.sweep import evenly_spread, learn_signs, sweep


class Slices(FakeDataset):
    """Images of two channels with a square, brighter in one and darker in the other, if the label is 1."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = 0.2 + 0.3 * torch.rand(6, 2, 16, 16, generator=generator)
        self.images[:, :, :3] = 0
        self.images[0] = 0
        self.labels, self.masks = torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6, 16, 16, dtype=torch.uint8)
        self.masks[3:, 8:12, 8:12] = 1
        self.images[3:, 0, 8:12, 8:12] += 0.4
        self.images[3:, 1, 8:12, 8:12] -= 0.15

    def collate(self, rows):
        return {"images": self.images[rows], "masks": self.masks[rows], "labels": self.labels[rows]}


@pytest.mark.parametrize("map", ["counterfactual", "reconstruction", "signed", "forward"])
def test_a_point_is_what_calls_of_the_pipeline_score(pipe, map):
    slices, setting = Slices(), {"guidance_scale": 2.0, "strength": 0.4, "num_inference_steps": 10, "map": map}
    pipe.preprocessing = {"signs": [1, -1]}
    points = sweep(pipe, slices, range(6), [1.5, 2.0], [0.2, 0.4], [map], 10, batch_size=4)
    assert [(p.strength, p.guidance_scale) for p in points] == [(0.2, 1.5), (0.2, 2.0), (0.4, 1.5), (0.4, 2.0)]
    counts, inside = PixelCounts(), foreground_mask(slices.images.numpy())
    maps = pipe(slices.images, **setting).heatmaps.numpy()
    counts.update(maps[inside], slices.masks.numpy()[inside])
    assert points[-1].foreground_auprc == pytest.approx(counts.average_precision(), abs=1e-3)
    assert points[-1].network_evaluations == pipe.network_evaluations(**setting)


def test_the_setting_of_a_map_that_is_not_finite_is_named(pipe, monkeypatch):
    denoise = pipe.denoise

    def broken(latents, target, guidance_scale, *more, **walk):
        decoded = denoise(latents, target, guidance_scale, *more, **walk)
        return decoded * float("nan") if (guidance_scale, walk["strength"]) == (2.0, 0.4) else decoded

    monkeypatch.setattr(pipe, "denoise", broken)
    with pytest.raises(InputError, match="guidance_scale 2.0, strength 0.4, .* NaN"):
        sweep(pipe, Slices(), range(6), [1.5, 2.0], [0.2, 0.4], ["counterfactual"], 10, batch_size=4)


def test_signs_come_from_labels(pipe, monkeypatch):
    """The counterfactual darkens channel 0 and brightens channel 1 of slices that are labelled 1."""
    slices = Slices()

    def denoise(latents, target, guidance_scale, **_):
        labels = slices.labels[-len(latents) :]  # the first image is empty and never decoded
        change = (labels == 1).float()[:, None, None, None] * torch.tensor([-0.2, 0.1])[None, :, None, None]
        return latents + (change if guidance_scale else 0)

    monkeypatch.setattr(pipe, "denoise", denoise)
    settings = {"guidance_scale": 2.0, "strength": 0.4, "num_inference_steps": 10}
    assert learn_signs(pipe, slices, range(6), batch_size=6, **settings) == [1, -1]
    with pytest.raises(InputError, match="both labels"):
        slices.labels = torch.zeros(6, dtype=torch.int64)
        learn_signs(pipe, slices, range(6), batch_size=6, **settings)


def test_signs_are_learned_in_windows_with_crop_background(pipe, monkeypatch):
    slices, sizes, denoise = Slices(), set(), pipe.denoise
    slices.images[:, :, :8], slices.images[:, :, 12:] = 0, 0
    pipe.register_to_config(crop_background=True)

    def spy(latents, *args, **walk):
        sizes.add(tuple(latents.shape[-2:]))
        return denoise(latents, *args, **walk)

    monkeypatch.setattr(pipe, "denoise", spy)
    learn_signs(pipe, slices, range(6), batch_size=6, guidance_scale=2.0, strength=0.4, num_inference_steps=10)
    assert sizes == {group.size for group in pipe.windows(pipe.prepare_images(slices.images))} == {(6, 8)}


def test_settings_that_cost_too_much_are_not_computed(pipe, record_calls):
    slices, calls = Slices(), record_calls(pipe)
    maps = ["counterfactual", "reconstruction", "forward"]
    points = sweep(pipe, slices, range(1, 6), [2.0], [0.2, 0.4], maps, 10, max_evaluations=8)
    # 2 of 10 steps cost 2 to encode and 4 to decode, 2 more for a reconstruction; forward costs 4, and 8 for 4 steps
    found = {(p.strength, p.map): p.network_evaluations for p in points}
    assert found == {(0.2, maps[0]): 6, (0.2, maps[1]): 8, (0.2, maps[2]): 4, (0.4, maps[2]): 8}
    assert sum(len(call.sample) for call in calls) == 5 * (8 + 8)
    assert not sweep(pipe, slices, range(1, 6), [2.0], [0.2], maps, 10, max_evaluations=3)


def test_slices_are_spread_evenly():
    assert evenly_spread(10, 4) == [0, 3, 6, 9]
    assert evenly_spread(3, 256) == [0, 1, 2]
    assert np.unique(evenly_spread(765, 256)).size == 256
