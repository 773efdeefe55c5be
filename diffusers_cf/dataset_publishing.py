"""A slice data set's way to the Hub: its images where their licence allows it, else how to make them from one's own."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet

from diffusers_cf.cards import OWN_DATA, SOURCES
from diffusers_cf.data.download import SPLITS_FILE
from diffusers_cf.data.preprocessing import PREPROCESSING_FILE, SPLITS, read_preprocessing, shards_of
from diffusers_cf.data.slices import check_count, slice_features
from diffusers_cf.dataset_cards import dataset_card
from diffusers_cf.errors import InputError
from diffusers_cf.hub import create_repository, push_files, repository_files


# What preprocessing.json tells everybody: not the name of the file or folder that the data was made from.
PUBLISHED = (
    "version", "source", "modalities", "class_names", "size", "channels", "dtype", "scale", "field_mm", "percentile",
    "orientation", "has_masks", "seed", "split_sha256", "labels_sha256", "lenient", "note", "splits", "skipped",
)  # fmt: skip
_PATH = re.compile(r"(?<!\S)(?:[A-Za-z]:\\|~?/)\S+")
_SHARD = re.compile(r"data/[^/]+\.parquet")
# What a repository may hold before the first push of a data set.
_BLANK = {".gitattributes", "README.md", "LICENSE"}


def push_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    licence: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    pictures: Sequence[str | Path] = (),
    commit_message: str | None = None,
) -> tuple[str, bool]:
    """Pushes a slice data set, with a card made from its facts, as one commit.

    splits.json (patients by split), preprocessing.json and the card go always, the images unless their source forbids it
    (`cards.SOURCES`); the card then says how to make the data set from one's own copy. What the Hub holds already isn't sent again; shards that the folder doesn't have are
    deleted there.

    Args:
        folder: a finished slice data set.
        repo_id: `name` or `user/name`; made where it doesn't exist.
        licence: of the data set, by its id on the Hub; needed where the source does not say it.
        token: instead of the one that `hf auth login` stored.
        private: who may read a new repository; None = as the account's default has it.
        pictures: for the card.
        commit_message: of the commit.

    Returns:
        The commit's address, and whether the images went with it.

    Raises:
        InputError: the data set is not whole, lacks a licence, or the Hub did not take it.
    """
    folder, pictures = Path(folder), [Path(picture) for picture in pictures]
    facts = read_preprocessing(folder)
    source = SOURCES.get(facts.get("source"), OWN_DATA)
    licence = _licence(folder, facts, licence)
    shards = _checked_shards(folder, facts)
    facts = published_facts(facts)
    repo_id = create_repository(repo_id, token, private, "dataset")
    files = {SPLITS_FILE: _as_json(patients_of_splits(shards)), PREPROCESSING_FILE: _as_json(facts)}
    files |= {picture.name: picture for picture in pictures}
    if source.may_be_passed_on:
        files |= {f"data/{path.name}": path for paths in shards.values() for path in paths}
    names = [picture.name for picture in pictures]
    files["README.md"] = dataset_card(facts, repo_id, licence, names, source.may_be_passed_on).encode()
    there = repository_files(folder, repo_id, token, "dataset")
    strange = sorted(set(there) - _BLANK)
    if strange and PREPROCESSING_FILE not in there:
        raise InputError(f"{repo_id}: holds something else already ({strange[0]}): choose another --repo_id")
    stale = [name for name in there if _SHARD.fullmatch(name) and name not in files]
    message = commit_message or f"Upload slice data set{'' if source.may_be_passed_on else ': splits and settings'}"
    address = push_files(folder, repo_id, files, stale, token=token, commit_message=message, repo_type="dataset")
    return address, source.may_be_passed_on


def published_facts(facts: dict) -> dict:
    """preprocessing.json without what only the publisher's machine knows: names of inputs, and paths in notes."""
    kept = {name: facts[name] for name in PUBLISHED if name in facts}
    return {name: _PATH.sub("PATH", value) if isinstance(value, str) else value for name, value in kept.items()}


def patients_of_splits(shards: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Sorted ids of each split's patients, as `prepare --split_file` takes them, from the split's Parquet files."""
    return {
        split: sorted(
            {
                patient
                for path in paths
                for patient in pyarrow.parquet.read_table(path, columns=["patient"])["patient"].unique().to_pylist()
            }
        )
        for split, paths in shards.items()
    }


def _licence(folder: Path, facts: dict, given: str | None) -> str | None:
    source = SOURCES.get(facts.get("source"))
    if source is None and given is None:
        raise InputError(
            f"{folder}: nothing says under which licence its images may be passed on: name it by --license"
        )
    if source and source.licence and given not in (None, source.licence):
        raise InputError(f"{folder}: {source.words} Its licence is {source.licence} for copies too, not {given}")
    return given or (source.licence if source else None)


def _checked_shards(folder: Path, facts: dict) -> dict[str, list[Path]]:
    """The Parquet files of each split, after a look whether they are whole and hold the right columns.

    Raises:
        InputError: they are not.
    """
    shards = {split: shards_of(folder, split) for split in SPLITS}
    features = slice_features(facts["class_names"])
    for split, paths in shards.items():
        rows = 0
        for path in paths:
            try:
                file = pyarrow.parquet.read_metadata(path)
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: can't be read ({str(error).splitlines()[0]})") from None
            if datasets.Features.from_arrow_schema(file.schema.to_arrow_schema()) != features:
                raise InputError(f"{path}: has other columns or classes than {PREPROCESSING_FILE} says")
            rows += file.num_rows
        check_count(str(folder), split, rows, facts["splits"][split]["slices"])
    return shards


def _as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
