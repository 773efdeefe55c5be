"""Half precision in the parts of a U-Net that tolerate it, and compiled networks."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusers_cf import counterfactual_unet
from diffusers_cf.errors import InputError
from diffusers_cf.inference import compile_network, compute_in, computing_dtype, open_pipeline
from diffusers_cf.loading import PRETRAINED


FLOAT32 = ("conv_in", "conv_out", "time_embedding.", "down_blocks.0.", "up_blocks.3.")
SHORT = {"guidance_scale": 3.0, "strength": 0.6}


@pytest.fixture
def predict():
    """`(dtype, whole) -> (pipe, function)`, where the function returns the shipped network's prediction of noise.

    With `whole`, all parts of the network have the dtype.
    """
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
    """Return the dtype of each convolution's and linear layer's output in a call."""
    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda *given, name=name: found.update({name: given[-1].dtype}))
    call()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ends_finest_level_time_and_shortcuts_stay_float32(predict, dtype):
    pipe, prediction = predict(dtype)
    found = dtypes_of_outputs(pipe.unet, prediction)
    for name, output in found.items():
        stays = name.startswith(FLOAT32) or name.endswith("conv_shortcut")
        assert output == (torch.float32 if stays else getattr(torch, dtype)), name
    assert {getattr(torch, dtype), torch.float32} == set(found.values())
    assert prediction().dtype == torch.float32
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    assert computing_dtype(pipe.unet) == dtype


@pytest.mark.parametrize("conditioning", ["adagn", "unconditional"])
def test_convolutions_between_levels_stay_float32(conditioning):
    unet = counterfactual_unet("small", conditioning, image_size=32).eval()
    compute_in(unet, torch.bfloat16)
    vector = None if conditioning == "unconditional" else torch.zeros(1, 192)
    tokens, image = torch.zeros(1, 4, 64), torch.ones(1, 4, 32, 32)
    found = dtypes_of_outputs(unet, lambda: unet(image, 10, tokens, class_labels=vector))
    between = [name for name in found if name.endswith("samplers.0.conv")]
    assert between and {found[name] for name in between} == {torch.float32}


def test_the_error_is_less_than_half_of_that_of_a_whole_network_in_bfloat16(predict):
    exact, mixed, whole = (predict(*given)[1]() for given in (("float32",), ("bfloat16",), ("bfloat16", True)))
    assert 0 < (mixed - exact).abs().mean() < (whole - exact).abs().mean() / 2


def test_float32_changes_nothing():
    unet = counterfactual_unet("small").eval()
    forward = unet.forward
    compute_in(unet, torch.float32)
    assert unet.forward == forward and computing_dtype(unet) == "float32"
    assert computing_dtype(unet.half()) == "float16"


@pytest.mark.slow
def test_a_network_in_half_precision_compiles_as_one_graph(predict):
    pipe, prediction = predict("bfloat16")
    expected = prediction()
    pipe.unet.compile(fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(prediction(), expected)


@pytest.fixture
def compile_with(pipe, monkeypatch):
    """Return a function that compiles the network of `pipe` with a backend."""
    original = torch.nn.Module.compile

    def compile_network_with(backend):
        monkeypatch.setattr(nn.Module, "compile", lambda module, **given: original(module, backend=backend, **given))
        compile_network(pipe)

    limit = torch._dynamo.config.recompile_limit
    yield compile_network_with
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_network_returns_the_same_maps_and_new_timesteps_need_no_new_graph(pipe, images, compile_with):
    expected, counter = pipe(images, num_inference_steps=10, **SHORT).heatmaps, CompileCounter()
    compile_with(counter)
    found = pipe(images, num_inference_steps=10, **SHORT).heatmaps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    graphs = counter.frame_count
    assert graphs >= 1
    pipe(images, num_inference_steps=20, **SHORT)
    assert counter.frame_count == graphs


def test_a_failed_compilation_is_one_line(compile_with):
    def broken(graph, inputs):
        raise OSError("no compiler\nand many more lines")

    with pytest.raises(InputError, match="^--compile: the network can't be compiled on this machine.*$") as caught:
        compile_with(broken)
    assert "\n" not in str(caught.value)
