"""What stands between a model folder and the pipeline: Hub download, allow-list, checksums, preprocessing.json.

A model folder is foreign input, from the Hub or from a colleague. `check_model_folder` refuses what it may not hold
before anything named in it is imported. diffusers itself accepts no component class of a third party from the Hub;
`download_model` is the cure: it fetches the right files, after which a folder on the disk is loaded.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .errors import InputError, OversizedError
from .hub_download import listed_files, one_line, refusals_in_one_line


SWITCHES = ("clip_input", "crop_background")  # the entries of model_index.json that are no components
MODEL_INDEX = "model_index.json"
PREPROCESSING = "preprocessing.json"

# Per component the [library, class] pairs that model_index.json may name. (None, None) marks an optional component.
ALLOWED_COMPONENTS: dict[str, tuple] = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "class_encoder": (("diffusers_cf.models", "ClassTokenEncoder"), (None, None)),
    "scheduler": (
        ("diffusers_cf.schedulers", "DynamicDDIMScheduler"),
        ("diffusers", "DDIMScheduler"),
    ),
    "inverse_scheduler": (
        ("diffusers_cf.schedulers", "DynamicDDIMInverseScheduler"),
        ("diffusers", "DDIMInverseScheduler"),
    ),
}

# The names that diffusers gives to weights, and the only ones that it loads: plain, of a variant, in shards.
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
SHARD_INDEX = re.compile(r"diffusion_pytorch_model\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
CONFIGS = ("config.json", "scheduler_config.json")
CHECKSUMS = re.compile(r"checksums(?:\.\w+)?\.json")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_MAX_JSON_BYTES = 16 * 2**20
_MAX_WEIGHTS_BYTES = 8 * 2**30  # twenty times the authors' network


def download_model(
    repo_id: str,
    *,
    allowed: Mapping[str, Iterable] = ALLOWED_COMPONENTS,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> str:
    """Fetches a model from the Hub into the local cache, all files from one commit, and returns its folder.

    Fetched are model_index.json, preprocessing.json, README.md, the checksums and, per component, configuration and
    safetensors weights: those of `variant` where the component has them, else the plain ones. Never code, never
    pickles, never more than a model can need. Without network, or with `HF_HUB_OFFLINE=1`, what the cache holds is used.

    Args:
        repo_id (`str`): `user/name`.
        allowed (`Mapping`, *optional*): as in `check_model_folder`: a foreign model is refused before its weights
            are fetched.
        variant (`str`, *optional*): for example `fp16`.
        revision (`str`, *optional*): branch, tag or commit; the default is the main branch.
        token (`str` or `bool`, *optional*): for private repositories; the default is the token of the log-in.
        cache_dir (`str` or `os.PathLike`, *optional*): the default is the Hub client's cache.
        local_files_only (`bool`, *optional*): makes no network call.
        force_download (`bool`, *optional*): fetches again what the cache holds.

    Raises:
        InputError: if the repository, the revision or files in it are missing, or the download fails.
    """
    options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
    index_file, sizes = fetch_index(repo_id, revision=revision, local_files_only=local_files_only, **options)
    folder = index_file.parent  # its name is the commit
    components = _read_components(index_file, allowed)
    if sizes is None:
        cached = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        _model_files(f"{repo_id} in the local cache", cached, components, variant)
        return str(folder)
    files = _model_files(repo_id, sizes, components, variant)
    for name in files:
        _check_size(f"{repo_id}: {name}", sizes[name])
    with refusals_in_one_line(repo_id, revision, "a file is gone"):
        return snapshot_download(repo_id, revision=folder.name, allow_patterns=files, **options)


def fetch_index(
    repo_id: str, *, revision: str | None = None, local_files_only: bool = False, token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None, force_download: bool = False,
) -> tuple[Path, dict[str, int | None] | None]:  # fmt: skip
    """Fetches model_index.json alone, arguments as in [`download_model`].

    Returns:
        Where it lies in the local cache, and the repository's files with their sizes, None where the Hub was not, or
        could not be, asked.

    Raises:
        InputError: there is none, or none of a sensible size.
    """
    options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
    with refusals_in_one_line(repo_id, revision, f"the repository has no {MODEL_INDEX}, so it holds no pipeline"):
        sizes = None if local_files_only else listed_files(model_info, repo_id, revision, token, force_download)
        _check_size(f"{repo_id}: {MODEL_INDEX}", (sizes or {}).get(MODEL_INDEX))
        index_file = hf_hub_download(
            repo_id, MODEL_INDEX, revision=revision, local_files_only=sizes is None, **options
        )
    return Path(index_file), sizes


def _check_size(name: str, size: int | None) -> None:
    limit = _MAX_WEIGHTS_BYTES if name.endswith(".safetensors") else _MAX_JSON_BYTES
    if size is not None and size > limit:
        text = f"{limit // 2**30} GiB" if limit >= 2**30 else f"{limit // 2**20} MiB"
        raise OversizedError(f"{name}: larger than {text}, refused")


def _model_files(where, names: Iterable[str], components: Mapping[str, tuple], variant: str | None) -> list[str]:
    """Those of a repository's files that loading needs."""
    in_component = {component: [] for component in components}
    files = []
    for name in names:
        component, _, base = name.rpartition("/")
        if component in in_component:
            in_component[component].append(base)
            files += [name] if base in CONFIGS else []
        elif not component and (base in (MODEL_INDEX, PREPROCESSING, "README.md") or CHECKSUMS.fullmatch(base)):
            files.append(name)
    for component, weights in _wanted_weights(where, in_component, components, variant).items():
        files += [f"{component}/{base}" for base in weights]
    return files


