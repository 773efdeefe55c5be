"""`diffusers-cf publish` and `publish-dataset`: push a model folder or a data set to the Hub, with a card."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from diffusers_cf.errors import InputError, reading
from diffusers_cf.files import read_json
from diffusers_cf.provenance import model_fingerprint


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf publish`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder")
    text = "results of `diffusers-cf evaluate` with this model, for the card; default: none"
    add("--scores", nargs="+", default=[], metavar="RESULT.json", help=text)
    text = "publish the code too, for DiffusionPipeline.from_pretrained(.., trust_remote_code=True); default: off"
    add("--with_code", action="store_true", help=text)
    add("--data_license", help="license of the training data, such as cc-by-4.0; default: that of their source")
    _add_repository_arguments(add, "license of the weights, by its id on the Hub such as apache-2.0; default: none")


def add_publish_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf publish-dataset`."""
    parser.add_argument("dataset", metavar="DATASET", help="a folder written by diffusers-cf prepare")
    text = "license of the data set, by its id on the Hub such as apache-2.0; required unless the source is phantom, "
    text += "decathlon or brats"
    _add_repository_arguments(parser.add_argument, text)


def _add_repository_arguments(add, license_text: str) -> None:
    add("--repo_id", required=True, metavar="USER/NAME", help="repository on the Hub; created if it does not exist")
    add("--pictures", nargs="+", default=[], metavar="FILE.png", help="of data that may be shown; default: none")
    add("--license", help=license_text)
    add("--private", action="store_true", default=None, help="make a new repository private; default: public")
    add("--token", help="access token of the Hub; default: the one that `hf auth login` stored")


def run_publish(args: argparse.Namespace) -> None:
    """Push the model and print the commit's address."""
    from diffusers_cf.hub.publishing import push_model

    if not Path(args.model).is_dir():
        raise InputError(f"{args.model}: no such folder")
    results = [_read_result(Path(path), args.model) for path in args.scores]
    address = push_model(
        args.model, args.repo_id, results=results, data_license=args.data_license, with_code=args.with_code,
        **_repository_options(args),
    )  # fmt: skip
    print(f"{args.model} -> {address}")


def run_publish_dataset(args: argparse.Namespace) -> None:
    """Push the data set, or only its splits and settings if its images must not be shared, and print the address."""
    from diffusers_cf.hub.cards import SOURCES
    from diffusers_cf.hub.publishing import push_dataset

    address, with_images = push_dataset(args.dataset, args.repo_id, **_repository_options(args))
    if not with_images:
        words = SOURCES[read_json(Path(args.dataset) / "preprocessing.json")["source"]].words
        print(f"{args.dataset}: images not pushed ({words}) Pushed are splits.json, settings and how to use them")
    print(f"{args.dataset} -> {address}")


def _repository_options(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("token", "private", "license", "pictures")}


def _read_result(path: Path, model: str) -> Mapping:
    """Read a RESULT.json and check that it was measured with the weights of this model."""
    from diffusers_cf.hub.cards import scores_of
    from diffusers_cf.inference import open_pipeline

    result = read_json(path)
    with reading(path, "RESULT.json of evaluate"):
        scores_of(result)
        measured = result["model_sha256"]
    if measured != model_fingerprint(open_pipeline(model)):
        raise InputError(f"{path}: was measured with other weights than those of {model}")
    return result
