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
        self.folder, self.patients = "made", np.array(["a", "b", "b", "a", "b", "c"])
        self.masks[3:, 8:12, 8:12] = 1
        self.images[3:, 0, 8:12, 8:12] += 0.4
        self.images[3:, 1, 8:12, 8:12] -= 0.15

    def collate(self, rows):
        return {"images": self.images[rows], "masks": self.masks[rows], "labels": self.labels[rows]}


@pytest.mark.parametrize("map", ["counterfactual", "reconstruction", "signed", "forward", "delta"])
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


def signs_of(pipe, monkeypatch, slices, shift):
    """Learn signs from counterfactuals that differ from the reconstruction by `-shift` `(6, C)`, with some noise."""
    noise = 0.01 * torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoise(latents, target, guidance_scale, **_):
        change = -(shift[:, :, None, None] + noise)[-len(latents) :]  # the first image is empty and never decoded
        return latents + (change if guidance_scale else 0)

    monkeypatch.setattr(pipe, "denoise", denoise)
    return learn_signs(pipe, slices, range(6), 6, guidance_scale=2.0, strength=0.4, num_inference_steps=10), noise


def test_signs_are_fishers_weights_from_labels(pipe, monkeypatch):
    """The difference of the mean changes of both labels' patients over the variance of the healthy slices' pixels."""
    slices = Slices()
    slices.images[0] = slices.images[1]
    shift = torch.zeros(6, 2)
    shift[3:] = torch.tensor([[0.2, -0.1], [0.22, -0.11], [0.18, -0.09]])
    found, noise = signs_of(pipe, monkeypatch, slices, shift)
    inside = (pipe.prepare_images(slices.images) > -1).any(dim=1)
    values = [(shift[i][:, None] + noise[i][:, inside[i]]).numpy() for i in range(6)]  # (C, pixels) of each slice
    mean = np.array([part.mean(axis=1) for part in values])
    unhealthy, healthy = mean[3:].mean(axis=0), (mean[0] + (mean[1] + mean[2]) / 2) / 2  # one mean for each patient
    variance = np.mean([(part**2).mean(axis=1) for part in values[:3]], axis=0) - mean[:3].mean(axis=0) ** 2
    weights = (unhealthy - healthy) / variance
    np.testing.assert_allclose(found["signs"], weights / np.abs(weights).mean(), rtol=1e-2)
    assert found["signs"][0] > 0 > found["signs"][1] and found["t"][0] > 10


def test_a_sign_that_the_labels_do_not_tell_is_0_and_none_at_all_is_refused(pipe, monkeypatch):
    slices, shift = Slices(), torch.zeros(6, 2)
    shift[3:, 0] = torch.tensor([0.2, 0.22, 0.18])
    shift[3:, 1] = torch.tensor([0.2, -0.3, 0.15])  # patients disagree
    found, _ = signs_of(pipe, monkeypatch, slices, shift)
    assert found["signs"] == [2.0, 0.0] and abs(found["t"][1]) < 2
    shift[3:, 0] = torch.tensor([0.2, -0.3, 0.15])
    with pytest.raises(InputError, match="do not tell the sign of disease in any channel"):
        signs_of(pipe, monkeypatch, slices, shift)
    slices.patients[:] = "a"
    with pytest.raises(InputError, match="unhealthy slices of two patients, not of 1"):
        signs_of(pipe, monkeypatch, slices, shift)


def test_signs_are_learned_in_windows_with_crop_background(pipe, monkeypatch):
    slices, sizes, denoise = Slices(), set(), pipe.denoise
    slices.images[:, :, :8], slices.images[:, :, 12:] = 0, 0
    pipe.register_to_config(crop_background=True)

    def spy(latents, *args, **walk):
        sizes.add(tuple(latents.shape[-2:]))
        return denoise(latents, *args, **walk)

    monkeypatch.setattr(pipe, "denoise", spy)
    monkeypatch.setattr("diffusers_cf.evaluation.sweep.LEAST_T", 0)
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
