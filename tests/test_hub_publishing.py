"""Models and data sets pushed to a Hub on loopback: they load again, and private facts are not published."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from data_files import write_brats
from hub_client import MODEL_FACTS, RESULT, client_process, command_line
from huggingface_hub import DatasetCard, ModelCard
from model_files import CONFIGS, UNET, edit_json, load, tiny_pipeline, write_model
from PIL import Image
from training_data import write_training_set

from diffusers_cf import InputError
from diffusers_cf.cli import main
from diffusers_cf.data.prepare import prepare
from diffusers_cf.data.scans import BratsSource
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.hub.publishing import push_model
from diffusers_cf.hub.remote_code import is_code
from diffusers_cf.inference import open_pipeline
from diffusers_cf.provenance import model_fingerprint


ROOT = Path(__file__).parents[1]
SHARDS = {f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MODEL_FACTS)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set like the phantom's, with private facts."""
    folder = write_training_set(
        tmp_path_factory.mktemp("data") / "set", test=(3,), source="phantom", skipped=[], input="ward-7",
        note="float16", diagnoses={"p0": "glioma"}, orientation="anterior up",
    )  # fmt: skip
    (folder / "data" / "notes.csv").write_text("not to be published")
    return folder


@pytest.fixture
def result(model):
    """A RESULT.json of the model."""
    return RESULT | {"model_sha256": model_fingerprint(open_pipeline(str(model)))}


def publish(client, *arguments):
    return client(command_line, "publish", *arguments)


def publish_dataset(client, folder, repo_id, *options):
    return client(command_line, "publish-dataset", folder, "--repo-id", repo_id, *options)


def refused(code, err, message):
    return code == 2 and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_a_model_comes_back_from_the_hub_with_its_card(hub, client, model, copy, result, tmp_path):
    (tmp_path / "RESULT.json").write_text(json.dumps(result))
    Image.new("L", (4, 4)).save(tmp_path / "map.png")
    for name in ("notes.txt", "pipeline.py", "unet/code.py", "unet/old.bin", "other/config.json", "o/x.safetensors"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"not to be published")
    edit_json(copy / "unet/config.json", _name_or_path="/srv/me/model")
    options = ["--scores", tmp_path / "RESULT.json", "--pictures", tmp_path / "map.png", "--license", "apache-2.0"]
    code, out, err = publish(client, copy, "--repo-id", "user/tiny", "--private", *options)
    assert code == 0 and "/user/tiny/commit/" in out, err
    files = hub.files("user/tiny")
    assert hub.repositories["models/user/tiny"].private
    expected = CONFIGS | {UNET, UNET.replace("unet", "class_encoder"), "checksums.json", "README.md", "map.png"}
    assert files.keys() - {".gitattributes"} == expected and b"/srv/me" not in files["unet/config.json"]
    assert client(load, "user/tiny", cache_dir=tmp_path / "cache") == load(model)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and len(card.data.eval_results) == 5 and "](map.png)" in card.text


def push_sharded(folder, repo_id):
    """Save the weights in shards and push them, in the client's process."""
    shards = folder.parent / "sharded"
    tiny_pipeline().save_pretrained(shards, max_shard_size="20KB")
    shutil.copy(folder / "preprocessing.json", shards)
    push_model(shards, repo_id)


def test_pushing_again_leaves_nothing_stale_and_keeps_other_variants(hub, client, copy, tmp_path):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "half", variant="fp16")
    shutil.copy(copy / "preprocessing.json", tmp_path / "half")
    client(push_model, tmp_path / "half", "user/again")
    client(push_sharded, copy, "user/again")
    shards = [name for name in hub.files("user/again") if "-of-" in name or name.endswith(".index.json")]
    assert len(shards) > 2
    assert publish(client, copy, "--repo-id", "user/again")[0] == 0
    assert not set(shards) & hub.files("user/again").keys()
    assert client(load, "user/again", cache_dir=tmp_path / "cache") == load(copy)
    assert client(load, "user/again", cache_dir=tmp_path / "cache", variant="fp16")["weights"] != load(copy)["weights"]
    before = len(hub.requests)
    assert publish(client, copy, "--repo-id", "user/again")[0] == 0
    assert not any(request.startswith("PUT /lfs/") for request in hub.requests[before:])