def _wanted_weights(
    where, names: Mapping[str, list[str]], components: Mapping[str, tuple], variant: str | None
) -> dict[str, list[str]]:
    """Per component with weights the file names (shard index included) that diffusers loads for a variant."""
    wanted, variants = {}, set()
    for component, (_, class_name) in components.items():
        if class_name.endswith("Scheduler"):
            continue
        found = {}
        for name in sorted(names[component]):
            match = WEIGHTS.fullmatch(name) or SHARD_INDEX.fullmatch(name)
            if match:
                found.setdefault(match["variant"], []).append(name)
        wanted[component] = found.get(variant) or found.get(None) or []
        variants |= set(found)
        if not wanted[component]:
            raise InputError(f"{where}: {component} {_why_no_weights(names[component], found)}")
        if all(_SHARD.search(name) for name in wanted[component]):
            raise InputError(f"{where}: {component} has shards of weights without the index that lists them")
    if variant is not None and variant not in variants:
        raise InputError(f"{where}: there are no weights of the variant {variant!r}")
    return wanted


def _why_no_weights(names: Iterable[str], found: Mapping[str, list[str]]) -> str:
    if found:
        return f"has weights of the variant {' and '.join(map(repr, sorted(found)))} only: name it by variant="
    pickles = [name for name in sorted(names) if name.endswith(_PICKLES)]
    if pickles:
        return f"has its weights as a pickle only ({pickles[0]}), which may run code: refused, ask for safetensors"
    return "has no weights (diffusion_pytorch_model.safetensors)"


def check_model_folder(
    folder: str | os.PathLike, allowed: Mapping[str, Iterable] = ALLOWED_COMPONENTS, variant: str | None = None
) -> dict[str, tuple[str, str]]:
    """Refuses a model folder that is not ours, not whole or not safe, before anything that it names is imported.

    Checked are the components and their classes against `allowed`, that every path stays in the folder, that the
    weights of `variant` are whole safetensors files, and the SHA-256 of each where the folder has a list of them
    (`saving.write_checksums`): a flipped byte in weights goes unnoticed otherwise.

    Args:
        folder (`str` or `os.PathLike`): a folder with model_index.json.
        allowed (`Mapping`, *optional*): component name to the (library, class) pairs it may have, (None, None) for an
            optional one.
        variant (`str`, *optional*): the weights that will be loaded, as in `from_pretrained`.

    Returns:
        `dict[str, tuple[str, str]]`: library and class of every component that is present.

    Raises:
        InputError: in one line that names the file and the reason.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    components = _read_components(inside(folder, folder / MODEL_INDEX), allowed)
    names = {}
    for component, (_, class_name) in components.items():
        sub_folder = folder / component
        if not sub_folder.is_dir():
            raise InputError(f"{sub_folder}: the folder of this component is missing")
        read_object(inside(folder, sub_folder / CONFIGS[class_name.endswith("Scheduler")]))
        names[component] = [path.name for path in sub_folder.iterdir()]
    for component, weights in _wanted_weights(folder, names, components, variant).items():
        for name in weights:
            path = inside(folder, folder / component / name)
            if SHARD_INDEX.fullmatch(name):
                _check_shard_index(path)
            else:
                _check_weights(folder, path)
    read_preprocessing(folder)
    return components


def _read_components(index_file: Path, allowed: Mapping[str, Iterable]) -> dict[str, tuple[str, str]]:
    """The components of model_index.json, each known by name and class."""
    named = {name: value for name, value in read_object(index_file).items() if not name.startswith("_")}
    for name in SWITCHES:
        switch = named.pop(name, True)
        if not isinstance(switch, bool):
            raise InputError(f"{index_file}: {name!r} is {json.dumps(switch)[:100]}, it must be true or false")
    for name, value in (dict.fromkeys(allowed, [None, None]) | named).items():
        if name not in allowed:
            raise InputError(f"{index_file}: foreign component {name!r}, refused: known are {', '.join(allowed)}")
        if not isinstance(value, list) or tuple(value) not in tuple(allowed[name]):
            raise InputError(f"{index_file}: {_why_refused(name, value, allowed[name])}")
    return {name: tuple(value) for name, value in named.items() if value != [None, None]}


def _why_refused(name: str, value: object, pairs: Iterable) -> str:
    known = " or ".join(".".join(pair) for pair in pairs if None not in pair)
    if value == [None, None]:
        return f"component {name!r} is missing, it must be {known}"
    return f"component {name!r} is {json.dumps(value)[:100]}, refused: it must be {known}"


def inside(folder: Path, path: Path) -> Path:
    """The path, if it is a file that lies in the folder, however many links lead there; else `InputError`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file in this model folder")
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # the Hub's cache keeps the content of a snapshot's files next to it
        homes.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in homes):
        raise InputError(f"{path}: leads out of the model folder, refused")
    return path


