"""`diffusers-cf publish` and its card, against a Hub stand-in on loopback."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from model_files import CONFIGS, FACTS, UNET, load, tiny_pipeline, write_model
from PIL import Image

from diffusers_cf.cli import main
from diffusers_cf.commands.demo import SHIPPED_MODEL
from diffusers_cf.commands.options import open_pipeline
from diffusers_cf.errors import InputError
from diffusers_cf.hub.cards import model_card
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.provenance import model_fingerprint
from diffusers_cf.training.options import command_of, parse_args


TRAINING = {"command": "accelerate launch train.py --x 1", "commit": "abc", "images": 64, "slices": 9, "patients": 3}
MODEL_FACTS = FACTS | {
    "class_names": ["healthy", "unhealthy"], "source": "phantom", "size": 8, "percentile": 99.0, "training": TRAINING,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MODEL_FACTS)


@pytest.fixture
def result(model):
    """What `evaluate` would have written about the model."""
    dice = {"mean": 0.5, "interval": [0.25, 0.625], "threshold": 0.125}
    chain = {"auprc": 0.75, "ideal_dice": 0.5625, "slice_auroc": None, "per_patient_dice": dice}
    return {
        "auprc": 0.625, "ideal_dice": 0.5, "slice_auroc": None, "postprocessed": chain, "n_patients": 4, "n_slices": 40,
        "dataset": {"source": "phantom", "split": "test"}, "protocol": {"pixels": "all of them"}, "dtype": "float32",
        "command": "diffusers-cf evaluate", "commit": "def", "model_sha256": model_fingerprint(open_pipeline(str(model))),
    }  # fmt: skip


def publish(*arguments):
    """Exit code, output and errors of `diffusers-cf publish`; for the client's process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["publish", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def push_sharded(folder, repo_id):
    CounterfactualDDIMPipeline.from_pretrained(folder).save_pretrained(
        folder.parent / "sharded", max_shard_size="20KB", push_to_hub=True, repo_id=repo_id
    )


def test_a_model_comes_back_from_the_hub_with_its_card(hub, client, model, result, tmp_path):
    (tmp_path / "RESULT.json").write_text(json.dumps(result))
    Image.new("L", (4, 4)).save(tmp_path / "map.png")
    shutil.copytree(model, tmp_path / "model")
    for name in ("notes.txt", "pipeline.py", "unet/code.py", "unet/old.bin", "checkpoint-1/optimizer.pt"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"not to be published")
    options = ["--scores", tmp_path / "RESULT.json", "--pictures", tmp_path / "map.png", "--license", "apache-2.0"]
    code, out, err = client(publish, tmp_path / "model", "--repo-id", "user/tiny", "--private", *options)
    assert code == 0 and "/user/tiny/commit/" in out, err
    files = hub.files("user/tiny")
    assert hub.repositories["models/user/tiny"].private
    assert CONFIGS | {UNET, "checksums.json", "README.md", "map.png"} <= files.keys()
    assert not any(data == b"not to be published" for data in files.values())
    assert client(load, "user/tiny", cache_dir=tmp_path / "cache") == load(model)
    card = ModelCard(files["README.md"].decode())
    assert (
        card.data.library_name == "diffusers_cf"
        and card.data.license == "apache-2.0"
        and "diffusers" in card.data.tags
    )
    scores = {(found.metric_type, found.metric_name): found.metric_value for found in card.data.eval_results}
    assert scores == {
        ("average_precision", "pixel AUPRC"): 0.625, ("average_precision", "pixel AUPRC, post-processed"): 0.75,
        ("dice", "ideal Dice"): 0.5, ("dice", "ideal Dice, post-processed"): 0.5625,
        ("dice", "mean Dice per patient, post-processed"): 0.5,
    }  # fmt: skip
    arguments = [found.metric_args for found in card.data.eval_results]
    assert arguments[0] == {"pixels": "all of them"}
    assert arguments[-1] == {"interval": [0.25, 0.625], "threshold": 0.125}
    assert "0.500 [0.250, 0.625]" in card.text and "](map.png)" in card.text
    assert 'from_pretrained("user/tiny")' in card.text and str(tmp_path) not in card.text


