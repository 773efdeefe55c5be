"""Cards of published models and data sets, made from their preprocessing.json and from results of `evaluate`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader

from diffusers_cf.data.intensity import normalize_of, unit_in_words
from diffusers_cf.data.splits import SPLITS
from diffusers_cf.errors import InputError
from diffusers_cf.loading import WEIGHTS, read_preprocessing, sha256_of


LIBRARY = "diffusers_cf"  # with `diffusers` the Hub would print a snippet that fails
# Key in RESULT.json, metric type on the Hub, and name.
METRICS = (
    ("auprc", "average_precision", "pixel AUPRC"),
    ("ideal_dice", "dice", "ideal Dice"),
    ("slice_auroc", "roc_auc", "slice AUROC"),
)
# Entries of preprocessing.json about a model's input, in the words of the card.
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


class Source(NamedTuple):
    """A source of data.

    Attributes:
        words (`str`): description.
        terms (`str`): more about its license.
        shareable (`bool`): whether images may be shared and pictures of them shown.
        license (`str`, *optional*): id on the Hub of the license that copies must have.
        medical (`bool`): whether images are scans of patients or look like scans.
    """

    words: str
    terms: str = ""
    shareable: bool = True
    license: str | None = None
    medical: bool = True


SOURCES = {
    "phantom": Source(
        "Phantoms: the anatomy of the ICBM 2009a template, warped for each patient, with invented disease.",
        "They show no real patient. The template: copyright McConnell Brain Imaging Centre, Montreal Neurological"
        " Institute, McGill University; see <https://nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009/> for its terms.",
    ),
    "decathlon": Source("Medical Segmentation Decathlon (CC-BY-SA 4.0).", license="cc-by-sa-4.0"),
    "brats": Source(
        "BraTS, whose terms don't allow sharing the scans.",
        "The organisers provide the scans under their terms.",
        shareable=False,
    ),
}


def source_of(facts: Mapping) -> Source:
    """Return the source that a preprocessing.json names; unknown sources count as the publisher's own data."""
    return SOURCES.get(str(facts.get("source")), Source("The publisher's own data.", medical=False))


def license_of_data(where: str, facts: Mapping, given: str | None) -> str | None:
    """Return the id on the Hub of the data's license: that of the source, else the given one.

    Raises:
        InputError: both exist and differ; the message starts with `where`.
    """
    source = source_of(facts)
    if source.license and given not in (None, source.license):
        raise InputError(f"{where}: {source.words} Copies must have the license {source.license}, not {given}")
    return given or source.license


def model_card(
    folder: str | Path, repo_id: str, license: str | None = None, results: Sequence[Mapping] = (),
    pictures: Sequence[str] = (), with_code: bool = False, data_license: str | None = None,
) -> str:  # fmt: skip
    """Return README.md of a model's repository.

    Args:
        folder (`str` or `Path`): the model folder.
        repo_id (`str`): `user/name`.
        license (`str`, *optional*): of the weights, by its id on the Hub.
        results (`Sequence[Mapping]`): contents of RESULT.json files measured with this model.
        pictures (`Sequence[str]`): names of pictures beside the card.
        with_code (`bool`): whether the repository holds the code too.
        data_license (`str`, *optional*): of the training data, if their source does not have one.
    """
    folder = Path(folder)
    facts = {"class_names": ["healthy"]} | read_preprocessing(folder)
    training, source, normalize = facts.get("training", {}), source_of(facts), normalize_of(facts)
    known = facts | {"normalize": f"{normalize}, {unit_in_words(normalize)}"}
    name, base = repo_id.split("/")[-1], training.get("base_model", "")
    weights = [path for path in sorted(folder.glob("*/*")) if WEIGHTS.fullmatch(path.name)]
    scores = [score for result in results for score in scores_of(result)]
    medical = ["medical"] if source.medical else []
    metadata = ModelCardData(
        license=license,
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=["diffusers", *medical, "anomaly-detection", "counterfactual", "weakly-supervised", "arxiv:2207.12268"],
        model_name=name if scores else None,
        eval_results=scores or None,
        metrics=["average_precision", "dice"] if scores else None,
        inference=False,
        base_model=base if "/" in base else None,  # a Hub id, not the name of a folder
    )
    return _TEMPLATES.get_template("model_card.md").render(
        metadata=metadata.to_yaml().strip(),
        name=name,
        repo_id=repo_id,
        facts=facts,
        pictures=pictures,
        with_code=with_code,
        source=source,
        data_license=license_of_data(str(folder), facts, data_license),
        preprocessing=[(text, known[key]) for key, text in INPUT.items() if key in known],
        scores=scores,
        protocol=_protocol(results),
        checksums=[(path.relative_to(folder).as_posix(), sha256_of(path)) for path in weights],
        training=training,
    )


