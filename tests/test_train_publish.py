"""`--push_to_hub` of the training script, against a Hub stand-in on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from training_data import write_training_set


ROOT = Path(__file__).parents[1]


@pytest.fixture
def hub():
    server = HubServer(lfs=True)
    server.start()
    yield server
    server.stop()


def train_and_push(hub, folder, name):
    """One step of training, in a process whose Hub is the stand-in; its output folder is `folder/out`."""
    environment = (
        os.environ | hub.environment(folder / "home") | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    )
    environment |= {"PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    data = write_training_set(folder / "data")
    options = ["--resolution", "16", "--train_batch_size", "4", "--max_train_steps", "1", "--validation_steps", "0"]
    options += ["--dataset", data, "--output_dir", folder / "out"]
    options += ["--push_to_hub", "--hub_model_id", name, "--hub_private_repo"]
    command = [sys.executable, ROOT / "train_counterfactual.py", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_ends_on_the_hub(hub, tmp_path):
    """A private repository of the name that was asked for holds the files of the model folder."""
    done = train_and_push(hub, tmp_path, "user/trained")
    assert done.returncode == 0, done.stderr
    pushed = hub.files("user/trained")
    assert hub.repositories["models/user/trained"].private
    for name in ("unet/diffusion_pytorch_model.safetensors", "preprocessing.json", "checksums.json"):
        assert pushed[name] == (tmp_path / "out" / name).read_bytes()
    assert {"model_index.json", "unet/config.json", "class_encoder/config.json", "README.md"} <= pushed.keys()
    assert not any(name.startswith("checkpoint-") or str(tmp_path).encode() in data for name, data in pushed.items())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["name", "no hub"])
def test_a_push_that_can_not_work_is_refused_before_the_training(fault, hub, tmp_path):
    name = "user/a name" if fault == "name" else "user/trained"
    if fault == "no hub":
        hub.stop()
    done = train_and_push(hub, tmp_path, name)
    if fault == "no hub":
        hub.start()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {name}: no repository to push to (")
    assert not list((tmp_path / "out").glob("*"))
