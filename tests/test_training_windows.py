"""Training on windows: they hold the images and draws of whole batches, and each image has the same weight."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from training_data import write_training_set

import train_counterfactual
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.losses import noise_prediction_loss
from diffusers_cf.models import class_token_encoder, counterfactual_unet
from diffusers_cf.training.loop import TrainingSlices
from train_counterfactual import parse_args, train_on_batch, training_slices


SIDE, COUNT = 32, 200


class MadeSlices:
    """Two images in memory: one with a foreground of 20 x 12 pixels, one that is filled."""

    folder, labels = "made", (0, 1)

    def __getitems__(self, indices):
        return indices

    def collate(self, rows):
        images = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) + 0.1
        images[0, :, :5] = images[0, :, 25:] = images[0, :, :, :10] = images[0, :, :, 22:] = 0
        return {"images": images[rows], "labels": torch.tensor(rows)}


def parts_of(share, positions=range(COUNT)):
    slices = TrainingSlices(MadeSlices(), 0, (SIDE, SIDE), crop_background=share, window_side=24)
    return slices.collate_parts(slices.__getitems__(list(positions)))


def test_parts_hold_every_image_once_with_its_draws():
    (whole,), parts = parts_of(0), parts_of(0.5)
    assert set(whole) == {"images", "labels", "noise", "timesteps", "uniform"}
    assert sorted(torch.cat([part["uniform"] for part in parts]).tolist()) == sorted(whole["uniform"].tolist())
    for part in parts:
        rows = [int((whole["uniform"] == uniform).nonzero()) for uniform in part["uniform"]]
        assert torch.equal(part["labels"], whole["labels"][rows])
        assert torch.equal(part["timesteps"], whole["timesteps"][rows])
        side = part["images"].shape[-1]
        top, left = (0, 0) if side == SIDE else ((SIDE - side) // 2 - 1, (SIDE - side) // 2)
        for key in ("images", "noise"):
            assert torch.equal(part[key], whole[key][rows, :, top : top + side, left : left + side]), key


def test_a_share_of_the_images_is_cut_to_windows():
    sizes = {tuple(part["images"].shape[2:]): part for part in parts_of(0.5)}
    assert set(sizes) == {(24, 24), (SIDE, SIDE)}
    small = sizes[(24, 24)]
    assert not small["labels"].any()  # the filled image does not fit into a window
    assert 0.35 < len(small["labels"]) / int((parts_of(0)[0]["labels"] == 0).sum()) < 0.65
    assert not (small["images"][:, :, 0] > -1).any() and (small["images"][:, :, 2:-2, 8:-8] > -1).all()
    everything = parts_of(1)
    assert sorted(tuple(part["images"].shape[2:]) for part in everything) == [(24, 24), (SIDE, SIDE)]
    assert sum(len(part["labels"]) for part in everything) == COUNT


class Network(torch.nn.Module):
    """Predicts its only weight times the image; counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(())), 0

    def forward(self, sample, timesteps, class_ids):
        self.calls += 1
        return self.weight * sample


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_each_image_has_the_same_weight_in_the_loss(share):
    network, scheduler, parts = Network(), DDPMScheduler(), parts_of(share, range(10))
    run = SimpleNamespace(
        args=SimpleNamespace(first_timesteps=1.0, guidance_dropout_prob=0.35, snr_gamma=5.0, max_grad_norm=1e9),
        accelerator=Accelerator(cpu=True), optimizer=torch.optim.SGD(network.parameters(), 0.5), model=network,
        network=SimpleNamespace(class_encoder=SimpleNamespace(null_id=2)),
    )  # fmt: skip
    assert len(parts) == (2 if share else 1)
    singles = [{k: v[i : i + 1] for k, v in part.items()} for part in parts for i in range(len(part["labels"]))]
    keys = ("images", "labels", "noise", "timesteps")
    losses = [noise_prediction_loss(network, scheduler, *(s[key] for key in keys), 5.0) for s in singles]
    expected = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(expected, network.weight)
    network.calls = 0
    loss = train_on_batch(run, scheduler, parts, 1.0)
    assert network.calls == len(parts)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(network.weight.detach(), 1 - 0.5 * gradient)


@pytest.mark.parametrize(
    "given, of_base, expected", [("", None, 0), ("0.5", None, 0.5), ("", True, 0.7), ("0", True, 0)]
)
def test_a_pipeline_trained_on_windows_computes_windows(pipe, tmp_path, given, of_base, expected):
    data = write_training_set(tmp_path / "data", size=32)
    options = ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), "--resolution", "32"]
    options += ["--crop_background", given] if given else []
    if of_base:
        made = train_counterfactual.build_pipeline(
            parse_args([*options, "--crop_background", "1"]), counterfactual_unet(image_size=32, num_channels=2),
            class_token_encoder(), SliceDataset(data, "train").preprocessing,
        )  # fmt: skip
        assert made.config.crop_background
        made.save_pretrained(tmp_path / "base")
        options += ["--pretrained_model", str(tmp_path / "base")]
    AcceleratorState._reset_state(reset_partial_state=True)
    args = parse_args(options)
    run = train_counterfactual.set_up(args, Accelerator(cpu=True), tmp_path / "out")
    assert run.slices.crop_background == expected
    assert run.pipeline().config.crop_background is bool(expected) and run.pipeline().config.clip_input
    assert run.fingerprint["crop_background"] == (expected or None)
    assert ("--crop_background 0.7" in run.facts["training"]["command"]) == (expected == 0.7)


def test_training_and_pipeline_have_the_same_windows(pipe, tmp_path):
    data = write_training_set(tmp_path / "data")
    args = parse_args(["--dataset", str(data), "--output_dir", "out", "--crop_background", "0.5"])
    pipe.unet.register_to_config(sample_size=16)
    slices = training_slices(args, SliceDataset(data, "train"), pipe)
    assert (slices.crop_background, slices.image_size) == (0.5, (16, 16))
    inside = torch.zeros(1, 2, 16, 16)
    inside[:, :, 4:6, 4:6] = 1
    pipe.register_to_config(crop_background=True)
    (group,) = pipe.windows(inside * 2 - 1)
    assert group.size == (slices.window_side,) * 2


def test_images_that_are_too_small_for_windows_are_refused(pipe, tmp_path):
    data = write_training_set(tmp_path / "data")
    args = parse_args(["--dataset", str(data), "--output_dir", "out", "--crop_background", "0.5"])
    pipe.unet.register_to_config(sample_size=8, block_out_channels=(8, 8, 8, 8))
    with pytest.raises(InputError, match="^--crop_background: images of 8 pixels"):
        training_slices(args, SliceDataset(data, "train"), pipe)
