"""Data sets by their name on the Hub, for training and evaluation: a stand-in on loopback and the real client."""

import json

import pytest
from hub_client import client_process, command_line
from hub_server import HubServer
from training_data import write_training_set

from diffusers_cf.arguments import run_command
from diffusers_cf.data import SliceDataset
from diffusers_cf.errors import InputError


SHARD = "data/{}-00000-of-00001.parquet"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
TRAINING = [
    "--resolution", "16", "--train_batch_size", "4", "--max_train_steps", "2", "--validation_steps", "0",
    "--mixed_precision", "no", "--checkpointing_steps", "1",
]  # fmt: skip


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What follows runs in the client's process, whose Hub is the stand-in.
def opened(name, split):
    dataset = SliceDataset(name, split)
    batch = dataset.collate(dataset.__getitems__(list(range(len(dataset)))))
    return batch["images"].numpy().tobytes(), dataset.patients.tolist(), dataset.commit


def train(*options):
    import train_counterfactual

    return run_command(
        lambda: train_counterfactual.main(train_counterfactual.parse_args([*map(str, options), *TRAINING]))
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_training_set(tmp_path_factory.mktemp("data") / "set", test=(3, 4))


@pytest.fixture(scope="module")
def hub(data):
    server = HubServer(lfs=True)
    server.start()
    server.put("user/slices", content(data), kind="datasets")
    server.put("user/private", content(data), kind="datasets", private=True)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    with client_process(hub.environment(home) | {"ACCELERATE_USE_CPU": "true"}) as call:
        yield call


def test_a_name_on_the_hub_stands_for_a_folder(hub, client, data):
    images, patients, commit = client(opened, "user/slices", "test")
    own = SliceDataset(data, "test")
    assert images == own.collate(own.__getitems__(list(range(16))))["images"].numpy().tobytes()
    assert patients == ["p3"] * 8 + ["p4"] * 8 and commit == hub.repositories["datasets/user/slices"].refs["main"]


def test_only_the_split_that_is_asked_for_is_downloaded_and_never_code(hub, client, data):
    foreign = {"slices.py": b"raise SystemExit", "data/test-0.pkl": b"code", "data/test-x/../../../a.parquet": b"PAR1"}
    foreign |= {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"}
    hub.put("user/part", content(data) | foreign, kind="datasets")
    assert client(opened, "user/part", "test")[1] == ["p3"] * 8 + ["p4"] * 8
    assert sorted(hub.downloads("user/part")) == [SHARD.format("test"), "preprocessing.json"]


def test_a_revision_is_a_branch_or_a_commit(hub, client, data, tmp_path):
    other = write_training_set(tmp_path / "set", test=(5,))
    first = hub.put("user/revised", content(other), kind="datasets")
    hub.put("user/revised", content(other), branch="v1", kind="datasets")
    hub.put("user/revised", content(data), kind="datasets")
    for revision, patients in (("", {"p3", "p4"}), (f"@{first}", {"p5"}), ("@v1", {"p5"})):
        assert set(client(opened, f"user/revised{revision}", "test")[1]) == patients


def test_a_folder_wins(data, tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "slices").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    dataset = SliceDataset("user/slices", "test")
    assert len(dataset) == 16 and dataset.commit is None


def test_a_second_time_needs_no_network(hub, client, data, home):
    hub.put("user/offline", content(data), kind="datasets")
    first = client(opened, "user/offline", "test")
    with client_process(hub.environment(home) | OFFLINE) as offline:
        hub.requests.clear()
        assert offline(opened, "user/offline", "test") == first
        with pytest.raises(InputError, match="user/offline: no data/train-.* or, without network, in the local cache"):
            offline(opened, "user/offline", "train")
        with pytest.raises(InputError, match="user/never: not a folder, not in the local cache"):
            offline(opened, "user/never", "test")
        assert hub.requests == []
    hub.stop()
    try:
        assert client(opened, "user/offline", "test") == first
    finally:
        hub.start()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("user/absent", "user/absent: neither a folder nor a repository on the Hub"),
        ("user/slices@v9", "user/slices: the repository has no revision 'v9'"),
        ("user/model", "user/model: the repository has no preprocessing.json, so it holds no slice data set"),
        ("user/huge", "preprocessing.json: larger than 16 MiB"),
        ("user/no-size", "preprocessing.json: size is null, which can't be"),
        ("user/objects", 'preprocessing.json: dtype is "O", which can\'t be'),
        ("user/cut", "its split test are there: not copied or downloaded as a whole|8 of the 16 slices"),
        ("user/else", "patient p3, slice 30: its image has not 2048 bytes, as preprocessing.json has it"),
    ],
)
def test_what_the_hub_lacks_or_holds_wrongly_is_said_in_one_line(hub, client, data, tmp_path, name, reason):
    files, smaller = content(data), content(write_training_set(tmp_path / "smaller", test=(3,)))
    facts = json.loads(files["preprocessing.json"])

    def changed(**changes):
        return files | {"preprocessing.json": json.dumps(facts | changes).encode()}

    shard = SHARD.format("test")
    for key, held in {
        "model": {"model_index.json": b"{}"}, "huge": files | {"preprocessing.json": b" " * (16 * 2**20 + 1)},
        "no-size": changed(size=None), "objects": changed(dtype="O"), "cut": files | {shard: smaller[shard]},
        "else": changed(dtype="float32"),
    }.items():  # fmt: skip
        if name == f"user/{key}":
            hub.put(name, held, kind="datasets")
    with pytest.raises(InputError, match=reason) as caught:
        client(opened, name, "test")
    assert "\n" not in str(caught.value)


def test_a_private_data_set_opens_with_the_token_of_the_log_in(hub, client, tmp_path):
    assert len(client(opened, "user/private", "test")[1]) == 16
    with client_process(hub.environment(tmp_path) | {"HF_TOKEN": None}) as anybody:
        with pytest.raises(InputError, match=r"user/private: neither a folder .* \(run `hf auth login`\?\)"):
            anybody(opened, "user/private", "test")


def test_evaluation_takes_the_name(hub, client, data, tmp_path):
    results = []
    for number, dataset in enumerate(("user/slices", data)):
        output = tmp_path / f"{number}.json"
        code, _, err = client(
            command_line, "evaluate", "--method", "threshold", "--output", output, "--dataset", dataset
        )
        assert code == 0, err
        results.append(json.loads(output.read_text()))
    assert results[0]["dataset"]["commit"] == hub.repositories["datasets/user/slices"].refs["main"]
    assert "commit" not in results[1]["dataset"]
    timed = ("seconds_per_slice", "command", "dataset")
    first, second = ({key: value for key, value in result.items() if key not in timed} for result in results)
    assert first == second and first["n_slices"] == 16
    code, _, err = client(
        command_line, "evaluate", "--method", "threshold", "--output", output, "--dataset", "user/no"
    )
    assert code == 2 and err.startswith("error: user/no: neither a folder nor") and len(err.splitlines()) == 1


def test_training_takes_the_name(hub, client, data, home, tmp_path):
    commit = hub.put("user/trained", content(data), kind="datasets")
    options = ["--dataset", "user/trained", "--output_dir", tmp_path]
    assert client(train, *options) == 0
    assert list(home.glob(f"hub/datasets--user--trained/snapshots/{commit}/{SHARD.format('train')}"))
    facts = json.loads((tmp_path / "preprocessing.json").read_text())["training"]
    assert facts["slices"] == 16 and facts["patients"] == 2
    assert client(train, *options, "--resume_from_checkpoint", "checkpoint-1") == 0
