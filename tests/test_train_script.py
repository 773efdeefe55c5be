"""Whole runs of train_counterfactual.py on 16 slices: what it saves, that it can be killed, what it refuses."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from training_data import STEPS, forget_accelerator, options, run_here, train, write_training_set

import train_counterfactual
from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.files import alone_at
from diffusers_cf.losses import noise_prediction_loss
from diffusers_cf.models import UNET_SIZES
from diffusers_cf.training.checkpoints import finished_checkpoints
from diffusers_cf.training.curves import read_curve
from train_counterfactual import build_network, main, parse_args, set_up, start_accelerator


ROOT = Path(__file__).parents[1]
DIE_WHILE_SAVING = """
import os, signal, sys
import train_counterfactual as script

def die(pipe, folder):
    folder.mkdir()
    (folder / "model_index.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)

script.CounterfactualDDIMPipeline.save_pretrained = die
script.main(script.parse_args(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread_one_cache(tmp_path_factory):
    """In this process as in the subprocesses, so that equal runs are equal to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        for name, value in {
            "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "ACCELERATE_USE_CPU": "true", "PYTHONDONTWRITEBYTECODE": "1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """2 channels, with masks."""
    return write_training_set(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture(scope="module")
def reference(data):
    """A run that nothing disturbs."""
    extra = {"report_to": "tensorboard", "validation_steps": STEPS, "num_validation_slices": 2}
    return train(data, data.parent / "reference", hub_token="hf_secret", **extra)


def weights(model):
    """All tensors of a pipeline folder."""
    files = [path for name in ("unet", "class_encoder") for path in (model / name).glob("*.safetensors")]
    return {f"{path.parent.name}.{key}": tensor for path in files for key, tensor in load_file(path).items()}


def assert_same_weights(first, second, tolerance=0.0):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and first
    assert all(tensor.isfinite().all() for tensor in first.values())
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= tolerance, name


def set_up_run(dataset, output, **changes):
    forget_accelerator()
    args = parse_args(options(dataset, output, **changes))
    return set_up(args, start_accelerator(args, output), output)


def test_weights_are_laid_out_as_the_device_trains_fastest(data, tmp_path):
    assert set_up_run(data, tmp_path / "out")[0].network.unet.mid_block.resnets[0].conv1.weight.is_contiguous()
    devices, fastest = [torch.device(name) for name in ("cpu", "cuda")], train_counterfactual.fastest_layout
    layouts = [fastest(device, compiled) for device in devices for compiled in (False, True)]
    assert layouts == 3 * [torch.contiguous_format] + [torch.channels_last]


def test_a_run_ends_with_a_pipeline_of_the_averaged_weights(reference, data):
    pipe = CounterfactualDDIMPipeline.from_pretrained(reference)
    assert pipe.image_size == (16, 16) and pipe.unet.config.in_channels == 2
    assert pipe.class_encoder.config.class_names == ["healthy", "unhealthy"]
    facts = json.loads((data / "preprocessing.json").read_text())
    training = pipe.preprocessing.pop("training")
    assert {k: v for k, v in facts.items() if k != "splits"} == pipe.preprocessing
    train_split = facts["splits"]["train"]
    assert training["images"] == 12 * 8 and training["slices"] == train_split["slices"]
    assert training["patients"] == train_split["patients"] and "--max_train_steps 12" in training["command"]
    assert "hf_secret" not in training["command"] and str(data) not in training["command"]
    assert pipe(torch.rand(1, 2, 16, 16), num_inference_steps=10).heatmaps.isfinite().all()
    assert [path.name for path in finished_checkpoints(reference)] == [f"checkpoint-{n}" for n in (4, 8, 12)]
    assert_same_weights(reference, reference / "checkpoint-12" / "pipeline")
    # the average, not the weights in training
    trained = load_file(reference / "checkpoint-12" / "model.safetensors")
    averaged = weights(reference)["unet.conv_out.weight"]
    assert 1e-5 < (trained["unet.conv_out.weight"] - averaged).abs().max() < 1e-2
    assert (reference / "validation" / "step-0000012.png").stat().st_size > 5000
    assert [row["images"] for row in read_curve(reference / "losses.json")] == [8 * n for n in range(1, 13)]
    logs = [path for path in (reference / "logs").rglob("*") if path.is_file()]
    assert logs and not any(b"hf_secret" in path.read_bytes() for path in logs)


def test_accumulated_parts_give_the_same_weights(reference, data, tmp_path):
    train(data, tmp_path / "out", train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=4)
    assert_same_weights(tmp_path / "out", reference / "checkpoint-4" / "pipeline", 1e-5)


def test_another_number_of_parts_in_the_environment_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert run_here(data, tmp_path / "out") == 2
    assert "GRADIENT_ACCUMULATION_STEPS is 2 in the environment, and --gradient_acc" in capsys.readouterr().err
    train(data, tmp_path / "out", gradient_accumulation_steps=2, max_train_steps=2, checkpointing_steps=2)
    assert [path.name for path in finished_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_a_folder_belongs_to_one_run(data, tmp_path, capsys):
    with alone_at(tmp_path / "out"):
        assert run_here(data, tmp_path / "out") == 2
    assert f"error: {tmp_path / 'out'}: another process is writing it" in capsys.readouterr().err
    assert list(tmp_path.rglob("*checkpoint*")) == []
    train(data, tmp_path / "out", max_train_steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # and no lock


def test_a_run_that_is_stopped_while_it_validates_goes_on_from_there(data, tmp_path, monkeypatch):
    def stop(self, pipe, step):
        raise KeyboardInterrupt

    changes = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2, "num_validation_slices": 2}
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_cf.training.validation.Validation.run", stop)
        assert run_here(data, tmp_path / "out", **changes) == 130
    assert [path.name for path in finished_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    train(data, tmp_path / "out", resume_from_checkpoint="latest", **changes)
    scores = json.loads((tmp_path / "out" / "validation" / "scores.json").read_text())
    assert [row["step"] for row in scores] == [2, 4]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes need two GPUs here")
def test_two_processes_give_the_same_weights(reference, data, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")  # nobody who follows README.md has set it
    changes = {"train_batch_size": 4, "max_train_steps": 4, "validation_steps": 4, "num_validation_slices": 2}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, ROOT / "train_counterfactual.py", *options(data, tmp_path / "out", **changes)]
    subprocess.run(command, cwd=tmp_path, check=True)
    states = {path.name for path in (tmp_path / "out" / "checkpoint-4").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}  # there were two
    assert_same_weights(tmp_path / "out", reference / "checkpoint-4" / "pipeline", 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_resumes_as_if_never_killed(reference, data, tmp_path):
    # 1. Killed at a random moment after the first checkpoint.
    output = tmp_path / "out"
    command = [sys.executable, ROOT / "train_counterfactual.py", *options(data, output, checkpoints_total_limit=2)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not (output / "checkpoint-4").exists():
            assert process.poll() is None, "ended before its first checkpoint"
            time.sleep(0.02)
        delay = random.uniform(0, 0.4)
        time.sleep(delay)
        process.kill()
    assert process.returncode == -signal.SIGKILL, f"ended within {delay} s"
    before = [path.name for path in finished_checkpoints(output)]

    # 2. Resumed, and killed again in the middle of writing its next checkpoint.
    again = options(data, output, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    killed = subprocess.run([sys.executable, "-c", DIE_WHILE_SAVING, *again], cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    (half_written,) = output.glob(".checkpoint-*.tmp")
    assert (half_written / "pipeline" / "model_index.json").read_text() == "{"
    assert [path.name for path in finished_checkpoints(output)] == before

    # 3. Resumed to its end.
    train(data, output, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    assert_same_weights(output, reference)
    assert {path.name for path in output.glob("*checkpoint*")} == {"checkpoint-8", "checkpoint-12"}


def test_resuming_restores_random_numbers_optimiser_rate_and_average(data, tmp_path, monkeypatch):
    monkeypatch.setitem(UNET_SIZES["small"], "dropout", 0.5)
    short = {"max_train_steps": 4, "checkpointing_steps": 2, "lr_warmup_steps": 3}
    whole = train(data, tmp_path / "whole", **short)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    torch.rand(7)  # whatever else was drawn meanwhile
    resumed = train(data, tmp_path / "resumed", resume_from_checkpoint="latest", **short)
    assert_same_weights(resumed, whole)


def test_the_first_steps_see_the_lowest_timesteps(data, tmp_path, monkeypatch):
    """8 steps from a tenth of the timesteps: below 100 for a quarter of them, then rising to all."""
    loss = Mock(wraps=noise_prediction_loss)
    monkeypatch.setattr(train_counterfactual, "noise_prediction_loss", loss)
    run, _ = set_up_run(data, tmp_path / "model", first_timesteps=0.1, max_train_steps=8, train_batch_size=16)
    assert list(run.steps()) == list(range(1, 9))
    seen = [int(call.args[5].max()) for call in loss.call_args_list]
    assert max(seen[:3]) < 100 and 100 < seen[4] < 550 and max(seen[6:]) > 550


@pytest.mark.parametrize("conditioning", ["attention", "adagn", "unconditional"])
def test_every_trained_weight_gets_a_gradient(conditioning, data):
    # several processes wait for each of them
    args = parse_args(options(data, "unused", conditioning=conditioning))
    model = build_network(args, SliceDataset(data, "train"), None)
    images, ids = torch.zeros(2, 2, 16, 16), torch.tensor([0, 2])
    noise_prediction_loss(model, DDPMScheduler(), images, ids, images + 1, torch.tensor([3, 500])).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_adagn_in_bf16_on_slices_without_masks(tmp_path):
    data = write_training_set(tmp_path / "data", channels=4, masks=False)
    given = [option.replace("_", "-") for option in options("D", "O", max_train_steps=2, validation_steps=2)[2:]]
    given += "--conditioning adagn --prediction-type v_prediction --snr-gamma 5 --gradient-checkpointing".split()
    given += "--random-flip --augment --mixed-precision bf16 --num-validation-slices 2".split()
    forget_accelerator()
    main(parse_args([f"--dataset={data}", f"--output-dir={tmp_path / 'out'}", *given]))
    pipe = CounterfactualDDIMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.prediction_type == pipe.inverse_scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.dtype == torch.float32 and pipe.unet.config.in_channels == 4
    assert {path.suffix for path in (tmp_path / "out" / "validation").iterdir()} == {".png", ".json"}


def test_epochs_of_the_first_samples_unconditional(data, tmp_path):
    changes = {"num_train_epochs": 2, "max_train_samples": 9, "lr_scheduler": "cosine"}
    output = train(data, tmp_path / "out", conditioning="unconditional", **changes)
    # 9 slices are two batches of 8
    assert [path.name for path in finished_checkpoints(output)] == ["checkpoint-4"]
    pipe = CounterfactualDDIMPipeline.from_pretrained(output)
    assert pipe.class_encoder is None and pipe.unet.config.class_embed_type is None


def test_fine_tuning_starts_from_the_given_weights(reference, data, tmp_path):
    start = {"pretrained_model": reference, "max_train_steps": 1, "resolution": None}
    still = train(data, tmp_path / "still", learning_rate=0, **start)
    assert_same_weights(still, reference)
    moved = train(data, tmp_path / "moved", lr_warmup_steps=0, **start)
    before = weights(reference)
    assert 1e-5 < max((after - before[name]).abs().max() for name, after in weights(moved).items()) < 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e30}, "the loss became "),
        # weights above 1.2 overflow in the update, after a loss that is still a number
        ({"adam_weight_decay": 2e42}, "the weights became "),
    ],
)
def test_a_diverging_run_stops_and_keeps_its_checkpoints(changes, words, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run_here(data, output, lr_warmup_steps=2, checkpointing_steps=1, max_train_steps=9, **changes) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {words}") and "--learning_rate" in last
    kept = finished_checkpoints(output)
    assert 1 <= len(kept) < 9 and not (output / "model_index.json").exists()
    for checkpoint in kept:
        assert all(tensor.isfinite().all() for tensor in weights(checkpoint / "pipeline").values())


@pytest.mark.slow
def test_an_error_of_the_command_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "train_counterfactual.py", *options("missing", tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


BASE = {"dataset": "{data}", "pretrained_model": "{model}"}
WRONG_INPUTS = {
    "output is taken": ({"output_dir": "{model}"}, "{model} already holds checkpoint-12: go on from it with --resume"),
    "other classes": (BASE | {"dataset": "{other}"}, "{model}: knows the classes ['healthy', 'unhealthy'], {other}"),
    "other resolution": (BASE | {"resolution": 32}, "{model}: was trained with --resolution 16, this run has 32"),
    "other prediction": (
        BASE | {"prediction_type": "v_prediction"}, "{model}: was trained with --prediction_type epsilon, this run",
    ),
    "one class": ({"max_train_samples": 5}, "{data}: no slice to train on is labelled unhealthy"),
    "not prepared": ({"dataset": "{tmp}"}, "{tmp} is no finished slice data set: preprocessing.json is missing"),
    "other network": (
        {"resume_from_checkpoint": "{model}/checkpoint-4", "conditioning": "adagn"},
        "checkpoint-4: not a readable checkpoint of this network (",
    ),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
    "no tracker": ({"report_to": "clearml"}, "--report_to clearml: this tracker is not installed"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs(case, data, reference, tmp_path, capsys):
    other = write_training_set(tmp_path / "other", classes=("sound", "ill"))
    places = {"tmp": tmp_path, "data": data, "other": other, "model": reference}
    changes, words = WRONG_INPUTS[case]
    changes = {"output_dir": "{tmp}/out", "dataset": "{data}"} | changes
    changes = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    capsys.readouterr()
    assert run_here(changes.pop("dataset"), changes.pop("output_dir"), **changes) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words.format(**places) in line
    assert not any("Traceback" in other or "Error" in other for other in before)
