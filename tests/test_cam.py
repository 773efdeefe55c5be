import pytest
import torch
from torch import nn
from torch.nn import functional
from trivial_phantom import train_briefly, trivial_auprc, trivial_batch, trivial_slices

from diffusers_cf.baselines.cam import ClassActivationMap


def tiny_cam(**changes):
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "image_size": 16, "embedding_size": 16, "hidden_sizes": (32,), "depths": (2,)}
    return ClassActivationMap(**(sizes | changes))


def constant_cam(bias_difference):
    """A classifier that looks at nothing: the difference of its logits is that of its biases."""
    method = tiny_cam()
    head = method.resnet.classifier[-1]
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.5, 0.5 + bias_difference])
    return method


@pytest.mark.parametrize("stages", [{}, {"hidden_sizes": (16, 24), "depths": (1, 1)}])
def test_mean_of_the_map_plus_bias_is_the_difference_of_the_logits(stages):
    method, images = tiny_cam(**stages).eval(), trivial_slices(5, 0, True)[0]
    method.resnet.classifier[-1].bias.data = torch.tensor([0.3, -1.1])
    logits = method.resnet(images).logits
    means = method.activation_map(images).mean((1, 2)) + method.bias_difference
    torch.testing.assert_close(means, logits[:, 1] - logits[:, 0])
    assert means.std() > 1e-4


def test_map_has_a_quarter_of_the_side_and_half_of_it_with_each_further_stage():
    images = torch.rand(2, 1, 32, 32)
    assert tiny_cam(image_size=32).activation_map(images).shape == (2, 8, 8)
    two = tiny_cam(image_size=32, hidden_sizes=(16, 24), depths=(1, 1))
    assert two.activation_map(images).shape == (2, 4, 4)


@pytest.mark.parametrize("bias_difference", [-30.0, -2.0, 0.0, 2.0, 30.0])
def test_maps_are_minus_log_p_healthy_in_the_foreground(bias_difference):
    method, images = constant_cam(bias_difference), trivial_slices(2, 0, True)[0]
    p_unhealthy = torch.tensor(bias_difference, dtype=torch.float64).sigmoid()
    expected = -torch.log1p(-p_unhealthy).float() * (images[:, 0] > 0)
    torch.testing.assert_close(method.anomaly_map(images), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(method.slice_score(images), p_unhealthy.float().repeat(2))


def test_maps_keep_the_order_of_negative_evidence_above_the_background():
    method, images = tiny_cam().eval(), trivial_slices(2, 0, True)[0]
    method.resnet.classifier[-1].bias.data = torch.tensor([20.0, 0.0])
    maps, tissue = method.anomaly_map(images), images[:, 0] > 0
    with torch.no_grad():
        evidence = functional.interpolate(method.activation_map(images)[:, None], (16, 16), mode="bilinear")[:, 0]
    assert (evidence - 20 < 0).all()
    assert (maps[tissue] > 0).all() and (maps[~tissue] == 0).all()
    ranked = maps[tissue][evidence[tissue].argsort()]
    assert (ranked.diff() >= 0).all() and ranked[-1] > 1.01 * ranked[0]


def test_slice_score_is_the_softmax_of_cut_and_resized_images():
    method, images = tiny_cam().eval(), 2 * torch.rand(3, 1, 32, 32)
    expected = method.resnet(functional.avg_pool2d(images.clamp(max=1), 2)).logits.softmax(1)[:, 1]
    torch.testing.assert_close(method.slice_score(images), expected.detach())


def test_loss_is_cross_entropy_of_healthy_against_all_others():
    method, batch = constant_cam(2.0), trivial_batch(4, 0, "all")
    batch["labels"] = torch.tensor([0, 1, 2, 7])
    ((name, loss),) = method.losses(batch, 0.0)
    p_unhealthy = torch.tensor(2.0).sigmoid()
    expected = -((1 - p_unhealthy).log() + 3 * p_unhealthy.log()) / 4
    assert name == "classifier" and method.trained_on == "all"
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(method.validation_loss(batch), expected)


def test_training_and_inference_show_the_network_the_same_range():
    method, batch = tiny_cam().eval(), trivial_batch(4, 0, "all")
    scores = method.slice_score((batch["images"] + 1) / 2)
    expected = functional.binary_cross_entropy(scores, batch["labels"].float())
    torch.testing.assert_close(method.validation_loss(batch), expected)


def test_map_of_a_slice_depends_neither_on_its_batch_nor_on_the_mode():
    method, images = tiny_cam().train(), trivial_slices(4, 0, True)[0]
    maps, scores = method.anomaly_map(images), method.slice_score(images)
    assert method.training and method.resnet.resnet.embedder.embedder.normalization.num_batches_tracked == 0
    torch.testing.assert_close(method.anomaly_map(images[:1]), maps[:1])
    torch.testing.assert_close(method.slice_score(images[:1]), scores[:1])
    torch.testing.assert_close(method.eval().anomaly_map(images), maps)


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (4, 32), (3, 64), (2, 128)])
def test_network_fits_every_size(channels, size):
    maps = ClassActivationMap(channels, size).anomaly_map(torch.rand(2, channels, 96, 96))
    assert maps.shape == (2, size, size) and not maps.requires_grad


def test_a_side_that_the_stages_do_not_divide_is_named():
    with pytest.raises(ValueError, match="image_size is 20: it must be a multiple of 8"):
        tiny_cam(image_size=20, hidden_sizes=(8, 8), depths=(1, 1))


def test_saved_model_gives_the_same_maps(tmp_path):
    method = tiny_cam()
    train_briefly(method, 4)
    method.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    images, loaded = trivial_slices(3, 0, True)[0], ClassActivationMap.from_pretrained(tmp_path)
    assert torch.equal(loaded.anomaly_map(images), method.anomaly_map(images))
    assert torch.equal(loaded.slice_score(images), method.slice_score(images))


def test_it_finds_the_square_and_the_slices_that_hold_one():
    method = train_briefly(tiny_cam(), 150)
    auprc, prevalence = trivial_auprc(method)
    assert auprc > 5 * prevalence
    healthy, sick = trivial_slices(16, 50, False)[0], trivial_slices(16, 51, True)[0]
    assert method.slice_score(sick).min() > method.slice_score(healthy).max()
