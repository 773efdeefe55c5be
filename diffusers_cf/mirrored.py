"""What makes encoding and decoding mirror images: one grid of timesteps, one schedule and one normalisation."""

import inspect

import torch
from diffusers import DDIMInverseScheduler, SchedulerMixin


# What training, encoding and decoding share: the noise of each timestep, and what of it the network predicts.
NOISE_LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
NOISE_LEVELS += ("rescale_betas_zero_snr",)
# What two schedulers must share for decoding to undo encoding.
_MIRRORED = (*NOISE_LEVELS, "set_alpha_to_one")
# What they must share besides where the clean image is normalised or clipped, and what stock ones do that have no option.
_CLIPPING = ("clip_sample_range", "threshold_clean_sample", "use_clipped_model_output")
_THRESHOLDING = ("dynamic_thresholding_ratio", "threshold_per_channel", "sample_max_value", *_CLIPPING[1:])
_STOCK = {"threshold_per_channel": False, "threshold_clean_sample": True, "use_clipped_model_output": False}


def check_mirrored(scheduler: SchedulerMixin, inverse_scheduler: SchedulerMixin) -> None:
    """Raises ValueError unless the two, with their timesteps set, walk the same path in opposite directions.

    Args:
        scheduler ([`SchedulerMixin`]): for decoding, ours or a stock one.
        inverse_scheduler ([`SchedulerMixin`]): for encoding, ours or the stock `DDIMInverseScheduler`.
    """
    if not isinstance(inverse_scheduler, DDIMInverseScheduler):
        name = type(inverse_scheduler).__name__
        raise ValueError(
            f"inverse_scheduler is a {name}: only a DDIMInverseScheduler's step reaches the timestep it is told"
        )
    down, up = scheduler.config, inverse_scheduler.config
    differing = [name for name in _MIRRORED if name in down and name in up and down[name] != up[name]]
    if not torch.equal(inverse_scheduler.timesteps.flip(0), scheduler.timesteps):
        differing.append("timesteps")
    down, up = _normalization(scheduler), _normalization(inverse_scheduler)
    differing += [name for name in {**down, **up} if down.get(name) != up.get(name)]
    if differing:
        raise ValueError(
            f"scheduler and inverse_scheduler differ in {', '.join(differing)}: make one from_config of the other"
        )


def _normalization(scheduler: SchedulerMixin) -> dict[str, object]:
    """The options of Sec. 3.4 that act in a scheduler; `from_config` leaves in a stock one's config what it ignores."""
    known = inspect.signature(type(scheduler).__init__).parameters
    options = _STOCK | {name: value for name, value in scheduler.config.items() if name in known}
    if options.get("thresholding"):
        names = ("thresholding", *_THRESHOLDING)
    else:
        names = ("clip_sample", *_CLIPPING) if options.get("clip_sample") else ()
    return {name: options.get(name) for name in names}
