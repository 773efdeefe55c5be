"""`diffusers-cf publish`: a model folder to the Hub, with a card made of facts."""

import argparse
import json
from pathlib import Path

from diffusers_cf.cards import SOURCES
from diffusers_cf.errors import InputError
from diffusers_cf.hub import push_model
from diffusers_cf.inference_options import DTYPES, open_pipeline
from diffusers_cf.loading import check_model_folder, read_preprocessing
from diffusers_cf.provenance import model_fingerprint


# What the card takes from RESULT.json.
_NEEDED = {"auprc", "ideal_dice", "slice_auroc", "postprocessed", "dataset", "protocol", "command", "commit", "dtype"}
_NEEDED |= {"n_patients", "n_slices"}


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf publish`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder")
    add("--repo_id", required=True, metavar="USER/NAME", help="made where it doesn't exist")
    add("--scores", nargs="+", default=[], metavar="RESULT.json", help="what evaluate measured with this model")
    add("--pictures", nargs="+", default=[], metavar="FILE.png", help="of data that may be shown")
    add("--license", help="of the weights, by its id on the Hub, such as apache-2.0")
    add(
        "--with_code",
        action="store_true",
        help="the code, too, for users without this package: DiffusionPipeline with trust_remote_code=True",
    )
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
    for picture in args.pictures:
        _check_picture(Path(picture), facts)
    address = push_model(
        args.model,
        args.repo_id,
        token=args.token,
        private=args.private or None,
        licence=args.license,
        results=results,
        pictures=args.pictures,
        commit_message=args.commit_message,
        with_code=args.with_code,
    )
    print(f"{args.model} -> {address}")
    return 0


def _read_result(path: Path, model: str) -> dict:
    """A result, if it was measured with the weights of this model."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(_NEEDED - result.keys())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: can't be read as a RESULT.json ({error})") from None
    if missing or result["dtype"] not in DTYPES:
        raise InputError(f"{path}: no RESULT.json of evaluate (lacks {(missing or ['a known dtype'])[0]})")
    if "model_sha256" not in result:
        raise InputError(f"{path}: does not say which weights it measured: evaluate again with this version")
    if result["model_sha256"] != model_fingerprint(open_pipeline(model, dtype=result["dtype"])):
        raise InputError(f"{path}: was measured with other weights than those of {model}")
    return result


def _check_picture(path: Path, facts: dict) -> None:
    if not path.is_file() or path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"{path}: a picture must be a .png or .jpg file")
    words, may_be_shown = SOURCES.get(facts.get("source"), ("", True))
    if not may_be_shown:
        raise InputError(f"{path}: pictures of this model's training data may not be shown ({words})")
