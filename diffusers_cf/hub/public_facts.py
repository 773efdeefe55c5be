"""What a published file may tell of the machine that it comes from: no path, no name of a folder or file, no token."""

import re
import shlex
from collections.abc import Iterable, Mapping


# Of a data set's preprocessing.json: not the name of the file or folder that it was made from.
OF_DATASET = (
    "version", "source", "modalities", "class_names", "size", "channels", "dtype", "scale", "field_mm", "percentile",
    "normalize", "orientation", "has_masks", "seed", "split_sha256", "labels_sha256", "lenient", "note", "splits", "skipped",
)  # fmt: skip
# Of a model's, which has what its data set has: not the patients that were left out there.
OF_MODEL = (
    *(name for name in OF_DATASET if name not in ("splits", "skipped")), "signs", "settings", "settings_chosen_by",
    "threshold_chosen_by", "paper_threshold", "paper_threshold_chosen_by", "evaluation_size", "training",
)  # fmt: skip

# What stands for the value of an option in a command.
_PLACES = {
    "model": "MODEL", "models": "MODELS", "pretrained_model": "MODEL", "dataset": "DATASET", "input": "INPUT",
    "output": "OUTPUT", "output_dir": "MODEL", "split_file": "SPLITS", "token": "TOKEN", "hub_token": "TOKEN",
}  # fmt: skip
# From its root or from somebody's home; the slashes of an address on the web don't count.
_PATH = re.compile(r"(?<![\w./~])(?:[A-Za-z]:[\\/](?!/)|~?/(?!/))\S+")
_FRACTION = re.compile(r"\d+/\d+")


def public_facts(facts: Mapping, names: Iterable[str]) -> dict:
    """The facts of these names, commands and texts without what only the publisher's machine knows."""
    names = set(names)
    return {name: _public(value, name) for name, value in facts.items() if name in names}


def _public(value: object, name: str = "") -> object:
    if isinstance(value, Mapping):
        return {key: _public(entry, key) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    if isinstance(value, str):
        return public_command(value) if name == "command" else _PATH.sub("PATH", value)
    return value


def public_command(command: str) -> str:
    """A command with placeholders such as DATASET for its files and folders, and base names for what else has a path."""
    try:
        given = shlex.split(command)
    except ValueError:  # a quotation mark without its second
        given = command.split()
    words, place = [], None
    for word in given:
        if not word.startswith("-"):
            words.append(place or _base_name(word))
            continue
        name, equals, value = word.partition("=")
        place = _PLACES.get(name.lstrip("-").replace("-", "_"))
        words.append(name + equals + (place or _base_name(value)) if equals else word)
    return shlex.join(words)


def _base_name(word: str) -> str:
    """A word without the folders before it; a fraction, such as that of `--shard`, is no path."""
    return word if _FRACTION.fullmatch(word) else re.split(r"[/\\]", word.rstrip("/\\"))[-1]
