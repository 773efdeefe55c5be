"""The way to the Hub: a repository, and one commit that holds a model with its card, or any other set of files."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, create_repo
from huggingface_hub.errors import HTTPError

from diffusers_cf.commands.options import open_pipeline
from diffusers_cf.errors import InputError
from diffusers_cf.hub.cards import model_card
from diffusers_cf.hub.pictures import checked_pictures
from diffusers_cf.hub.public_facts import OF_MODEL, public_facts
from diffusers_cf.hub.published_results import checked_result
from diffusers_cf.hub.remote_code import PIPELINE_CLASS, code_files, code_names
from diffusers_cf.hub.sources import licence_of_data
from diffusers_cf.loading import (
    CHECKSUMS,
    CONFIGS,
    MODEL_INDEX,
    PREPROCESSING,
    SHARD_INDEX,
    WEIGHTS,
    check_model_folder,
    fetch_index,
    inside,
    read_object,
    read_preprocessing,
)
from diffusers_cf.model_facts import check_publishable


# Arguments of `push_model` that `save_pretrained(.., push_to_hub=True)` hands on.
OPTIONS = ("token", "private", "licence", "data_licence", "commit_message", "create_pr", "with_code")
# What a repository may hold before a first push.
_BLANK = {".gitattributes", "README.md", "LICENSE"}


def create_repository(
    name: str, token: str | None = None, private: bool | None = None, repo_type: str = "model"
) -> str:
    """Makes a repository on the Hub unless it exists.

    Args:
        name (`str`): `name` or `user/name`.
        token (`str`, *optional*): instead of the one that `hf auth login` stored.
        private (`bool`, *optional*): who may read a new repository; None = as the account's default has it.
        repo_type (`str`): `model` or `dataset`.

    Returns:
        `user/name`.

    Raises:
        InputError: the name is not allowed, there is no token, it may not write there, or the Hub can't be reached.
    """
    try:
        return create_repo(name, token=token, private=private, exist_ok=True, repo_type=repo_type).repo_id
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{name}: no repository to push to ({_reason(error)}); `hf auth login` stores a token"
        ) from None


def model_repository(name: str, token: str | None = None, private: bool | None = None) -> tuple[str, list[str]]:
    """A repository for a model, as [`create_repository`] makes it: new, blank, or with a model of this kind already.

    Returns:
        `user/name`, and the files that it holds.

    Raises:
        InputError: there is none to write to, or it holds something else.
    """
    repo_id = create_repository(name, token, private)
    there = repository_files(repo_id, token)
    strange = strange_file(there)
    if strange and not (MODEL_INDEX in there and _is_ours(fetch_index(repo_id, token=token)[0])):
        raise InputError(f"{repo_id}: holds something else already ({strange}): choose another --repo_id")
    return repo_id, there


def _is_ours(index_file: Path) -> bool:
    """Whether a model_index.json is that of our pipeline, with its code or without."""
    try:
        return read_object(index_file).get("_class_name") in (PIPELINE_CLASS, PIPELINE_CLASS[1])
    except InputError:
        return False


def strange_file(names: Iterable[str]) -> str | None:
    """The first of a repository's files that a blank one does not have."""
    return min(set(names) - _BLANK, default=None)


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    licence: str | None = None,
    data_licence: str | None = None,
    results: Sequence[Mapping] = (),
    pictures: Sequence[str | Path] = (),
    commit_message: str | None = None,
    create_pr: bool = False,
    with_code: bool = False,
) -> str:
    """Pushes a model folder, with a card made from its facts, as one commit; returns the commit's address.

    What the Hub holds already isn't sent again, so that a push that was cut short goes on where it was. Weights of the
    same variant that the folder doesn't have are deleted there, and so is code of an earlier push `with_code`. Of
    preprocessing.json those entries go that this package knows, without paths of this machine.

    Args:
        folder (`str` or `Path`): a model folder.
        repo_id (`str`): `name` or `user/name`; made where it doesn't exist.
        token (`str`, *optional*): instead of the one that `hf auth login` stored.
        private (`bool`, *optional*): who may read a new repository.
        licence (`str`, *optional*): of the weights, by its id on the Hub.
        data_licence (`str`, *optional*): of the training data, where their source does not say it.
        results (`Sequence[Mapping]`): RESULT.json of `diffusers-cf evaluate`, for the card.
        pictures (`Sequence[str | Path]`): for the card, of data that may be shown.
        commit_message (`str`, *optional*): of the commit.
        create_pr (`bool`): propose it as a pull request.
        with_code (`bool`): add the code, for users without this package: their
            `DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)` runs it, and no other generic loading
            works any longer. `CounterfactualDDIMPipeline.from_pretrained` never reads it.

    Raises:
        InputError: the folder is not a whole model that can be used, a result or picture can't be published, or the
            Hub did not take it; the folder stays as it was.
    """
    folder = Path(folder)
    components, variants = _checked_model(folder)
    facts = read_preprocessing(folder)
    results = [checked_result(result, f"result {number}") for number, result in enumerate(results, 1)]
    pictures, data_licence = checked_pictures(pictures, facts), licence_of_data(str(folder), facts, data_licence)
    files = published_files(folder, components) | pictures
    files |= _with_code(folder, components) if with_code else {}
    repo_id, there = model_repository(repo_id, token, private)
    card = {"licence": licence, "data_licence": data_licence, "results": results, "pictures": list(pictures)}
    files["README.md"] = model_card(folder, repo_id, with_code=with_code, **card).encode()
    stale = [name for name in there if name not in files and _is_stale(name, variants)]
    message = commit_message or "Upload CounterfactualDDIMPipeline"
    return push_files(folder, repo_id, files, stale, token=token, commit_message=message, create_pr=create_pr)