def _check_shard_index(path: Path) -> None:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map, so not an index of sharded weights")
    for name in set(map(str, weight_map.values())):
        if not WEIGHTS.fullmatch(name):
            raise InputError(f"{path}: names {name!r}, which is not the name of a file of weights, refused")
        if not (path.parent / name).is_file():
            raise InputError(f"{path}: names {name!r}, which is missing")


def _check_weights(folder: Path, path: Path) -> None:
    """Whole (safetensors states its own length) and unchanged, where the folder has checksums."""
    _check_size(str(path), path.stat().st_size)
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` in the clone")
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated weights ({one_line(error)})") from error
    sums_file = folder / checksums_name(path.name)
    if not sums_file.exists():
        return
    expected = read_object(inside(folder, sums_file)).get(f"{path.parent.name}/{path.name}")
    if expected is None:
        raise InputError(f"{path}: not listed in {sums_file.name}: left over from an earlier save?")
    if expected != sha256_of(path):
        raise InputError(f"{path}: damaged, its SHA-256 is not the one in {sums_file.name}")


def read_preprocessing(folder: str | os.PathLike) -> dict:
    """The facts and recommended settings in a folder's preprocessing.json, {} where there is none.

    Raises:
        InputError: if the file is no JSON object, or its `settings` are not.
    """
    path = Path(folder) / PREPROCESSING
    if not path.exists():
        return {}
    facts = read_object(inside(Path(folder), path))
    if not isinstance(facts.get("settings", {}), dict):
        raise InputError(f"{path}: `settings` is not a JSON object")
    return facts


def preprocessing_of_hub_model(repo_id: str, component_folder: str | os.PathLike | None) -> dict:
    """preprocessing.json of a model that diffusers fetched from the Hub with its code: it leaves this file there.

    Args:
        repo_id (`str`): `user/name`.
        component_folder (`str` or `os.PathLike`): where a component was loaded from; it tells commit and cache.

    Raises:
        InputError: the file is there, but can't be fetched; recommended settings are never replaced unnoticed.
    """
    folder = Path(component_folder or "").parent
    if folder.parent.name != "snapshots" or (folder / PREPROCESSING).exists():
        return read_preprocessing(folder)
    with refusals_in_one_line(f"{repo_id}: {PREPROCESSING}", folder.name, "it has none"):
        try:
            path = hf_hub_download(repo_id, PREPROCESSING, revision=folder.name, cache_dir=folder.parents[2])
        except RemoteEntryNotFoundError:
            return {}
    return read_preprocessing(Path(path).parent)


def checksums_name(weights_name: str) -> str:
    """The list of checksums that a weight file stands in."""
    variant = WEIGHTS.fullmatch(weights_name)["variant"]
    return f"checksums.{variant}.json" if variant else "checksums.json"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path) -> dict:
    """A JSON object from a file that may be anything; `InputError` if it is something else, or too large."""
    try:
        _check_size(str(path), path.stat().st_size)
        value = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value
