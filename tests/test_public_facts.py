"""What leaves this machine with a model: never its paths, whatever wrote them."""

import json
import sys

import pytest
from hub_client import command_line
from training_data import write_training_set

from diffusers_cf.cli import main
from diffusers_cf.hub.public_facts import OF_MODEL, public_command, public_facts


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("diffusers-cf sweep --model a/b --dataset c --store", "diffusers-cf sweep --model MODEL --dataset DATASET --store"),
        ("diffusers-cf evaluate --model=/x/y --output 'my out/R.json'", "diffusers-cf evaluate --model=MODEL --output OUTPUT"),
        ("diffusers-cf benchmark --dataset a b --seeds 3", "diffusers-cf benchmark --dataset DATASET DATASET --seeds 3"),
        ("run --shard 1/4 --other ~/me/file.csv --more=../up/x", "run --shard 1/4 --other file.csv --more=x"),
        ("run --hub-token abc -x 'half a quotation", "run --hub-token TOKEN -x ''\"'\"'half' a quotation"),
        (r"run 'C:\me\data\scan.nii' --limit -3", "run scan.nii --limit -3"),
    ],
)  # fmt: skip
def test_commands_keep_their_options_and_lose_their_places(command, public):
    assert public_command(command) == public


def test_facts_keep_what_is_known_to_be_harmless():
    facts = {
        "note": "see https://a.org/b, from /srv/me/x and file:/srv/me, w/o C:/me/y", "input": "ward-7", "mine": 1,
        "settings_chosen_by": {"command": "sweep --dataset x", "split": "test"}, "modalities": ["t1", "~/t2"], "size": 8,
    }  # fmt: skip
    assert public_facts(facts, OF_MODEL) == {
        "note": "see https://a.org/b, from PATH and file:PATH w/o PATH", "modalities": ["t1", "PATH"], "size": 8,
        "settings_chosen_by": {"command": "sweep --dataset DATASET", "split": "test"},
    }  # fmt: skip


def test_nothing_of_this_machine_is_published_with_a_model(hub, client, make_pipeline, tmp_path, monkeypatch):
    """After a real evaluation, sweep and calibration of files in folders whose names should stay here."""
    place = tmp_path / "ward-7"
    data = write_training_set(
        place / "mueller", test=(3, 4), input="ward-7", note="from /srv/me/scans", skipped=["schmidt"]
    )
    facts = json.loads((data / "preprocessing.json").read_text())
    pipe = make_pipeline()
    pipe.preprocessing = {name: value for name, value in facts.items() if name != "splits"} | {"diagnoses": "glioma"}
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
    assert str(place) in (place / "model" / "preprocessing.json").read_text()
    code, out, err = client(
        command_line, "publish", place / "model", "--repo-id", "user/clean", "--scores", place / "RESULT.json"
    )
    assert code == 0, err
    files = hub.files("user/clean")
    told = b"".join(data for name, data in files.items() if name.endswith((".json", ".md")))
    for word in (str(tmp_path), "ward-7", "mueller", "schmidt", "glioma", "/srv", "calibration.json"):
        assert word.encode() not in told, word
    assert b"sweep --model MODEL --dataset DATASET" in told and b"evaluate --model MODEL" in told
    published = json.loads(files["preprocessing.json"])
    assert published["threshold_chosen_by"]["rule"] == "slice-labels"
    assert published["settings_chosen_by"]["command"].endswith("--output OUTPUT --store")
