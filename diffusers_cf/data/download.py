"""A slice data set by its name on the Hub: `user/name`, or `user/name@revision` for a branch, tag or commit."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import dataset_info, hf_hub_download, snapshot_download

from diffusers_cf.data.preprocessing import PREPROCESSING_FILE, shards_of
from diffusers_cf.errors import InputError
from diffusers_cf.hub_download import listed_files, refusals_in_one_line


SPLITS_FILE = "splits.json"
_NAME = re.compile(r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>.+))?")
_NO_DATASET = f"the repository has no {PREPROCESSING_FILE}, so it holds no slice data set"


def dataset_folder(name: str | Path, split: str) -> tuple[Path, str | None]:
    """Where a data set lies on this machine, with the files of a split.

    Args:
        name: A folder, or `user/name[@revision]` on the Hub. A folder wins.
        split: Whose files to download.

    Returns:
        Its folder, and the commit that it is of: None where `name` is a folder, or nothing that the Hub could know.

    Raises:
        InputError: As in `download_dataset`.
    """
    if not is_hub_name(name):
        return Path(name), None
    folder = download_dataset(name, split)
    return folder, folder.name


def dataset_shards(name: str | Path, split: str) -> tuple[Path, str | None, list[str]]:
    """Where a split can be read from without a download of it.

    Args:
        name: As in `dataset_folder`.
        split: Whose files.

    Returns:
        A folder with preprocessing.json; the commit, None where `name` is a folder; and the Parquet files: paths on this
        machine where `name` is a folder, else in Hugging Face's file system.

    Raises:
        InputError: The repository, its revision or files of it are missing, or the Hub can't be reached.
    """
    if not is_hub_name(name):
        return Path(name), None, [str(path) for path in shards_of(name, split)]
    repo_id, revision = hub_name(name)
    with refusals_in_one_line(repo_id, revision, _NO_DATASET):
        names = listed_files(dataset_info, repo_id, revision, token=None, must_answer=True)
        facts = hf_hub_download(repo_id, PREPROCESSING_FILE, revision=revision, repo_type="dataset")
    commit = Path(facts).parent.name
    files = _wanted(name, names, split)
    return Path(facts).parent, commit, [f"datasets/{repo_id}@{commit}/{file}" for file in files]


def is_hub_name(name: str | Path) -> bool:
    """Whether the data set is to be looked for on the Hub: no folder, and of the form of a name there."""
    return isinstance(name, str) and not Path(name).is_dir() and bool(_NAME.fullmatch(name))


def hub_name(name: str) -> tuple[str, str | None]:
    """Returns repository and revision of `user/name[@revision]`."""
    match = _NAME.fullmatch(name)
    return match["repo_id"], match["revision"]


def download_dataset(name: str, split: str) -> Path:
    """Fetches preprocessing.json and a split's Parquet files from the Hub, all from one commit, into the local cache.

    Never code, never another kind of file. Without network, or with `HF_HUB_OFFLINE=1`, what the cache holds is used.
    A private data set opens with the token of the log-in.

    Args:
        name: `user/name[@revision]`.
        split: Whose files.

    Returns:
        The folder in the cache; its name is the commit.

    Raises:
        InputError: The repository, its revision or files of it are missing, or the download fails.
    """
    repo_id, revision = hub_name(name)
    with refusals_in_one_line(repo_id, revision, _NO_DATASET):
        names = listed_files(dataset_info, repo_id, revision, token=None)
        of_kind = {"repo_type": "dataset"}
        facts = hf_hub_download(
            repo_id, PREPROCESSING_FILE, revision=revision, local_files_only=names is None, **of_kind
        )
        folder = Path(facts).parent
        files = _wanted(name, names or [], split)
        if files:
            snapshot_download(repo_id, revision=folder.name, allow_patterns=[PREPROCESSING_FILE, *files], **of_kind)
    return folder


def _wanted(name: str, names: Iterable[str], split: str) -> list[str]:
    """Those of a repository's files that hold a split."""
    if SPLITS_FILE in names and not any(file.endswith(".parquet") for file in names):
        raise InputError(
            f"{name}: holds no images, for their licence forbids to pass them on: prepare your own copy with its"
            f" {SPLITS_FILE}, as its README.md says"
        )
    # Whole names alone, as `prepare` and `datasets` give them: none can lead out of the folder.
    shard = re.compile(rf"data/{split}-[\w-]+\.parquet")
    return sorted(file for file in names if shard.fullmatch(file))
