import itertools
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import average_precision_score
from trivial_phantom import TINY, tiny, train_briefly, trivial_batch, trivial_slices

from diffusers_cf.baselines import NETWORKS, ROWS, Grid, make_baseline, network_of_data, row_of
from diffusers_cf.baselines.dae import DenoisingAutoencoder
from diffusers_cf.baselines.fanogan import FAnoGAN
from diffusers_cf.baselines.method import foreground, residual_map
from diffusers_cf.benchmark.presets import PRESETS
from diffusers_cf.errors import InputError


GRID = Grid(num_inference_steps=20, guidance_scales=(3.0,), strengths=(0.4,), classifier_scales=(30.0,))


def rebuilt(method, images):
    """What a method of reconstruction makes of images in input units."""
    if isinstance(method, DenoisingAutoencoder):
        return method.network(images)
    if isinstance(method, FAnoGAN):
        return method.generator(method.encoder(images))
    return method.decode(method.encode(images)[0])


@pytest.fixture(scope="module")
def trained():
    """Function that trains a network once."""
    networks = {}

    def get(name):
        if name not in networks:
            networks[name] = train_briefly(tiny(name), 100 if name.startswith(("cdpm", "ours", "dae")) else 150)
        return networks[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        name
        for name, row in ROWS.items()
        if row.network and not (name.startswith("ours-") or NETWORKS[row.network].teacher)
    ],
)
def test_each_row_finds_the_square(trained, row):
    images, masks = trivial_slices(24, 7, True)
    maps = row_of(row).make(trained(ROWS[row].network), GRID).anomaly_map(images).detach().float()
    assert average_precision_score(masks.numpy().ravel(), maps.numpy().ravel()) > 5 * masks.mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fanogan", "vae", "dae"])
def test_healthy_slices_are_reproduced(trained, name):
    # any constant image would find the square: tissue and, where the loss covers it, the rim show what was learned
    (images, _), method = trivial_slices(16, 99, False), trained(name)
    assert method.anomaly_map(images)[foreground(images)[:, 0] > 0].mean() < 0.045
    if name != "dae":
        assert rebuilt(method, images).detach()[..., :2, :].mean() < 0.1


@pytest.mark.parametrize("name", ["fanogan", "vae", "dae"])
def test_the_map_is_the_residual_of_one_reconstruction(name):
    method, images = tiny(name).eval(), trivial_slices(3, 3, True)[0]
    expected = residual_map(images, rebuilt(method, images).detach())
    torch.testing.assert_close(method.anomaly_map(images), expected)
    torch.testing.assert_close(method.anomaly_map(2 * images), method.anomaly_map((2 * images).clamp(max=1)))
    assert method.network_evaluations_per_slice == 1


@pytest.mark.parametrize("name", TINY)
def test_a_saved_network_gives_equal_maps(tmp_path, name):
    method, images = train_briefly(tiny(name), 2), trivial_slices(3, 5, True)[0]
    method.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(type(method).from_pretrained(tmp_path).anomaly_map(images), method.anomaly_map(images))


@pytest.mark.parametrize("row", [*TINY, "vae-restoration"])
def test_a_map_depends_neither_on_its_batch_nor_on_the_mode(row):
    network, images = tiny(ROWS[row].network).train(), trivial_slices(4, 3, True)[0]
    method, given = row_of(row).make(network, replace(GRID, restoration_steps=5)), images.clone()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    maps = method.anomaly_map(images)
    assert maps.shape == (4, 16, 16) and not maps.requires_grad and network.training
    assert torch.equal(images, given) and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    torch.testing.assert_close(method.anomaly_map(images[:1]), maps[:1], atol=1e-5, rtol=1e-4)
    network.eval()
    torch.testing.assert_close(method.anomaly_map(images), maps)


@pytest.mark.parametrize("name", TINY)
def test_the_validation_loss_is_the_first_of_the_last_step_in_evaluation_mode(name):
    method = tiny(name).train()
    batch = trivial_batch(4, 0, method.trained_on)
    loss = method.validation_loss(batch)
    assert not loss.requires_grad and method.training
    torch.testing.assert_close(loss, next(method.eval().losses(batch, 1.0))[1].detach())


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 64), (2, 128)])
@pytest.mark.parametrize("name", TINY)
def test_a_network_fits_images_of_any_size(name, channels, size):
    method = NETWORKS[name].cls(num_channels=channels, image_size=size)
    assert method.anomaly_map(torch.rand(2, channels, 96, 96)).shape == (2, size, size)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fanogan", {"image_size": 48}, "image_size is 48: it must be a power of two, at least 8"),
        ("fanogan", {"image_size": 4}, "image_size is 4"),
        ("fanogan", {"num_channels": 1, "image_size": 16, "latent_dim": 129}, "latent_dim is 129"),
        ("vae", {"image_size": 48}, "image_size is 48: it must be 4 times a power of two"),
        ("vae", {"image_size": 4}, "image_size is 4"),
        ("vae", {"num_channels": 1, "image_size": 8, "latent_dim": 65}, "latent_dim is 65"),
    ],
)
def test_a_size_that_does_not_fit_is_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS[name].cls(**arguments)


