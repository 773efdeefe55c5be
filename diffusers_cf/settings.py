"""Settings of inference: given by the caller, else recommended by the model, else those of the paper."""

from collections.abc import Mapping
from numbers import Integral

import numpy as np


# Maps of a decoded counterfactual; the others decode nothing, see maps.py.
DECODED_MAPS = ("counterfactual", "reconstruction", "signed")
COMPARED_MAPS = ("forward", "delta")  # of two conditions at the same noise
MAPS = (*DECODED_MAPS, *COMPARED_MAPS, "student")
# Sec. 4 and the authors' code. A model folder recommends others in its preprocessing.json.
PAPER_SETTINGS = {
    "guidance_scale": 3.0,
    "strength": 0.75,
    "num_inference_steps": 100,
    "map": "counterfactual",
    "threshold": None,
}
NAMES = ("recommended", "paper")
# The settings that a sweep varies and a threshold depends on.
MAP_SETTINGS = ("guidance_scale", "strength", "num_inference_steps", "map")


def settings_in_use(facts: Mapping, given: Mapping, name: str | None = None) -> dict:
    """Return every setting of [`PAPER_SETTINGS`], checked. None means "not set" everywhere.

    Args:
        facts (`Mapping`): a model's preprocessing.json. Its `settings` are the recommended ones, without unknown names;
            its `paper_threshold` belongs to the paper's settings. A threshold holds for its own map only.
        given (`Mapping`): settings of the caller, which come first.
        name (`str`, *optional*): source of the other settings, `recommended` or `paper`; None means `recommended`.

    Raises:
        ValueError: a setting or the name is unknown, or a setting is out of range.
    """
    if unknown := set(given) - set(PAPER_SETTINGS):
        raise ValueError(f"setting {unknown.pop()!r} is unknown: it must be one of {', '.join(PAPER_SETTINGS)}")
    if name not in (None, *NAMES):
        raise ValueError(f"settings is {name!r}: it must be one of {', '.join(NAMES)}")
    chosen = {"threshold": facts.get("paper_threshold")} if name == "paper" else facts.get("settings", {})
    settings = dict(PAPER_SETTINGS)
    if given.get("map") not in (None, chosen.get("map") or settings["map"]):
        chosen = {**chosen, "threshold": None}  # each map has its own range of values
    for source in (chosen, given):
        settings |= {k: v for k, v in source.items() if k in PAPER_SETTINGS and v is not None}
    steps = settings["num_inference_steps"]
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"num_inference_steps is {steps!r}: it must be a whole number, 1 or more")
    if settings["map"] not in MAPS:
        raise ValueError(f"map is {settings['map']!r}: it must be one of {', '.join(MAPS)}")
    if not 0 <= settings["strength"] <= 1:
        raise ValueError(f"strength is {settings['strength']}: it must lie in [0, 1]")
    if not (np.isfinite(settings["guidance_scale"]) and settings["guidance_scale"] >= 0):
        raise ValueError(f"guidance_scale is {settings['guidance_scale']}: it must be 0 or more")
    return settings
