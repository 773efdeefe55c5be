"""`diffusers-cf publish-dataset` and its card, against a Hub stand-in on loopback."""

import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
from data_files import write_brats
from hub_client import client_process, command_line
from huggingface_hub import DatasetCard
from training_data import write_training_set

from diffusers_cf.cli import main
from diffusers_cf.data import BratsSource, SliceDataset
from diffusers_cf.data.prepare import prepare


SHARDS = {f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set as the phantom's, with what no one else should see."""
    folder = write_training_set(
        tmp_path_factory.mktemp("data") / "set", test=(3,), source="phantom", skipped=[], input="ward-7",
        note="from /srv/me/scans, float16", diagnoses={"p0": "glioma"}, orientation="anterior up",
    )  # fmt: skip
    (folder / "data" / "notes.csv").write_text("not to be published")
    (folder / ".prepare.lock").write_text("not to be published")
    return folder


def publish(client, folder, repo_id, *options):
    return client(command_line, "publish-dataset", folder, "--repo-id", repo_id, *options)


def facts_of(folder, name, split):
    """What a data set holds, and how `datasets` sees it; for the client's process."""
    dataset = SliceDataset(name, split, cache_dir=folder)
    batch = dataset.collate(dataset.__getitems__(list(range(len(dataset)))))
    opened = datasets.load_dataset(name, split=split, cache_dir=str(folder))
    stream = datasets.load_dataset(name, split=split, streaming=True)
    return SimpleNamespace(
        images=batch["images"].numpy().tobytes(), labels=dataset.labels.tolist(), patients=dataset.patients.tolist(),
        names=opened.features["label"].names, rows=opened.num_rows, streamed=[row["slice"] for row in stream],
    )  # fmt: skip


def test_a_data_set_comes_back_from_the_hub_with_its_card(hub, client, data, tmp_path):
    code, out, err = publish(client, data, "user/slices", "--private", "--license", "cc0-1.0")
    assert code == 0 and "/user/slices/commit/" in out, err
    files = hub.files("user/slices", kind="datasets")
    assert hub.repositories["datasets/user/slices"].private
    assert set(files) - {".gitattributes"} == {*SHARDS, "preprocessing.json", "splits.json", "README.md"}
    assert json.loads(files["splits.json"]) == {"train": ["p0", "p1"], "validation": ["p2"], "test": ["p3"]}
    for split in ("train", "test"):
        got, own = client(facts_of, tmp_path / "hub", "user/slices", split), SliceDataset(data, split, tmp_path)
        batch = own.collate(own.__getitems__(list(range(len(own)))))
        assert got.images == batch["images"].numpy().tobytes() and got.labels == own.labels.tolist()
        assert got.patients == own.patients.tolist() and got.names == ["healthy", "unhealthy"]
        assert got.rows == len(own) and got.streamed == own.slices.tolist()


def test_nothing_of_this_machine_is_published(hub, client, data):
    assert publish(client, data, "user/clean")[0] == 0
    files = hub.files("user/clean", kind="datasets")
    facts = json.loads(files["preprocessing.json"])
    assert not {"input", "diagnoses"} & facts.keys() and facts["note"] == "from PATH float16"
    told = files["preprocessing.json"] + files["README.md"]
    assert not any(word in told for word in (b"ward-7", b"/srv", b"glioma", str(data.parent).encode()))


def test_the_card_holds_the_facts(hub, client, data):
    assert publish(client, data, "user/card", "--license", "cc0-1.0")[0] == 0
    card = DatasetCard(hub.files("user/card", kind="datasets")["README.md"].decode())
    found = card.data.to_dict()
    assert found["license"] == "cc0-1.0" and found["task_categories"] == ["image-segmentation"]
    assert found["size_categories"] == ["n<1K"] and found["pretty_name"] == "card"
    assert found["configs"][0]["data_files"][1] == {"split": "validation", "path": "data/validation-*.parquet"}
    for text in (
        "| train | 2 | 16 | 6 |", "| test | 1 | 8 | 3 |", "(2, 16, 16): flair, t1", "0 = healthy, 1 = unhealthy",
        '"user/card"', "--dataset user/card ", "15 mm a pixel", "- `percentile`: 99.0", "Fonov", "Sanchez",
        "--source phantom --output DATASET --seed 0 --patients 4 --size 16 --field_mm 240",
    ):  # fmt: skip
        assert text in card.text, text


def test_images_under_terms_stay_and_their_data_set_can_be_made_from_the_card(hub, client, tmp_path):
    for number in range(4):
        write_brats(tmp_path / "scans", f"P_{number}", seed=number)
    (tmp_path / "scans" / "P_9").mkdir()
    own = tmp_path / "own"
    prepare(BratsSource(tmp_path / "scans", modalities=("t1", "flair"), size=16), own, seed=5, skip_bad=True)
    code, out, err = publish(client, own, "user/brats")
    assert code == 0 and f"{own}: the images stay here (BraTS, under its own terms" in out, err
    files = hub.files("user/brats", kind="datasets")
    assert set(files) - {".gitattributes"} == {"preprocessing.json", "splits.json", "README.md"}

    (tmp_path / "splits.json").write_bytes(files["splits.json"])
    card = files["README.md"].decode()
    command = card.partition("```text\ndiffusers-cf ")[2].partition("\n")[0]
    places = {"FOLDER": tmp_path / "scans", "DATASET": tmp_path / "theirs", "splits.json": tmp_path / "splits.json"}
    assert main([str(places.get(word, word)) for word in command.split()]) == 0
    made, published = (
        {path.name: path.read_bytes() for path in (folder / "data").iterdir()} for folder in (own, tmp_path / "theirs")
    )
    assert made == published and len(made) == 3
    code, _, err = client(
        command_line, "evaluate", "--method", "threshold", "--dataset", "user/brats", "--output=r.json"
    )
    assert code == 2 and "user/brats: holds no images, for their licence forbids" in err and len(err.splitlines()) == 1


def test_pushing_again_sends_nothing_twice_and_leaves_nothing_stale(hub, client, data, tmp_path):
    hub.objects.clear()
    hub.puts_left = 1
    code, _, err = publish(client, data, "user/again")
    hub.puts_left = None
    assert code == 2 and "is whole, but could not be pushed to user/again" in err
    assert len(hub.objects) == 1 and not SHARDS & hub.files("user/again", kind="datasets").keys()
    before = len(hub.requests)
    assert publish(client, data, "user/again")[0] == 0
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests[before:]) == 2
    before = len(hub.requests)
    assert publish(client, data, "user/again")[0] == 0
    assert not any(request.startswith("PUT /lfs/") for request in hub.requests[before:])
    smaller = write_training_set(tmp_path / "set", source="phantom", skipped=[])
    assert publish(client, smaller, "user/again")[0] == 0
    assert "data/test-00000-of-00001.parquet" not in hub.files("user/again", kind="datasets")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"source": "arrays"}, [], "nothing says under which licence"),
        ({"source": "decathlon"}, ["--license", "mit"], "Its licence is cc-by-sa-4.0 for copies too, not mit"),
        ({"source": "brats"}, ["--pictures", "x.png"], "pictures of these data may not be shown"),
        ({"class_names": ["a", "b"]}, ["--license", "mit"], "has other columns or classes than"),
        ({"splits": dict.fromkeys(("train", "validation", "test"), {"slices": 16})}, [], "8 of the 16 slices"),
        ({"version": 9}, [], "not a slice data set of version 1"),
    ],
)  # fmt: skip
def test_what_may_not_or_can_not_be_published(data, tmp_path, monkeypatch, capsys, change, options, message):
    folder = shutil.copytree(data, tmp_path / "set")
    facts = json.loads((data / "preprocessing.json").read_text())
    (folder / "preprocessing.json").write_text(json.dumps(facts | change))
    (tmp_path / "x.png").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["publish-dataset", str(folder), "--repo-id", "user/x", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_licence_of_the_decathlon_needs_no_option(hub, client, tmp_path):
    folder = write_training_set(tmp_path / "set", source="decathlon", skipped=[])
    assert publish(client, folder, "user/msd")[0] == 0
    card = DatasetCard(hub.files("user/msd", kind="datasets")["README.md"].decode())
    assert card.data.license == "cc-by-sa-4.0" and "Antonelli" in card.text and "Passed on under the same" in card.text


def test_what_the_hub_does_not_take_is_said_in_one_line(hub, client, data, tmp_path):
    hub.put("user/other", {"data/train-0.parquet": b"somebody's", "train.py": b""}, kind="datasets")
    hub.put("team/theirs", {"README.md": b"theirs"}, kind="datasets")
    hub.forbidden = {"team", "team/theirs"}
    damaged = shutil.copytree(data, tmp_path / "damaged")
    (damaged / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    for folder, name, message in (
        (data, "user/other", "user/other: holds something else already (data/train-0.parquet): choose another"),
        (data, "team/new", "team/new: no repository to push to (403 Forbidden: You don't have the rights"),
        (data, "team/theirs", "could not be pushed to team/theirs (403 Forbidden: You may not write"),
        (damaged, "user/damaged", "train-00000-of-00001.parquet: can't be read"),
        (tmp_path / "none", "user/none", "is no finished slice data set"),
        (data, "a/b/c", "a/b/c: no repository to push to"),
    ):
        code, _, err = publish(client, folder, name)
        # bars of the uploads may stand before it
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err
    assert hub.files("user/other", kind="datasets").keys() == {"data/train-0.parquet", "train.py"}
    hub.stop()
    code, _, err = publish(client, data, "user/x")
    hub.start()
    assert code == 2 and "no repository to push to" in err and len(err.splitlines()) == 1


def test_without_a_token_the_log_in_is_named(hub, data, tmp_path):
    with client_process(hub.environment(tmp_path) | {"HF_TOKEN": None}) as call:
        code, _, err = publish(call, data, "user/x")
        assert code == 2 and "`hf auth login` stores a token" in err and len(err.splitlines()) == 1
        assert publish(call, data, "user/given", "--token", "hf_given")[0] == 0
