"""A tiny model folder and what tells two of them apart, for the tests of loading."""

import json

import torch
from diffusers import UNet2DConditionModel

from diffusers_cf.models import ClassTokenEncoder
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


UNET = "unet/diffusion_pytorch_model.safetensors"
FACTS = {"modalities": ["flair", "t1"], "settings": {"num_inference_steps": 4, "strength": 0.5}}
CONFIGS = {
    "model_index.json", "preprocessing.json", "unet/config.json", "class_encoder/config.json",
    "scheduler/scheduler_config.json", "inverse_scheduler/scheduler_config.json",
}  # fmt: skip
UNCONDITIONAL = {
    "class_embed_type": None, "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D", "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}  # fmt: skip


def tiny_unet(**changes) -> UNet2DConditionModel:
    """Return a network of 2 channels, 8 x 8 pixels, tokens of width 8 and a class vector of width 32."""
    config = {
        "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift", "norm_num_groups": 4, "cross_attention_dim": 8,
        "attention_head_dim": 8, "class_embed_type": "identity",
    }  # fmt: skip
    unet = UNet2DConditionModel(**config | changes)
    unet.conv_out.weight.data *= 0.3  # small outputs, so that nothing overflows
    return unet


def tiny_pipeline(seed: int = 0, channels: int = 2, class_names=("healthy", "unhealthy")):
    """The method at its smallest: 8 x 8 pixels."""
    torch.manual_seed(seed)
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    encoder = ClassTokenEncoder(class_names, num_tokens=2, token_dim=8, vector_dim=32, embedding_dim=8)
    pipe = CounterfactualDDIMPipeline(unet, encoder, DynamicDDIMScheduler(), DynamicDDIMInverseScheduler())
    pipe.preprocessing = FACTS
    return pipe


def write_model(folder, facts: dict):
    """A folder of the tiny pipeline with these facts; returns it."""
    pipe = tiny_pipeline()
    pipe.preprocessing = facts
    pipe.save_pretrained(folder)
    return folder


def fingerprint(pipe) -> dict:
    """All weights, a heatmap and the facts, as values that compare by ==."""
    torch.set_num_threads(1)  # with several, rounding depends on where in memory the weights lie
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = {f"unet.{name}": value for name, value in pipe.unet.state_dict().items()}
    weights |= {f"class_encoder.{name}": value for name, value in pipe.class_encoder.state_dict().items()}
    return {
        "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
        "heatmaps": pipe(images).heatmaps.numpy().tobytes(),
        "preprocessing": pipe.preprocessing,
    }


def load(name, **options):
    return fingerprint(CounterfactualDDIMPipeline.from_pretrained(name, **options))


def files_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
