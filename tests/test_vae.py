import pytest
import torch
from trivial_phantom import train_briefly, trivial_auprc, trivial_batch, trivial_slices

from diffusers_cf.baselines.method import residual_map
from diffusers_cf.baselines.vae import (
    VAERestoration,
    VariationalAutoencoder,
    kl_divergence,
    negative_elbo,
    restoration_objective,
    total_variation,
)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return train_briefly(VariationalAutoencoder(num_channels=1, image_size=16, base_channels=16), 150)


def restoration(vae, **settings):
    method = VAERestoration(vae)
    method.settings |= settings
    return method


def test_kl_is_that_of_two_gaussians():
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    code = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_negative_elbo_is_mean_squared_error_and_weighted_mean_kl_of_each_image():
    images, code = torch.zeros(2, 3, 4, 4), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    reconstructions = images.clone()
    reconstructions[1] = 0.5
    # KL of N(mu, 1) is mu^2 / 2: 0.5 and 4.5 for the first image, none for the second
    elbo = negative_elbo(images, reconstructions, code, torch.zeros(2, 2), kl_weight=0.1)
    torch.testing.assert_close(elbo, torch.tensor([0.1 * 2.5, 0.25]))


def test_total_variation_counts_every_edge_once_in_every_channel():
    images = torch.zeros(2, 2, 6, 6)
    images[0, 0, 2:4, 2:5] = 0.5  # 2 x 3 pixels: a perimeter of 10
    images[1, 1, 3:, :] = -2.0  # one edge of 6 pixels; none at the frame
    torch.testing.assert_close(total_variation(images), torch.tensor([5.0, 12.0]))


def test_residual_is_the_mean_over_channels_in_the_foreground():
    images = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.4, 0.5]]).reshape(1, 2, 1, 3)
    restored = images + torch.tensor([[9.0, 0.2, -0.1], [9.0, 0.0, 0.3]]).reshape(1, 2, 1, 3)
    torch.testing.assert_close(residual_map(images, restored), torch.tensor([[[0.0, 0.1, 0.2]]]))


@pytest.mark.parametrize(("image_size", "channels"), [(16, 2), (32, 1), (64, 4), (128, 3)])
def test_the_vae_fits_any_power_of_two_and_any_images(image_size, channels):
    vae = VariationalAutoencoder(channels, image_size, base_channels=4, latent_dim=8)
    mean, log_variance = vae.encode(torch.rand(2, channels, image_size, image_size))
    assert mean.shape == log_variance.shape == (2, 8)
    assert vae.decode(mean).shape == (2, channels, image_size, image_size)
    assert vae.anomaly_map(torch.rand(2, channels, 40, 40)).shape == (2, image_size, image_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"image_size": 48}, "image_size is 48: it must be 4 times"), ({"image_size": 4}, "image_size is 4"),
     ({"image_size": 8, "num_channels": 1, "latent_dim": 65}, "latent_dim is 65: an image has only 64 values")],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VariationalAutoencoder(**arguments)


def test_training_draws_the_code_from_the_posterior_by_the_noise_of_the_batch():
    vae = VariationalAutoencoder(1, 16, base_channels=4, latent_dim=8).eval()
    batch = trivial_batch(4, 0, "healthy")
    images = (batch["images"] + 1) / 2
    mean, log_variance = vae.encode(images)
    code = mean + torch.exp(log_variance).sqrt() * batch["noise"].reshape(4, -1)[:, :8]
    expected = (images - vae.decode(code)).square().mean() + 1e-3 * kl_divergence(mean, log_variance).mean()
    ((name, loss),) = vae.losses(batch, 0.0)
    torch.testing.assert_close(loss, expected)
    assert name in vae.optimizers()
    torch.testing.assert_close(vae.validation_loss(batch), expected.detach())


def test_reconstruction_finds_the_square(trained):
    auprc, prevalence = trivial_auprc(trained)
    assert auprc > 5 * prevalence
    # any constant would find the square; what has learned repaints healthy tissue up to its noise
    images, _ = trivial_slices(16, 99, False)
    assert trained.anomaly_map(images)[images[:, 0] > 0].mean() < 0.045
    assert trained.decode(trained.encode(images)[0]).detach()[..., :2, :].mean() < 0.1


def test_reconstruction_is_that_of_the_mean_code(trained):
    images, _ = trivial_slices(4, 3, True)
    with torch.no_grad():
        expected = residual_map(images, trained.decode(trained.encode(images)[0]))
    for _ in range(2):
        torch.testing.assert_close(trained.anomaly_map(images), expected)


