from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_cf import DynamicDDIMInverseScheduler, DynamicDDIMScheduler
from diffusers_cf.baselines.classifier_guidance import (
    ClassifierGuidedDDIMPipeline,
    NoisyClassifier,
    log_probability_gradient,
)
from diffusers_cf.evaluation.trajectories import heatmaps_of_settings


SHORT = {"num_inference_steps": 10, "strength": 0.4}  # 4 steps each way
MEANS, STD = torch.tensor([-0.3, 0.2], dtype=torch.float64).view(2, 1, 1, 1), 0.5
ALPHAS = DDIMScheduler().alphas_cumprod.double().view(1000, 1, 1, 1)


def noisy_marginal(label, timestep):
    """Return mean and variance of a pixel of x_t if a pixel of the class is N(MEANS[label], STD^2)."""
    alpha = ALPHAS[timestep]
    return alpha.sqrt() * MEANS[label], alpha * STD**2 + 1 - alpha


def exact_noise(sample, label, timestep):
    """Return E[eps | x_t, class]: -sqrt(1 - abar) times the score of the class's noisy marginal."""
    mean, variance = noisy_marginal(label, timestep)
    return (1 - ALPHAS[timestep]).sqrt() * (sample - mean) / variance


class ExactClassifier(ModelMixin, ConfigMixin):
    """Logits that are the exact log densities of x_t under the two classes; double precision."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, sample, timestep):
        marginals = [noisy_marginal(label, timestep) for label in (0, 1)]
        return torch.stack([(-((sample - m) ** 2) / (2 * v)).sum(dim=(1, 2, 3)) for m, v in marginals], dim=1)


class ExactUnconditionalPredictor(ModelMixin, ConfigMixin):
    """E[eps | x_t] of the even mixture of both classes: each class's own, weighted by its probability."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 2):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.classifier = [ExactClassifier()]  # in a list: not a part of the network

    def forward(self, sample, timestep, encoder_hidden_states=None, class_labels=None):
        sample = sample.double()
        probabilities = self.classifier[0](sample, timestep.expand(len(sample))).softmax(dim=1)
        parts = [p.view(-1, 1, 1, 1) * exact_noise(sample, label, timestep) for label, p in enumerate(probabilities.T)]
        return SimpleNamespace(sample=sum(parts))


@pytest.fixture
def gaussian_pipe():
    schedulers = DynamicDDIMScheduler(thresholding=False), DynamicDDIMInverseScheduler(thresholding=False)
    return ClassifierGuidedDDIMPipeline(ExactUnconditionalPredictor(), *schedulers, ExactClassifier())


@pytest.fixture
def guided_pipe(make_pipeline):
    """Untrained, with the U-Net of the plain pipeline without classes."""
    plain_pipe = make_pipeline(unconditional=True)
    classifier = NoisyClassifier(2, 8, block_out_channels=(8, 16), norm_num_groups=4).eval()
    classifier.to_logits.weight.data *= 20  # classes that matter, without training
    parts = plain_pipe.unet, plain_pipe.scheduler, plain_pipe.inverse_scheduler
    return ClassifierGuidedDDIMPipeline(*parts, classifier)


def count_calls(pipe):
    """Count the images that pass through each network of a pipeline."""
    counts = Counter()
    for name in ("unet", "classifier"):
        hook = lambda _, inputs, name=name: counts.update({name: len(inputs[0])})  # noqa: E731
        getattr(pipe, name).register_forward_pre_hook(hook)
    return counts


