"""Where a result comes from, without paths or tokens of this machine."""

import sys

import pytest

from diffusers_cf.provenance import command_line, public_command
from train_counterfactual import command_of, parse_args


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("diffusers-cf sweep --model a/b --dataset c --store", "diffusers-cf sweep --model MODEL --dataset DATASET --store"),
        ("diffusers-cf evaluate --model=/x/y --output 'my out/R.json'", "diffusers-cf evaluate --model=MODEL --output OUTPUT"),
        ("diffusers-cf benchmark --dataset a b --seeds 3", "diffusers-cf benchmark --dataset DATASET DATASET --seeds 3"),
        ("run --shard 1/4 --other ~/me/file.csv --more=../up/x", "run --shard 1/4 --other file.csv --more=x"),
        ("run --hub-token abc", "run --hub-token TOKEN"),
        (r"run 'C:\me\data\scan.nii' --limit -3", "run scan.nii --limit -3"),
    ],
)  # fmt: skip
def test_commands_keep_their_options_and_lose_their_places(command, public):
    assert public_command(command) == public == public_command(public)


def test_the_recorded_command_has_placeholders(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/srv/me/bin/diffusers-cf", "evaluate", "--model", "/srv/me/model"])
    assert command_line() == "diffusers-cf evaluate --model MODEL"


def test_the_command_of_a_training_names_no_folder_of_this_machine():
    options = ["--dataset=/data/secret", "--output_dir=/data/mine", "--hub_token=abc", "--seed=3", "--augment"]
    expected = "accelerate launch train_counterfactual.py --dataset DATASET --output_dir MODEL"
    assert (
        command_of(parse_args([*options, "--unet_size=paper"])) == f"{expected} --unet_size paper --augment --seed 3"
    )
