import pytest
import torch
from torch import nn
from torch.nn import functional
from trivial_phantom import train_briefly, trivial_auprc, trivial_batch, trivial_slices

from diffusers_cf.baselines.fanogan import FAnoGAN, frozen, gradient_penalty
from diffusers_cf.baselines.method import foreground
from diffusers_cf.baselines.training import training_step


def tiny_fanogan(**changes):
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "image_size": 16, "block_out_channels": (8, 16, 16), "latent_dim": 32}
    return FAnoGAN(**(sizes | changes))


def state_of(*modules):
    return [value.clone() for module in modules for value in module.state_dict().values()]


def equal_states(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def random_pair(n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
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
    mix = torch.tensor([0.0, 0.25, 1.0])
    points = torch.stack([fake[0], 0.25 * real[1] + 0.75 * fake[1], real[2]])
    expected = (points.flatten(1).norm(dim=1) - 1).square().mean()
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
        expected = functional.mse_loss(reconstruction, images) + kappa * features
        assert features > 0.001
        torch.testing.assert_close(method.encoder_loss(images), expected)
        torch.testing.assert_close(method.validation_loss({"images": images * 2 - 1}), expected)


def test_stages_yield_their_own_losses():
    method, batch = tiny_fanogan(critic_steps=3, encoder_from=0.5), trivial_batch(4, 0, "healthy")
    used, latents = [], method.latents
    method.latents = lambda batch, draw: used.append(draw) or latents(batch, draw)
    assert [name for name, _ in method.losses(batch, 0.49)] == ["critic"] * 3 + ["generator"]
    assert used == [0, 1, 2, 3]
    assert [name for name, _ in method.losses(batch, 0.5)] == ["encoder"]


def test_every_critic_step_has_noise_of_its_own():
    method, batch = tiny_fanogan(), trivial_batch(4, 0, "healthy")
    draws = [method.latents(batch, draw) for draw in range(8)]
    assert torch.equal(torch.cat(draws, dim=1), batch["noise"].flatten(1))
    assert torch.equal(method.latents(batch, 9), draws[1])  # 256 values of noise are 8 draws


@pytest.mark.parametrize(
    ("progress", "trained", "untouched"),
    [(0.0, ["generator", "critic"], ["encoder"]), (0.9, ["encoder"], ["generator", "critic"])],
)
def test_a_stage_changes_its_own_networks_only(progress, trained, untouched):
    method = tiny_fanogan().train()
    before = {name: state_of(getattr(method, name)) for name in trained + untouched}
    optimizers = method.optimizers()
    for seed in range(2):
        training_step(method, optimizers, trivial_batch(4, seed, "healthy"), progress)
    assert all(equal_states(before[name], state_of(getattr(method, name))) for name in untouched)
    assert not any(equal_states(before[name], state_of(getattr(method, name))) for name in trained)
    # nothing stays frozen behind a step
    assert all(p.requires_grad for p in method.parameters()) and all(m.training for m in method.modules())


def test_a_step_leaves_no_gradients_to_networks_that_it_does_not_train():
    method, batch = tiny_fanogan().train(), trivial_batch(4, 0, "healthy")
    method.generator_loss(method.latents(batch, 0)).backward()
    assert all(p.grad is None for p in method.critic.parameters())
    assert all(p.grad is not None for p in method.generator.parameters())
    method.zero_grad()
    method.encoder_loss(batch["images"]).backward()
    assert all(p.grad is None for m in (method.critic, method.generator) for p in m.parameters())
    assert all(p.grad is not None for p in method.encoder.parameters())


def test_frozen_gives_back_what_it_found():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).eval()
    module[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(module):
        assert not any(p.requires_grad for p in module.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert not module.training


def test_map_is_the_mean_absolute_residual_of_the_foreground():
    method = tiny_fanogan(num_channels=2).train()
    for parameter in method.generator[-2].parameters():
        nn.init.zeros_(parameter)  # G = sigmoid(0) = 0.5 everywhere
    images = torch.full((2, 2, 16, 16), 0.9)
    images[:, 1] = 0.2
    images[:, :, :4] = 0
    images[0, 0, 10, 10] = 3.0  # is cut at 1
    expected = torch.full((2, 16, 16), (0.4 + 0.3) / 2)
    expected[:, :4] = 0
    expected[0, 10, 10] = (0.5 + 0.3) / 2
    maps = method.anomaly_map(images)
    torch.testing.assert_close(maps, expected)
    assert not maps.requires_grad


def test_map_of_a_slice_depends_neither_on_its_batch_nor_on_the_mode():
    method, images = tiny_fanogan().train(), trivial_slices(4, 0, True)[0]
    maps = method.anomaly_map(images)
    torch.testing.assert_close(method.anomaly_map(images[:1]), maps[:1])
    assert method.training and method.encoder[0][1].norm1.num_batches_tracked == 0
    loss = method.validation_loss({"images": images * 2 - 1})
    torch.testing.assert_close(method.eval().anomaly_map(images), maps)
    torch.testing.assert_close(method.encoder_loss(images).detach(), loss)


def test_encoder_stays_within_the_unit_cube():
    method = tiny_fanogan().eval()
    method.encoder[1].bias.data.fill_(50.0)
    torch.testing.assert_close(method.encoder(torch.rand(2, 1, 16, 16)).detach(), torch.ones(2, 32))


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (4, 32), (3, 64), (2, 128)])
def test_networks_fit_every_size(channels, size):
    method = FAnoGAN(channels, size)
    images = torch.rand(2, channels, 96, 96)
    assert method.anomaly_map(images).shape == (2, size, size)
    assert method.critic(torch.rand(2, channels, size, size)).shape == (2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 48}, "image_size is 48: it must be a power of two, at least 8"),
        ({"image_size": 4}, "image_size is 4: it must be a power of two, at least 8"),
        ({"latent_dim": 257}, "latent_dim is 257: it must be at most 256"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_fanogan(**changes)


def test_saved_model_gives_the_same_maps(tmp_path):
    method = tiny_fanogan()
    train_briefly(method, 4)
    method.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    images = trivial_slices(3, 0, True)[0]
    assert torch.equal(FAnoGAN.from_pretrained(tmp_path).anomaly_map(images), method.anomaly_map(images))


def test_the_encoder_learns_to_invert_the_generator():
    method = tiny_fanogan(encoder_learning_rate=1e-3).train()
    latents = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).tanh()
    with torch.no_grad(), frozen(method.generator):
        batch = {"images": method.generator(4 * latents) * 2 - 1}
        spread = (batch["images"] / 2).var(dim=0).mean()  # the error of the best constant image
    optimizers = method.optimizers()
    for _ in range(120):
        training_step(method, optimizers, batch, 1.0)
    with torch.no_grad(), frozen(method):
        images = (batch["images"] + 1) / 2
        error = functional.mse_loss(method.generator(method.encoder(images)), images)
    assert error < 0.5 * spread


def test_it_finds_the_square_and_repaints_healthy_tissue():
    method = tiny_fanogan(learning_rate=1e-3, encoder_learning_rate=1e-3)
    train_briefly(method, 150)
    auprc, prevalence = trivial_auprc(method)
    assert auprc > 5 * prevalence
    # any constant image would find the square: the rim and the level of tissue show that a generator was learned
    images, _ = trivial_slices(16, 99, False)
    assert method.anomaly_map(images)[foreground(images)[:, 0] > 0].mean() < 0.045
    assert method.generator(method.encoder(images)).detach()[..., :2, :].mean() < 0.1
