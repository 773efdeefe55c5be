import pytest
import torch
from torch import nn
from torch.nn import functional
from trivial_phantom import training_step, trivial_batch, trivial_slices

from diffusers_cf.baselines.fanogan import FAnoGAN, gradient_penalty


def tiny_fanogan(**changes):
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "image_size": 16, "block_out_channels": (8, 16, 16), "latent_dim": 32}
    return FAnoGAN(**(sizes | changes))


def random_pair(n=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 4, 4, generator=generator), torch.randn(n, 2, 4, 4, generator=generator)


def test_penalty_of_a_linear_critic_is_that_of_its_norm():
    # D(x) = <w, x> has the gradient w everywhere: (||w|| - 1)^2, with the derivative 2 (||w|| - 1) w / ||w||
    real, fake = random_pair()
    weight = torch.linspace(-1, 2, 32).view(2, 4, 4).requires_grad_()
    penalty = gradient_penalty(lambda x: (x * weight).sum((1, 2, 3)), real, fake, torch.tensor([0.0, 0.3, 1.0]))
    norm = weight.detach().norm()
    torch.testing.assert_close(penalty, (norm - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * (norm - 1) * weight.detach() / norm)


def test_penalty_is_taken_between_real_and_fake_sample_by_sample():
    # D(x) = ||x||^2 / 2 has the gradient x: the penalty shows the point at which it was taken
    real, fake = random_pair()
    points = torch.stack([fake[0], 0.25 * real[1] + 0.75 * fake[1], real[2]])
    expected = (points.flatten(1).norm(dim=1) - 1).square().mean()
    mix = torch.tensor([0.0, 0.25, 1.0])
    penalty = gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, mix)
    torch.testing.assert_close(penalty, expected)


class MeanCritic(nn.Module):
    """D(x) = 2 mean(x) over 256 pixels: the gradient's norm is 2 / 16."""

    def forward(self, images):
        return 2 * images.flatten(1).mean(dim=1, keepdim=True)


def test_adversarial_losses_are_those_of_wgan_gp():
    method, images, latents = tiny_fanogan(), torch.full((4, 1, 16, 16), 0.7), torch.randn(4, 32)
    method.critic = MeanCritic()
    fake_mean = method.generator(latents).mean().detach()
    expected = 2 * fake_mean - 2 * 0.7 + 10 * (2 / 16 - 1) ** 2
    torch.testing.assert_close(method.critic_loss(images, latents, torch.rand(4)).detach(), expected)
    torch.testing.assert_close(method.generator_loss(latents).detach(), -2 * fake_mean)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.5])
def test_encoder_loss_adds_kappa_times_the_critics_features(kappa):
    method, images = tiny_fanogan(feature_weight=kappa).eval(), trivial_slices(4, 0, False)[0]
    with torch.no_grad():
        reconstruction = method.generator(method.encoder(images))
        features = functional.mse_loss(method.critic[0](reconstruction), method.critic[0](images))
        assert features > 0.001
        expected = functional.mse_loss(reconstruction, images) + kappa * features
        torch.testing.assert_close(method.encoder_loss(images), expected)


def test_stages_yield_their_own_losses_and_each_network_has_noise_of_its_own():
    method, batch, used = tiny_fanogan(encoder_from=0.5), trivial_batch(4, 0, "healthy"), []
    method.generator.register_forward_pre_hook(lambda _, given: used.append(given[0]))
    assert [name for name, _ in method.losses(batch, 0.49)] == ["critic", "generator"]
    assert torch.equal(torch.cat(used, dim=1), batch["noise"].flatten(1)[:, :64])
    assert [name for name, _ in method.losses(batch, 0.5)] == ["encoder"]


@pytest.mark.parametrize(
    ("progress", "trained", "untouched"),
    [(0.0, ["generator", "critic"], ["encoder"]), (0.9, ["encoder"], ["generator", "critic"])],
)
def test_a_stage_changes_its_own_networks_only(progress, trained, untouched):
    method = tiny_fanogan().train()

    def states():
        networks = {name: getattr(method, name).state_dict().values() for name in trained + untouched}
        return {name: [value.clone() for value in values] for name, values in networks.items()}

    before, optimizers = states(), method.optimizers()
    for seed in range(2):
        training_step(method, optimizers, trivial_batch(4, seed, "healthy"), progress)
    after = states()
    changed = [any(not torch.equal(a, b) for a, b in zip(before[n], after[n], strict=True)) for n in before]
    assert changed == [True] * len(trained) + [False] * len(untouched)
    # nothing stays frozen after a step
    assert all(p.requires_grad for p in method.parameters()) and all(m.training for m in method.modules())


def test_the_map_is_the_mean_absolute_residual_of_clipped_images_in_the_foreground():
    method = tiny_fanogan(num_channels=2)
    for parameter in method.generator[-2].parameters():
        nn.init.zeros_(parameter)  # G = sigmoid(0) = 0.5 everywhere
    images = torch.full((2, 2, 16, 16), 0.9)
    images[:, 1], images[:, :, :4], images[0, 0, 10, 10] = 0.2, 0, 3.0
    expected = torch.full((2, 16, 16), (0.4 + 0.3) / 2)
    expected[:, :4], expected[0, 10, 10] = 0, (0.5 + 0.3) / 2
    torch.testing.assert_close(method.anomaly_map(images), expected)
