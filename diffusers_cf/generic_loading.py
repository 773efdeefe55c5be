"""How `DiffusionPipeline.from_pretrained` finds our pipeline: after the same checks as our own `from_pretrained`."""

import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path

import diffusers

from diffusers_cf.errors import InputError, OversizedError
from diffusers_cf.loading import MODEL_INDEX, fetch_index, read_object


def register_with_diffusers(pipeline_class: type) -> None:
    """Makes `DiffusionPipeline.from_pretrained` load models of a pipeline class, from a folder and from the Hub.

    diffusers knows no classes of third parties, and for one that it did know it would skip `check_model_folder`. So its
    public classmethod gets a door before it: model_index.json is looked at, and a model that names `pipeline_class` is
    handed to that class. Everything else goes where it went before: other models, other classes, models with code of
    their own. A class of diffusers is never replaced.
    """
    base, class_name = diffusers.DiffusionPipeline, pipeline_class.__name__
    if hasattr(diffusers, class_name):
        return
    original = base.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        ours = cls is base and not kwargs.get("custom_pipeline")
        if ours and _is_of_class(class_name, os.fspath(pretrained_model_name_or_path), kwargs):
            return pipeline_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    base.from_pretrained = classmethod(from_pretrained)


def _is_of_class(class_name: str, model: str, options: Mapping) -> bool:
    """Whether a folder's or repository's model_index.json names a class; no, where it can't be read: diffusers says why."""
    known = inspect.signature(fetch_index).parameters
    try:
        if os.path.isdir(model):
            index_file = Path(model) / MODEL_INDEX
        else:
            index_file, _ = fetch_index(model, **{name: options[name] for name in options if name in known})
        return read_object(index_file).get("_class_name") == class_name
    except OversizedError:
        raise
    except InputError:
        return False