def test_an_interrupted_push_continues(hub, client, model, data):
    for kind, command in (("models", lambda: publish(client, model, "--repo-id", "user/cut")),
                          ("datasets", lambda: publish_dataset(client, data, "user/cut"))):  # fmt: skip
        hub.objects.clear()
        hub.puts_left = 1
        code, _, err = command()
        hub.puts_left = None
        assert refused(code, err, "user/cut: can't push to it (") and len(hub.objects) == 1
        assert len(hub.files("user/cut", kind=kind)) == 1
        before = len(hub.requests)
        assert command()[0] == 0
        puts = sum(request.startswith("PUT /lfs/") for request in hub.requests[before:])
        assert puts == (1 if kind == "models" else 2)


def test_names_of_files_and_patients_are_not_published_with_a_model(hub, client, make_pipeline, tmp_path, monkeypatch):
    """Evaluate, sweep and calibrate with files in folders with private names."""
    place = tmp_path / "ward-7"
    data = write_training_set(place / "mueller", test=(3, 4), input="ward-7", skipped=["schmidt"])
    facts = json.loads((data / "preprocessing.json").read_text())
    pipe = make_pipeline()
    pipe.preprocessing = facts | {"diagnoses": "glioma", "training": {"command": "train", "images": 1}}
    pipe.save_pretrained(place / "model")
    common = ["--model", place / "model", "--dataset", data, "--dtype", "float32"]
    grid = ["--guidance_scales=2", "--strengths=0.2", "--num_inference_steps=10", "--maps", "counterfactual"]
    for command in (
        ["sweep", *common, *grid, "--output", place / "grid", "--store"],
        ["calibrate", *common, f"--output={place / 'calibration.json'}", "--store"],
        ["evaluate", *common, "--output", place / "RESULT.json"],
    ):
        monkeypatch.setattr(sys, "argv", ["diffusers-cf", *map(str, command)])
        assert main(sys.argv[1:]) == 0
    for name in ("grid/sweep.json", "calibration.json"):
        assert str(place) not in json.loads((place / name).read_text())["command"]
    code, _, err = publish(client, place / "model", "--repo-id", "user/clean", "--scores", place / "RESULT.json")
    assert code == 0, err
    told = b"".join(text for name, text in hub.files("user/clean").items() if name.endswith((".json", ".md")))
    for word in (str(tmp_path), "mueller", "schmidt", "glioma", "calibration.json"):
        assert word.encode() not in told, word
    assert b"sweep --model MODEL --dataset DATASET" in told and b"evaluate --model MODEL" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_sha256": "0" * 64}, "was measured with other weights than those of"),
        ({"model_sha256": "gone"}, "RESULT.json of evaluate ('model_sha256')"),
        ({"postprocessed": 1}, "RESULT.json of evaluate"),
    ],
)
def test_scores_of_another_model_are_not_published(model, result, tmp_path, capsys, changes, message):
    changed = {key: value for key, value in (result | changes).items() if value != "gone"}
    (tmp_path / "R.json").write_text(json.dumps(changed))
    assert main(["publish", str(model), "--repo-id", "user/x", "--scores", str(tmp_path / "R.json")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'R.json'}: " in error and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ["flair"]}, "takes 2 channels, but names the modalities flair"),
        ({"class_names": ["healthy", "rust"]}, r"its network knows the classes"),
        ({"settings": {"strength": "high"}}, "holds a value of a wrong type"),
        ({"settings": {"map": "signed"}}, "preprocessing holds no `signs`"),
        ({"settings": {"postprocess": "yes"}}, "`postprocess` in its preprocessing.json"),
        ({"training": "long"}, "`training` in its preprocessing.json is not a JSON object"),
        ({"threshold_per_channel": False}, "differ in threshold_per_channel"),  # an option of schedulers
    ],
)
def test_an_unusable_model_is_not_published(copy, changes, message):
    path = "scheduler/scheduler_config.json" if "threshold_per_channel" in changes else "preprocessing.json"
    edit_json(copy / path, **changes)
    with pytest.raises(InputError, match=message):
        push_model(copy, "user/x")


