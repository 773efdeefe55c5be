"""How a pipeline leaves a model folder and comes back: what diffusers' own loading and saving lack for ours."""

import importlib
import inspect
import os
from tempfile import TemporaryDirectory

from diffusers_cf.loading import (
    check_model_folder,
    download_model,
    preprocessing_of_hub_model,
    read_preprocessing,
)
from diffusers_cf.maps import check_forward
from diffusers_cf.saving import forget_origin, write_checksums, write_preprocessing
from diffusers_cf.settings import check_signs, settings_in_use


class ModelFolderMixin:
    """For a `DiffusionPipeline` whose folder has preprocessing.json and checksums.json, and which is checked on loading."""

    _preprocessing = None

    @property
    def preprocessing(self) -> dict:
        """Facts of the model folder's preprocessing.json: modalities, image size, intensity scale, recommended settings."""
        if self._preprocessing is None:
            origin = self.config.get("_name_or_path")
            if origin and os.path.isdir(origin):
                self._preprocessing = read_preprocessing(origin)
            elif origin:  # loaded by diffusers itself, which leaves this file on the Hub
                self._preprocessing = preprocessing_of_hub_model(origin, self.unet.config.get("_name_or_path"))
            else:
                self._preprocessing = {}
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, facts: dict) -> None:
        self._preprocessing = dict(facts)

    def resolve_settings(self, settings: str | None = None, **given) -> dict:
        """Return settings with each None replaced by what the model recommends, else by the paper's.

        Args:
            settings: `paper` for the paper's values instead of what the model recommends.
            **given: any of `guidance_scale`, `strength`, `num_inference_steps`, `map`, `threshold`; checked.

        Raises:
            ValueError: one is out of range, or the pipeline can't make the map.
        """
        found = settings_in_use(self.preprocessing, given, settings)
        if found["map"] == "forward":
            check_forward(self)
        if found["map"] == "signed":
            check_signs(self.preprocessing.get("signs"), self.unet.config.in_channels)
        return found

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Downloads a model from the Hub and returns its folder; see [`loading.download_model`]."""
        known = inspect.signature(download_model).parameters
        return str(download_model(pretrained_model_name, **{k: v for k, v in kwargs.items() if k in known}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Loads a model folder or Hub id; raises InputError for a missing, foreign or damaged file before importing any.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or `user/name`.
            **kwargs: as in `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, `revision`, `token`, ..).
        """
        folder = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            folder = cls.download(folder, **kwargs)
        check_model_folder(folder, variant=kwargs.get("variant"))
        pipe = super().from_pretrained(folder, **(kwargs | {"use_safetensors": True}))
        pipe.preprocessing = read_preprocessing(folder)  # now: the folder may be gone later
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Saves components (safetensors), preprocessing.json and checksums.json; arguments as in `DiffusionPipeline`."""
        facts = self.preprocessing
        super().save_pretrained(save_directory, **(kwargs | {"safe_serialization": True}))
        if facts:
            write_preprocessing(save_directory, facts)
        forget_origin(save_directory)
        write_checksums(save_directory)
        if push_to_hub:
            hub = _hub()
            name = kwargs.get("repo_id", os.path.basename(os.path.normpath(save_directory)))
            hub.push_model(save_directory, name, **{k: v for k, v in kwargs.items() if k in hub.OPTIONS})

    def push_to_hub(self, repo_id: str, variant: str | None = None, **options) -> str:
        """Pushes the pipeline with a card made from facts; `options` are those of [`hub.push_model`], `token` and others."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return _hub().push_model(folder, repo_id, **options)


def _hub():
    """What writes the card, which a pipeline that came as remote code does not bring along."""
    try:
        return importlib.import_module("diffusers_cf.hub.publishing")
    except ModuleNotFoundError:
        raise ImportError("to publish a model, install diffusers_cf") from None
