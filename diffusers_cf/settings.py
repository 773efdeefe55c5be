"""Settings of inference: what is given comes before what a model recommends, and that before the paper's."""

from collections.abc import Mapping
from numbers import Integral

import numpy as np


# Maps of a decoded counterfactual; `forward` decodes nothing (maps.py).
DECODED_MAPS = ("counterfactual", "reconstruction", "signed")
MAPS = (*DECODED_MAPS, "forward")
# Sec. 4 and the authors' code; a model folder that recommends others has them in preprocessing.json.
PAPER_SETTINGS = {
    "guidance_scale": 3.0,
    "strength": 0.75,
    "num_inference_steps": 100,
    "map": "counterfactual",
    "threshold": None,
}


NAMES = ("recommended", "paper")
# What a sweep varies, and what a threshold depends on.
MAP_SETTINGS = ("guidance_scale", "strength", "num_inference_steps", "map")


def settings_in_use(facts: Mapping, given: Mapping, name: str | None = None) -> dict:
    """Every setting of [`PAPER_SETTINGS`], checked; None stands for "not set" everywhere.

    Args:
        facts: a model's preprocessing.json: its `settings` are recommended (those unknown here are left out), its
            `paper_threshold` belongs to the paper's. A threshold goes with its map: another map has none.
        given: by the caller; comes first.
        name: where the others come from: `recommended`, the default, or `paper`.

    Raises:
        ValueError: a setting or the name is unknown, or a setting out of its range.
    """
    unknown = set(given) - set(PAPER_SETTINGS)
    if unknown:
        raise ValueError(f"setting {unknown.pop()!r} is unknown: it must be one of {', '.join(PAPER_SETTINGS)}")
    if name not in (None, *NAMES):
        raise ValueError(f"settings is {name!r}: it must be one of {', '.join(NAMES)}")
    chosen = {"threshold": facts.get("paper_threshold")} if name == "paper" else facts.get("settings", {})
    settings = dict(PAPER_SETTINGS)
    if given.get("map") not in (None, chosen.get("map") or settings["map"]):
        chosen = {**chosen, "threshold": None}  # each map has a scale of its own
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
