import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from trivial_phantom import tiny, training_step, trivial_batch, trivial_slices

from diffusers_cf.baselines.fanogan import gradient_penalty


def test_penalty_is_taken_between_real_and_fake_sample_by_sample_and_trains_the_critic():
    # D(x) = a ||x||^2 / 2 has the gradient a x: the penalty shows the point at which it was taken
    (real, fake), factor = torch.randn(2, 3, 2, 4, 4), torch.tensor(0.5, requires_grad=True)
    norms = torch.stack([fake[0], 0.25 * real[1] + 0.75 * fake[1], real[2]]).flatten(1).norm(dim=1)
    mix = torch.tensor([0.0, 0.25, 1.0])
    penalty = gradient_penalty(lambda x: factor * x.square().sum((1, 2, 3)) / 2, real, fake, mix)
    torch.testing.assert_close(penalty, (factor * norms - 1).square().mean())
    penalty.backward()
    torch.testing.assert_close(factor.grad, (2 * (0.5 * norms - 1) * norms).mean())


class MeanCritic(nn.Module):
    """D(x) = 2 mean(x) over 256 pixels: the gradient's norm is 2 / 16."""

    def forward(self, images):
        return 2 * images.flatten(1).mean(dim=1, keepdim=True)


def test_adversarial_losses_are_those_of_wgan_gp():
    method, images, latents = tiny("fanogan"), torch.full((4, 1, 16, 16), 0.7), torch.randn(4, 32)
    method.critic = MeanCritic()
    fake_mean = method.generator(latents).mean().detach()
    expected = 2 * fake_mean - 2 * 0.7 + 10 * (2 / 16 - 1) ** 2
    torch.testing.assert_close(method.critic_loss(images, latents, torch.rand(4)).detach(), expected)
    torch.testing.assert_close(method.generator_loss(latents).detach(), -2 * fake_mean)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.5])
def test_encoder_loss_adds_kappa_times_the_critics_features(kappa):
    method, images = tiny("fanogan", feature_weight=kappa).eval(), trivial_slices(4, 0, False)[0]
    with torch.no_grad():
        reconstruction = method.generator(method.encoder(images))
        features = functional.mse_loss(method.critic[0](reconstruction), method.critic[0](images))
        assert features > 0.001
        expected = functional.mse_loss(reconstruction, images) + kappa * features
        torch.testing.assert_close(method.encoder_loss(images), expected)


def test_stages_yield_their_own_losses_and_each_network_has_noise_of_its_own():
    method, batch, used = tiny("fanogan", encoder_from=0.5), trivial_batch(4, 0, "healthy"), []
    method.generator.register_forward_pre_hook(lambda _, given: used.append(given[0]))
    assert [name for name, _ in method.losses(batch, 0.49)] == ["critic", "generator"]
    assert torch.equal(torch.cat(used, dim=1), batch["noise"].flatten(1)[:, :64])
    assert [name for name, _ in method.losses(batch, 0.5)] == ["encoder"]


@pytest.mark.parametrize(("progress", "trained"), [(0.0, {"generator", "critic"}), (0.9, {"encoder"})])
def test_a_stage_changes_its_own_networks_only(progress, trained):
    method = tiny("fanogan").train()
    before, optimizers = copy.deepcopy(method.state_dict()), method.optimizers()
    for seed in range(2):
        training_step(method, optimizers, trivial_batch(4, seed, "healthy"), progress)
    changed = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in changed} == trained
    # nothing stays frozen after a step
    assert all(p.requires_grad for p in method.parameters()) and all(m.training for m in method.modules())