def test_pictures_that_can_not_be_published_are_refused(copy, model, tmp_path):
    (tmp_path / "a").mkdir()
    good, same, text, cut, none = (tmp_path / name for name in ("p.png", "a/p.png", "t.png", "c.png", "none.png"))
    for path in (good, same):
        Image.new("L", (64, 64), 7).save(path)
    text.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:40])
    for pictures, message in (([good, same], "has the same name"), ([text], "t.png: "), ([cut], "c.png: "),
                              ([none], "none.png: can't be read")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            push_model(model, "user/x", pictures=pictures)
    edit_json(copy / "preprocessing.json", source="brats")
    with pytest.raises(InputError, match="must not be shown"):
        push_model(copy, "user/x", pictures=[good])


FOREIGN = {
    "something": {"train.py": b"", "README.md": b"mine"},
    "pipeline": {"model_index.json": b'{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}'},
    "broken": {"model_index.json": b"{", "README.md": b"mine"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_repository_with_something_else_is_left_alone(hub, client, model, data, kind):
    for command, repositories in (
        (lambda name: publish(client, model, "--repo-id", name), "models"),
        (lambda name: publish_dataset(client, data, name), "datasets"),
    ):
        hub.put(f"user/{kind}", FOREIGN[kind], kind=repositories)
        code, _, err = command(f"user/{kind}")
        assert refused(code, err, f"user/{kind}: holds something else already (")
        assert hub.files(f"user/{kind}", kind=repositories) == FOREIGN[kind]


def test_a_blank_repository_and_an_earlier_model_are_written_to(hub, client, model):
    hub.put("user/blank", {".gitattributes": b"", "README.md": b"# blank", "LICENSE": b""})
    for options, modules in (([], 0), (["--with-code"], 4), ([], 0)):
        code, _, err = publish(client, model, "--repo-id", "user/blank", *options)
        assert code == 0, err
        assert sum(map(is_code, hub.files("user/blank"))) == modules
    assert b"CounterfactualDDIMPipeline" in hub.files("user/blank")["README.md"]


def test_refusals_of_the_hub_are_one_line(hub, client, model, data, tmp_path):
    hub.put("user/taken", {"README.md": b"of somebody"})
    hub.forbidden = {"user/taken", "locked"}
    for name, message in (("a/b/c", "a/b/c: can't"), ("locked/x", "create under locked"), ("user/taken", "not write")):
        assert refused(*publish(client, model, "--repo-id", name)[::2], message)
    assert refused(*publish_dataset(client, data, "locked/x")[::2], "create under locked")
    assert hub.files("user/taken") == {"README.md": b"of somebody"}
    hub.forbidden = set()
    assert refused(*publish(client, tmp_path / "none", "--repo-id", "user/x")[::2], "none: no such folder")
    with client_process(hub.environment(tmp_path) | {"HF_TOKEN": None}) as nobody:
        assert refused(*publish(nobody, model, "--repo-id", "user/x")[::2], "`hf auth login` stores a token")
        assert publish(nobody, model, "--repo-id", "user/given", "--token", "hf_given")[0] == 0
    hub.stop()
    try:
        assert refused(*publish(client, model, "--repo-id", "user/x")[::2], "user/x: can't push to it")
    finally:
        hub.start()


def rows_of(folder, name, split):
    """Return the content of a data set by `SliceDataset` and by `datasets`; for the client's process."""
    dataset = SliceDataset(name, split, cache_dir=folder)
    batch = dataset.collate(dataset.__getitems__(list(range(len(dataset)))))
    stream = datasets.load_dataset(name, split=split, streaming=True)
    found = batch["images"].numpy().tobytes(), dataset.labels.tolist(), dataset.patients.tolist()
    return *found, stream.features["label"].names, [row["slice"] for row in stream]


def test_a_data_set_comes_back_from_the_hub_with_its_card(hub, client, data, tmp_path):
    code, out, err = publish_dataset(client, data, "user/slices", "--private", "--license", "cc0-1.0")
    assert code == 0 and "/user/slices/commit/" in out, err
    files = hub.files("user/slices", kind="datasets")
    assert hub.repositories["datasets/user/slices"].private
    assert files.keys() - {".gitattributes"} == {*SHARDS, "preprocessing.json", "splits.json", "README.md"}
    assert json.loads(files["splits.json"]) == {"train": ["p0", "p1"], "validation": ["p2"], "test": ["p3"]}
    told = files["preprocessing.json"] + files["README.md"]
    assert not any(word in told for word in (b"ward-7", b"glioma", str(data.parent).encode()))
    for split in ("train", "test"):
        own = SliceDataset(data, split)
        batch = own.collate(own.__getitems__(list(range(len(own)))))
        expected = batch["images"].numpy().tobytes(), own.labels.tolist(), own.patients.tolist()
        assert client(rows_of, tmp_path, "user/slices", split) == (*expected, [*own.class_names], own.slices.tolist())
    smaller = write_training_set(tmp_path / "set", source="decathlon", skipped=[])
    assert publish_dataset(client, smaller, "user/slices")[0] == 0
    files = hub.files("user/slices", kind="datasets")
    assert "data/test-00000-of-00001.parquet" not in files
    assert DatasetCard(files["README.md"].decode()).data.license == "cc-by-sa-4.0"  # that of its source


@pytest.mark.slow
def test_brats_images_are_not_published_and_the_card_says_how_to_make_the_data_set(hub, client, tmp_path):
    for number in range(4):
        write_brats(tmp_path / "scans", f"P_{number}", seed=number)
    own = tmp_path / "own"
    prepare(BratsSource(tmp_path / "scans", modalities=("t1", "flair"), size=16), own, seed=5)
    code, out, err = publish_dataset(client, own, "user/brats")
    assert code == 0 and f"{own}: images not pushed (BraTS" in out, err
    files = hub.files("user/brats", kind="datasets")
    assert files.keys() - {".gitattributes"} == {"preprocessing.json", "splits.json", "README.md"}
    (tmp_path / "splits.json").write_bytes(files["splits.json"])
    command = files["README.md"].decode().partition("```text\ndiffusers-cf ")[2].partition("\n")[0]
    places = {"FOLDER": tmp_path / "scans", "DATASET": tmp_path / "theirs", "splits.json": tmp_path / "splits.json"}
    assert main([str(places.get(word, word)) for word in command.split()]) == 0
    made, theirs = ({p.name: p.read_bytes() for p in (f / "data").iterdir()} for f in (own, tmp_path / "theirs"))
    assert made == theirs and len(made) == 3
    code, _, err = client(command_line, "evaluate", "--method=threshold", "--dataset", "user/brats", "--output=r.json")
    assert refused(code, err, "user/brats: holds no images")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"source": "arrays"}, [], "nothing says under which license"),
        ({"source": "decathlon"}, ["--license", "mit"], "must have the license cc-by-sa-4.0, not mit"),
        ({"source": "brats"}, ["--pictures", "x.png"], "pictures of these data must not be shown"),
        ({"splits": dict.fromkeys(("train", "validation", "test"), {"slices": 16})}, [], "8 of the 16 slices"),
        ({"version": 9}, [], "not a slice data set of version 1"),
        (None, [], "train-00000-of-00001.parquet: can't be read|not a readable Parquet file"),
    ],
)  # fmt: skip
def test_an_unusable_or_protected_data_set_is_refused(data, tmp_path, monkeypatch, capsys, change, options, message):
    folder = shutil.copytree(data, tmp_path / "set")
    edit_json(folder / "preprocessing.json", **(change or {}))
    if change is None:
        (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    assert main(["publish-dataset", str(folder), "--repo-id", "user/x", *options]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")) and len(error.splitlines()) == 1


def train_and_push(hub, folder, name):
    """Train for one step in a process that uses the hub; its output folder is `folder/out`."""
    environment = os.environ | hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    options = ["--resolution=16", "--train_batch_size=4", "--max_train_steps=1", "--validation_steps=0"]
    options += ["--dataset", write_training_set(folder / "data"), "--output_dir", folder / "out"]
    options += ["--push_to_hub", "--hub_model_id", name, "--hub_private_repo"]
    command = [sys.executable, ROOT / "train_counterfactual.py", *options]
    return subprocess.run(command, env=environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_training_run_ends_on_the_hub(hub, tmp_path):
    done = train_and_push(hub, tmp_path, "user/trained")
    assert done.returncode == 0, done.stderr
    pushed = hub.files("user/trained")
    assert hub.repositories["models/user/trained"].private
    for name in (UNET, "preprocessing.json", "checksums.json"):
        assert pushed[name] == (tmp_path / "out" / name).read_bytes()
    assert not any(name.startswith("checkpoint-") or str(tmp_path).encode() in text for name, text in pushed.items())
    done = train_and_push(hub, tmp_path / "other", "user/a name")  # refused before the training
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: user/a name: can't push to it (")
    assert not list((tmp_path / "other/out").glob("*"))
