"""Settings of inference: what is given comes before what a model recommends, and that before the paper's."""

from collections.abc import Mapping

import numpy as np

from diffusers_cf.heatmaps import MAPS


# Sec. 4 and the authors' code; a model folder that recommends others has them in preprocessing.json.
PAPER_SETTINGS = {
    "guidance_scale": 3.0,
    "strength": 0.75,
    "num_inference_steps": 100,
    "map": "counterfactual",
    "threshold": None,
}


def settings_in_use(recommended: Mapping, given: Mapping) -> dict:
    """Every setting of [`PAPER_SETTINGS`], checked; None stands for "not set" in both arguments.

    Args:
        recommended: by a model, from its preprocessing.json; what is unknown here is left out.
        given: by the caller.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """
    unknown = set(given) - set(PAPER_SETTINGS)
    if unknown:
        raise ValueError(f"setting {unknown.pop()!r} is unknown: it must be one of {', '.join(PAPER_SETTINGS)}")
    known = {k: v for k, v in recommended.items() if k in PAPER_SETTINGS and v is not None}
    settings = PAPER_SETTINGS | known | {k: v for k, v in given.items() if v is not None}
    if settings["map"] not in MAPS:
        raise ValueError(f"map is {settings['map']!r}: it must be one of {', '.join(MAPS)}")
    if not 0 <= settings["strength"] <= 1:
        raise ValueError(f"strength is {settings['strength']}: it must lie in [0, 1]")
    if not (np.isfinite(settings["guidance_scale"]) and settings["guidance_scale"] >= 0):
        raise ValueError(f"guidance_scale is {settings['guidance_scale']}: it must be 0 or more")
    return settings
