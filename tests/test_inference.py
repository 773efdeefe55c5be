"""Device and dtype of a command, and what computing in bfloat16 changes."""

import argparse

import numpy as np
import pytest
import torch

from diffusers_cf.data.phantom import FROZEN_SEED, PhantomSource
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask, postprocess_maps
from diffusers_cf.inference import check_device_arguments, computes_in_bfloat16, open_pipeline
from diffusers_cf.loading import PRETRAINED


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(device, current, monkeypatch):
    # Accelerate trains on the current GPU, whatever the command line says
    found = []
    monkeypatch.setattr("diffusers_cf.inference.torch.zeros", lambda *_, device: None)
    monkeypatch.setattr("diffusers_cf.inference.torch.cuda.set_device", found.append)
    check_device_arguments(argparse.Namespace(device=device, batch_size=1, dtype="auto"))
    assert found == current


@pytest.mark.parametrize("features", [set(), {"_is_avx512_bf16_supported"}, {"_is_amx_tile_supported"}])
def test_auto_is_bfloat16_where_the_processor_computes_in_it(monkeypatch, features):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in features)
    for given, found in (("auto", "bfloat16" if features else "float32"), ("float32", "float32")):
        args = argparse.Namespace(device="cpu", batch_size=1, dtype=given)
        check_device_arguments(args)
        assert args.dtype == found


@pytest.mark.parametrize("computes", [True, False])
def test_emulated_bfloat16_is_warned_of(monkeypatch, caplog, computes):
    monkeypatch.setattr("diffusers_cf.inference.computes_in_bfloat16", lambda device: computes)
    args = argparse.Namespace(device="cpu", batch_size=1, dtype="bfloat16")
    check_device_arguments(args)
    assert args.dtype == "bfloat16"
    assert [record.message for record in caplog.records if "emulated" in record.message] == [
        "bfloat16 is emulated on this machine and many times slower than --dtype auto"
    ] * (not computes)


def test_a_processor_that_torch_tells_nothing_about_computes_in_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    args = argparse.Namespace(device="cpu", batch_size=1, dtype="auto")
    check_device_arguments(args)
    assert args.dtype == "float32"


def test_a_model_in_use_is_laid_out_for_convolutions():
    weight = open_pipeline(str(PRETRAINED / "phantom_small")).unet.conv_in.weight
    assert weight.dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last)


def phantom_slices():
    """Every sixth slice of three phantom patients with a lesion, 64 x 64: images and masks."""
    source, found = PhantomSource(FROZEN_SEED, size=64), []
    for patient in map(source.read, source.fixed_splits()["validation"]):
        found += [patient] * bool(patient.masks.any())
        if len(found) == 3:
            break
    return (np.concatenate([getattr(patient, name)[::6] for patient in found]) for name in ("images", "masks"))


@pytest.mark.slow
@pytest.mark.skipif(not computes_in_bfloat16("cpu"), reason="bfloat16 is emulated here")
def test_bfloat16_finds_what_float32_finds():
    """Within one point of AUPRC in the foreground after post-processing."""
    images, masks = phantom_slices()
    inside, scores = foreground_mask(images), []
    for dtype in ("float32", "bfloat16"):
        maps = open_pipeline(str(PRETRAINED / "phantom_small"), "cpu", dtype)(torch.from_numpy(images)).heatmaps
        counts = PixelCounts()
        counts.update(postprocess_maps(maps.float().numpy(), images)[inside], masks[inside])
        scores.append(counts.average_precision())
    assert scores[0] > 5 * masks.sum() / inside.sum()
    assert scores[1] == pytest.approx(scores[0], abs=0.01)
