"""`diffusers-cf publish` and its card, against a Hub stand-in on loopback."""

import contextlib
import io
import json
import shutil

import pytest
from huggingface_hub import ModelCard
from model_files import CONFIGS, FACTS, UNET, load, tiny_pipeline

from diffusers_cf.cards import model_card
from diffusers_cf.cli import main
from diffusers_cf.inference_options import open_pipeline
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.provenance import model_fingerprint
from diffusers_cf.training_options import command_of, parse_args


TRAINING = {"command": "accelerate launch train.py --x 1", "commit": "abc", "images": 64, "slices": 9, "patients": 3}
MODEL_FACTS = FACTS | {
    "class_names": ["healthy", "unhealthy"], "source": "phantom", "size": 8, "percentile": 99.0, "training": TRAINING,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = tiny_pipeline()
    pipe.preprocessing = MODEL_FACTS
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def result(model):
    """What `evaluate` would have written about the model."""
    chain = {"auprc": 0.75, "per_patient_dice": {"mean": 0.5, "interval": [0.25, 0.625]}}
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
    (tmp_path / "map.png").write_bytes(b"a picture")
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
    scores = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert scores == {"average_precision": 0.625, "dice": 0.5}
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
    cases = [
        (bare, "user/x", "does not name its modalities"), (damaged, "user/x", "damaged"),
        (tmp_path / "none", "user/x", "no such folder"), (model, "a/b/c", "no repository to push to"),
    ]  # fmt: skip
    for folder, name, message in cases:
        code, _, err = client(publish, folder, "--repo-id", name)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    hub.stop()
    code, _, err = client(publish, model, "--repo-id", "user/x")
    hub.start()
    assert code == 2 and "no repository to push to" in err and len(err.splitlines()) == 1
