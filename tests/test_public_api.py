"""Public names, module paths in published models, and saved models that come back bit-equal."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

import diffusers_cf
from diffusers_cf import CounterfactualDDIMPipeline


SHORT = {"num_inference_steps": 10, "strength": 0.4}


def test_public_names():
    assert set(diffusers_cf.__all__) == {
        "ClassTokenEncoder", "CounterfactualDDIMPipeline", "CounterfactualOutput", "DynamicDDIMInverseScheduler",
        "DynamicDDIMScheduler", "InputError", "anomaly_heatmap", "class_token_encoder", "counterfactual_unet",
        "drop_condition", "dynamic_normalize", "implicit_guidance", "noise_prediction_loss", "signed_heatmap",
        "unet_config",
    }  # fmt: skip
    assert set(diffusers_cf.__all__) <= set(dir(diffusers_cf))
    assert all(getattr(diffusers_cf, name).__doc__ for name in diffusers_cf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffusers_cf.nothing  # noqa: B018


def test_arguments_of_the_pipeline():
    def names(method):
        return list(inspect.signature(method).parameters)[1:]

    assert names(CounterfactualDDIMPipeline.__call__) == [
        "images", "target", "guidance_scale", "strength", "num_inference_steps", "map", "generator", "output_type",
        "return_dict", "callback_on_step_end", "settings", "callback_on_step_end_tensor_inputs",
    ]  # fmt: skip
    assert names(CounterfactualDDIMPipeline.invert)[:3] == ["images", "strength", "num_inference_steps"]
    assert names(CounterfactualDDIMPipeline.denoise)[:5] == [
        "latents", "target", "guidance_scale", "strength", "num_inference_steps"
    ]  # fmt: skip
    assert names(CounterfactualDDIMPipeline.__init__) == [
        "unet", "class_encoder", "scheduler", "inverse_scheduler", "student", "clip_input", "crop_background"
    ]  # fmt: skip


def test_module_paths_and_configuration_in_published_models(pipe, tmp_path):
    """Published models name these module paths, so they never move."""
    pipe.save_pretrained(tmp_path)
    places = tmp_path / "model_index.json", tmp_path / "class_encoder" / "config.json"
    index, config = (json.loads(place.read_text(encoding="utf-8")) for place in places)
    del index["_diffusers_version"], config["_diffusers_version"]
    assert index == {
        "_class_name": "CounterfactualDDIMPipeline", "clip_input": True, "crop_background": False,
        "unet": ["diffusers", "UNet2DConditionModel"], "class_encoder": ["diffusers_cf.models", "ClassTokenEncoder"],
        "scheduler": ["diffusers_cf.schedulers", "DynamicDDIMScheduler"],
        "inverse_scheduler": ["diffusers_cf.schedulers", "DynamicDDIMInverseScheduler"],
    }  # fmt: skip
    assert config == {
        "_class_name": "ClassTokenEncoder", "class_names": ["healthy", "unhealthy"], "num_tokens": 2, "token_dim": 8,
        "vector_dim": 32, "embedding_dim": 8,
    }  # fmt: skip
    assert set(pipe.class_encoder.state_dict()) == {
        "embedding.weight", "to_vector.0.weight", "to_vector.0.bias", "to_vector.2.weight", "to_vector.2.bias",
        "tokens.weight",
    }  # fmt: skip


@pytest.mark.parametrize("unconditional", [False, True], ids=["conditional", "unconditional"])
def test_a_saved_model_comes_back_bit_equal(make_pipeline, images, tmp_path, unconditional):
    pipe = make_pipeline(unconditional=unconditional, dynamic_thresholding_ratio=0.9, fixed_point=1)
    pipe.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".py")]
    loaded = CounterfactualDDIMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is CounterfactualDDIMPipeline
    assert (loaded.class_encoder is None) == unconditional
    assert loaded.network_evaluations(**SHORT) == pipe.network_evaluations(**SHORT) == 4 * (3 if unconditional else 4)
    for field, value in pipe(images, **SHORT).items():
        assert torch.equal(loaded(images, **SHORT)[field], value)


def test_loading_imports_the_modules_of_components(tmp_path, pipe):
    """diffusers finds classes only in modules that are already imported."""
    pipe.save_pretrained(tmp_path)
    code = f"from diffusers_cf import CounterfactualDDIMPipeline as P; P.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
