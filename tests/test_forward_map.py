"""The forward map against its closed form where each class is a Gaussian, its walk, its cost, and a trivial phantom."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from trivial_phantom import train_briefly, trivial_auprc

from diffusers_cf import (
    ClassTokenEncoder,
    CounterfactualDDIMPipeline,
    DynamicDDIMInverseScheduler,
    DynamicDDIMScheduler,
    implicit_guidance,
)
from diffusers_cf.baselines.diffusion import CounterfactualDiffusion
from diffusers_cf.baselines.forward_map import ForwardMap
from diffusers_cf.images import Windows


MEANS, STD = (-0.2, 0.3, 0.1), 0.4  # of healthy, unhealthy, null, in the network's range
GRID = [
    {"guidance_scale": scale, "strength": strength, "num_inference_steps": steps}
    for steps in (10, 20)
    for strength in (0.0, 0.2, 0.4)
    for scale in (1.0, 3.0)
]


class GaussianClassPredictor(ModelMixin, ConfigMixin):
    """The exact noise predictor of pixels from N(mean, STD^2), where the tokens of a class hold its mean."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 2):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = DDIMScheduler().alphas_cumprod

    def forward(self, sample, timestep, encoder_hidden_states=None, class_labels=None):
        alpha, mean = self.alphas_cumprod[int(timestep)], encoder_hidden_states[:, 0, 0].reshape(-1, 1, 1, 1)
        noise = (1 - alpha).sqrt() * (sample - alpha.sqrt() * mean) / (alpha * STD**2 + 1 - alpha)
        return SimpleNamespace(sample=noise)


