"""Training batches: positions, draws and augmentation."""

import math

import numpy as np
import pytest
import torch
from training_data import MadeSlices

from diffusers_cf.errors import InputError
from diffusers_cf.training.batches import PositionBatches, TrainingSlices, augment_images


def training_slices(labels=(0, 0, 0, 1), seed=0, **options):
    images = torch.rand(len(labels), 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return TrainingSlices(MadeSlices(images, labels), seed, (8, 8), **options)


def batch_at(slices, positions):
    return slices.collate(slices.__getitems__(list(positions)))


def test_classes_come_evenly_however_rare_one_is():
    slices = training_slices([0] * 90 + [1] * 10 + [2] * 2)
    drawn = np.array([slices.index_at(position) for position in range(6000, 12_000)])
    for counts in np.split(np.bincount(drawn, minlength=102), [90, 100]):
        assert abs(counts.sum() - 2000) < 5 * math.sqrt(6000 * 2 / 9)
        expected = 2000 / len(counts)  # within a class every slice has the same chance
        assert (np.abs(counts - expected) < 5 * math.sqrt(expected)).all()


def test_positions_match_as_far_as_classes_have_slices_there():
    """Unhealthy slices in the middle third alone: within it both classes come evenly, outside it only healthy ones."""
    slices = training_slices([0, 0, 0, 1, 1, 0, 0, 0, 0] * 20)
    slices.slices.patients, slices.slices.slices = np.repeat(np.arange(20).astype(str), 9), np.tile(np.arange(9), 20)
    options = {"image_size": (8, 8), "match_positions": True}
    matched = TrainingSlices(slices.slices, 0, **options)
    drawn = np.array([matched.index_at(position) for position in range(8000)]) % 9
    counts = np.bincount(drawn, minlength=9)
    assert (abs(counts - 8000 / 9) < 5 * math.sqrt(8000 / 9)).all()  # every part of the head as often as it occurs
    part = np.minimum((np.arange(9) / 8 * 12).astype(int), 11)
    assert len(set(part)) == 9  # each position is a part of its own here


def test_the_share_of_images_that_lose_channels():
    """Each choice that leaves a channel as often as the others, and everything else stays as it is."""
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    slices, options = MadeSlices(images, [0, 1] * 20), {"image_size": (8, 8), "random_flip": True, "augment": True}
    slices.preprocessing = {"channels": 3}
    whole, dropped = (
        batch_at(TrainingSlices(slices, 0, **options, channel_dropout=share), range(3000)) for share in (0, 0.4)
    )
    is_empty = (dropped["images"] == -1).all(dim=(2, 3))
    counts = torch.bincount((is_empty * torch.tensor([1, 2, 4])).sum(dim=1), minlength=8)
    assert counts[7] == 0 and abs(counts[0] - 1800) < 5 * math.sqrt(3000 * 0.4 * 0.6)
    assert (abs(counts[1:7] - 200) < 5 * math.sqrt(200)).all()
    assert torch.equal(torch.where(is_empty[:, :, None, None], dropped["images"], whole["images"]), dropped["images"])
    assert all(torch.equal(whole[key], dropped[key]) for key in whole if key != "images")
    slices.preprocessing = {"channels": 1}
    with pytest.raises(InputError, match="^--channel_dropout: these images have one channel"):
        TrainingSlices(slices, 0, **options, channel_dropout=0.4)


def test_an_index_is_a_function_of_seed_and_position():
    positions = [0, 20_000, 5, 8191, 8192, 1, 20_000]
    walked, jumped = training_slices(range(40)), training_slices(range(40))
    in_order = {position: walked.index_at(position) for position in sorted(set(positions))}
    assert [jumped.index_at(position) for position in positions] == [in_order[position] for position in positions]
    other = training_slices(range(40), seed=1)
    assert [other.index_at(p) for p in range(50)] != [jumped.index_at(p) for p in range(50)]


def test_an_empty_split_is_refused():
    with pytest.raises(InputError, match="^made: the training split is empty$"):
        training_slices(())


def test_draws_do_not_depend_on_the_batch():
    slices = training_slices(random_flip=True, augment=True)
    whole = batch_at(slices, range(8))
    again = training_slices(random_flip=True, augment=True)
    for positions in ([5], [7, 2, 3], [0, 1, 4, 6]):
        part = batch_at(again, positions)
        assert set(part) == {"images", "labels", "noise", "timesteps", "uniform", "is_cropped"}
        for key, value in part.items():
            assert torch.equal(value, whole[key][positions]), key
    assert len({row.sum().item() for row in whole["noise"]}) == 8
    other = batch_at(training_slices(seed=1, random_flip=True, augment=True), range(8))
    assert all(not torch.equal(other[key], whole[key]) for key in ("noise", "timesteps", "uniform", "images"))


def test_noise_timesteps_and_uniform_have_their_distributions():
    batch = batch_at(training_slices(num_train_timesteps=10), range(2000))
    counts = torch.bincount(batch["timesteps"], minlength=10)
    assert len(counts) == 10 and ((counts - 200).abs() < 5 * math.sqrt(2000 * 0.09)).all()
    below = (batch["uniform"] < 0.35).sum()
    assert abs(below - 700) < 5 * math.sqrt(2000 * 0.35 * 0.65)
    n = batch["noise"].numel()
    assert abs(batch["noise"].mean()) < 5 / math.sqrt(n) and abs(batch["noise"].std() - 1) < 5 / math.sqrt(2 * n)
    # drawn from one generator, yet independent of one another and of the class
    columns = [batch[key].double() for key in ("timesteps", "uniform", "labels")] + [batch["noise"][:, 0, 0, 0]]
    assert (torch.corrcoef(torch.stack(columns)) - torch.eye(4)).abs().max() < 5 / math.sqrt(2000)
    assert batch_at(training_slices(), range(2000))["timesteps"].max() > 990


@pytest.mark.parametrize("options, peak", [({}, 1.0), ({"clip_input": False}, 2.0)])
def test_images_fill_the_range_of_the_network_and_peaks_stay_where_they_are_not_cut(options, peak):
    images = torch.tensor([0.0, 1.5]).reshape(2, 1, 1, 1).expand(2, 2, 8, 8)
    batch = batch_at(TrainingSlices(MadeSlices(images, [0, 1]), 0, (4, 4), **options), range(6))
    assert batch["images"].shape == batch["noise"].shape == (6, 2, 4, 4)
    torch.testing.assert_close(batch["images"][:, 0, 0, 0], torch.where(batch["labels"] == 0, -1.0, peak))


def positions_of(first, last, batch_size, parts, world):
    """Positions by step, of all processes and parts."""
    found = {step: [] for step in range(first, last)}
    for rank in range(world):
        sampler = PositionBatches(first, last, batch_size, parts, rank, world)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(len(batch) == batch_size for batch in batches)
        for i, batch in enumerate(batches):
            found[first + i // parts] += batch
    return {step: sorted(positions) for step, positions in found.items()}


def test_positions_are_the_same_however_a_batch_is_split():
    whole = positions_of(0, 5, 8, 1, 1)
    assert whole == {step: list(range(8 * step, 8 * step + 8)) for step in range(5)}
    for batch_size, parts, world in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)):
        assert positions_of(0, 5, batch_size, parts, world) == whole
    assert positions_of(3, 5, 2, 2, 2) == {step: whole[step] for step in (3, 4)}


