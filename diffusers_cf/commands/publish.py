"""`diffusers-cf publish` and `publish-dataset`: a model folder or a data set to the Hub, with a card made of facts."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from diffusers_cf.commands.options import DTYPES, open_pipeline
from diffusers_cf.data.preprocessing import read_preprocessing as read_dataset_facts
from diffusers_cf.errors import InputError
from diffusers_cf.hub.datasets import push_dataset
from diffusers_cf.hub.pictures import PHANTOM_PICTURE, phantom_picture
from diffusers_cf.hub.published_results import checked_result
from diffusers_cf.hub.publishing import push_model
from diffusers_cf.hub.sources import SOURCES
from diffusers_cf.loading import check_model_folder, read_preprocessing
from diffusers_cf.model_facts import check_publishable
from diffusers_cf.provenance import model_fingerprint


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf publish`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder")
    add("--scores", nargs="+", default=[], metavar="RESULT.json", help="what evaluate measured with this model")
    add(
        "--with_code",
        action="store_true",
        help="the code, too, for users without this package: DiffusionPipeline with trust_remote_code=True",
    )
    add("--data_license", help="of the training data, where their source does not say it, as the decathlon's does")
    _add_repository_arguments(add, "of the weights")


def add_publish_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf publish-dataset`."""
    parser.add_argument("dataset", metavar="DATASET", help="a folder written by diffusers-cf prepare")
    _add_repository_arguments(
        parser.add_argument, "of the data set, needed unless it comes from phantom, decathlon or brats"
    )


def _add_repository_arguments(add, whose_licence: str) -> None:
    add("--repo_id", required=True, metavar="USER/NAME", help="made where it doesn't exist")
    add("--pictures", nargs="+", default=[], metavar="FILE.png", help="of data that may be shown")
    add("--license", help=f"{whose_licence}, by its id on the Hub, such as apache-2.0")
    add("--private", action="store_true", help="a new repository that others can't read")
    add("--token", help="in the place of the one that `hf auth login` stored")
    add("--commit_message")


def run_publish(args: argparse.Namespace) -> int:
    """Pushes the model and prints where it is.

    Raises:
        InputError: the folder, a result or a picture can't be published, or the Hub does not take it.
    """
    if not Path(args.model).is_dir():
        raise InputError(f"{args.model}: no such folder")
    check_model_folder(args.model)
    facts = read_preprocessing(args.model)
    for name in ("modalities", "class_names"):
        if not facts.get(name):
            raise InputError(f"{args.model}: its preprocessing.json does not name its {name}: nobody could use it")
    results = [_read_result(Path(path), args.model) for path in args.scores]
    with TemporaryDirectory() as folder:
        pictures = args.pictures or _own_pictures(args.model, facts, Path(folder))
        address = push_model(
            args.model,
            args.repo_id,
            token=args.token,
            private=args.private or None,
            licence=args.license,
            data_licence=args.data_license,
            results=results,
            pictures=pictures,
            commit_message=args.commit_message,
            with_code=args.with_code,
        )
    print(f"{args.model} -> {address}")
    return 0


def run_publish_dataset(args: argparse.Namespace) -> int:
    """Pushes the data set, or splits and settings of one whose images may not be passed on, and prints where it is.

    Raises:
        InputError: the folder or a picture can't be published, or the Hub does not take it.
    """
    facts = read_dataset_facts(args.dataset)
    address, with_images = push_dataset(
        args.dataset,
        args.repo_id,
        licence=args.license,
        token=args.token,
        private=args.private or None,
        pictures=args.pictures,
        commit_message=args.commit_message,
    )
    if not with_images:
        words = SOURCES[facts["source"]].words
        print(
            f"{args.dataset}: the images stay here ({words}) Published are splits.json, settings and how to use them"
        )
    print(f"{args.dataset} -> {address}")
    return 0


def _own_pictures(model: str, facts: Mapping, folder: Path) -> list[Path]:
    """A picture of data that anybody may see, for a model that was trained on such."""
    if facts.get("source") != "phantom":
        return []
    pipe = open_pipeline(model, "cuda" if torch.cuda.is_available() else "cpu")
    check_publishable(pipe, model)
    return phantom_picture(pipe, folder / PHANTOM_PICTURE)


def _read_result(path: Path, model: str) -> Mapping:
    """A result, if it was measured with the weights of this model."""
    try:
        result = checked_result(json.loads(path.read_text(encoding="utf-8")), str(path))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as a RESULT.json ({error})") from None
    if result.get("dtype") not in (*DTYPES,):
        raise InputError(f"{path}: no RESULT.json of evaluate (lacks a known dtype)")
    if "model_sha256" not in result:
        raise InputError(f"{path}: does not say which weights it measured: evaluate again with this version")
    if result["model_sha256"] != model_fingerprint(open_pipeline(model)):
        raise InputError(f"{path}: was measured with other weights than those of {model}")
    return result
