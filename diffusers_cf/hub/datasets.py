"""A slice data set's way to the Hub: its images where their licence allows it, else how to make them from one's own."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet

from diffusers_cf.data.download import SPLITS_FILE
from diffusers_cf.data.preprocessing import PREPROCESSING_FILE, SPLITS, read_preprocessing, shards_of
from diffusers_cf.data.slices import check_count, slice_features
from diffusers_cf.errors import InputError
from diffusers_cf.hub.dataset_cards import dataset_card
from diffusers_cf.hub.pictures import checked_pictures
from diffusers_cf.hub.public_facts import OF_DATASET, public_facts
from diffusers_cf.hub.publishing import create_repository, push_files, repository_files, strange_file
from diffusers_cf.hub.sources import SOURCES, licence_of_data, source_of


_SHARD = re.compile(r"data/[^/]+\.parquet")


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
    (`sources.SOURCES`); the card then says how to make the data set from one's own copy. What the Hub holds already isn't
    sent again; shards that the folder doesn't have are deleted there.

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
        InputError: the data set is not whole, lacks a licence, a picture can't be published, or the Hub did not take it.
    """
    folder = Path(folder)
    facts = read_preprocessing(folder)
    source = source_of(facts)
    pictures = checked_pictures(pictures, facts)
    licence = _licence(folder, facts, licence)
    shards = _checked_shards(folder, facts)
    facts = public_facts(facts, OF_DATASET)
    repo_id = create_repository(repo_id, token, private, "dataset")
    files = {SPLITS_FILE: _as_json(patients_of_splits(shards)), PREPROCESSING_FILE: _as_json(facts)}
    files |= pictures
    if source.may_be_passed_on:
        files |= {f"data/{path.name}": path for paths in shards.values() for path in paths}
    files["README.md"] = dataset_card(facts, repo_id, licence, list(pictures), source.may_be_passed_on).encode()
    there = repository_files(repo_id, token, "dataset")
    if PREPROCESSING_FILE not in there and (strange := strange_file(there)):
        raise InputError(f"{repo_id}: holds something else already ({strange}): choose another --repo_id")
    stale = [name for name in there if _SHARD.fullmatch(name) and name not in files]
    message = commit_message or f"Upload slice data set{'' if source.may_be_passed_on else ': splits and settings'}"
    address = push_files(folder, repo_id, files, stale, token=token, commit_message=message, repo_type="dataset")
    return address, source.may_be_passed_on


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
    if facts.get("source") not in SOURCES and given is None:
        raise InputError(
            f"{folder}: nothing says under which licence its images may be passed on: name it by --license"
        )
    return licence_of_data(str(folder), facts, given)


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
