"""Training on windows: they hold the images and draws of whole batches, and each image has the same weight."""

import pytest
import torch
from accelerate import Accelerator
from training_data import forget_accelerator, two_slices, write_training_set

import train_counterfactual
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError
from diffusers_cf.training.batches import PositionBatches, TrainingSlices
from train_counterfactual import parse_args


SIDE, COUNT = 32, 200


def parts_of(share, positions=range(COUNT)):
    slices = TrainingSlices(two_slices(), 0, (SIDE, SIDE), crop_background=share)
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


def test_batches_are_cut_to_windows(tmp_path):
    data = write_training_set(tmp_path / "data", size=32, area=0.3)
    slices = TrainingSlices(SliceDataset(data, "train"), 0, (64, 64), crop_background=1.0)
    for parts in slices.batches(PositionBatches(0, 2, 8, 1, 0, 1), 0, False):
        assert sum(len(part["images"]) for part in parts) == 8
        assert [part["images"].shape[2:] for part in parts] == [(48, 48)]


@pytest.mark.parametrize(
    "given, of_base, expected", [("", None, 0), ("0.5", None, 0.5), ("", True, 0.7), ("0", True, 0)]
)
def test_a_pipeline_trained_on_windows_computes_windows(pipe, tmp_path, given, of_base, expected):
    data = write_training_set(tmp_path / "data", size=32)
    options = ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), "--resolution", "32"]
    options += ["--crop_background", given] if given else []
    if of_base:
        pipe.unet.register_to_config(sample_size=32)
        pipe.register_to_config(crop_background=True)
        pipe.save_pretrained(tmp_path / "base")
        options += ["--pretrained_model", str(tmp_path / "base")]
    forget_accelerator()
    run, pipeline = train_counterfactual.set_up(parse_args(options), Accelerator(cpu=True), tmp_path / "out")
    assert run.slices.crop_background == expected
    assert pipeline().config.crop_background is bool(expected) and pipeline().config.clip_input
    assert run.metadata["crop_background"] == (expected or None)
    assert ("--crop_background 0.7" in pipeline().preprocessing["training"]["command"]) == (expected == 0.7)


def test_windows_are_those_of_the_network(pipe):
    halvings = len(pipe.unet.config.down_block_types) - 1
    slices = TrainingSlices(two_slices(), 0, (16, 16), crop_background=0.5, halvings=halvings)
    pipe.unet.register_to_config(sample_size=16)
    inside = torch.zeros(1, 2, 16, 16)
    inside[:, :, 4:6, 4:6] = 1
    pipe.register_to_config(crop_background=True)
    (group,) = pipe.windows(inside * 2 - 1)
    assert group.size == (slices.window_side,) * 2


def test_images_that_are_too_small_for_windows_are_refused():
    with pytest.raises(InputError, match="^--crop_background: images of 8 pixels are too small to be cut to windows$"):
        TrainingSlices(two_slices(), 0, (8, 8), crop_background=0.5)