def gaussian_pipe():
    """Pipeline of three Gaussian conditions, without normalisation."""
    encoder = ClassTokenEncoder(num_tokens=1, token_dim=1, vector_dim=1, embedding_dim=1)
    encoder.tokens.weight.data = torch.tensor(MEANS)[:, None]
    schedulers = DynamicDDIMScheduler(thresholding=False), DynamicDDIMInverseScheduler(thresholding=False)
    pipe = CounterfactualDDIMPipeline(GaussianClassPredictor(), encoder, *schedulers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_map_of_gaussian_classes_in_closed_form(images, scale):
    """The difference of the predicted noise doesn't depend on x, so neither does that of the clean images."""
    method, alphas = ForwardMap(gaussian_pipe()), DDIMScheduler().alphas_cumprod.double()
    method.settings = {"guidance_scale": scale, "strength": 0.6, "num_inference_steps": 5}
    changes = [0.0]  # the first step begins at the image itself, which has no noise to predict
    for t in (200, 400):
        nearer, alpha = alphas[t - 200], alphas[t]
        noise = (1 - alpha).sqrt() * alpha.sqrt() * (MEANS[2] - MEANS[0]) / (alpha * STD**2 + 1 - alpha)
        changes.append(((1 - nearer) / nearer).sqrt() * scale * noise)
    maps = method.anomaly_map(images)
    assert (maps[:, :2] == 0).all()
    # half: the network's range is twice as wide as the input's
    torch.testing.assert_close(maps[:, 2:], torch.full((4, 6, 8), float(sum(changes)) / 3 / 2), rtol=1e-4, atol=0)


def test_the_map_of_an_untrained_network_step_by_step(pipe, images):
    """With dynamic normalisation, and written out with the scheduler's own step."""
    inverse, total = DynamicDDIMInverseScheduler(), torch.zeros(4, 8, 8)
    inverse.set_timesteps(10)
    null, target = (pipe.class_encoder(torch.full((4,), row)) for row in (2, 0))
    x = 2 * images - 1
    with torch.no_grad():
        for t in (0, 100, 200, 300):
            a, b = (
                pipe.unet(x, t, encoder_hidden_states=tokens, class_labels=vector).sample
                for tokens, vector in (null, target)
            )
            guided = inverse.step(implicit_guidance(a, b, 3.0), t, x).pred_original_sample
            step = inverse.step(a, t, x)
            total += (step.pred_original_sample - guided).abs().mean(dim=1) / 2
            x = step.prev_sample
    method = ForwardMap(pipe)
    method.settings = {"guidance_scale": 3.0, "strength": 0.4, "num_inference_steps": 10}
    expected = total / 4 * (images > 0).any(dim=1)
    assert expected.max() > 1e-3
    torch.testing.assert_close(method.anomaly_map(images), expected, rtol=1e-4, atol=1e-6)


def test_a_walk_of_second_order_is_the_encoding_of_second_order(pipe, images, record_calls):
    pipe.inverse_scheduler = DynamicDDIMInverseScheduler(solver_order=2)
    calls, method = record_calls(pipe), ForwardMap(pipe)
    pipe.invert(images, 0.4, 10)
    encoding = list(calls)
    calls.clear()
    method.settings = {"guidance_scale": 3.0, "strength": 0.4, "num_inference_steps": 10}
    method.anomaly_map(images)
    assert [call.timestep for call in calls] == [call.timestep for call in encoding] == [0, 0, 100, 200]
    for call, encoded in zip(calls, encoding, strict=True):
        torch.testing.assert_close(call.sample, encoded.sample.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)


def test_a_stock_inverse_scheduler_is_refused(pipe):
    pipe.inverse_scheduler = DDIMInverseScheduler()
    with pytest.raises(ValueError, match="inverse_scheduler is DDIMInverseScheduler"):
        ForwardMap(pipe)


def test_the_walk_is_the_encoding_with_both_conditions_in_one_batch(pipe, images, record_calls):
    calls = record_calls(pipe)
    pipe.invert(images, 0.4, 10)
    encoding, method = list(calls), ForwardMap(pipe)
    calls.clear()
    method.settings = {"guidance_scale": 3.0, "strength": 0.4, "num_inference_steps": 10}
    method.anomaly_map(images)
    assert [call.timestep for call in calls] == [call.timestep for call in encoding] == [0, 100, 200, 300]
    for call, encoded in zip(calls, encoding, strict=True):
        torch.testing.assert_close(call.sample, encoded.sample.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    assert method.network_evaluations_per_slice == 2 * len(calls)


def test_one_walk_serves_all_candidates_of_a_grid(pipe, images, record_calls):
    calls, method = record_calls(pipe), ForwardMap(pipe)
    method.candidates = GRID
    found = list(method.maps_of_candidates(images))
    assert sorted(index for index, _ in found) == list(range(len(GRID)))
    # two branches in each call: 2 K_max passes for each of the two grids
    assert [len(call.sample) for call in calls] == [2 * len(images)] * (4 + 8)
    for index, maps in found:
        method.settings = GRID[index]
        torch.testing.assert_close(maps, method.anomaly_map(images), rtol=1e-5, atol=1e-7)
    assert len({round(maps.sum().item(), 5) for _, maps in found}) == 1 + 8  # strength 0 changes nothing


def test_empty_slices_and_margins_are_not_computed(pipe, images, record_calls):
    """Nor are conditions encoded anew at each step."""
    images[0] = 0
    calls, encoded, encode = record_calls(pipe), [], pipe.encode_classes
    pipe.encode_classes = lambda *given: encoded.append(given) or encode(*given)
    pipe.windows = lambda prepared: [Windows([1, 2], [(0, 0), (4, 4)], (4, 4)), Windows([3], [(0, 0)], (8, 8))]
    method = ForwardMap(pipe)
    method.settings = {"guidance_scale": 3.0, "strength": 0.3, "num_inference_steps": 10}
    maps = method.anomaly_map(images)
    assert [tuple(call.sample.shape) for call in calls] == [(4, 2, 4, 4)] * 3 + [(2, 2, 8, 8)] * 3
    assert len(encoded) == 2
    assert (maps[0] == 0).all() and (maps[1, 4:] == 0).all() and (maps[2, :4] == 0).all()
    assert all((maps[number] > 0).any() for number in (1, 2, 3))


def test_the_default_candidates_are_valid(pipe):
    method = ForwardMap(pipe)
    for settings in method.candidates:
        method.settings = settings
        assert method.network_evaluations_per_slice == 200 * settings["strength"]


def test_maps_have_the_size_of_the_network_and_no_graph(pipe):
    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    images[1] = 0
    method = ForwardMap(pipe)
    method.settings = {"guidance_scale": 3.0, "strength": 0.2, "num_inference_steps": 10}
    maps = method.anomaly_map(images)
    assert maps.shape == (3, 8, 8) and not maps.requires_grad
    assert (maps[1] == 0).all() and (maps[[0, 2]] > 0).all()


def test_what_is_refused(make_pipeline, pipe, images):
    with pytest.raises(ValueError, match="pipe has no class_encoder"):
        ForwardMap(make_pipeline(unconditional=True))
    method = ForwardMap(pipe)
    method.settings = {"guidance_scale": 3.0, "strength": 1.5, "num_inference_steps": 10}
    with pytest.raises(ValueError, match="strength is 1.5"):
        method.anomaly_map(images)
    with pytest.raises(ValueError, match="images has shape"):
        method.anomaly_map(images[:, :1])


def test_it_finds_the_square_of_the_trivial_phantom():
    torch.manual_seed(0)
    method = ForwardMap(train_briefly(CounterfactualDiffusion(num_channels=1, image_size=16), steps=60).pipeline())
    method.settings = {"guidance_scale": 3.0, "strength": 0.4, "num_inference_steps": 20}
    auprc, prevalence = trivial_auprc(method)
    assert auprc > 5 * prevalence
