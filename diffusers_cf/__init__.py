"""Finding disease in images from image-level labels alone, by counterfactual diffusion (Sanchez et al. 2022)."""

__version__ = "0.1.0"

# Eager on purpose: diffusers resolves the classes named in a model folder only in modules that are already imported.
from diffusers_cf.errors import InputError
from diffusers_cf.generic_loading import register_with_diffusers
from diffusers_cf.losses import drop_condition, noise_prediction_loss
from diffusers_cf.maps import anomaly_heatmap, signed_heatmap
from diffusers_cf.models import (
    ClassTokenEncoder,
    class_token_encoder,
    counterfactual_unet,
    implicit_guidance,
    unet_config,
)
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline, CounterfactualOutput
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler, dynamic_normalize


register_with_diffusers(CounterfactualDDIMPipeline)
