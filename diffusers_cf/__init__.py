"""Lesion localisation from image-level labels by counterfactual diffusion (Sanchez et al. 2022)."""

import importlib


__version__ = "0.1.0"

# Public name -> module. Imported on first use, so that `diffusers-cf --help` doesn't wait for torch.
_MODULES = {
    "ClassTokenEncoder": "models",
    "CounterfactualDDIMPipeline": "pipeline_counterfactual_ddim",
    "CounterfactualOutput": "pipeline_counterfactual_ddim",
    "DynamicDDIMInverseScheduler": "schedulers",
    "DynamicDDIMScheduler": "schedulers",
    "InputError": "errors",
    "anomaly_heatmap": "maps",
    "class_token_encoder": "models",
    "counterfactual_unet": "models",
    "drop_condition": "losses",
    "dynamic_normalize": "schedulers",
    "implicit_guidance": "models",
    "noise_prediction_loss": "losses",
    "signed_heatmap": "maps",
    "unet_config": "models",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
