import pytest
import torch
from trivial_phantom import tiny, train_briefly, trivial_batch, trivial_slices

from diffusers_cf.baselines.vae import VAERestoration, VariationalAutoencoder, total_variation


@pytest.fixture(scope="module")
def trained():
    return train_briefly(tiny("vae"), 150)


def restored(vae, images, **changes):
    method = VAERestoration(vae)
    return method.restore(images, **method.settings | changes)


def test_negative_elbo_is_mean_squared_error_and_weighted_mean_kl_of_each_image(monkeypatch):
    vae, images = VariationalAutoencoder(1, 16, latent_dim=7, kl_weight=0.1), torch.zeros(2, 1, 16, 16)
    mean, log_variance = torch.randn(2, 7), torch.randn(2, 7)
    monkeypatch.setattr(vae, "decode", lambda code: torch.tensor([0, 0.5]).view(2, 1, 1, 1).expand(images.shape))
    code = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).mean(dim=1)
    elbo = vae.negative_elbo(images, mean, mean, log_variance)
    torch.testing.assert_close(elbo, torch.tensor([0.0, 0.25]) + 0.1 * kl)


def test_total_variation_counts_every_edge_once_in_every_channel():
    images = torch.zeros(2, 2, 6, 6)
    images[0, 0, 2:4, 2:5] = 0.5  # 2 x 3 pixels: a perimeter of 10
    images[1, 1, 3:, :] = -2.0  # one edge of 6 pixels; none at the border
    torch.testing.assert_close(total_variation(images), torch.tensor([5.0, 12.0]))


def test_training_draws_the_code_from_the_posterior_by_the_noise_of_the_batch():
    vae, batch = VariationalAutoencoder(1, 16, base_channels=4, latent_dim=8).eval(), trivial_batch(4, 0, "healthy")
    images = (batch["images"] + 1) / 2
    mean, log_variance = vae.encode(images)
    code = mean + torch.exp(log_variance).sqrt() * batch["noise"].reshape(4, -1)[:, :8]
    ((name, loss),) = vae.losses(batch, 0.0)
    torch.testing.assert_close(loss, vae.negative_elbo(images, code, mean, log_variance).mean())
    assert name in vae.optimizers() and vae.config.kl_weight == 1e-3


@torch.no_grad()
def test_the_objective_sums_over_pixels(trained):
    images, _ = trivial_slices(2, 3, True)
    changed = images.clone()
    changed[0, 0, 8, 8] += 0.5
    mean, log_variance = trained.encode(changed)
    elbo = trained.negative_elbo(changed, mean, mean, log_variance)
    # one pixel has four neighbours
    expected = 256 * elbo + 0.3 * torch.tensor([4 * 0.5, 0.0])
    torch.testing.assert_close(VAERestoration(trained).objective(changed, images, 0.3), expected)


# with a larger weight the oscillation of a fixed step outweighs what is gained
@pytest.mark.parametrize("tv_weight", [0.0, 0.05, 0.1])
@torch.no_grad()
def test_restoration_lowers_its_objective_of_every_image(trained, tv_weight):
    images, _ = trivial_slices(6, 3, True)
    objective, changed = VAERestoration(trained).objective, restored(trained, images, tv_weight=tv_weight)
    assert (objective(changed, images, tv_weight) < 0.9 * objective(images, images, tv_weight)).all()


def test_a_step_goes_down_the_gradient_by_its_size(trained):
    images, _ = trivial_slices(1, 3, True)
    shift = torch.zeros_like(images)
    shift[0, 0, 8, 8] = 1e-2
    ends = [VAERestoration(trained).objective(images + s * shift, images, 0.0).item() for s in (1, -1)]
    change = (restored(trained, images, num_steps=1, step_size=0.05, tv_weight=0.2) - images)[0, 0, 8, 8]
    assert change.item() == pytest.approx(-0.05 * (ends[0] - ends[1]) / 2e-2, rel=0.05)


def test_choose_takes_the_candidate_that_changes_healthy_slices_least(trained):
    images, _ = trivial_slices(12, 11, False)
    method = VAERestoration(trained)
    method.candidates = [c | {"num_steps": 25, "step_size": 0.02} for c in method.candidates]
    # batches of unequal size: every slice counts the same
    chosen = method.choose(iter([images[:2], images[2:]]))
    changes = [restored(trained, images, **candidate) - images for candidate in method.candidates]
    expected = [change.abs().mean().item() for change in changes]
    assert chosen["scores"] == pytest.approx(expected, rel=1e-2)
    assert chosen["settings"] == method.candidates[expected.index(min(expected))]
    assert max(expected) > 1.5 * min(expected)
