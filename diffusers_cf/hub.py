"""The way to the Hub: a repository, and one commit that holds a model with its card, or any other set of files."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, create_repo
from huggingface_hub.errors import HTTPError

from diffusers_cf.cards import model_card
from diffusers_cf.errors import InputError
from diffusers_cf.loading import CHECKSUMS, MODEL_INDEX, PREPROCESSING, SHARD_INDEX, WEIGHTS, check_model_folder
from diffusers_cf.remote_code import PIPELINE_CLASS, code_files, code_names


# Arguments of `push_model` that `save_pretrained(.., push_to_hub=True)` hands on.
OPTIONS = ("token", "private", "licence", "commit_message", "create_pr", "with_code")


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


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    licence: str | None = None,
    results: Sequence[Mapping] = (),
    pictures: Sequence[str | Path] = (),
    commit_message: str | None = None,
    create_pr: bool = False,
    with_code: bool = False,
) -> str:
    """Pushes a model folder, with a card made from its facts, as one commit; returns the commit's address.

    What the Hub holds already isn't sent again, so that a push that was cut short goes on where it was. Weights of the
    same variant that the folder doesn't have are deleted there, and so is code of an earlier push `with_code`.

    Args:
        folder (`str` or `Path`): a model folder.
        repo_id (`str`): `name` or `user/name`; made where it doesn't exist.
        token (`str`, *optional*): instead of the one that `hf auth login` stored.
        private (`bool`, *optional*): who may read a new repository.
        licence (`str`, *optional*): of the weights, by its id on the Hub.
        results (`Sequence[Mapping]`): RESULT.json of `diffusers-cf evaluate`, for the card.
        pictures (`Sequence[str | Path]`): for the card.
        commit_message (`str`, *optional*): of the commit.
        create_pr (`bool`): propose it as a pull request.
        with_code (`bool`): add the code, for users without this package: their
            `DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)` runs it, and no other generic loading
            works any longer. `CounterfactualDDIMPipeline.from_pretrained` never reads it.

    Raises:
        InputError: the folder is not a whole model, or the Hub did not take it; the folder stays as it was.
    """
    folder, pictures = Path(folder), [Path(picture) for picture in pictures]
    variants = {match["variant"] for path in folder.glob("*/*") if (match := _weight(path.name))}
    for variant in sorted(variants, key=str) or [None]:
        components = check_model_folder(folder, variant=variant)
    repo_id = create_repository(repo_id, token, private)
    files = published_files(folder) | {picture.name: picture for picture in pictures}
    files |= _with_code(folder, components) if with_code else {}
    names = [picture.name for picture in pictures]
    files["README.md"] = model_card(folder, repo_id, licence, results, names, with_code).encode()
    kept = repository_files(folder, repo_id, token)
    stale = [name for name in kept if name not in files and _is_stale(name, variants)]
    message = commit_message or "Upload CounterfactualDDIMPipeline"
    return push_files(folder, repo_id, files, stale, token=token, commit_message=message, create_pr=create_pr)


def repository_files(
    folder: str | Path, repo_id: str, token: str | None = None, repo_type: str = "model"
) -> list[str]:
    """Names of the files that a repository holds already.

    Raises:
        InputError: the Hub does not say; the message is about `folder`, which stays as it was.
    """
    with _refusals(folder, repo_id):
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
    with _refusals(folder, repo_id):
        return HfApi(token=token).create_commit(repo_id, operations, **options).commit_url


@contextmanager
def _refusals(folder: str | Path, repo_id: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = _reason(error)
    except RuntimeError as error:  # how the client reports that one of several uploads failed
        reason = f"{_reason(error)} {_reason(error.__cause__ or error)}"
    else:
        return
    raise InputError(f"{folder}: is whole, but could not be pushed to {repo_id} ({reason})")


def _is_stale(name: str, variants: set[str | None]) -> bool:
    """Whether a file that a push did not bring would be taken for a part of what it brought."""
    match = _weight(name.rpartition("/")[2])
    return bool(match and match["variant"] in variants) or name in code_names()


def _with_code(folder: Path, components: dict[str, tuple[str, str]]) -> dict[str, bytes]:
    """The code, and a model_index.json that names it."""
    index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8")) | {"_class_name": PIPELINE_CLASS}
    code = {name: text.encode() for name, text in code_files(components).items()}
    return code | {MODEL_INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that a repository holds, by their names there: no code, no pickle, no training state."""
    root = [folder / MODEL_INDEX, folder / PREPROCESSING]
    root += [path for path in folder.iterdir() if CHECKSUMS.fullmatch(path.name)]
    inner = [path for path in folder.glob("*/*") if path.suffix == ".json" or WEIGHTS.fullmatch(path.name)]
    components = {path.parent for path in folder.glob("*/*config.json")}
    files = [path for path in root if path.exists()] + [path for path in inner if path.parent in components]
    return {path.relative_to(folder).as_posix(): path for path in sorted(files)}


def _weight(name: str) -> re.Match | None:
    return WEIGHTS.fullmatch(name) or SHARD_INDEX.fullmatch(name)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
