"""How the diffusion models of the tables are trained."""

import torch
from trivial_phantom import tiny, trivial_batch

from diffusers_cf.baselines import network_of_data


def test_the_classifier_sees_as_much_noise_as_it_is_told():
    """In the middle of training it gets x_t at half of t, together with half of t."""
    network, batch, seen = tiny("cdpm-classifier"), trivial_batch(4, 0, "all"), {}
    network.classifier.register_forward_pre_hook(lambda _, given: seen.update(sample=given[0], timestep=given[1]))
    dict(network.losses(batch, 0.5))
    half = batch["timesteps"] // 2
    assert torch.equal(seen["timestep"], half)
    alphas = network.noise_scheduler.alphas_cumprod[half].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * batch["images"] + (1 - alphas).sqrt() * batch["noise"]
    torch.testing.assert_close(seen["sample"], expected)


def test_the_network_begins_with_low_timesteps_and_is_validated_on_all():
    network, batch, seen = tiny("ours"), trivial_batch(4, 0, "all"), []
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    dict(network.losses(batch, 0.0))
    network.validation_loss(batch)
    assert seen[0].max() < 200 and torch.equal(seen[0], (batch["timesteps"] * 0.2).long())
    assert torch.equal(seen[1], batch["timesteps"])
    # validation losses can be compared once all timesteps are trained
    dict(network.losses(batch, network.comparable_from))
    assert torch.equal(seen[2], batch["timesteps"])
    dict(network.losses(batch, network.comparable_from - 0.01))
    assert not torch.equal(seen[3], batch["timesteps"])
    network.register_to_config(first_timesteps=1.0)
    assert network.comparable_from == 0


def test_the_papers_recipe_has_no_weights_no_cosine_and_no_cut_input():
    with torch.device("meta"):
        paper = network_of_data("ours", "paper", 1, 64, ("healthy", "unhealthy"))
    assert [paper.learning_rate_factor(progress) for progress in (0.1, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert paper.config.snr_gamma is None and paper.clip_input is False and paper.config.first_timesteps == 1
    small = tiny("ours")
    assert small.learning_rate_factor(0.5) == 0.5 and small.clip_input is True
    small.register_to_config(snr_gamma=None, clip_input=False)
    batch = trivial_batch(4, 0, "all")
    noisy = small.noise_scheduler.add_noise(batch["images"], batch["noise"], batch["timesteps"])
    predicted = small.network(noisy, batch["timesteps"], batch["labels"])
    torch.testing.assert_close(small.validation_loss(batch), (predicted - batch["noise"]).pow(2).mean())
    guided = tiny("cdpm-classifier")
    guided.register_to_config(clip_input=False)
    assert small.pipeline().config.clip_input is guided.pipeline().config.clip_input is False