def test_pushing_again_leaves_nothing_stale(hub, client, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    client(push_sharded, folder, "user/again")
    shards = [name for name in hub.files("user/again") if "-of-" in name or name.endswith(".index.json")]
    assert len(shards) > 2
    assert client(publish, model, "--repo-id", "user/again")[0] == 0
    assert not set(shards) & hub.files("user/again").keys()
    assert client(load, "user/again", cache_dir=tmp_path / "cache") == load(model)
    before = len(hub.requests)
    assert client(publish, model, "--repo-id", "user/again")[0] == 0
    assert not any(request.startswith("PUT /lfs/") for request in hub.requests[before:])


def test_the_card_holds_the_facts(model):
    text = model_card(model, "user/tiny")
    assert "- modalities, in this order: flair, t1" in text and "9 slices" in text and "3 patients" in text
    assert TRAINING["command"] in text and "64 images in all; code: abc" in text
    assert "Not a medical device" in text and "None published with this model" in text
    for name, value in json.loads((model / "checksums.json").read_text()).items():
        assert f"| {name} | `{value}` |" in text


def card_of(folder, changes=None, **options):
    """A card of the model folder with some of its facts changed."""
    facts = MODEL_FACTS | (changes or {})
    (folder / "preprocessing.json").write_text(json.dumps(facts))
    return ModelCard(model_card(folder, "user/tiny", **options))


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def test_only_scans_are_called_medical(copy):
    card = card_of(copy)
    assert "medical" in card.data.tags and "scanners" in card.text and "diffusers-cf segment" in card.text
    for source in ("folder", "arrays", None):
        card = card_of(copy, {"source": source})
        assert "medical" not in card.data.tags and "Not a medical device" in card.text
        assert not any(word in card.text for word in ("scanner", "anatomy", "lesion is", "the lesion", "PATIENT_DIR"))


def test_the_card_names_the_licence_of_the_data(copy):
    assert "Licence of the data: the terms of its source. No patient stands behind them." in card_of(copy).text
    assert "Licence of the data: cc-by-sa-4.0." in card_of(copy, {"source": "decathlon"}).text
    assert "Licence of the data: not stated by the publisher." in card_of(copy, {"source": "folder"}).text
    assert "Licence of the data: cc0-1.0." in card_of(copy, {"source": "folder"}, data_licence="cc0-1.0").text
    with pytest.raises(InputError, match="Its licence is cc-by-sa-4.0 for copies too, not mit"):
        card_of(copy, {"source": "decathlon"}, data_licence="mit")


def test_the_card_says_what_chose_settings_and_threshold(copy):
    by = {"command": "diffusers-cf sweep --dataset x", "split": "validation", "n_slices": 9}
    rule = {"command": "diffusers-cf calibrate --dataset x", "split": "train", "n_slices": 7, "rule": "slice-labels"}
    assert "What chose the settings is not recorded." in card_of(copy).text
    text = card_of(copy, {"settings_chosen_by": by}).text
    assert "Settings and threshold chosen by `diffusers-cf sweep --dataset DATASET` on 9 slices" in text
    text = card_of(copy, {"settings_chosen_by": by, "threshold_chosen_by": rule}).text
    assert "Settings chosen by `diffusers-cf sweep" in text
    assert "Threshold chosen by `diffusers-cf calibrate --dataset DATASET` on 7 slices of the split train" in text
    text = card_of(copy, {"paper_threshold": 0.125, "paper_threshold_chosen_by": by}).text
    assert "Threshold for the paper's settings: 0.125, chosen by `diffusers-cf sweep" in text


def test_each_score_stands_with_its_own_protocol(copy, result):
    other = result | {"protocol": {"pixels": "all of them", "resolution": "64 x 64"}, "command": "other"}
    first = result | {"protocol": {"pixels": "all of them", "resolution": "128 x 128"}}
    lines = card_of(copy, results=[first, other]).text.splitlines()
    start = lines.index("- `diffusers-cf evaluate` (def)")
    assert lines[start : start + 5] == [
        "- `diffusers-cf evaluate` (def)", "  - resolution: 128 x 128", "- `other` (def)", "  - resolution: 64 x 64",
        "- pixels: all of them",
    ]  # fmt: skip


def test_a_model_of_phantoms_shows_one(hub, client, model):
    assert client(publish, model, "--repo-id", "user/shown")[0] == 0
    files = hub.files("user/shown")
    with Image.open(io.BytesIO(files["phantom.png"])) as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert "](phantom.png)" in files["README.md"].decode()


def test_the_card_of_the_shipped_model_is_what_publish_would_write():
    scores = Path(__file__).parents[1] / "results/phantom/phantom_small.json"
    text = model_card(SHIPPED_MODEL, "USER/phantom_small", "apache-2.0", [json.loads(scores.read_text())])
    assert (SHIPPED_MODEL / "README.md").read_text(encoding="utf-8") == text
    assert "617344 images in all" in text and "300 patients, 14317 slices" in text


def test_a_pipeline_without_facts_has_a_card_too(tmp_path):
    pipe = tiny_pipeline()
    pipe.preprocessing = {}
    pipe.save_pretrained(tmp_path)
    text = model_card(tmp_path, "user/bare")
    assert "channel 1, channel 2" in text and "Not recorded" in text and "the paper's are used" in text


def test_the_command_of_a_training_names_no_folder_of_this_machine():
    args = parse_args([
        "--dataset=/data/secret", "--output_dir=/data/mine", "--hub_token=abc", "--seed=3", "--augment", "--unet_size=paper",
    ])  # fmt: skip
    expected = "accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL"
    assert command_of(args) == f"{expected} --unet_size paper --augment --seed 3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "was measured with other weights than those of"),
        ({"model_sha256": None}, "does not say which weights it measured"),
        ({"dtype": "float8"}, "no RESULT.json of evaluate (lacks a known dtype)"),
        ({"auprc": None}, "no RESULT.json of evaluate (lacks auprc)"),
    ],
)
def test_scores_of_something_else_are_not_published(model, result, tmp_path, capsys, change, message):
    changed = {key: value for key, value in (result | change).items() if value is not None or key == "slice_auroc"}
    (tmp_path / "RESULT.json").write_text(json.dumps(changed))
    assert main(["publish", str(model), "--repo-id", "user/x", "--scores", str(tmp_path / "RESULT.json")]) == 2
    assert message in capsys.readouterr().err


