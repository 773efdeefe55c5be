"""Device, number type and compilation of a network at inference."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from gaussian_data import noise
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusers_cf import counterfactual_unet
from diffusers_cf.data.phantom import FROZEN_SEED, PhantomSource
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask
from diffusers_cf.inference import (
    check_device_arguments,
    compile_network,
    compute_in,
    computes_in_bfloat16,
    computing_dtype,
    open_pipeline,
)
from diffusers_cf.loading import PRETRAINED


FLOAT32 = ("conv_in", "conv_out", "time_embedding.", "down_blocks.0.", "up_blocks.3.")
SHORT = {"guidance_scale": 3.0, "strength": 0.6}


def shipped(dtype: str):
    """Return the shipped model with a network that computes in a dtype."""
    return open_pipeline(str(PRETRAINED / "phantom_small"), dtype=dtype)


@torch.no_grad()
def prediction(pipe) -> torch.Tensor:
    return pipe.predict_noise(noise(2, 4, 64, 64), 300, pipe.encode_classes("healthy", 2))


def dtypes_of_outputs(unet: nn.Module, call) -> dict[str, torch.dtype]:
    """Return the dtype of each convolution's and linear layer's output in a call."""
    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda *given, name=name: found.update({name: given[-1].dtype}))
    call()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ends_finest_level_time_and_shortcuts_stay_float32(dtype):
    pipe = shipped(dtype)
    found = dtypes_of_outputs(pipe.unet, lambda: prediction(pipe))
    for name, output in found.items():
        stays = name.startswith(FLOAT32) or name.endswith("conv_shortcut")
        assert output == (torch.float32 if stays else getattr(torch, dtype)), name
    assert {getattr(torch, dtype), torch.float32} == set(found.values())
    assert prediction(pipe).dtype == torch.float32
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


def test_the_error_is_less_than_half_of_that_of_a_whole_network_in_bfloat16():
    pipes = shipped("float32"), shipped("bfloat16"), shipped("float32").to(torch.bfloat16)
    exact, mixed, whole = map(prediction, pipes)
    assert 0 < (mixed - exact).abs().mean() < (whole - exact).abs().mean() / 2


def test_float32_changes_nothing():
    unet = counterfactual_unet("small").eval()
    forward = unet.forward
    compute_in(unet, torch.float32)
    assert unet.forward == forward and computing_dtype(unet) == "float32"
    assert computing_dtype(unet.half()) == "float16"


@pytest.mark.slow
def test_a_network_in_half_precision_compiles_as_one_graph():
    pipe = shipped("bfloat16")
    expected = prediction(pipe)
    pipe.unet.compile(fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(prediction(pipe), expected)


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


def checked(device="cpu", dtype="auto"):
    """Return the dtype that is used for these options of the command line."""
    args = argparse.Namespace(device=device, batch_size=1, dtype=dtype)
    check_device_arguments(args)
    return args.dtype


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(device, current, monkeypatch):
    # Accelerate trains on the current GPU, whatever the command line says
    found = []
    monkeypatch.setattr("diffusers_cf.inference.torch.zeros", lambda *_, device: None)
    monkeypatch.setattr("diffusers_cf.inference.torch.cuda.set_device", found.append)
    checked(device)
    assert found == current


@pytest.mark.parametrize("features", [None, set(), {"_is_avx512_bf16_supported"}, {"_is_amx_tile_supported"}])
def test_auto_is_bfloat16_where_the_processor_computes_in_it(monkeypatch, features):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if features is None:  # a build of torch that tells nothing
            monkeypatch.delattr(torch.cpu, name)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in features)
    assert checked() == ("bfloat16" if features else "float32") and checked(dtype="float32") == "float32"


@pytest.mark.parametrize("computes", [True, False])
def test_emulated_bfloat16_is_warned_of(monkeypatch, caplog, computes):
    monkeypatch.setattr("diffusers_cf.inference.computes_in_bfloat16", lambda device: computes)
    assert checked(dtype="bfloat16") == "bfloat16"
    assert ("bfloat16 is emulated on this machine" in caplog.text) != computes


def test_a_model_in_use_is_laid_out_for_convolutions():
    weight = shipped("float32").unet.conv_in.weight
    assert weight.dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.skipif(not computes_in_bfloat16("cpu"), reason="bfloat16 is emulated here")
def test_bfloat16_finds_what_float32_finds():
    """Within one point of AUPRC in the foreground after post-processing, on three phantom patients with a lesion."""
    source = PhantomSource(FROZEN_SEED, size=64)
    patients = filter(lambda p: p.masks.any(), map(source.read, source.fixed_splits()["validation"]))
    pairs = [(patient.images[::6], patient.masks[::6]) for patient in itertools.islice(patients, 3)]
    images, masks = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    inside, scores = foreground_mask(images), []
    for dtype in ("float32", "bfloat16"):
        maps = shipped(dtype)(torch.from_numpy(images)).heatmaps
        counts = PixelCounts()
        counts.update(PostProcessing().apply(maps.float().numpy(), images)[inside], masks[inside])
        scores.append(counts.average_precision())
    assert scores[0] > 5 * masks.sum() / inside.sum()
    assert scores[1] == pytest.approx(scores[0], abs=0.01)
