"""`--compile`: the same maps from one graph, whatever the number of steps; and one line where nothing can be compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusers_cf.errors import InputError
from diffusers_cf.inference import compile_network


WALK = {"guidance_scale": 3.0, "strength": 0.6}


@pytest.fixture
def compile_with(pipe, monkeypatch):
    """Function that compiles the pipeline's network by a backend of the tests; nothing is left of it afterwards."""
    original = torch.nn.Module.compile

    def compile_network_with(backend):
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda module, **options: original(module, backend=backend, **options)
        )
        compile_network(pipe)

    limit = torch._dynamo.config.recompile_limit
    yield compile_network_with
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def test_a_compiled_network_makes_the_same_maps_and_no_new_graph_for_new_timesteps(pipe, images, compile_with):
    expected = pipe(images, num_inference_steps=10, **WALK).heatmaps
    counter = CompileCounter()
    compile_with(counter)
    torch.testing.assert_close(pipe(images, num_inference_steps=10, **WALK).heatmaps, expected, atol=1e-5, rtol=0)
    graphs = counter.frame_count
    assert graphs >= 1
    pipe(images, num_inference_steps=20, **WALK)
    assert counter.frame_count == graphs


def test_what_can_not_be_compiled_is_said_in_one_line(compile_with):
    def broken(graph, inputs):
        raise OSError("no compiler\nand many more lines")

    with pytest.raises(InputError) as caught:
        compile_with(broken)
    assert "\n" not in str(caught.value) and "--compile: the network can't be compiled on this machine" in str(
        caught.value
    )
