"""The student: targets from labels, its loss, targets that move with the image, and what it learns."""

import numpy as np
import pytest
import torch
from model_files import tiny_pipeline
from training_data import MadeSlices

from diffusers_cf import CounterfactualDDIMPipeline, InputError
from diffusers_cf.baselines.combination import IntensityCombination
from diffusers_cf.baselines.method import AnomalyMethod
from diffusers_cf.baselines.student import Student, TaughtSlices, student_loss, targets_of_maps
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.evaluation.chains import RAW, choose_chain, maps_of_split
from diffusers_cf.evaluation.postprocessing import PostProcessing
from diffusers_cf.maps import student_maps
from diffusers_cf.training.batches import TrainingSlices


def test_targets_by_hand():
    """0 at the 98 % quantile of healthy slices, 1 at the 99.5 % quantile of unhealthy ones, 0 in healthy slices."""
    maps, inside = np.zeros((2, 1, 1001), np.float32), np.ones((2, 1, 1001), bool)
    maps[0], maps[1] = np.arange(1001) / 1000, np.arange(1001) / 100
    inside[1, 0, 500] = False
    targets = targets_of_maps(maps, inside, [0, 1])
    high = np.quantile(maps[1][inside[1]], 0.995)
    expected = np.clip((maps[1, 0] - 0.98) / (high - 0.98), 0, 1)
    expected[500] = 0
    np.testing.assert_allclose(targets[1, 0], expected, atol=1e-3)
    assert (targets[0] == 0).all() and targets[1, 0, 98] == 0 < targets[1, 0, 100] and targets[1, 0, 1000] == 1
    with pytest.raises(InputError, match="nothing to learn"):
        targets_of_maps(maps[::-1], inside, [0, 1])
    weak = targets_of_maps(maps[::-1].copy(), inside, [0, 1], accept_weak=True)  # the unhealthy slice scales it alone
    assert (weak[0] == 0).all() and weak[1, 0, 980] == 0 < weak[1, 0, 990] < 1 == weak[1, 0, 1000]
    assert (targets_of_maps(maps * 0, inside, [0, 1], accept_weak=True) == 0).all()


def test_the_loss_by_hand():
    logits, targets = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 0.5]]])
    found = 1 / (1 + np.exp(-np.array([0.0, 2.0])))
    entropy = -np.mean([np.log(1 - found[0]), 0.5 * np.log(found[1]) + 0.5 * np.log(1 - found[1])])
    dice = (2 * found[1] * 0.5 + 1) / ((found**2).sum() + 0.25 + 1)
    assert student_loss(logits, targets).item() == pytest.approx(entropy + 0.5 * (1 - dice), rel=1e-5)


def test_targets_move_with_the_image_and_have_no_gain():
    """The target of a picture that is its own target stays the picture, but for the gain of each channel."""
    y, x = np.mgrid[:32, :32] / 31
    pictures = torch.tensor(np.exp(-(((x - 0.6) ** 2 + (y - 0.4) ** 2) / 0.05)), dtype=torch.float32).expand(
        4, 2, 32, 32
    )
    slices = MadeSlices(pictures * 0.8, [0, 1, 0, 1])
    slices.patients = np.array(list("abcd"))
    taught = TaughtSlices(slices, pictures[:, 0].numpy() * 0.8)
    batches = TrainingSlices(taught, 0, (32, 32), random_flip=True, augment=True)
    batch = batches.collate(batches.__getitems__(list(range(8))))
    images = (batch["images"] + 1) / 2
    gains = images.amax(dim=(2, 3)) / batch["targets"].amax(dim=(1, 2))[:, None]
    torch.testing.assert_close(images, batch["targets"][:, None] * gains[:, :, None, None], rtol=1e-3, atol=1e-4)
    assert (abs(gains - 1) < 0.101).all() and gains.std() > 0.01
    plain = TrainingSlices(slices, 0, (32, 32), random_flip=True, augment=True)
    same = plain.collate(plain.__getitems__(list(range(8))))
    assert "targets" not in same and all(torch.equal(same[name], batch[name]) for name in same)


