"""Model folders on the disk: saved and loaded bit-equal, and refused where they are foreign, unsafe or damaged."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from model_files import FACTS, UNET, edit_json, files_of, fingerprint, load, tiny_pipeline

from diffusers_cf import generic_loading, loading, saving
from diffusers_cf.errors import InputError
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model folder; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    saving.write_checksums(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_save_and_load_is_bit_equal(model):
    pipe = CounterfactualDDIMPipeline.from_pretrained(model)
    assert fingerprint(pipe) == fingerprint(tiny_pipeline())
    assert type(pipe.scheduler) is DynamicDDIMScheduler and type(pipe.inverse_scheduler) is DynamicDDIMInverseScheduler


def test_plain_diffusion_pipeline_finds_our_class(model):
    importlib.import_module("diffusers_cf")
    pipe = DiffusionPipeline.from_pretrained(model)
    assert type(pipe) is CounterfactualDDIMPipeline and fingerprint(pipe) == load(model)


def test_a_class_of_diffusers_is_never_replaced():
    foreign = type("DDIMPipeline", (), {"__module__": "diffusers_cf.other"})
    before = DiffusionPipeline.from_pretrained
    generic_loading.register_with_diffusers(foreign)
    assert importlib.import_module("diffusers").DDIMPipeline is not foreign
    assert DiffusionPipeline.from_pretrained == before


def test_models_of_others_load_as_before(tmp_path):
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is DDIMPipeline
    with pytest.raises(OSError, match="no file named model_index.json|does not appear to have|Error no file"):
        DiffusionPipeline.from_pretrained(tmp_path / "unet")


def test_every_allowed_class_exists():
    for name, pairs in loading.ALLOWED_COMPONENTS.items():
        for library, class_name in pairs:
            assert library is None or isinstance(getattr(importlib.import_module(library), class_name), type), name


def shard_index(folder, name):
    shutil.move(folder / UNET, folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def pickle_only(folder):
    os.remove(folder / UNET)
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")


def flip_a_byte(folder, name=UNET):
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)


def link_out(folder, name):
    shutil.move(folder / name, folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")


DAMAGES = {
    "os.system": (
        lambda f: edit_json(f / "model_index.json", unet=["os", "system"]),
        r"model_index.json: component 'unet' is \[\"os\", \"system\"\], refused",
    ),
    "class of diffusers": (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet2DModel"]),
        "model_index.json: component 'unet' is .*UNet2DModel.*must be diffusers.UNet2DConditionModel",
    ),
    "foreign name": (
        lambda f: edit_json(f / "model_index.json", safety_checker=[None, None]),
        "model_index.json: foreign component 'safety_checker'",
    ),
    "no scheduler": (
        lambda f: edit_json(f / "model_index.json", scheduler=[None, None]),
        "model_index.json: component 'scheduler' is missing",
    ),
    "setting for a component": (
        lambda f: edit_json(f / "model_index.json", unet="../other"),
        "model_index.json: component 'unet' is \"../other\", refused",
    ),
    "number for a component": (lambda f: edit_json(f / "model_index.json", unet=3), "component 'unet' is 3, refused"),
    "switch no switch": (
        lambda f: edit_json(f / "model_index.json", clip_input=["os", "system"]),
        "model_index.json: 'clip_input' is .*, it must be true or false",
    ),
    "no model_index.json": (lambda f: os.remove(f / "model_index.json"), "model_index.json: no such file"),
    "model_index.json cut": (lambda f: (f / "model_index.json").write_text('{"unet": '), "not readable as JSON"),
    "model_index.json nested": (lambda f: (f / "model_index.json").write_text("[" * 10**6), "not readable as JSON"),
    "model_index.json a list": (lambda f: (f / "model_index.json").write_text("[]"), "not a JSON object"),
    "model_index.json large": (lambda f: (f / "model_index.json").write_text(" " * 2**25), "larger than 16 MiB"),
    "component missing": (lambda f: shutil.rmtree(f / "class_encoder"), "class_encoder: the folder of this component"),
    "config missing": (lambda f: os.remove(f / "unet/config.json"), "unet/config.json: no such file"),
    "config binary": (lambda f: (f / "unet/config.json").write_bytes(b"\xff"), "unet/config.json: not readable"),
    "pickle": (pickle_only, r"unet has its weights as a pickle only \(diffusion_pytorch_model.bin\)"),
    "no weights": (lambda f: os.remove(f / UNET), "unet has no weights"),
    "weights cut": (lambda f: os.truncate(f / UNET, 5000), f"{UNET}: damaged or truncated"),
    "weights huge": (lambda f: os.truncate(f / UNET, 2**33 + 1), f"{UNET}: larger than 8 GiB"),
    "weights empty": (lambda f: os.truncate(f / UNET, 0), f"{UNET}: damaged or truncated"),
    "weights grown": (lambda f: (f / UNET).open("ab").write(bytes(9)), f"{UNET}: damaged or truncated"),
    "LFS pointer": (
        lambda f: (f / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        f"{UNET}: a Git LFS pointer",
    ),
    "flipped byte": (flip_a_byte, f"{UNET}: damaged, its SHA-256 is not the one in checksums.json"),
    "not in checksums": (
        lambda f: (f / "checksums.json").write_text("{}"),
        "model.safetensors: not listed in checksums.json",
    ),
    "shard outside": (
        lambda f: shard_index(f, "../../outside.safetensors"),
        "names '../../outside.safetensors', which is not the name of a file of weights",
    ),
    "shard missing": (
        lambda f: shard_index(f, "diffusion_pytorch_model-00001-of-00002.safetensors"),
        "names 'diffusion_pytorch_model-00001-of-00002.safetensors', which is missing",
    ),
    "index missing": (
        lambda f: os.rename(f / UNET, f / "unet/diffusion_pytorch_model-00001-of-00001.safetensors"),
        "unet has shards of weights without the index",
    ),
    "index empty": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "index.json: no weight_map",
    ),
    "weights linked": (lambda f: link_out(f, UNET), f"{UNET}: leads out of the model folder"),
    "component linked": (lambda f: link_out(f, "unet"), "unet/config.json: leads out of the model folder"),
    "preprocessing cut": (
        lambda f: (f / "preprocessing.json").write_text('{"modalities": ["flair"'),
        "preprocessing.json: not readable as JSON",
    ),
    "preprocessing settings": (
        lambda f: edit_json(f / "preprocessing.json", settings=[3.0]),
        "preprocessing.json: `settings` is not a JSON object",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_foreign_unsafe_or_damaged_folder_is_refused(copy, damage):
    loading.check_model_folder(copy)
    do, reason = DAMAGES[damage]
    do(copy)
    with pytest.raises(InputError, match=reason) as caught:
        CounterfactualDDIMPipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "model_index.json" not in name])
def test_generic_loading_refuses_the_same(copy, damage):
    do, reason = DAMAGES[damage]
    do(copy)
    with pytest.raises(InputError, match=reason):
        DiffusionPipeline.from_pretrained(copy)


def test_nothing_that_a_model_names_is_imported(copy, tmp_path, monkeypatch):
    (tmp_path / "bait_of_a_model.py").write_text("class UNet2DConditionModel: pass")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(copy / "model_index.json", unet=["bait_of_a_model", "UNet2DConditionModel"])
    with pytest.raises(InputError, match="bait_of_a_model"):
        CounterfactualDDIMPipeline.from_pretrained(copy)
    assert "bait_of_a_model" not in sys.modules


def test_a_pickle_beside_safetensors_is_never_read(copy):
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load(copy, use_safetensors=False) == load(copy)


def test_facts_outlive_the_folder_that_they_came_from(copy, tmp_path):
    pipe = CounterfactualDDIMPipeline.from_pretrained(copy)
    shutil.rmtree(copy)
    pipe.save_pretrained(tmp_path / "again")
    assert loading.read_preprocessing(tmp_path / "again") == FACTS


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(InputError, match="nothing: no such folder"):
        loading.check_model_folder(tmp_path / "nothing")


def test_checksums_follow_the_weights(copy):
    sums = saving.write_checksums(copy)
    assert set(sums) == {UNET, UNET.replace("unet", "class_encoder")}
    flip_a_byte(copy)
    (copy / "checksums.old.json").write_text("{}")
    changed = saving.write_checksums(copy)
    assert {name for name in sums if sums[name] != changed[name]} == {UNET}
    assert json.loads((copy / "checksums.json").read_text()) == changed and not (copy / "checksums.old.json").exists()
    loading.check_model_folder(copy)


def test_preprocessing_is_written_whole_or_not_at_all(tmp_path):
    assert loading.read_preprocessing(tmp_path) == {}
    saving.write_preprocessing(tmp_path / "new", FACTS)
    with pytest.raises(ValueError, match="JSON compliant"):
        saving.write_preprocessing(tmp_path / "new", {"settings": {"threshold": float("nan")}})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
        saving.write_preprocessing(tmp_path / "new", {})
    assert loading.read_preprocessing(tmp_path / "new") == FACTS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["preprocessing.json"]


def test_a_saved_model_does_not_say_where_it_was_loaded_from(model, tmp_path):
    """diffusers notes the folder in every configuration; published, it would show the machine's paths."""
    pipe = CounterfactualDDIMPipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path / "again")
    assert str(model) in str(pipe.unet.config)
    written = {name: data for name, data in files_of(tmp_path / "again").items() if name.endswith(".json")}
    assert len(written) > 5 and not [name for name, data in written.items() if b"_name_or_path" in data]
