"""Scores on a card: a RESULT.json of `diffusers-cf evaluate`, if it is whole."""

from collections.abc import Mapping

from diffusers_cf.errors import InputError


def checked_result(result: object, name: str) -> Mapping:
    """The result, if it holds what a card says of it.

    Args:
        result: as read from JSON.
        name: of the file, for the message.

    Raises:
        InputError: something is missing or not of its kind; the message names it.
    """
    if not isinstance(result, Mapping):
        raise InputError(f"{name}: no RESULT.json of evaluate (not a JSON object)")
    for path, good in {**_OWN, **{f"postprocessed.{path}": good for path, good in _OF_CHAIN.items()}}.items():
        value = result
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise InputError(f"{name}: no RESULT.json of evaluate (lacks {path})")
            value = value[key]
        if not good(value):
            raise InputError(f"{name}: no RESULT.json of evaluate ({path} is {str(value)[:40]!r}, which can't be)")
    return result


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _score(value: object) -> bool:
    """From 0 to 1, or None where there is nothing to measure."""
    return value is None or (_number(value) and 0 <= value <= 1)


def _interval(value: object) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_number, value)))


def _text(value: object) -> bool:
    return isinstance(value, str)


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value.values()))


# What must be there, and how it must be.
_SCORES = {"auprc": _score, "ideal_dice": _score, "slice_auroc": _score}
_OF_CHAIN = _SCORES | {
    "per_patient_dice.mean": _score,
    "per_patient_dice.interval": _interval,
    "per_patient_dice.threshold": lambda value: value is None or _number(value),
}
_OWN = _SCORES | {
    "dataset.source": _text,
    "dataset.split": _text,
    "protocol": _texts,
    "command": _text,
    "commit": _text,
    "n_patients": _count,
    "n_slices": _count,
}