def test_a_student_learns_what_it_is_taught():
    """Squares are the target; brightness alone is not, as there are bright discs."""
    torch.manual_seed(0)
    student, generator = Student(1, 16, (8, 16), 1e-2), np.random.default_rng(0)
    (optimizer,) = student.optimizers().values()

    def batch():
        images, targets = torch.full((8, 1, 16, 16), 0.3), torch.zeros(8, 16, 16)
        for number in range(8):
            top, left = generator.integers(1, 10, 2)
            images[number, 0, top : top + 5, left : left + 5] = 0.8
            targets[number, top : top + 5, left : left + 5] = 1
        return {"images": images * 2 - 1, "targets": targets}

    for _ in range(60):
        ((name, loss),) = student.losses(batch(), 0.5)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    seen = batch()
    found = student.eval().anomaly_map((seen["images"] + 1) / 2)
    assert name == "network" and abs(found - seen["targets"]).mean() < 0.05


def test_the_pipeline_keeps_its_student(tmp_path):
    pipe, images = tiny_pipeline(), torch.rand(3, 2, 16, 16)
    images[:, :, :4] = 0
    with pytest.raises(ValueError, match="this model has no student"):
        pipe(images, map="student")
    torch.manual_seed(1)
    pipe.register_modules(student=Student(2, 8, (8, 16)).network)
    pipe.save_pretrained(tmp_path / "model")
    loaded = CounterfactualDDIMPipeline.from_pretrained(tmp_path / "model")
    out = loaded(images, map="student")
    assert out.counterfactuals is None and out.latents is None and loaded.network_evaluations(map="student") == 1
    assert torch.equal(out.heatmaps, pipe(images, map="student").heatmaps) and out.heatmaps.shape == (3, 16, 16)
    assert (out.heatmaps[:, :3] == 0).all() and (out.heatmaps[:, 8:] > 0).all()
    logits = pipe.student(images[:, :, ::2, ::2] * 0 - 1, 0).sample  # an empty image
    assert (student_maps(pipe.student, images * 0) == 0).all() and logits.shape == (3, 1, 8, 8)
    assert loaded(images, num_inference_steps=4).counterfactuals is not None  # the model still does what it did


class Bright(AnomalyMethod):
    """The second channel, minus half."""

    def anomaly_map(self, images):
        assert len(images) <= 32
        return images[:, 1] - 0.5


@pytest.fixture
def split(files):
    return SliceDataset(files / "slices", "train")


def test_maps_of_a_split_are_those_of_its_patients(split):
    maps, inside = maps_of_split(Bright(), split, PostProcessing(1, 0, clear_rim=False))
    images = split.collate(split.__getitems__(range(16)))["images"].numpy()
    assert np.array_equal(inside, (images > 0).any(axis=1))
    np.testing.assert_allclose(maps[inside], (images[:, 1] - 0.5)[inside], atol=1e-3)


def test_a_combination_is_the_root_of_the_map_times_brightness(split):
    """sqrt(max(map, 0)) max(z, 0) with z = (v - median) / (1.4826 MAD) of FLAIR in the patient's foreground."""
    method = IntensityCombination(Bright(), ["flair", "t1"])
    rows = np.flatnonzero(split.patients == split.patients[0])
    images = split.collate(split.__getitems__(rows.tolist()))["images"].numpy()
    inside, flair = (images > 0).any(axis=1), images[:, 0]
    median = np.median(flair[inside])
    z = (flair - median) / (1.4826 * np.median(abs(flair[inside] - median)))
    expected = np.sqrt(np.clip(images[:, 1] - 0.5, 0, None)) * np.clip(z, 0, None)
    found = method.anomaly_map(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-3, atol=1e-3)
    assert (found[~inside] == 0).all() and found.max() > 1


class Noisy(AnomalyMethod):
    """The truth plus noise, the same `(S, H, W)` for every patient."""

    def __init__(self, split, noise):
        self.split, self.noise, self.seen = split, noise, 0

    def anomaly_map(self, images):
        rows = range(self.seen, self.seen + len(images))
        self.seen += len(images)
        return self.split.collate(self.split.__getitems__(rows))["masks"] + self.noise.repeat(len(rows) // 8, 1, 1)


def test_validation_decides_about_the_filters(split):
    bright_slices, bright_pixels = torch.zeros(8, 16, 16), torch.zeros(8, 16, 16)
    bright_slices[::2], bright_pixels[:, ::3, ::3] = 1.2, 1.2
    chosen, counts = choose_chain(Noisy(split, torch.zeros(8, 16, 16)), split)
    assert chosen == RAW and counts[RAW].average_precision() == 1
    assert choose_chain(Noisy(split, bright_slices), split)[0].slice_sigma > 0
    found = choose_chain(Noisy(split, bright_pixels), split)[0]
    assert found.median_size > 1 and found.slice_sigma == 0