def noise(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_is_the_analytic_one():
    """With equal variances grad log p(0 | x) is p(1 | x) (m_0 - m_1) / v, the same for every pixel."""
    sample, timesteps, labels = noise(3, 2, 8, 8, scale=0.8), torch.tensor([300, 600, 900]), torch.tensor([0, 1, 0])
    classifier = ExactClassifier()
    gradient = log_probability_gradient(classifier, sample, timesteps, labels)
    other = classifier(sample, timesteps).softmax(dim=1)[torch.arange(3), 1 - labels]
    (first, variance), (second, _) = noisy_marginal(labels, timesteps), noisy_marginal(1 - labels, timesteps)
    expected = other.view(-1, 1, 1, 1) * (first - second) / variance
    assert ((1e-3 < other) & (other < 1 - 1e-3)).all()
    torch.testing.assert_close(gradient.double(), expected.expand(3, 2, 8, 8), rtol=1e-5, atol=1e-6)
    assert not gradient.requires_grad and classifier.unused.grad is None


@pytest.mark.parametrize("label, target", [(0, None), (0, "healthy"), (1, "unhealthy")])
@pytest.mark.parametrize("timestep", [100, 500, 900])
@pytest.mark.parametrize("scale", [0, 1, 2.5])
def test_guidance_with_exact_parts_goes_to_the_conditional_noise(gaussian_pipe, label, target, timestep, scale):
    """Bayes: score of x_t plus grad log p(y | x_t) is the score given y. So is the noise, up to a factor."""
    sample, t = noise(3, 2, 8, 8, scale=0.7), torch.tensor(timestep)
    with torch.no_grad():
        plain = gaussian_pipe.predict_noise(sample, t, None)
        guided = gaussian_pipe.predict_guided(sample, t, None, gaussian_pipe.encode_target(target, 3), scale)
    expected = plain + scale * (exact_noise(sample, label, t) - plain)
    torch.testing.assert_close(guided.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("target", "labels"), [(None, [0, 0]), (["unhealthy", "healthy"], [1, 0])])
def test_decoding_with_exact_parts_is_that_of_the_target_class(gaussian_pipe, target, labels):
    latents, scheduler = noise(2, 2, 8, 8), DynamicDDIMScheduler(thresholding=False)
    scheduler.set_timesteps(20)
    decoded = gaussian_pipe.denoise(latents, target, guidance_scale=1, strength=1, num_inference_steps=20)
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(exact_noise(x, labels, t).float(), t, x).prev_sample
    torch.testing.assert_close(decoded, (x + 1) / 2, rtol=0, atol=1e-4)


def test_scale_0_is_the_plain_pipeline_and_encoding_always_is(guided_pipe, make_pipeline, images):
    plain_pipe = make_pipeline(unconditional=True)
    assert torch.equal(guided_pipe.invert(images, **SHORT), plain_pipe.invert(images, **SHORT))
    out, plain = (pipe(images, guidance_scale=0, **SHORT) for pipe in (guided_pipe, plain_pipe))
    assert torch.equal(out.heatmaps, plain.heatmaps)
    guided = guided_pipe(images, guidance_scale=5, **SHORT)
    assert not torch.equal(guided.heatmaps, plain.heatmaps) and not guided.counterfactuals.requires_grad
    assert all(p.grad is None for p in (*guided_pipe.classifier.parameters(), *guided_pipe.unet.parameters()))


@pytest.mark.parametrize(
    "scale, kind, evaluations",
    [(0, "counterfactual", 8), (1, "counterfactual", 12), (30, "counterfactual", 12), (30, "reconstruction", 16)],
)
def test_network_evaluations_are_those_that_happen(guided_pipe, images, scale, kind, evaluations):
    counts, settings = count_calls(guided_pipe), SHORT | {"guidance_scale": scale, "map": kind}
    guided_pipe(images, **settings)
    assert guided_pipe.network_evaluations(**settings) == evaluations == counts.total() / len(images)


def test_many_settings_share_one_encoding(guided_pipe, images):
    settings = [(0.4, scale, kind) for scale in (0.0, 40.0) for kind in ("counterfactual", "reconstruction")]
    heats = dict(heatmaps_of_settings(guided_pipe, images, settings, 10))
    for (strength, scale, kind), heat in heats.items():
        walk = {"strength": strength, "guidance_scale": scale, "map": kind, "num_inference_steps": 10}
        expected = guided_pipe(images, **walk).heatmaps
        torch.testing.assert_close(torch.from_numpy(heat), expected, rtol=1e-3, atol=1e-5)
    # without guidance the reconstruction is the counterfactual
    assert not heats[0.4, 0.0, "reconstruction"].any() and heats[0.4, 40.0, "reconstruction"].any()


def test_a_pipeline_moves_its_classifier_and_is_made_of_its_components(guided_pipe, images):
    other, walk = ClassifierGuidedDDIMPipeline(**guided_pipe.components), SHORT | {"guidance_scale": 5}
    assert torch.equal(other(images, **walk).heatmaps, guided_pipe(images, **walk).heatmaps)
    assert guided_pipe.to(torch.float64).classifier.dtype == guided_pipe.unet.dtype == torch.float64


def test_what_is_refused(guided_pipe, images):
    with pytest.raises(ValueError, match="class 'sick' is unknown"):
        guided_pipe(images, "sick", **SHORT)
    with pytest.raises(ValueError, match="target holds 1 names for 4 images"):
        guided_pipe(images, ["healthy"], **SHORT)


@pytest.mark.parametrize("side", [16, 128])
def test_each_sample_has_its_own_timestep(side):
    torch.manual_seed(0)
    classifier = NoisyClassifier(num_channels=3, image_size=side, num_classes=5).eval()
    sample, timesteps = noise(1, 3, side, side).expand(3, -1, -1, -1), torch.tensor([10, 900, 10])
    with torch.no_grad():
        first, second, third = classifier(sample, timesteps)
        alone = classifier(sample[:1], timesteps[1:2])[0]
    assert first.shape == (5,)
    torch.testing.assert_close(first, third)
    torch.testing.assert_close(second, alone)
    assert (first - second).abs().max() > 1e-3


def test_parts_that_would_give_wrong_maps_are_refused(guided_pipe):
    parts = guided_pipe.components
    with pytest.raises(ValueError, match="class_encoder and student must be None"):
        ClassifierGuidedDDIMPipeline(**parts | {"class_encoder": object()})
    scheduler = DynamicDDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'"):
        ClassifierGuidedDDIMPipeline(**parts | {"scheduler": scheduler})