def dataset_card(
    facts: Mapping, repo_id: str, license: str | None = None, pictures: Sequence[str] = (), images: bool = True
) -> str:
    """Return README.md of a data set's repository.

    Args:
        facts (`Mapping`): the published preprocessing.json.
        repo_id (`str`): `user/name`.
        license (`str`, *optional*): of the data set, by its id on the Hub.
        pictures (`Sequence[str]`): names of pictures beside the card.
        images (`bool`): whether the repository holds the slices, or only the splits and settings.
    """
    splits = {name: facts["splits"][name] for name in SPLITS if facts["splits"][name]["slices"]}
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]  # for `datasets.load_dataset`
    source, name, normalize = source_of(facts), repo_id.split("/")[-1], normalize_of(facts)
    metadata = DatasetCardData(
        license=license,
        pretty_name=name,
        task_categories=["image-segmentation"],
        tags=[*(["medical"] if source.medical else []), "anomaly-detection", "weakly-supervised", LIBRARY],
        **({"configs": [{"config_name": "default", "data_files": files}]} if images else {"viewer": False}),
    )
    return _TEMPLATES.get_template("dataset_card.md").render(
        metadata=metadata.to_yaml().strip(),
        name=name,
        repo_id=repo_id,
        facts=facts,
        splits=splits,
        pictures=pictures,
        images=images,
        source=source,
        license=license,
        pixel_mm=facts["field_mm"] / facts["size"] if facts.get("field_mm") else None,
        command=prepare_command(facts),
        normalize=normalize,
        unit=unit_in_words(normalize),
    )


def prepare_command(facts: Mapping) -> str:
    """Return the `diffusers-cf prepare` command that makes the same slices from another copy of the source."""
    source, modalities = facts.get("source"), " ".join(facts["modalities"])
    words = ["--input FOLDER", "--output DATASET", "--split_file splits.json", f"--modalities {modalities}"]
    if source == "phantom":
        patients = sum(facts["splits"][name]["patients"] for name in SPLITS)
        words = ["--output DATASET", f"--seed {facts['seed']}", f"--patients {patients}"]
    words += [f"--size {facts['size']}", f"--field_mm {facts['field_mm']:g}", f"--normalize {normalize_of(facts)}"]
    words += ["--class_names", *facts["class_names"]] if source == "folder" else []
    words += ["--labels FILE.csv"] if facts.get("labels_sha256") else []
    words += ["--lenient"] if facts.get("lenient") else []
    return " ".join([f"diffusers-cf prepare --source {source}", *words])


def in_words(value: object) -> str:
    """Return a value as the card shows it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_TEMPLATES = Environment(loader=PackageLoader("diffusers_cf"), trim_blocks=True, keep_trailing_newline=True)
_TEMPLATES.filters |= {"words": in_words, "json": json.dumps}


def scores_of(result: Mapping) -> list[EvalResult]:
    """Return the scores of one RESULT.json for the card's metadata."""
    processed = result["postprocessed"]
    dice = processed["per_patient_dice"]
    scores = [
        (kind, text + suffix, part[key], None)
        for part, suffix in ((result, ""), (processed, ", post-processed"))
        for key, kind, text in METRICS
    ]
    details = {key: dice[key] for key in ("interval", "threshold")}
    scores.append(("dice", "mean Dice per patient, post-processed", dice["mean"], details))
    source, split = result["dataset"]["source"], result["dataset"]["split"]
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=source,
            dataset_name=f"{source}, {result['n_patients']} patients, {result['n_slices']} slices",
            dataset_split=split,
            metric_type=kind,
            metric_name=text,
            metric_value=round(value, 4),
            metric_args=details,
        )
        for kind, text, value, details in scores
        if value is not None
    ]


def _protocol(results: Sequence[Mapping]) -> str:
    """Return how the scores were made, one entry a line; entries that all results share come once, at the end."""
    first = results[0]["protocol"] if results else {}
    common = {key: text for key, text in first.items() if all(one["protocol"].get(key) == text for one in results)}
    lines = []
    for result in results:
        lines.append(f"- `{result['command']}` ({result['commit']})")
        lines += [f"  - {key}: {text}" for key, text in result["protocol"].items() if key not in common]
    return "\n".join(lines + [f"- {key}: {text}" for key, text in common.items()])