def test_the_residual_is_the_mean_over_channels_in_the_foreground():
    images = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.4, 0.5]]).reshape(1, 2, 1, 3)
    restored = images + torch.tensor([[9.0, 0.2, -0.1], [9.0, 0.0, 0.3]]).reshape(1, 2, 1, 3)
    torch.testing.assert_close(residual_map(images, restored), torch.tensor([[[0.0, 0.1, 0.2]]]))


CLIPPED = {"thresholding": False, "clip_sample": True}
UNCLIPPED = {"thresholding": False, "clip_sample": False}
DYNAMIC = {"thresholding": True, "use_clipped_model_output": True}
RAW = {"thresholding": True, "use_clipped_model_output": False}


@pytest.mark.parametrize(
    ("row", "scale", "kind", "both", "encoding"),
    [
        ("cdpm-healthy", 0.0, "counterfactual", CLIPPED, {}),
        ("cdpm-classifier", 30.0, "counterfactual", CLIPPED, {}),
        ("cdpm-adagn", 1.0, "counterfactual", CLIPPED, {}),
        ("cdpm-adagn-guided", 3.0, "counterfactual", CLIPPED, {}),
        ("ours-clipped", 3.0, "counterfactual", CLIPPED, {}),
        ("ours-unclipped", 3.0, "counterfactual", UNCLIPPED, {}),
        ("ours", 3.0, "counterfactual", DYNAMIC, {}),
        ("ours-reconstruction", 3.0, "reconstruction", DYNAMIC, {}),
        ("forward-map", 3.0, "forward", DYNAMIC, {}),
        ("ours-raw-epsilon", 3.0, "counterfactual", RAW, {}),
        ("ours-fixed-point", 3.0, "counterfactual", DYNAMIC, {"num_fixed_point_iterations": 3}),
    ],
)
def test_a_diffusion_row_is_what_its_title_says(row, scale, kind, both, encoding):
    method = row_of(row).make(tiny(ROWS[row].network), GRID)
    for scheduler in (method.pipe.scheduler, method.pipe.inverse_scheduler):
        assert both.items() <= dict(scheduler.config).items()
    expected = {"num_fixed_point_iterations": 0, "solver_order": 1} | encoding
    assert expected.items() <= dict(method.pipe.inverse_scheduler.config).items()
    assert method.pipe.scheduler.config.solver_order == 1 and not method.pipe.config.crop_background
    assert {c["guidance_scale"] for c in method.candidates} == {scale}
    assert {c["map"] for c in method.candidates} == {kind} and method.settings == method.candidates[0]


@pytest.mark.parametrize("steps", [3, 500])
def test_restoration_goes_as_far_in_any_number_of_steps(steps):
    ways = [row_of("vae-restoration").make(tiny("vae"), replace(GRID, restoration_steps=n)) for n in (None, steps)]
    lengths = [[c["num_steps"] * c["step_size"] for c in way.candidates] for way in ways]
    assert lengths[0] == pytest.approx(lengths[1])
    assert {c["num_steps"] for c in ways[1].candidates} == {steps} == {ways[1].network_evaluations_per_slice}


def test_the_class_activation_map_of_every_preset_has_locations():
    for preset in PRESETS.values():
        with torch.device("meta"):
            network = network_of_data("cam", preset.size, 4, preset.image_size, ("healthy", "unhealthy"))
            images = torch.rand(1, 4, preset.image_size, preset.image_size)
            assert min(network.activation_map(images).shape[1:]) >= 4


def test_settings_of_the_grid_are_every_combination():
    grid = PRESETS["cpu"].grid
    found = [(s["strength"], s["guidance_scale"], s["num_inference_steps"]) for s in grid.settings((1.5, 3.0))]
    assert found == list(itertools.product(grid.strengths, (1.5, 3.0), [20]))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("threshold", "needs the modality flair, but the images hold t1, t2"),
        ("threshold-t1ce", "needs the modality t1ce, but the images hold t1, t2"),
        ("threshold-", "there is no method threshold-; the methods are threshold,"),
        ("treshold", "there is no method treshold; the methods are threshold,"),
        ("dae", "method dae must be trained first"),
    ],
)
def test_a_wrong_id_or_modality_is_named(method, message):
    with pytest.raises(InputError, match=message):
        make_baseline(method, ["t1", "t2"])
