import pytest
import torch
from torch.nn import functional
from trivial_phantom import tiny, trivial_batch, trivial_slices


@pytest.mark.parametrize(("stages", "side"), [({}, 4), ({"hidden_sizes": (16, 24), "depths": (1, 1)}, 2)])
def test_the_mean_of_the_map_is_the_difference_of_the_logits(stages, side):
    method, images = tiny("cam", **stages).eval(), trivial_slices(5, 0, True)[0]
    method.resnet.classifier[-1].bias.data = torch.tensor([0.3, -1.1])
    logits, maps = method.resnet(images).logits, method.activation_map(images)
    assert maps.shape == (5, side, side)
    torch.testing.assert_close(maps.mean((1, 2)), logits[:, 1] - logits[:, 0])
    assert maps.mean((1, 2)).std() > 1e-4


@pytest.mark.parametrize("bias_difference", [-30.0, -2.0, 0.0, 2.0, 30.0])
def test_maps_are_minus_log_p_healthy_of_each_place_in_the_foreground(bias_difference):
    method, images = tiny("cam").eval(), trivial_slices(2, 0, True)[0]
    method.resnet.classifier[-1].bias.data = torch.tensor([0.5, 0.5 + bias_difference])
    maps, tissue = method.anomaly_map(images), images[:, 0] > 0
    with torch.no_grad():
        evidence = functional.interpolate(method.activation_map(images)[:, None], (16, 16), mode="bilinear")[:, 0]
    expected = -torch.log1p(-evidence.double().sigmoid()).float() * tissue
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=0)
    # negative evidence, too, keeps its order above the background
    assert (maps[tissue] > 0).all() and maps[tissue].max() > 1.002 * maps[tissue].min()


def test_images_are_clipped_and_resized_for_the_network():
    method, images = tiny("cam").eval(), 2 * torch.rand(3, 1, 32, 32)
    expected = method.anomaly_map(functional.avg_pool2d(images.clamp(max=1), 2))
    torch.testing.assert_close(method.anomaly_map(images), expected)


def test_the_loss_is_the_cross_entropy_of_healthy_against_all_others_in_the_range_of_inference():
    method, batch = tiny("cam").eval(), trivial_batch(4, 0, "all") | {"labels": torch.tensor([0, 1, 2, 7])}
    ((name, loss),) = method.losses(batch, 0.0)
    p_unhealthy = method.activation_map(method.network_input((batch["images"] + 1) / 2)).mean((1, 2)).sigmoid()
    expected = -((1 - p_unhealthy[0]).log() + p_unhealthy[1:].log().sum()) / 4
    assert name in method.optimizers() and method.trained_on == "all"
    torch.testing.assert_close(loss, expected)
