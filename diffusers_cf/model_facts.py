"""Whether preprocessing.json of a model fits its network and can be used: for what segments with it and what publishes it."""

import re

from diffusers_cf.data.geometry import FIELD_MM, check_geometry
from diffusers_cf.data.intensity import normalize_of
from diffusers_cf.errors import InputError
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.settings import NAMES, check_signs


# Pixels along a side of the slices on which thresholds are chosen, as `prepare` cuts them unless told otherwise.
EVALUATION_SIZE = 128
# `segment` writes a file for each modality, and a model folder is foreign.
_FILE_NAME = re.compile(r"\w[\w.+-]*")
# Entries that are tables of facts, where they are there.
_TABLES = ("training", "settings_chosen_by", "threshold_chosen_by", "paper_threshold_chosen_by")


def usable_facts(pipe: CounterfactualDDIMPipeline, model: str, **settings) -> dict:
    """What a model takes and how it is used: `preprocessing` (modalities and geometry) and `settings`, checked.

    Args:
        pipe: The pipeline.
        model: Its name, for messages.
        **settings: As in `pipe.resolve_settings`.

    Raises:
        InputError: The model does not say what it takes, or says what its network contradicts; or a setting is out of
            range.
    """
    known, modalities = pipe.preprocessing, modalities_of(pipe, model)
    try:
        settings = pipe.resolve_settings(**settings)
        pipe.timesteps(settings["strength"], settings["num_inference_steps"])
        size = known.get("evaluation_size", max(EVALUATION_SIZE, known.get("size", 0)))
        geometry = {"size": size, "field_mm": known.get("field_mm", FIELD_MM)}
        geometry["normalize"] = normalize_of(known)
        if geometry["normalize"] == "none":
            raise ValueError(f"{model}: takes images as they are, so that no scan can be brought to its scale")
        check_geometry(**geometry)
        threshold = settings["threshold"]
        if threshold is not None and not 0 < threshold < float("inf"):
            raise ValueError(f"threshold is {threshold}: it must be above 0 and finite")
        if settings["map"] == "signed":
            check_signs(known.get("signs"), len(modalities))
    except TypeError as error:
        raise InputError(f"{model}: preprocessing.json holds a value of a wrong type ({error})") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    return {"preprocessing": {"modalities": modalities, **geometry}, "settings": settings}


def check_publishable(pipe: CounterfactualDDIMPipeline, model: str) -> None:
    """Refuses a model that nobody could use: what it recommends is checked as for use, and what its card is made of.

    Raises:
        InputError: as [`usable_facts`], or an entry is not what it must be.
    """
    facts = pipe.preprocessing
    for name in NAMES:
        usable_facts(pipe, model, settings=name)
    for name in _TABLES:
        if not isinstance(facts.get(name, {}), dict):
            raise InputError(f"{model}: `{name}` in its preprocessing.json is not a JSON object")
    if not isinstance(facts.get("settings", {}).get("postprocess", False), bool):
        raise InputError(f"{model}: `postprocess` in its preprocessing.json is neither true nor false")


def modalities_of(pipe: CounterfactualDDIMPipeline, model: str) -> list[str]:
    """The modalities that a model takes, a name for each of its channels.

    Raises:
        InputError: they are not named, or not as its network and its class encoder are.
    """
    known, channels = pipe.preprocessing, pipe.unet.config.in_channels
    modalities, classes = known.get("modalities"), known.get("class_names")
    if not (isinstance(modalities, list) and modalities and all(isinstance(name, str) for name in modalities)):
        raise InputError(f"{model}: its preprocessing.json does not name the modalities that it takes")
    if bad := [name for name in modalities if not _FILE_NAME.fullmatch(name)]:
        raise InputError(f"{model}: its modality {bad[0]!r} can't be a part of a file's name")
    if len(modalities) != channels:
        raise InputError(f"{model}: takes {channels} channels, but names the modalities {', '.join(modalities)}")
    encoder = pipe.class_encoder
    if classes is not None and encoder is not None and classes != list(encoder.config.class_names):
        raise InputError(f"{model}: its network knows the classes {list(encoder.config.class_names)}, not {classes}")
    return modalities
