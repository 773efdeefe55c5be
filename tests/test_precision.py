"""Half precision in the parts of a U-Net that bear it."""

import pytest
import torch
from torch import nn

from diffusers_cf import counterfactual_unet
from diffusers_cf.inference import compute_in, computing_dtype, open_pipeline
from diffusers_cf.loading import PRETRAINED


EXACT = ("conv_in", "conv_out", "time_embedding.", "down_blocks.0.", "up_blocks.3.")


@pytest.fixture
def predict():
    """`(dtype, whole) -> (pipe, function of nothing)`: the shipped network's prediction for one noisy image."""
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))

    def make(dtype: str, whole: bool = False):
        pipe = open_pipeline(str(PRETRAINED / "phantom_small"), dtype="float32" if whole else dtype)
        if whole:
            pipe.to(getattr(torch, dtype))

        @torch.no_grad()
        def prediction() -> torch.Tensor:
            return pipe.predict_noise(noise, 300, pipe.encode_classes("healthy", len(noise)))

        return pipe, prediction

    return make


def dtypes_of_outputs(unet: nn.Module, call) -> dict[str, torch.dtype]:
    """What each layer with weights returned."""
    found = {}

    def note(name: str):
        return lambda module, given, output: found.update({name: output.dtype})

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    call()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ends_finest_level_time_and_the_path_around_blocks_stay_float32(predict, dtype):
    pipe, prediction = predict(dtype)
    found = dtypes_of_outputs(pipe.unet, prediction)
    for name, output in found.items():
        stays = name.startswith(EXACT) or name.endswith("conv_shortcut")
        assert output == (torch.float32 if stays else getattr(torch, dtype)), name
    assert {getattr(torch, dtype), torch.float32} == set(found.values())
    assert prediction().dtype == torch.float32
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("conditioning", ["adagn", "unconditional"])
def test_networks_with_convolutions_between_levels(conditioning):
    unet = counterfactual_unet("small", conditioning, image_size=32).eval()
    compute_in(unet, torch.bfloat16)
    vector = None if conditioning == "unconditional" else torch.zeros(1, 192)
    tokens, image = torch.zeros(1, 4, 64), torch.ones(1, 4, 32, 32)
    found = dtypes_of_outputs(unet, lambda: unet(image, 10, tokens, class_labels=vector))
    between = [name for name in found if name.endswith("samplers.0.conv")]
    assert between and {found[name] for name in between} == {torch.float32}


def test_it_rounds_away_less_than_half_of_what_a_whole_network_in_bfloat16_does(predict):
    exact, mixed, whole = (predict(*given)[1]() for given in (("float32",), ("bfloat16",), ("bfloat16", True)))
    assert 0 < (mixed - exact).abs().mean() < (whole - exact).abs().mean() / 2


def test_float32_changes_nothing():
    unet = counterfactual_unet("small").eval()
    forward = unet.forward
    compute_in(unet, torch.float32)
    assert unet.forward == forward and computing_dtype(unet) == "float32"


def test_its_dtype_is_known_by_name():
    unet = counterfactual_unet("small").eval()
    compute_in(unet, torch.bfloat16)
    assert computing_dtype(unet) == "bfloat16" and unet.dtype == torch.float32
    assert computing_dtype(counterfactual_unet("small").half()) == "float16"


def test_it_compiles_as_one_graph(predict):
    pipe, prediction = predict("bfloat16")
    expected = prediction()
    pipe.unet.compile(fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(prediction(), expected)
