"""Find or download model folders, check them before anything in them is loaded, and save them with checksums.

A model folder is foreign input. Only components of known classes are loaded, from JSON and safetensors files. Code and
pickles are never read: diffusers loads from a temporary folder that holds only the checked files.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open

from diffusers_cf.errors import InputError, first_line, reading
from diffusers_cf.files import alone_at, new_folder, read_json, tidy, write_json
from diffusers_cf.maps import check_map
from diffusers_cf.settings import settings_in_use


PRETRAINED = Path(__file__).parent / "pretrained"  # holds a folder for each shipped model
PIPELINE_CLASS = "CounterfactualDDIMPipeline"
PIPELINE_CLASS_WITH_CODE = ["pipeline_counterfactual_ddim", PIPELINE_CLASS]  # in repositories published --with-code
MODEL_INDEX, PREPROCESSING = "model_index.json", "preprocessing.json"
SHIPPED = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob(f"*/{MODEL_INDEX}")))
# Entries of model_index.json besides components, with their defaults.
SWITCHES = {"clip_input": True, "crop_background": False}
# The pairs [library, class] that model_index.json may name for each component.
COMPONENTS = {
    "unet": (["diffusers", "UNet2DConditionModel"],),
    "class_encoder": (["diffusers_cf.models", "ClassTokenEncoder"], [None, None]),
    "scheduler": (["diffusers_cf.schedulers", "DynamicDDIMScheduler"], ["diffusers", "DDIMScheduler"]),
    "inverse_scheduler": (
        ["diffusers_cf.schedulers", "DynamicDDIMInverseScheduler"], ["diffusers", "DDIMInverseScheduler"],
    ),
    "student": (["diffusers", "UNet2DModel"], [None, None]),
}  # fmt: skip
# Names of weights in diffusers: with or without a variant, whole or in shards with an index.
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
SHARD_INDEX = re.compile(r"diffusion_pytorch_model\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
CHECKSUMS = re.compile(r"checksums(?:\.\w+)?\.json")
CONFIGS = ("config.json", "scheduler_config.json")
_MAX_BYTES = (16 << 20, 8 << 30)  # of JSON; of weights and of data set shards
_OF_DATASET = ("splits", "input", "skipped")  # entries of a data set that may name patients; models do not need them

logger = logging.getLogger(__name__)


class ModelFolderMixin:
    """Load and save a `DiffusionPipeline` with preprocessing.json and checksums.json."""

    _preprocessing = None

    @property
    def preprocessing(self) -> dict:
        """The model's preprocessing.json: modalities, image size, intensity scale, recommended settings.

        The U-Net holds it too, so that `Pipeline(**pipe.components)` and `from_pipe` keep it.
        """
        return getattr(self.unet, "_preprocessing", {}) if self._preprocessing is None else self._preprocessing

    @preprocessing.setter
    def preprocessing(self, facts: Mapping) -> None:
        self._preprocessing = self.unet._preprocessing = dict(facts)

    def resolve_settings(self, settings: str | None = None, **given) -> dict:
        """Return settings; each None is replaced by the model's recommendation, else by the paper's value.

        Args:
            settings (`str`, *optional*): `paper` for the paper's values instead of the recommended ones.
            **given: any of `guidance_scale`, `strength`, `num_inference_steps`, `map`, `threshold`.

        Raises:
            ValueError: one is out of range, or the pipeline can't make the map.
        """
        found = settings_in_use(self.preprocessing, given, settings)
        check_map(self, found["map"])
        return found

    def register_switches(self, **given: bool | None) -> None:
        """Register `SWITCHES` in the config: the given value, else that of the U-Net, else the default."""
        carried = SWITCHES | getattr(self.unet, "_switches", {}) | {k: v for k, v in given.items() if v is not None}
        self.unet._switches = carried
        self.register_to_config(**carried)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a model after checking its files.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, the name of a shipped model such as
                `phantom_small`, or `user/name` on the Hub.
            **kwargs: as in `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, `revision`, `token` and others).
                `trust_remote_code` has no effect.

        Raises:
            InputError: the model is missing, foreign or damaged; one line with the file and the reason.
        """
        folder = find_model(pretrained_model_name_or_path, **kwargs)
        files = check_model_folder(folder, kwargs.get("variant"))
        index = read_json(Path(folder) / MODEL_INDEX) | {"_class_name": cls.__name__}
        safe = {"use_safetensors": True, "trust_remote_code": False, "custom_pipeline": None}
        with reading(folder, "model"), TemporaryDirectory() as view:
            for name in files:
                target = Path(view, name)
                target.parent.mkdir(exist_ok=True)
                target.symlink_to(Path(folder, name).resolve())
            write_json(index, Path(view, MODEL_INDEX))  # replaces the link: a folder with code names another class
            pipe = super().from_pretrained(view, **(kwargs | safe))
            pipe.register_to_config(_name_or_path=folder)
            if missing := [name for name, value in pipe.unet.named_parameters() if value.is_meta]:
                raise InputError(f"{folder}: the weights of unet lack {missing[0]}")
            if min(pipe.image_size) < 1:
                raise InputError(f"{folder}: sample_size of unet is {pipe.unet.config.sample_size}")
        pipe.preprocessing = read_preprocessing(folder)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save components, preprocessing.json and checksums; arguments as in `DiffusionPipeline.save_pretrained`."""
        folder = Path(save_directory)
        super().save_pretrained(folder, **(kwargs | {"safe_serialization": True}))
        if self.student is None:  # older versions of the package know no student
            index = read_json(folder / MODEL_INDEX)
            write_json({name: value for name, value in index.items() if name != "student"}, folder / MODEL_INDEX)
        for path in (folder / MODEL_INDEX, *(folder / name / config for name in COMPONENTS for config in CONFIGS)):
            if path.exists() and "_name_or_path" in (config := read_json(path)):  # a path of this machine
                write_json({key: value for key, value in config.items() if key != "_name_or_path"}, path)
        if facts := {key: value for key, value in self.preprocessing.items() if key not in _OF_DATASET}:
            write_json(facts, folder / PREPROCESSING)
        write_checksums(folder)
        if push_to_hub:
            kwargs.pop("max_shard_size", None)
            self.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)


def find_model(name: str | os.PathLike, variant: str | None = None, **options) -> str:
    """Return the folder of a model: `name` itself, that of a shipped model, or the download of `user/name`."""
    name = os.fspath(name)
    if not os.path.isdir(name):
        tidy(Path(os.path.abspath(name)))  # a process killed in `replace_json` left it under another name
    if os.path.isdir(name):
        return name
    if Path(name).name == name and (PRETRAINED / name / MODEL_INDEX).is_file():
        return str(PRETRAINED / name)
    if "/" not in name:
        raise InputError(f"{name}: no such folder, and no shipped model ({SHIPPED}); on the Hub a model is user/name")

    def choose(names: list[str], options: dict) -> list[str]:
        """Refuse a foreign model before its weights are downloaded."""
        if MODEL_INDEX not in names:
            raise InputError(f"{name}: the repository has no {MODEL_INDEX}, so it holds no pipeline")
        components = read_components(Path(hf_hub_download(name, MODEL_INDEX, **options)))
        return _model_files(name, names, components, variant)

    known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return download(name, choose, **{key: options[key] for key in known if key in options})


def download(
    repo_id: str, choose: Callable, revision: str | None = None, local_files_only: bool = False, **options
) -> str:
    """Download files of a Hub repository and return their folder in the cache. Without a network, use the cache.

    Args:
        repo_id (`str`): `user/name`.
        choose (`Callable`): takes the names of all files and the options of a download; returns the files to get.
        revision (`str`, *optional*): branch, tag or commit.
        local_files_only (`bool`): use the cache alone.
        **options: other options of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: the repository or revision is missing, a file is too large, or the download fails.
    """
    info = None
    try:
        if local_files_only:  # whatever the cache holds; later checks name missing files
            return snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[], **options)
        # this call comes first, because without a network the others try for half a minute
        kind, token = options.get("repo_type"), options.get("token")
        info = HfApi().repo_info(repo_id, revision=revision, files_metadata=True, repo_type=kind, token=token)
        for file in info.siblings:
            if (file.size or 0) > (limit := _MAX_BYTES[file.rfilename.endswith((".safetensors", ".parquet"))]):
                raise InputError(f"{repo_id}: {file.rfilename}: larger than {limit >> 20} MiB")
        files = choose([file.rfilename for file in info.siblings], options | {"revision": revision})
        return snapshot_download(repo_id, revision=revision, allow_patterns=files, **options)
    except InputError:
        raise
    except (HFValidationError, RepositoryNotFoundError):
        reason = f"neither a folder, nor a shipped model ({SHIPPED}), nor a repository that your token may read"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except (HTTPError, OSError, ValueError) as error:
        reason = f"the download failed: {first_line(error)}"
        if info is None and not (local_files_only or options.get("force_download")):
            logger.warning("%s: the Hub can't be reached (%s), using the local cache", repo_id, first_line(error))
            return download(repo_id, choose, revision, local_files_only=True, **options)
    raise InputError(f"{repo_id}: {reason}")


def read_components(index_file: Path) -> dict[str, list[str]]:
    """Return library and class of each component; raise `InputError` for a model_index.json of another pipeline."""
    index = read_json(index_file)
    if not isinstance(name := index.get("_class_name"), str) and name != PIPELINE_CLASS_WITH_CODE:
        raise InputError(f"{index_file}: _class_name is {str(name)[:100]}, not {PIPELINE_CLASS}")
    found = dict.fromkeys(COMPONENTS, [None, None]) | {k: value for k, value in index.items() if not k.startswith("_")}
    for name, value in found.items():
        allowed = COMPONENTS.get(name, (True, False) if name in SWITCHES else ())
        if not any(value == one and type(value) is type(one) for one in allowed):
            known = " or ".join(map(str, allowed)) or f"absent; known are {', '.join(COMPONENTS)}"
            raise InputError(f"{index_file}: {name!r} is {str(value)[:100]}, it must be {known}")
    return {name: value for name, value in found.items() if name in COMPONENTS and value != [None, None]}


def _model_files(where: str | Path, names: Iterable[str], components: Mapping, variant: str | None) -> list[str]:
    """Return the names of the files that loading reads, of all files in a folder or repository."""
    files = [name for name in names if name in (MODEL_INDEX, PREPROCESSING) or CHECKSUMS.fullmatch(name)]
    for component, (_, class_name) in components.items():
        is_scheduler, found = class_name.endswith("Scheduler"), {}
        for folder, _, base in (name.rpartition("/") for name in names):
            if folder == component and (match := WEIGHTS.fullmatch(base) or SHARD_INDEX.fullmatch(base)):
                found.setdefault(match["variant"], []).append(f"{component}/{base}")
        weights = found.get(variant) or found.get(None) or []
        if not (weights or is_scheduler):
            variants = f" but those of the variant {' and '.join(map(repr, found))}" if found else ""
            raise InputError(f"{where}: {component} has no safetensors weights{variants}")
        files += [f"{component}/{CONFIGS[is_scheduler]}", *weights]
    return sorted(files)


def check_model_folder(folder: str | os.PathLike, variant: str | None = None) -> list[str]:
    """Check a model folder before anything that it names is imported, and return the names of the files to load.

    Raises:
        InputError: a component has an unknown class, a file leads out of the folder, or the weights of `variant` are
            no whole safetensors files or differ from the checksums. The message is one line with file and reason.
    """
    folder = Path(folder)
    components = read_components(inside(folder, MODEL_INDEX))
    names = [path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    files = _model_files(folder, names, components, variant)
    for name in files:
        path = inside(folder, name)
        if name.endswith(".safetensors"):
            with reading(path, "safetensors file"):
                safe_open(path, framework="np").keys()  # fails unless the file has the length that it states
            sums = folder / checksums_name(path.name)
            if sums.exists() and read_json(inside(folder, sums.name)).get(name) != sha256_of(path):
                raise InputError(f"{path}: damaged, its SHA-256 is not the one in {sums.name}")
        elif "quantization_config" in (value := read_json(path)):
            raise InputError(f"{path}: quantized networks can't be loaded")
        elif SHARD_INDEX.fullmatch(path.name):
            with reading(path, "index of sharded weights"):
                if lost := {f"{path.parent.name}/{shard}" for shard in value["weight_map"].values()} - set(files):
                    raise InputError(f"{path}: names {min(lost)}, which is no file of weights in this folder")
    read_preprocessing(folder)
    return files


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a model folder; raise `InputError` if it is missing or a link out of the folder."""
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        raise InputError(f"{path}: no such file, so this is not a whole model folder")
    # the files of a snapshot in the Hub's cache are links to a folder beside it
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(place) for place in homes):
        raise InputError(f"{path}: leads out of the model folder")
    return path


