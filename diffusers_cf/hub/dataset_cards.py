"""The card of a published data set: everything on it is a fact of its preprocessing.json."""

import json
from collections.abc import Mapping, Sequence

from diffusers_cf.data.intensity import normalize_of, unit_in_words
from diffusers_cf.data.preprocessing import SPLITS
from diffusers_cf.hub.cards import LIBRARY, in_words
from diffusers_cf.hub.sources import source_of


TAGS = ["anomaly-detection", "weakly-supervised", LIBRARY]
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(
    facts: Mapping, repo_id: str, licence: str | None = None, pictures: Sequence[str] = (), images: bool = True
) -> str:
    """README.md of a data set's repository, metadata first.

    Args:
        facts: the published preprocessing.json.
        repo_id: `user/name`.
        licence: of the data set, by its id on the Hub; None = none is named.
        pictures: names of pictures beside the card.
        images: whether the repository holds the slices themselves, or only how to make them.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("diffusers_cf"), trim_blocks=True, keep_trailing_newline=True)
    splits = {name: facts["splits"][name] for name in SPLITS if facts["splits"][name]["slices"]}
    name = repo_id.split("/")[-1]
    return environment.get_template("dataset_card.md").render(
        metadata=_metadata(name, licence, splits, images, source_of(facts).medical),
        name=name,
        repo_id=repo_id,
        facts=facts,
        splits=splits,
        pictures=pictures,
        images=images,
        source=source_of(facts),
        licence=licence,
        pixel_mm=in_words(facts["field_mm"] / facts["size"]) if facts.get("field_mm") else None,
        command=prepare_command(facts),
        normalize=normalize_of(facts),
        unit=unit_in_words(normalize_of(facts)),
        preprocessing=[(name, json.dumps(value)) for name, value in facts.items() if name != "splits"],
    )


def prepare_command(facts: Mapping) -> str:
    """The `diffusers-cf prepare` that makes the same slices from one's own copy of the source."""
    source = facts.get("source")
    words = [f"diffusers-cf prepare --source {source}"]
    if source == "phantom":
        patients = sum(facts["splits"][name]["patients"] for name in SPLITS)
        words.append(f"--output DATASET --seed {facts['seed']} --patients {patients}")
    else:
        words.append("--input FOLDER --output DATASET --split_file splits.json")
        words.append(f"--modalities {' '.join(facts['modalities'])}")
    words.append(f"--size {facts['size']} --field_mm {facts['field_mm']:g}")
    words.append(f"--normalize {normalize_of(facts)}")
    words += [f"--class_names {' '.join(facts['class_names'])}"] if source == "folder" else []
    words += ["--labels FILE.csv"] if facts.get("labels_sha256") else []
    words += ["--lenient"] if facts.get("lenient") else []
    return " ".join(words)


def _metadata(name: str, licence: str | None, splits: Mapping, images: bool, medical: bool) -> str:
    """Front matter; the Hub and `datasets` find the splits by `configs`."""
    from huggingface_hub import DatasetCardData

    count = sum(counts["slices"] for counts in splits.values())
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    of_images = {"configs": [{"config_name": "default", "data_files": files}]} if images else {"viewer": False}
    data = DatasetCardData(
        license=licence,
        pretty_name=name,
        task_categories=["image-segmentation"],
        size_categories=[next((text for limit, text in SIZES if count < limit), "n>10M")] if images else None,
        tags=["medical", *TAGS] if medical else TAGS,
        **of_images,
    )
    return data.to_yaml().strip()
