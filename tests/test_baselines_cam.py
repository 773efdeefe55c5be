import pytest
import torch
from torch import nn
from torch.nn import functional
from trivial_phantom import tiny, trivial_batch, trivial_slices


def constant_cam(bias_difference):
    """A classifier whose logits differ by its biases, whatever it sees."""
    method = tiny("cam")
    head = method.resnet.classifier[-1]
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.5, 0.5 + bias_difference])
    return method


@pytest.mark.parametrize(("stages", "side"), [({}, 4), ({"hidden_sizes": (16, 24), "depths": (1, 1)}, 2)])
def test_the_mean_of_the_map_is_the_difference_of_the_logits(stages, side):
    method, images = tiny("cam", **stages).eval(), trivial_slices(5, 0, True)[0]
    method.resnet.classifier[-1].bias.data = torch.tensor([0.3, -1.1])
    logits, maps = method.resnet(images).logits, method.activation_map(images)
    assert maps.shape == (5, side, side)
    torch.testing.assert_close(maps.mean((1, 2)), logits[:, 1] - logits[:, 0])
    assert maps.mean((1, 2)).std() > 1e-4


@pytest.mark.parametrize("bias_difference", [-30.0, -2.0, 0.0, 2.0, 30.0])
def test_maps_are_minus_log_p_healthy_in_the_foreground(bias_difference):
    method, images = constant_cam(bias_difference), trivial_slices(2, 0, True)[0]
    p_unhealthy = torch.tensor(bias_difference, dtype=torch.float64).sigmoid()
    expected = -torch.log1p(-p_unhealthy).float() * (images[:, 0] > 0)
    torch.testing.assert_close(method.anomaly_map(images), expected, rtol=1e-4, atol=0)


def test_maps_keep_the_order_of_negative_evidence_above_the_background():
    method, images = tiny("cam").eval(), trivial_slices(2, 0, True)[0]
    method.resnet.classifier[-1].bias.data = torch.tensor([20.0, 0.0])
    maps, tissue = method.anomaly_map(images), images[:, 0] > 0
    with torch.no_grad():
        evidence = functional.interpolate(method.activation_map(images)[:, None], (16, 16), mode="bilinear")[:, 0]
    assert (evidence < 0).all()
    assert (maps[tissue] > 0).all() and (maps[~tissue] == 0).all()
    ranked = maps[tissue][evidence[tissue].argsort()]
    assert (ranked.diff() >= 0).all() and ranked[-1] > 1.01 * ranked[0]


def test_images_are_clipped_and_resized_for_the_network():
    method, images = tiny("cam").eval(), 2 * torch.rand(3, 1, 32, 32)
    expected = method.anomaly_map(functional.avg_pool2d(images.clamp(max=1), 2))
    torch.testing.assert_close(method.anomaly_map(images), expected)


def test_the_loss_is_the_cross_entropy_of_healthy_against_all_others():
    method, batch = constant_cam(2.0), trivial_batch(4, 0, "all")
    batch["labels"] = torch.tensor([0, 1, 2, 7])
    ((name, loss),) = method.losses(batch, 0.0)
    p_unhealthy = torch.tensor(2.0).sigmoid()
    expected = -((1 - p_unhealthy).log() + 3 * p_unhealthy.log()) / 4
    assert name in method.optimizers() and method.trained_on == "all"
    torch.testing.assert_close(loss.detach(), expected)


def test_training_and_inference_show_the_network_the_same_range():
    method, batch = tiny("cam").eval(), trivial_batch(4, 0, "all")
    with torch.no_grad():
        logits = method.activation_map(method.network_input((batch["images"] + 1) / 2)).mean((1, 2))
    expected = functional.binary_cross_entropy_with_logits(logits, batch["labels"].float())
    torch.testing.assert_close(method.validation_loss(batch), expected)