def _checked_model(folder: Path) -> tuple[dict[str, tuple[str, str]], set[str | None]]:
    """Components and variants of a model folder that is whole, and whose facts fit its network."""
    found = {match["variant"] for path in folder.glob("*/*") if (match := _weight(path.name))}
    for variant in sorted(found, key=str) or [None]:
        components = check_model_folder(folder, variant=variant)
    pipe = open_pipeline(str(folder), variant=None if None in found else variant)
    check_publishable(pipe, str(folder))
    return components, found


def repository_files(repo_id: str, token: str | None = None, repo_type: str = "model") -> list[str]:
    """Names of the files that a repository holds already.

    Raises:
        InputError: the Hub does not say.
    """
    with _refusals(f"{repo_id}: what it holds can't be read"):
        return HfApi(token=token).list_repo_files(repo_id, repo_type=repo_type)


def push_files(
    folder: str | Path, repo_id: str, files: Mapping[str, Path | bytes], stale: Sequence[str] = (), *,
    token: str | None = None, commit_message: str, create_pr: bool = False, repo_type: str = "model",
) -> str:  # fmt: skip
    """Pushes files as one commit and returns its address. What the Hub holds already isn't sent again.

    Args:
        folder (`str` or `Path`): where they are from, for messages.
        repo_id (`str`): an existing repository.
        files (`Mapping[str, Path | bytes]`): by their names there.
        stale (`Sequence[str]`): files there to delete.
        token (`str`, *optional*): instead of the one that `hf auth login` stored.
        commit_message (`str`): of the commit.
        create_pr (`bool`): propose it as a pull request.
        repo_type (`str`): `model` or `dataset`.

    Raises:
        InputError: the Hub did not take it.
    """
    contents = {name: content if isinstance(content, bytes) else str(content) for name, content in files.items()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    options = {"commit_message": commit_message, "create_pr": create_pr, "repo_type": repo_type}
    with _refusals(f"{folder}: is whole, but could not be pushed to {repo_id}"):
        return HfApi(token=token).create_commit(repo_id, operations, **options).commit_url


@contextmanager
def _refusals(message: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = _reason(error)
    except RuntimeError as error:  # how the client reports that one of several uploads failed
        reason = f"{_reason(error)} {_reason(error.__cause__ or error)}"
    else:
        return
    raise InputError(f"{message} ({reason})")


def _is_stale(name: str, variants: set[str | None]) -> bool:
    """Whether a file that a push did not bring would be taken for a part of what it brought."""
    match = _weight(name.rpartition("/")[2])
    return bool(match and match["variant"] in variants) or name in code_names()


def _with_code(folder: Path, components: dict[str, tuple[str, str]]) -> dict[str, bytes]:
    """The code, and a model_index.json that names it."""
    index = _without_origin(read_object(folder / MODEL_INDEX)) | {"_class_name": PIPELINE_CLASS}
    code = {name: text.encode() for name, text in code_files(components).items()}
    return code | {MODEL_INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def published_files(folder: Path, components: Iterable[str]) -> dict[str, Path | bytes]:
    """The files of a model folder that a repository holds, by their names there: no code, no pickle, no training state.

    Args:
        folder: a model folder.
        components: the names of those that model_index.json names; other folders are nobody else's business.

    Raises:
        InputError: one of them leads out of the folder.
    """
    names = [MODEL_INDEX, PREPROCESSING, *(path.name for path in folder.iterdir() if CHECKSUMS.fullmatch(path.name))]
    for component in components:
        inner = (path.name for path in (folder / component).iterdir())
        names += [f"{component}/{name}" for name in inner if name in CONFIGS or _weight(name)]
    files = {name: inside(folder, folder / name) for name in sorted(names) if os.path.lexists(folder / name)}
    return {name: _published(name, path) for name, path in files.items()}


def _published(name: str, path: Path) -> Path | bytes:
    """A file as it is, or without what only this machine knows."""
    if not name.endswith((MODEL_INDEX, PREPROCESSING, *CONFIGS)):
        return path
    facts = read_object(path)
    known = public_facts(facts, OF_MODEL) if name == PREPROCESSING else _without_origin(facts)
    return path if known == facts else (json.dumps(known, indent=2) + "\n").encode()


def _without_origin(config: dict) -> dict:
    """A configuration without the folder that the model was loaded from, which diffusers writes into each."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def _weight(name: str) -> re.Match | None:
    return WEIGHTS.fullmatch(name) or SHARD_INDEX.fullmatch(name)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