def test_pictures_of_scans_under_terms_are_not_published(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "preprocessing.json").write_text(json.dumps(MODEL_FACTS | {"source": "brats"}))
    (tmp_path / "map.png").touch()
    (tmp_path / "map.nii").touch()
    for name, message in (
        ("map.png", "may not be shown"),
        ("map.nii", "must be a .png"),
        ("no.png", "must be a .png"),
    ):
        assert main(["publish", str(folder), "--repo-id", "user/x", "--pictures", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_what_can_not_be_published_is_said_in_one_line(hub, client, model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "preprocessing.json").unlink()
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / UNET).write_bytes(b"\0" * 100)
    hub.forbidden = {"locked"}
    cases = [
        (bare, "user/x", "does not name its modalities"), (damaged, "user/x", "damaged"),
        (tmp_path / "none", "user/x", "no such folder"), (model, "a/b/c", "no repository to push to"),
        (model, "locked/x", "You don't have the rights to create under locked"),
    ]  # fmt: skip
    for folder, name, message in cases:
        code, _, err = client(publish, folder, "--repo-id", name)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    hub.stop()
    code, _, err = client(publish, model, "--repo-id", "user/x")
    hub.start()
    assert code == 2 and "no repository to push to" in err and len(err.splitlines()) == 1
