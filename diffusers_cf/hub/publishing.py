"""Publishing model folders and slice data sets on the Hub, each as one commit with a card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, create_repo
from huggingface_hub.errors import HTTPError
from PIL import Image
from pyarrow.parquet import read_table

from diffusers_cf.data.preprocessing import SPLITS_FILE, read_preprocessing, shards_of
from diffusers_cf.data.slices import check_count
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError, first_line, reading
from diffusers_cf.hub.cards import SOURCES, dataset_card, license_of_data, model_card, source_of
from diffusers_cf.hub.remote_code import code_files, is_code
from diffusers_cf.inference import check_publishable, open_pipeline
from diffusers_cf.loading import (
    MODEL_INDEX,
    PIPELINE_CLASS_WITH_CODE,
    PREPROCESSING,
    SHARD_INDEX,
    WEIGHTS,
    check_model_folder,
    read_components,
    read_json,
)


# Entries of preprocessing.json that are published: no names of files or folders.
_OF_BOTH = (
    "version", "source", "modalities", "class_names", "size", "channels", "dtype", "scale", "field_mm", "percentile",
    "normalize", "orientation", "has_masks", "seed", "split_sha256", "labels_sha256", "lenient", "note",
)  # fmt: skip
OF_DATASET = (*_OF_BOTH, "splits", "skipped")
OF_MODEL = (
    *_OF_BOTH, "signs", "settings", "settings_chosen_by", "threshold_chosen_by", "paper_threshold",
    "paper_threshold_chosen_by", "evaluation_size", "training", "student",
)  # fmt: skip


def push_model(
    folder: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None,
    license: str | None = None, data_license: str | None = None, results: Sequence[Mapping] = (),
    pictures: Sequence[str | Path] = (), with_code: bool = False,
) -> str:  # fmt: skip
    """Push a model folder with a card as one commit and return the commit's address.

    Files that the Hub already has are not sent again. Code of an earlier push, and weights of the same variants that the
    folder doesn't have, are deleted on the Hub.

    Args:
        folder (`str` or `Path`): a model folder.
        repo_id (`str`): `name` or `user/name`; created if it doesn't exist.
        token (`str`, *optional*): instead of the one that `hf auth login` stored.
        private (`bool`, *optional*): whether a new repository is private; None is the account's default.
        license (`str`, *optional*): of the weights, by its id on the Hub.
        data_license (`str`, *optional*): of the training data, if their source does not have one.
        results (`Sequence[Mapping]`): contents of RESULT.json files, for the card.
        pictures (`Sequence[str | Path]`): PNG or JPEG files for the card.
        with_code (`bool`): add the code, for users without this package.

    Raises:
        InputError: the model is incomplete or not usable, a picture can't be published, or the Hub refuses.
    """
    folder = Path(folder)
    variants = {match["variant"] for path in folder.glob("*/*") if (match := _weights(path.name))} or {None}
    names = {name for variant in variants for name in check_model_folder(folder, variant)}
    pipe = open_pipeline(str(folder), variant=None if None in variants else min(variants))
    check_publishable(pipe, str(folder))
    facts = {name: value for name, value in pipe.preprocessing.items() if name in OF_MODEL}
    pictures = checked_pictures(pictures, facts)
    data_license = license_of_data(str(folder), facts, data_license)

    files = {name: folder / name for name in sorted(names)} | pictures
    for name in (name for name in names if name.endswith(".json")):
        files[name] = _json({key: value for key, value in read_json(folder / name).items() if key != "_name_or_path"})
    class_name = PIPELINE_CLASS_WITH_CODE if with_code else PIPELINE_CLASS_WITH_CODE[1]
    files[MODEL_INDEX] = _json(read_json(folder / MODEL_INDEX) | {"_class_name": class_name})
    files[PREPROCESSING] = _json(facts)
    if with_code:
        code = code_files(read_components(folder / MODEL_INDEX), facts)
        files |= {name: text.encode() for name, text in code.items()}

    repo_id, there = open_repository(repo_id, token, private)
    card = model_card(folder, repo_id, license, results, list(pictures), with_code, data_license)
    files["README.md"] = card.encode()
    weights = {name: match["variant"] for name in there if (match := _weights(Path(name).name))}
    stale = [name for name in there if is_code(name) or (name in weights and weights[name] in variants)]
    return _push(repo_id, files, stale, token, "Upload CounterfactualDDIMPipeline")


def push_dataset(
    folder: str | Path, repo_id: str, *, license: str | None = None, token: str | None = None,
    private: bool | None = None, pictures: Sequence[str | Path] = (),
) -> tuple[str, bool]:  # fmt: skip
    """Push a slice data set with a card as one commit; arguments as in [`push_model`].

    If the source does not allow sharing its images, only splits.json and preprocessing.json are pushed; the card says how
    to make the data set from another copy of the source. Shards that the folder doesn't have are deleted on the Hub.

    Returns:
        The commit's address, and whether the images were pushed.

    Raises:
        InputError: the data set is incomplete or lacks a license, a picture can't be published, or the Hub refuses.
    """
    folder = Path(folder)
    facts = read_preprocessing(folder)
    source, pictures = source_of(facts), checked_pictures(pictures, facts)
    if facts.get("source") not in SOURCES and license is None:
        raise InputError(f"{folder}: nothing says under which license its images may be shared: name it by --license")
    license = license_of_data(str(folder), facts, license)
    facts = {name: value for name, value in facts.items() if name in OF_DATASET}
    patients, shards = {}, {}
    for split in SPLITS:
        names = []
        for path in shards_of(folder, split):
            with reading(path, "Parquet file"):
                names += read_table(path, columns=["patient"])["patient"].to_pylist()
            shards[f"data/{path.name}"] = path
        check_count(str(folder), split, len(names), facts["splits"][split]["slices"])
        patients[split] = sorted(set(names))
    files = {SPLITS_FILE: _json(patients), PREPROCESSING: _json(facts)} | pictures
    files |= shards if source.shareable else {}
    repo_id, there = open_repository(repo_id, token, private, "dataset")
    files["README.md"] = dataset_card(facts, repo_id, license, list(pictures), source.shareable).encode()
    stale = [name for name in there if Path(name).match("data/*.parquet")]
    return _push(repo_id, files, stale, token, "Upload slice data set", "dataset"), source.shareable


def open_repository(
    name: str, token: str | None = None, private: bool | None = None, repo_type: str = "model"
) -> tuple[str, list[str]]:
    """Create a repository for a model or data set unless it exists.

    Returns:
        `user/name`, and the names of the files that it holds.

    Raises:
        InputError: the Hub refuses, or the repository holds something that this package has not pushed.
    """
    with _pushing(name):
        repo_id = create_repo(name, token=token, private=private, exist_ok=True, repo_type=repo_type).repo_id
        there = HfApi(token=token).list_repo_files(repo_id, repo_type=repo_type)
    foreign = set(there) - {".gitattributes", "README.md", "LICENSE"}  # files of a new repository
    if foreign and PREPROCESSING not in there:
        raise InputError(f"{repo_id}: holds something else already ({min(foreign)}): choose another --repo_id")
    return repo_id, there


def _push(
    repo_id: str, files: Mapping[str, Path | bytes], stale: Sequence[str], token: str | None, message: str,
    repo_type: str = "model",
) -> str:  # fmt: skip
    """Make one commit that adds files and deletes the stale files that are not among them; return its address."""
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in stale if name not in files]
    with _pushing(repo_id):
        api = HfApi(token=token)
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).commit_url


@contextmanager
def _pushing(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one line."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        if isinstance(error, RuntimeError) and error.__cause__:  # of a failed upload; the cause has the reason
            reason += f" {first_line(error.__cause__)}"
        raise InputError(f"{repo_id}: can't push to it ({reason}); `hf auth login` stores a token") from None


def checked_pictures(pictures: Sequence[str | Path], facts: Mapping) -> dict[str, Path]:
    """Return the pictures of a card by file name.

    Raises:
        InputError: one is no PNG or JPEG file, two have the same name, or pictures of these data must not be shown.
    """
    found, source = {}, source_of(facts)
    for path in map(Path, pictures):
        if not source.shareable:
            raise InputError(f"{path}: pictures of these data must not be shown ({source.words})")
        if path.name in found:
            raise InputError(f"{path}: another picture has the same name")
        with reading(path, "PNG or JPEG picture"), Image.open(path, formats=["PNG", "JPEG"]) as image:
            image.verify()
        found[path.name] = path
    return found


def _weights(name: str):
    return WEIGHTS.fullmatch(name) or SHARD_INDEX.fullmatch(name)


def _json(value: Mapping) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