def read_preprocessing(folder: str | os.PathLike) -> dict:
    """Read preprocessing.json of a model folder; empty if there is none."""
    path = Path(folder) / PREPROCESSING
    if not path.exists():
        return {}
    facts = read_json(inside(Path(folder), PREPROCESSING))
    if not isinstance(facts.get("settings", {}), dict):
        raise InputError(f"{path}: `settings` is not a JSON object")
    return facts


def replace_json(folder: str | os.PathLike, files: Mapping[str, Mapping]) -> None:
    """Replace JSON files of a model folder together: a killed process leaves all old ones or all new ones.

    Args:
        folder (`str` or `os.PathLike`): a model folder.
        files (`Mapping[str, Mapping]`): contents by name, such as `inverse_scheduler/scheduler_config.json`.
    """
    folder = Path(folder).resolve()
    with alone_at(folder):
        if len(files) == 1:
            return write_json(*files.values(), folder.joinpath(*files))
        with new_folder(folder) as copy:
            shutil.copytree(folder, copy, symlinks=True, copy_function=_link, dirs_exist_ok=True)
            for name, value in files.items():  # new files, so that nothing is written through a link
                write_json(value, copy / name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def write_checksums(folder: str | os.PathLike) -> None:
    """Write the SHA-256 of every weight file to checksums.json, or to a file of its own for each variant.

    Weights get the file mode of model_index.json, because safetensors lets only the user read them.
    """
    folder, lists = Path(folder), {}
    for path in sorted(folder.glob("*/*.safetensors")):
        if path.parent.name in COMPONENTS and WEIGHTS.fullmatch(path.name):
            path.chmod((folder / MODEL_INDEX).stat().st_mode)
            lists.setdefault(checksums_name(path.name), {})[f"{path.parent.name}/{path.name}"] = sha256_of(path)
    for name, sums in lists.items():
        write_json(sums, folder / name)


def checksums_name(weights_name: str) -> str:
    """Return the name of the file of checksums for a weight file."""
    variant = WEIGHTS.fullmatch(weights_name)["variant"]
    return f"checksums.{variant}.json" if variant else "checksums.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