def picture(height=24, width=40):
    """A block away from the centre, nothing around it: (1, 3, H, W)."""
    images = torch.zeros(1, 3, height, width)
    images[:, :, 8:14, 22:30] = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)) + 0.2
    return images


def drawn(**changes):
    draws = torch.full((1, 6 + 3), 0.5)
    names = ("flip", "rotation", "scale_y", "scale_x", "shift_y", "shift_x", "gain0", "gain1", "gain2")
    for name, value in changes.items():
        draws[:, names.index(name)] = value
    return draws


@pytest.mark.parametrize("deform", [False, True])
def test_flips(deform):
    images = picture()
    flipped = augment_images(images, drawn(flip=0.2), True, deform)
    torch.testing.assert_close(flipped, images.flip(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(augment_images(images, drawn(flip=0.7), True, deform), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(augment_images(images, drawn(flip=0.2), False, deform), images, rtol=0, atol=1e-5)


def centre_of_mass(images):
    weights = images[0, 0] / images[0, 0].sum()
    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in images.shape[-2:]), indexing="ij")
    return (weights * y).sum().item(), (weights * x).sum().item()


def test_deformations_have_the_size_that_they_say():
    images = picture(40, 40)
    # 5 % of 40 pixels
    shifted = augment_images(images, drawn(shift_x=1.0, shift_y=0.0), False, True)
    torch.testing.assert_close(shifted[..., 2:, :-2], images[..., :-2, 2:], rtol=0, atol=1e-5)
    edge = augment_images(torch.ones(1, 3, 40, 40), drawn(shift_x=1.0), False, True)
    assert (edge[..., :-2] > 0.99).all() and (edge[..., -2:] < 0.01).all()
    y, x = centre_of_mass(images)
    grown = centre_of_mass(augment_images(images, drawn(scale_x=0.0), False, True))
    assert grown == pytest.approx((y, x / 0.9), abs=0.05)
    turned = centre_of_mass(augment_images(images, drawn(rotation=1.0), False, True))
    angle = math.degrees(math.atan2(*turned) - math.atan2(y, x))
    assert abs(angle) == pytest.approx(10, abs=0.5) and math.hypot(*turned) == pytest.approx(math.hypot(y, x), abs=0.1)
    louder = augment_images(images, drawn(gain0=1.0, gain2=0.0), False, True)
    gains = torch.tensor([1.1, 1.0, 0.9])[:, None, None]
    torch.testing.assert_close(louder, images * gains, rtol=0, atol=1e-5)


def test_background_stays_zero():
    draws = torch.rand(50, 9, generator=torch.Generator().manual_seed(1))
    images = picture().expand(50, -1, -1, -1)
    moved = augment_images(images, draws, True, True)
    assert torch.equal(augment_images(images, draws, True, True), moved)
    assert moved.min() == 0 and moved.isfinite().all()
    assert (moved == 0).float().mean() > 0.85  # the block covers 5 %
    assert (moved.amax(dim=(1, 2, 3)) > 0.5).all()
    assert (augment_images(torch.zeros_like(images), draws, True, True) == 0).all()
