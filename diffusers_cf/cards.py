"""The card of a published model: everything on it is a fact of the model folder, or of a result measured with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusers_cf.loading import read_preprocessing, sha256_of


LIBRARY = "diffusers_cf"  # under `diffusers` the Hub would print a snippet that fails
TAGS = ["diffusers", "medical", "anomaly-detection", "counterfactual", "weakly-supervised", "arxiv:2207.12268"]


class Source(NamedTuple):
    """A source of data: what it is, whether its images may be passed on, and the one licence under which they may."""

    words: str
    may_be_passed_on: bool = True
    licence: str | None = None


SOURCES = {
    "phantom": Source(
        "Phantoms: the anatomy of the ICBM 2009a template, warped for each patient, with invented disease."
    ),
    "decathlon": Source("Medical Segmentation Decathlon (CC-BY-SA 4.0).", licence="cc-by-sa-4.0"),
    "brats": Source("BraTS, under its own terms: the scans are not passed on.", may_be_passed_on=False),
}
OWN_DATA = Source("Data of the publisher's own.")
# What the card says about the input, and how it calls it.
INPUT = {
    "modalities": "modalities, in this order",
    "percentile": "each is divided by this percentile of its foreground",
    "size": "pixels along a side, for the network",
    "evaluation_size": "pixels along a side, for recommended settings and scores",
    "field_mm": "field of view in mm",
    "orientation": "orientation",
    "class_names": "classes, the healthy one first",
    "signs": "sign of disease for each modality (map `signed`)",
}


def model_card(
    folder: str | Path,
    repo_id: str,
    licence: str | None = None,
    results: Sequence[Mapping] = (),
    pictures: Sequence[str] = (),
    with_code: bool = False,
) -> str:
    """README.md of a model's repository, metadata first.

    Args:
        folder: a model folder.
        repo_id: `user/name`.
        licence: of the weights, by its id on the Hub; None = none is named.
        results: RESULT.json of `diffusers-cf evaluate`, measured with this model.
        pictures: names of pictures beside the card.
        with_code: whether the repository holds the code, too.
    """
    from jinja2 import Environment, PackageLoader

    facts = _names_of_networks(Path(folder)) | read_preprocessing(folder)
    training = facts.get("training", {})
    name = repo_id.split("/")[-1]
    environment = Environment(loader=PackageLoader("diffusers_cf"), trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("model_card.md").render(
        metadata=_metadata(name, licence, results, training.get("base_model")),
        name=name,
        repo_id=repo_id,
        modalities=facts["modalities"],
        class_names=facts["class_names"],
        pictures=pictures,
        with_code=with_code,
        data=SOURCES.get(facts.get("source"), OWN_DATA).words,
        preprocessing=[(text, in_words(facts[key])) for key, text in INPUT.items() if key in facts],
        settings=[(key, in_words(value)) for key, value in facts.get("settings", {}).items()],
        chosen=facts.get("settings_chosen_by"),
        scores=[_score_row(result) for result in results],
        protocol=_protocol(results),
        checksums=[(path.relative_to(folder).as_posix(), sha256_of(path)) for path in _weights(folder)],
        **{key: training.get(key) for key in ("patients", "slices", "command", "images", "commit", "base_model")},
    )


def _names_of_networks(folder: Path) -> dict:
    """Channels and classes as far as the networks know them, for a folder without preprocessing.json."""
    unet, encoder = (folder / name / "config.json" for name in ("unet", "class_encoder"))
    channels = json.loads(unet.read_text(encoding="utf-8"))["in_channels"]
    classes = json.loads(encoder.read_text(encoding="utf-8"))["class_names"] if encoder.exists() else ["healthy"]
    return {"modalities": [f"channel {number}" for number in range(1, channels + 1)], "class_names": classes}


def _weights(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*/*.safetensors"))


def in_words(value: object) -> str:
    """A fact as the card shows it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _metadata(name: str, licence: str | None, results: Sequence[Mapping], base: str | None) -> str:
    """Front matter with the scores as `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    found = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=result["dataset"]["source"],
            dataset_name=_data_of(result),
            dataset_split=result["dataset"]["split"],
            metric_type=kind,
            metric_name=text,
            metric_value=round(value, 4),
        )
        for result in results
        for kind, text, value in (
            ("average_precision", "pixel AUPRC", result["auprc"]),
            ("dice", "ideal Dice", result["ideal_dice"]),
            ("roc_auc", "slice AUROC", result["slice_auroc"]),
        )
        if value is not None
    ]
    data = ModelCardData(
        license=licence,
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=TAGS,
        model_name=name if found else None,
        eval_results=found or None,
        metrics=["average_precision", "dice"] if found else None,
        inference=False,
        base_model=base if base and "/" in base else None,  # a Hub id, not the name of somebody's folder
    )
    return data.to_yaml().strip()


def _data_of(result: Mapping) -> str:
    return f"{result['dataset']['source']}, {result['n_patients']} patients, {result['n_slices']} slices"


def _score_row(result: Mapping) -> dict[str, str]:
    chain = result["postprocessed"]
    dice = chain["per_patient_dice"]
    interval = dice["interval"]
    text = "–" if dice["mean"] is None else f"{dice['mean']:.3f}"
    return {
        "data": f"{_data_of(result)}, split {result['dataset']['split']}",
        **{
            key: "–" if result[key] is None else f"{result[key]:.3f}" for key in ("auprc", "ideal_dice", "slice_auroc")
        },
        "postprocessed": "–" if chain["auprc"] is None else f"{chain['auprc']:.3f}",
        "dice": text + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""),
    }


def _protocol(results: Sequence[Mapping]) -> str:
    """How the scores were made, a line each, said once."""
    lines = [f"`{result['command']}` ({result['commit']})" for result in results]
    protocols = [result["protocol"] for result in results[:1]]
    lines += [f"{key}: {text}" for protocol in protocols for key, text in protocol.items()]
    return "\n".join(f"- {line}" for line in lines)
