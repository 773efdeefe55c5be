import math

import pytest
import torch
from trivial_phantom import tiny, trivial_batch

from diffusers_cf.baselines.dae import DenoisingAutoencoder, DenoisingUNet, WeightStandardizedConv2d, coarse_noise


def unrolled_noise(count, side=128):
    noise = torch.randn(count, 2, side, side, generator=torch.Generator().manual_seed(0))
    return noise, coarse_noise(noise, torch.zeros(count), torch.ones(count, 1, side, side))


@pytest.mark.parametrize(("side", "points"), [(128, 16), (64, 16), (32, 16), (16, 8)])
def test_noise_has_16_points_a_side_with_a_std_of_a_fifth(side, points):
    noise, coarse = unrolled_noise(2000 * 32 // side, side)
    # the corner pixel lies outside of all points and repeats the nearest one
    torch.testing.assert_close(coarse[..., 0, 0], 0.2 * noise[..., 0, 0])
    torch.testing.assert_close(coarse[..., -1, -1], 0.2 * noise[..., points - 1, points - 1])
    assert coarse[..., 0, 0].std().item() == pytest.approx(0.2, rel=0.05)


def test_noise_has_the_std_of_bilinear_interpolation_away_from_the_border():
    # along an axis the mean square of the weights (1 - t, t) is 0.664 over t = 1/16, 3/16, .., 15/16
    shares = torch.arange(1, 16, 2) / 16
    factor = ((1 - shares).square() + shares.square()).mean().item()
    assert factor == pytest.approx(0.664, abs=1e-3)
    inner = unrolled_noise(100)[1][..., 4:-4, 4:-4]
    assert inner.square().mean().sqrt().item() == pytest.approx(0.2 * factor, rel=0.02)
    assert inner.mean().item() == pytest.approx(0, abs=0.005)


def test_noise_is_rolled_by_the_shift_of_its_image_and_zero_outside_the_foreground():
    noise, mask = torch.randn(3, 2, 16, 16), (torch.rand(3, 1, 16, 16) > 0.5).float()
    still = coarse_noise(noise, torch.zeros(3), torch.ones_like(mask))
    rolled = coarse_noise(noise, torch.tensor([0.0, 37 / 256, 0.99999]), mask)
    for image, shift in enumerate([(0, 0), (2, 5), (15, 15)]):
        torch.testing.assert_close(rolled[image], still[image].roll(shift, (1, 2)) * mask[image])


def test_filters_are_standardised():
    conv = WeightStandardizedConv2d(3, 4, 3, padding=1, padding_mode="reflect")
    images, flat = torch.randn(2, 3, 8, 8), conv.weight.detach().flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    plain = torch.nn.functional.conv2d(padded, flat.view(4, 3, 3, 3), conv.bias)
    torch.testing.assert_close(conv(images), plain, atol=1e-4, rtol=1e-4)


def test_the_published_size_has_the_published_number_of_parameters():
    network = DenoisingUNet(4, (64, 128, 256, 512))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(7.7, abs=0.05)


def test_training_removes_noise_from_the_foreground():
    method, batch, seen = DenoisingAutoencoder(3, 16, (8, 16)), trivial_batch(4, 0, "healthy"), []
    batch |= {key: batch[key].repeat(1, 3, 1, 1) for key in ("images", "noise")}
    images = (batch["images"] + 1) / 2
    method.network.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    ((name, loss),) = method.losses(batch, 0.0)
    tissue = images > 0
    noise = coarse_noise(batch["noise"], batch["uniform"], tissue[:, :1].float())
    torch.testing.assert_close(seen[0], images + noise)
    torch.testing.assert_close(loss, (seen[1] - images)[tissue].square().mean())
    (group,) = method.optimizers()[name].param_groups
    assert group["amsgrad"] and group["weight_decay"] == 1e-5 and method.max_grad_norm == 0.5
    ((_, empty),) = method.losses(batch | {"images": -torch.ones_like(images)}, 0.0)
    assert empty.item() == 0


def test_the_learning_rate_falls_to_zero_once_or_in_published_cycles():
    once, published = tiny("dae"), tiny("dae", num_half_cycles=21)
    assert [once.learning_rate_factor(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    # 2100 periods; 100 are a half cycle
    for period in (0, 50, 100, 200, 1030, 2100):
        expected = (1 + math.cos(math.pi * period / 100)) / 2
        assert published.learning_rate_factor(period / 2100) == pytest.approx(expected, abs=1e-9)