@pytest.mark.parametrize("restore", [False, True])
def test_a_map_depends_neither_on_its_batch_nor_on_the_mode(trained, restore):
    images, _ = trivial_slices(6, 3, True)
    method = restoration(trained, num_steps=5, tv_weight=0.1) if restore else trained
    together = method.anomaly_map(images)
    trained.train()
    alone = torch.cat([method.anomaly_map(image[None]) for image in images])
    assert trained.training and not alone.requires_grad
    trained.eval()
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_a_saved_vae_gives_equal_maps(trained, tmp_path):
    images, _ = trivial_slices(4, 5, True)
    trained.save_pretrained(tmp_path)
    loaded = VariationalAutoencoder.from_pretrained(tmp_path)
    assert loaded.config.base_channels == 16
    assert torch.equal(loaded.anomaly_map(images), trained.anomaly_map(images))


def test_restoration_finds_the_square(trained):
    auprc, prevalence = trivial_auprc(restoration(trained, tv_weight=0.1))
    assert auprc > 5 * prevalence


@torch.no_grad()
def test_the_objective_sums_over_pixels(trained):
    images, _ = trivial_slices(2, 3, True)
    restored = images.clone()
    restored[0, 0, 8, 8] += 0.5
    mean, log_variance = trained.encode(restored)
    elbo = negative_elbo(restored, trained.decode(mean), mean, log_variance, 1e-3)
    # one pixel has four neighbours
    expected = 256 * elbo + 0.3 * torch.tensor([4 * 0.5, 0.0])
    torch.testing.assert_close(restoration_objective(trained, restored, images, 0.3), expected)


# with a larger weight the jitter of a fixed step outweighs what is gained
@pytest.mark.parametrize("tv_weight", [0.0, 0.05, 0.1])
@torch.no_grad()
def test_restoration_lowers_its_objective_of_every_image(trained, tv_weight):
    images, _ = trivial_slices(6, 3, True)
    before = restoration_objective(trained, images, images, tv_weight)
    restored = restoration(trained, tv_weight=tv_weight).restore(images)
    assert (restoration_objective(trained, restored, images, tv_weight) < 0.9 * before).all()


def test_a_step_goes_down_the_gradient_by_its_size(trained):
    images, _ = trivial_slices(1, 3, True)
    pixel, shift = (0, 0, 8, 8), 1e-2
    method = restoration(trained, num_steps=1, step_size=0.05)
    change = (method.restore(images) - images)[pixel]
    ends = []
    for sign in (1, -1):
        moved = images.clone()
        moved[pixel] += sign * shift
        ends.append(restoration_objective(trained, moved, images, 0.0).detach())
    slope = (ends[0] - ends[1]).item() / (2 * shift)
    assert change.item() == pytest.approx(-0.05 * slope, rel=0.05)


def test_restoration_leaves_the_weights_and_the_images_alone(trained):
    images, _ = trivial_slices(2, 3, True)
    kept, weights = images.clone(), {key: value.clone() for key, value in trained.state_dict().items()}
    trained.zero_grad()
    restoration(trained, num_steps=3).anomaly_map(images)
    assert torch.equal(images, kept)
    assert all(torch.equal(value, weights[key]) for key, value in trained.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_total_variation_makes_the_change_smoother(trained):
    images, _ = trivial_slices(4, 3, True)
    variations = []
    for weight in (0.0, 0.1):
        variations.append(total_variation(restoration(trained, tv_weight=weight).restore(images) - images))
    assert (variations[1] < 0.7 * variations[0]).all()


def test_a_step_costs_one_evaluation(trained):
    assert VAERestoration(trained).network_evaluations_per_slice == 100
    assert restoration(trained, num_steps=7).network_evaluations_per_slice == 7


def test_choose_takes_the_candidate_that_changes_healthy_slices_least(trained):
    images, _ = trivial_slices(12, 11, False)
    method = restoration(trained, num_steps=7)
    settings = dict(method.settings)
    # batches of unequal size: every slice counts the same
    chosen = method.choose(iter([images[:2], images[2:]]))
    assert method.settings == settings
    expected = []
    for candidate in method.candidates:
        restored = restoration(trained, **candidate).restore(images)
        expected.append((images - restored).abs().mean().item())
    assert chosen["scores"] == pytest.approx(expected, rel=1e-2)
    assert chosen["settings"] == method.candidates[expected.index(min(expected))]
    assert max(expected) > 1.5 * min(expected)


def test_choose_needs_slices(trained):
    with pytest.raises(ValueError, match="images_batches is empty"):
        VAERestoration(trained).choose([])
