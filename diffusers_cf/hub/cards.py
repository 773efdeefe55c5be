"""The card of a published model: everything on it is a fact of the model folder, or of a result measured with it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_cf.data.intensity import normalize_of, unit_in_words
from diffusers_cf.hub.public_facts import OF_MODEL, public_command, public_facts
from diffusers_cf.hub.sources import licence_of_data, source_of
from diffusers_cf.loading import WEIGHTS, read_preprocessing, sha256_of


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LIBRARY = "diffusers_cf"  # under `diffusers` the Hub would print a snippet that fails
TAGS = ["diffusers", "anomaly-detection", "counterfactual", "weakly-supervised", "arxiv:2207.12268"]
# Key in RESULT.json, kind on the Hub, name, and the lines of the protocol that say how it was made.
_PIXELS = ("resolution", "pixels", "counts")
METRICS = (
    ("auprc", "average_precision", "pixel AUPRC", _PIXELS),
    ("ideal_dice", "dice", "ideal Dice", (*_PIXELS, "ideal_threshold")),
    ("slice_auroc", "roc_auc", "slice AUROC", ("slice_auroc",)),
)
# What the card says about the input, and how it calls it.
INPUT = {
    "modalities": "modalities, in this order",
    "normalize": "intensity scale",
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
    data_licence: str | None = None,
) -> str:
    """README.md of a model's repository, metadata first.

    Args:
        folder: a model folder.
        repo_id: `user/name`.
        licence: of the weights, by its id on the Hub; None = none is named.
        results: RESULT.json of `diffusers-cf evaluate`, measured with this model.
        pictures: names of pictures beside the card.
        with_code: whether the repository holds the code, too.
        data_licence: of the training data, where their source does not say it.
    """
    from jinja2 import Environment, PackageLoader

    facts = _names_of_networks(Path(folder)) | public_facts(read_preprocessing(folder), OF_MODEL)
    training, source = facts.get("training", {}), source_of(facts)
    name, normalize = repo_id.split("/")[-1], normalize_of(facts)
    known = facts | {"normalize": f"{normalize}, {unit_in_words(normalize)}"}
    environment = Environment(loader=PackageLoader("diffusers_cf"), trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("model_card.md").render(
        metadata=_metadata(name, licence, results, training.get("base_model"), source.medical),
        name=name,
        repo_id=repo_id,
        modalities=facts["modalities"],
        class_names=facts["class_names"],
        pictures=pictures,
        with_code=with_code,
        source=source,
        data_licence=licence_of_data(str(folder), facts, data_licence),
        preprocessing=[(text, in_words(known[key])) for key, text in INPUT.items() if key in known],
        settings=[(key, in_words(value)) for key, value in facts.get("settings", {}).items()],
        settings_by=facts.get("settings_chosen_by"),
        threshold_by=facts.get("threshold_chosen_by"),
        paper_threshold=in_words(facts["paper_threshold"]) if "paper_threshold" in facts else None,
        paper_threshold_by=facts.get("paper_threshold_chosen_by"),
        scores=[_score_row(result) for result in results],
        protocol=_protocol(results),
        checksums=[(path.relative_to(folder).as_posix(), sha256_of(path)) for path in _weights(folder)],
        training=training,
    )


def _names_of_networks(folder: Path) -> dict:
    """Channels and classes as far as the networks know them, for a folder without preprocessing.json."""
    unet, encoder = (folder / name / "config.json" for name in ("unet", "class_encoder"))
    channels = json.loads(unet.read_text(encoding="utf-8"))["in_channels"]
    classes = json.loads(encoder.read_text(encoding="utf-8"))["class_names"] if encoder.exists() else ["healthy"]
    return {"modalities": [f"channel {number}" for number in range(1, channels + 1)], "class_names": classes}


def _weights(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*/*") if WEIGHTS.fullmatch(path.name))


def in_words(value: object) -> str:
    """A fact as the card shows it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _metadata(name: str, licence: str | None, results: Sequence[Mapping], base: str | None, medical: bool) -> str:
    """Front matter with the scores as `model-index`."""
    from huggingface_hub import ModelCardData

    found = [score for result in results for score in _scores_of(result)]
    data = ModelCardData(
        license=licence,
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=TAGS[:1] + ["medical"] + TAGS[1:] if medical else TAGS,
        model_name=name if found else None,
        eval_results=found or None,
        metrics=["average_precision", "dice"] if found else None,
        inference=False,
        base_model=base if base and "/" in base else None,  # a Hub id, not the name of somebody's folder
    )
    return data.to_yaml().strip()


def _scores_of(result: Mapping) -> Iterator["EvalResult"]:
    """The scores of one result, each with the part of the protocol that it was made by.

    What the Hub itself has verified, and its token for that, are the Hub's to write.
    """
    from huggingface_hub import EvalResult

    chain = result["postprocessed"]
    dice = chain["per_patient_dice"]
    extra = {key: dice[key] for key in ("interval", "threshold") if dice[key] is not None}
    rows = [(kind, text, result[key], keys, {}) for key, kind, text, keys in METRICS]
    rows += [
        (kind, f"{text}, post-processed", chain[key], (*keys, "postprocessed"), {})
        for key, kind, text, keys in METRICS
    ]
    keys = ("per_patient_dice", "patients_without_lesion", "interval", "postprocessed")
    rows.append(("dice", "mean Dice per patient, post-processed", dice["mean"], keys, extra))
    for kind, text, value, keys, arguments in rows:
        if value is not None:
            yield EvalResult(
                task_type="image-segmentation",
                dataset_type=result["dataset"]["source"],
                dataset_name=_data_of(result),
                dataset_split=result["dataset"]["split"],
                metric_type=kind,
                metric_name=text,
                metric_value=round(value, 4),
                metric_args=arguments | {key: result["protocol"][key] for key in keys if key in result["protocol"]},
            )


def _data_of(result: Mapping) -> str:
    return f"{result['dataset']['source']}, {result['n_patients']} patients, {result['n_slices']} slices"


def _score_row(result: Mapping) -> dict[str, str]:
    chain = result["postprocessed"]
    dice = chain["per_patient_dice"]
    interval = dice["interval"]
    scores = {key: _three_digits(result[key]) for key, *_ in METRICS}
    scores |= {f"{key}_postprocessed": _three_digits(chain[key]) for key, *_ in METRICS}
    text = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return {"data": f"{_data_of(result)}, split {result['dataset']['split']}", **scores,
            "dice": _three_digits(dice["mean"]) + text}  # fmt: skip


def _three_digits(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _protocol(results: Sequence[Mapping]) -> str:
    """How the scores were made, a line each: what is the same for all of them once, at the end."""
    first = results[0]["protocol"] if results else {}
    common = {key: text for key, text in first.items() if all(one["protocol"].get(key) == text for one in results)}
    lines = []
    for result in results:
        lines.append(f"- `{public_command(result['command'])}` ({result['commit']})")
        lines += [f"  - {key}: {text}" for key, text in result["protocol"].items() if key not in common]
    return "\n".join(lines + [f"- {key}: {text}" for key, text in common.items()])
