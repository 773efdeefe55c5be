"""Data sets by their name on the Hub: a stand-in on loopback and the real client."""

import json

import pytest
from hub_client import client_process, command_line
from model_files import files_of
from training_data import write_training_set

from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError


SHARD = "data/{}-00000-of-00001.parquet"


# What follows runs in the client's process, whose Hub is the stand-in.
def opened(name, split):
    dataset = SliceDataset(name, split)
    batch = dataset.collate(dataset.__getitems__(list(range(len(dataset)))))
    return batch["images"].numpy().tobytes(), dataset.patients.tolist(), dataset.commit


@pytest.fixture(scope="module")
def data(tmp_path_factory, hub):
    folder = write_training_set(tmp_path_factory.mktemp("data") / "set", test=(3, 4))
    hub.put("user/slices", files_of(folder), kind="datasets")
    return folder


def test_a_name_on_the_hub_stands_for_a_folder_and_one_split_is_downloaded(hub, client, data):
    images, patients, commit = client(opened, "user/slices", "test")
    assert (images, patients) == opened(data, "test")[:2]
    assert commit == hub.repositories["datasets/user/slices"].refs["main"]
    assert set(hub.downloads("user/slices")) == {"preprocessing.json", SHARD.format("test")}


def test_a_revision_is_a_branch_or_a_commit(hub, client, data, tmp_path):
    other = write_training_set(tmp_path / "other", test=(3,))
    first = hub.put("user/versions", files_of(other), kind="datasets")
    hub.put("user/versions", files_of(other), branch="v1", kind="datasets")
    hub.put("user/versions", files_of(data), kind="datasets")
    counts = {name: len(client(opened, f"user/versions{name}", "test")[1]) for name in ("", "@v1", f"@{first}")}
    assert counts == {"": 16, "@v1": 8, f"@{first}": 8}


def test_a_second_time_needs_no_network(hub, client, data, tmp_path):
    with client_process(hub.environment(tmp_path)) as other:
        first = other(opened, "user/slices", "test")
        hub.stop()
        try:
            assert other(opened, "user/slices", "test") == first
            with pytest.raises(InputError, match="user/never: the download failed"):
                other(opened, "user/never", "test")
        finally:
            hub.start()
    with client_process(hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}) as offline:
        hub.requests.clear()
        assert offline(opened, "user/slices", "test") == first and hub.requests == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("user/absent", "user/absent: neither a folder"),
        ("user/slices@v9", "user/slices: the repository has no revision 'v9'"),
        ("user/model", "user/model: the repository has no preprocessing.json, so it is no slice data set"),
        ("user/huge", "preprocessing.json: larger than 16 MiB"),
        ("user/size", "preprocessing.json: size is null"),
        ("user/dtype", 'preprocessing.json: dtype is "O"'),
        ("user/cut", "its split test are there|8 of the 16 slices"),
    ],
)
def test_what_the_hub_lacks_or_holds_wrongly_is_said_in_one_line(hub, client, data, tmp_path, name, reason):
    files = files_of(data)
    facts, shard = json.loads(files["preprocessing.json"]), SHARD.format("test")
    held = {
        "model": {"model_index.json": b"{}"}, "huge": {"preprocessing.json": b" " * (16 * 2**20 + 1)},
        "size": {"preprocessing.json": json.dumps(facts | {"size": None}).encode()},
        "dtype": {"preprocessing.json": json.dumps(facts | {"dtype": "O"}).encode()},
    }  # fmt: skip
    if name == "user/cut":
        held["cut"] = files | {shard: files_of(write_training_set(tmp_path / "smaller", test=(3,)))[shard]}
    if (key := name.partition("/")[2]) in held:
        hub.put(name, held[key] if key == "model" else files | held[key], kind="datasets")
    with pytest.raises(InputError, match=reason) as caught:
        client(opened, name, "test")
    assert "\n" not in str(caught.value)


def test_a_command_takes_the_name(hub, client, data, tmp_path):
    output = tmp_path / "R.json"
    code, _, err = client(command_line, "evaluate", "--method=threshold", "--output", output, "--dataset=user/slices")
    assert code == 0, err
    assert json.loads(output.read_text())["dataset"]["commit"] == hub.repositories["datasets/user/slices"].refs["main"]
