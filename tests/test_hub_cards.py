"""Cards of models and data sets."""

import json
import shutil
from pathlib import Path

import pytest
from hub_client import MODEL_FACTS, RESULT
from huggingface_hub import DatasetCard, ModelCard
from model_files import write_model
from training_data import write_training_set

from diffusers_cf.hub.cards import dataset_card, model_card
from diffusers_cf.loading import PRETRAINED


TRAINING = {"command": "accelerate launch train.py --x 1", "commit": "abc", "images": 64, "slices": 9, "patients": 3}
MODEL_FACTS = MODEL_FACTS | {"training": TRAINING}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MODEL_FACTS)


@pytest.fixture
def card_of(model, tmp_path):
    """Cards of the model with some of its facts changed."""
    folder = shutil.copytree(model, tmp_path / "copy")

    def card(changes=None, **options):
        (folder / "preprocessing.json").write_text(json.dumps(MODEL_FACTS | (changes or {})))
        return ModelCard(model_card(folder, "user/tiny", **options))

    return card


def test_the_card_holds_facts_and_scores(card_of, model):
    card = card_of(results=[RESULT], pictures=["map.png"], license="apache-2.0")
    assert card.data.library_name == "diffusers_cf" and "diffusers" in card.data.tags
    scores = {(found.metric_type, found.metric_name): found.metric_value for found in card.data.eval_results}
    assert scores == {
        ("average_precision", "pixel AUPRC"): 0.625, ("average_precision", "pixel AUPRC, post-processed"): 0.75,
        ("dice", "ideal Dice"): 0.5, ("dice", "ideal Dice, post-processed"): 0.5625,
        ("dice", "mean Dice per patient, post-processed"): 0.5,
    }  # fmt: skip
    assert card.data.eval_results[-1].metric_args == {"interval": [0.25, 0.625], "threshold": 0.125}
    sums = json.loads((model / "checksums.json").read_text())
    for text in ("flair, t1", "9 slices", "3 patients", TRAINING["command"], "Not a medical device", "](map.png)",
                 "0.500 [0.250, 0.625]", 'from_pretrained("user/tiny")', "evaluate --model MODEL", *sums.values()):  # fmt: skip
        assert text in card.text, text


def test_only_scans_are_called_medical(card_of):
    card = card_of()
    assert "medical" in card.data.tags and "diffusers-cf segment" in card.text
    for source in ("folder", None):
        card = card_of({"source": source})
        assert "medical" not in card.data.tags and "Not a medical device" in card.text
        assert not any(word in card.text for word in ("scanner", "anatomy", "lesion is", "PATIENT_DIR"))


@pytest.mark.parametrize(
    ("source", "given", "said"),
    [
        ("phantom", None, "the terms of its source"), ("decathlon", None, "cc-by-sa-4.0"),
        ("folder", None, "not stated by the publisher"), ("folder", "cc0-1.0", "cc0-1.0"),
    ],
)  # fmt: skip
def test_the_card_names_the_license_of_the_data(card_of, source, given, said):
    assert f"License of the data: {said}." in card_of({"source": source}, data_license=given).text


def test_the_card_says_what_chose_settings_and_threshold(card_of):
    by = {"command": "diffusers-cf sweep", "split": "validation", "n_slices": 9}
    rule = {"command": "diffusers-cf calibrate", "split": "train", "n_slices": 7, "rule": "slice-labels"}
    text = card_of({"settings_chosen_by": by, "threshold_chosen_by": rule, "paper_threshold": 0.125}).text
    assert "Settings chosen by `diffusers-cf sweep` on 9 slices" in text
    assert "Threshold chosen by `diffusers-cf calibrate` on 7 slices of the split train" in text
    assert "Threshold for the paper's settings: 0.125" in text


def test_each_score_is_listed_with_its_own_protocol(card_of):
    first, other = (RESULT | {"command": name, "protocol": {"pixels": "all", "resolution": name}} for name in "ab")
    lines = card_of(results=[first, other]).text.splitlines()
    start = lines.index("- `a` (def)")
    assert lines[start : start + 5] == [
        "- `a` (def)", "  - resolution: a", "- `b` (def)", "  - resolution: b", "- pixels: all"
    ]  # fmt: skip


def test_the_card_of_the_shipped_model_is_what_publish_would_write():
    folder, scores = PRETRAINED / "phantom_small", Path(__file__).parents[1] / "results/phantom/phantom_small.json"
    text = model_card(folder, "USER/phantom_small", "apache-2.0", [json.loads(scores.read_text())])
    assert (folder / "README.md").read_text(encoding="utf-8") == text


def test_the_card_of_a_data_set(tmp_path):
    folder = write_training_set(tmp_path / "set", test=(3,), source="phantom", orientation="anterior up")
    facts = json.loads((folder / "preprocessing.json").read_text())
    card = DatasetCard(dataset_card(facts, "user/card", "cc0-1.0"))
    found = card.data.to_dict()
    assert found["license"] == "cc0-1.0" and found["pretty_name"] == "card"
    assert found["configs"][0]["data_files"][1] == {"split": "validation", "path": "data/validation-*.parquet"}
    for text in (
        "| train | 2 | 16 | 6 |", "| test | 1 | 8 | 3 |", "(2, 16, 16): flair, t1", "0 = healthy, 1 = unhealthy",
        "--dataset user/card ", "15 mm a pixel", "Fonov", "Sanchez",
        "--source phantom --output DATASET --seed 0 --patients 4 --size 16 --field_mm 240",
    ):  # fmt: skip
        assert text in card.text, text
