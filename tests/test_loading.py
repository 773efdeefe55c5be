"""Model folders: saved and loaded bit-equal, from the disk and the Hub; refused if foreign, unsafe or damaged."""

import json
import os
import shutil
import signal
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hub_client import client_process
from model_files import CONFIGS, FACTS, UNET, edit_json, files_of, fingerprint, load, tiny_pipeline
from safetensors.torch import load_file, save_file

from diffusers_cf.errors import InputError
from diffusers_cf.loading import MODEL_INDEX, check_model_folder, find_model, read_preprocessing, replace_json
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


ENCODER, UNET_FP16 = UNET.replace("unet", "class_encoder"), UNET.replace("model.", "model.fp16.")
SCHEDULER = "inverse_scheduler/scheduler_config.json"


# What follows runs in the client's process, whose Hub is the stand-in.
def push(folder, repo_id, **options):
    CounterfactualDDIMPipeline.from_pretrained(folder).push_to_hub(repo_id, **options)


def save_and_push(folder, repo_id):
    CounterfactualDDIMPipeline.from_pretrained(folder).save_pretrained(folder, push_to_hub=True, repo_id=repo_id)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model folder; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_save_and_load_is_bit_equal(model, tmp_path):
    pipe = CounterfactualDDIMPipeline.from_pretrained(model)
    assert fingerprint(pipe) == fingerprint(tiny_pipeline())
    assert type(pipe.scheduler) is DynamicDDIMScheduler and type(pipe.inverse_scheduler) is DynamicDDIMInverseScheduler
    pipe.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(model)  # in particular, no path that it was loaded from


def test_a_shipped_model_has_a_name_that_works_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = CounterfactualDDIMPipeline.from_pretrained("phantom_small")
    assert pipe.config.crop_background and pipe.preprocessing["source"] == "phantom"
    (tmp_path / "phantom_small").mkdir()
    assert find_model("phantom_small") == "phantom_small"  # a folder comes first


def test_facts_outlive_the_folder_and_names_of_folders_and_patients_are_not_saved(copy, tmp_path):
    pipe = CounterfactualDDIMPipeline.from_pretrained(copy)
    shutil.rmtree(copy)
    pipe.preprocessing = pipe.preprocessing | {"input": "ward-7", "skipped": ["P_1"], "splits": {}}
    pipe.save_pretrained(tmp_path / "again")
    assert read_preprocessing(tmp_path / "again") == FACTS


def test_components_carry_facts_and_switches_to_another_pipeline():
    pipe = tiny_pipeline()
    parts = pipe.components
    pipe = CounterfactualDDIMPipeline(**parts, crop_background=True, clip_input=False)
    pipe.preprocessing = FACTS | {"signs": [1, -1]}
    for again in (CounterfactualDDIMPipeline(**pipe.components), CounterfactualDDIMPipeline.from_pipe(pipe)):
        assert again.preprocessing == pipe.preprocessing
        assert again.config.crop_background and not again.config.clip_input
    assert not CounterfactualDDIMPipeline(**pipe.components, crop_background=False).config.crop_background


def test_files_have_the_mode_of_any_new_file(model, tmp_path):
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in model.rglob("*") if path.is_file()} == {(tmp_path / "new").stat().st_mode}


def test_checksums_follow_the_weights(copy):
    pipe = CounterfactualDDIMPipeline.from_pretrained(copy)
    before = json.loads((copy / "checksums.json").read_text())
    pipe.unet.conv_in.weight.data += 1
    pipe.save_pretrained(copy)
    after = json.loads((copy / "checksums.json").read_text())
    assert set(before) == {UNET, ENCODER} and {name for name in before if before[name] != after[name]} == {UNET}


def shard_index(folder, name):
    shutil.move(folder / UNET, folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))


def pickle_only(folder):
    os.remove(folder / UNET)
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")


def flip_a_byte(folder):
    data = bytearray((folder / UNET).read_bytes())
    data[-5] ^= 1
    (folder / UNET).write_bytes(data)


def lose_a_tensor(folder):
    weights = load_file(folder / UNET)
    del weights["conv_in.weight"]
    save_file(weights, folder / UNET)
    os.remove(folder / "checksums.json")


def link_out(folder, name):
    shutil.move(folder / name, folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")


def edit(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    "class of diffusers": (edit(MODEL_INDEX, unet=["diffusers", "UNet2DModel"]), "'unet' is .*UNet2DModel"),
    "foreign name": (edit(MODEL_INDEX, safety_checker=[None, None]), "model_index.json: 'safety_checker'"),
    "no scheduler": (edit(MODEL_INDEX, scheduler=[None, None]), "model_index.json: 'scheduler' is"),
    "text for a component": (edit(MODEL_INDEX, unet="../other"), "model_index.json: 'unet' is ../other"),
    "switch no switch": (edit(MODEL_INDEX, clip_input=["os", "system"]), "'clip_input' is .* must be True or False"),
    "no class": (edit(MODEL_INDEX, _class_name=[]), r"_class_name is \[\]"),
    "no model_index.json": (lambda f: os.remove(f / MODEL_INDEX), "model_index.json: no such file"),
    "model_index.json cut": (write(MODEL_INDEX, b'{"unet": '), "not a readable JSON"),
    "model_index.json nested": (write(MODEL_INDEX, b"[" * 10**6), "not a readable JSON"),
    "model_index.json large": (write(MODEL_INDEX, b" " * 2**25), "larger than 16 MiB"),
    "config missing": (lambda f: os.remove(f / "unet/config.json"), "unet/config.json: no such file"),
    "config binary": (write("unet/config.json", b"\xff"), "unet/config.json: not a readable JSON"),
    "config senseless": (edit("unet/config.json", act_fn={}), "not a readable model"),
    "size senseless": (edit("unet/config.json", sample_size=-1), "sample_size of unet is -1"),
    "quantized": (edit("unet/config.json", quantization_config="x"), "unet/config.json: quantized"),
    "pickle": (pickle_only, "unet has no safetensors weights"),
    "weights cut": (lambda f: os.truncate(f / UNET, 5000), f"{UNET}: not a readable safetensors"),
    "weights grown": (lambda f: (f / UNET).open("ab").write(bytes(9)), f"{UNET}: not a readable safetensors"),
    "a tensor is missing": (lose_a_tensor, "weights of unet lack conv_in.weight"),
    "flipped byte": (flip_a_byte, f"{UNET}: damaged, its SHA-256 is not the one in checksums.json"),
    "not in checksums": (write("checksums.json", b"{}"), "safetensors: damaged, its SHA-256"),
    "shard outside": (lambda f: shard_index(f, "../../outside.safetensors"), "names unet/../../outside.safetensors"),
    "index empty": (write(f"{UNET}.index.json", b"{}"), "index.json: not a readable index"),
    "index missing": (lambda f: os.rename(f / UNET, f / UNET.replace("l.", "l-00001-of-00001.")), "SHA-256|unet"),
    "weights linked": (lambda f: link_out(f, UNET), f"{UNET}: leads out of the model folder"),
    "component linked": (lambda f: link_out(f, "unet"), "unet/config.json: leads out of the model folder"),
    "checksums linked": (lambda f: link_out(f, "checksums.json"), "checksums.json: leads out of the model folder"),
    "preprocessing cut": (write("preprocessing.json", b'{"modalities": ["flair"'), "preprocessing.json: not a readable"),
    "preprocessing settings": (edit("preprocessing.json", settings=[3.0]), "preprocessing.json: `settings`"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_foreign_unsafe_or_damaged_folder_is_refused_in_one_line(copy, damage):
    check_model_folder(copy)
    do, reason = DAMAGES[damage]
    do(copy)
    with pytest.raises(InputError, match=reason) as caught:
        CounterfactualDDIMPipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["", "nothing", "no/such/folder", "../x", ".hidden/y z"])
def test_a_model_that_is_nowhere_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{name}: "):
        CounterfactualDDIMPipeline.from_pretrained(name, local_files_only=True)


def test_nothing_that_a_model_names_is_imported(copy, tmp_path, monkeypatch):
    (tmp_path / "bait_of_a_model.py").write_text("class UNet2DConditionModel: pass")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(copy / MODEL_INDEX, unet=["bait_of_a_model", "UNet2DConditionModel"])
    with pytest.raises(InputError, match="bait_of_a_model"):
        CounterfactualDDIMPipeline.from_pretrained(copy)
    assert "bait_of_a_model" not in sys.modules


def test_pickles_and_code_beside_the_weights_are_never_read(copy, model):
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    edit_json(copy / MODEL_INDEX, _class_name=["pipeline_counterfactual_ddim", "CounterfactualDDIMPipeline"])
    (copy / "pipeline_counterfactual_ddim.py").write_text("raise SystemExit")
    assert load(copy, trust_remote_code=True, use_safetensors=False) == load(copy) == load(model)


def replace_until_killed(folder, step):
    """`replace_json` in a process that dies at its `step`-th renaming."""
    rename, count = os.replace, iter(range(100))

    def dying(*paths):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = dying
    replace_json(folder, {"preprocessing.json": {"settings": {}}, SCHEDULER: {"new": 1}})


@pytest.mark.parametrize("step", range(5))
def test_json_files_are_replaced_together(copy, step):
    (copy / "checkpoint-1").mkdir()
    (copy / "checkpoint-1/state").write_text("kept")
    old = files_of(copy)
    process = get_context("fork").Process(target=replace_until_killed, args=(copy, step))
    process.start()
    process.join()
    assert find_model(copy) == str(copy)
    new, changed = files_of(copy), ("preprocessing.json", SCHEDULER)
    if step < 4:
        assert process.exitcode == -signal.SIGKILL and new == old
    else:
        assert json.loads(new[SCHEDULER]) == {"new": 1} and json.loads(new["preprocessing.json"]) == {"settings": {}}
        assert {k: v for k, v in new.items() if k not in changed} == {k: v for k, v in old.items() if k not in changed}
    replace_json(copy, {"preprocessing.json": {}})
    assert os.listdir(copy.parent) == ["model"]  # what the killed process left is removed


@pytest.mark.parametrize("how", [push, save_and_push])
def test_push_and_load_through_the_hub_is_bit_equal(hub, client, copy, tmp_path, how):
    repo_id = f"user/{how.__name__}"
    client(how, copy, repo_id)
    assert hub.files(repo_id).keys() >= CONFIGS | {UNET, "checksums.json", "README.md"}
    assert client(load, repo_id, cache_dir=tmp_path) == load(copy)


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """A model folder whose variant `fp16` holds other weights than the plain ones."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "both")
    tiny_pipeline(seed=1).save_pretrained(folder, variant="fp16")
    return folder


def test_a_variant_is_fetched_alone_and_code_and_pickles_never(hub, client, both, tmp_path):
    extra = ["pipeline.py", "unet/diffusion_pytorch_model.bin", "class_encoder/diffusers_cf.models.py", "unet/a.txt"]
    hub.put("user/variant", files_of(both) | dict.fromkeys(extra, b"raise SystemExit"))
    fetched = CONFIGS | {"checksums.json", "checksums.fp16.json"}
    half = client(load, "user/variant", variant="fp16", cache_dir=tmp_path)
    assert half == load(both, variant="fp16") != load(both)
    assert set(hub.downloads("user/variant")) == fetched | {UNET_FP16, ENCODER.replace("model.", "model.fp16.")}
    hub.requests.clear()
    assert client(load, "user/variant", cache_dir=tmp_path) == load(both)
    assert {UNET} <= set(hub.downloads("user/variant")) <= fetched | {UNET, ENCODER}


def test_a_revision_is_a_branch_or_a_commit(hub, client, both, model, tmp_path):
    hub.put("user/revisions", files_of(model), branch="v1", private=True)  # opens with the token
    commit = hub.put("user/revisions", files_of(both))
    hub.put("user/revisions", {MODEL_INDEX: b"broken"})
    for revision in ("v1", commit):
        assert client(load, "user/revisions", revision=revision, cache_dir=tmp_path) == load(model)
    with pytest.raises(InputError, match=f"{MODEL_INDEX}: not a readable JSON"):
        client(load, "user/revisions", cache_dir=tmp_path)


def test_a_second_load_needs_no_network(hub, client, model, tmp_path):
    hub.put("user/offline", files_of(model) | {"README.md": b""})  # not needed, so it isn't in the cache
    first = client(load, "user/offline", cache_dir=tmp_path)
    hub.requests.clear()
    assert client(load, "user/offline", cache_dir=tmp_path, local_files_only=True) == first == load(model)
    with client_process(hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert offline(load, "user/offline", cache_dir=tmp_path) == first
    assert hub.requests == []
    hub.stop()
    try:
        assert client(load, "user/offline", cache_dir=tmp_path) == first
        for name, options in (("user/other", {}), ("user/offline", {"force_download": True})):
            with pytest.raises(InputError, match=f"{name}: the download failed: "):
                client(load, name, cache_dir=tmp_path, **options)
    finally:
        hub.start()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("user/absent", {}, "neither a folder, nor a shipped model"),
        ("user/private", {"token": False}, "neither a folder, nor a shipped model"),
        ("user/public", {"revision": "v9"}, "no revision 'v9'"),
        ("user/public", {}, "no model_index.json"),
        ("a/b/c", {}, r"neither a folder, nor a shipped model \(flair_tumour_small, phantom_small\)"),
    ],
)
def test_what_the_hub_lacks_is_said_in_one_line(hub, client, model, tmp_path, name, options, reason):
    hub.put("user/public", {"README.md": b"nothing else"})
    hub.put("user/private", files_of(model), private=True)
    with pytest.raises(InputError, match=reason) as caught:
        client(load, name, cache_dir=tmp_path, **options)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["foreign", "pickle", "large"])
def test_a_bad_model_is_refused_before_its_weights_are_fetched(hub, client, copy, tmp_path, kind):
    if kind == "foreign":
        edit_json(copy / MODEL_INDEX, vae=["diffusers", "AutoencoderKL"])
    elif kind == "pickle":
        pickle_only(copy)
    large = type("Large", (bytes,), {"__len__": lambda _: 2**33 + 1})()  # says so and holds nothing
    hub.put(f"user/{kind}", files_of(copy) | ({UNET: large} if kind == "large" else {}))
    with pytest.raises(InputError, match="'vae' is|no safetensors weights|safetensors: larger than 8192 MiB"):
        client(load, f"user/{kind}", cache_dir=tmp_path)
    assert set(hub.downloads(f"user/{kind}")) <= {MODEL_INDEX}


def test_sharded_weights_load_from_disk_and_hub(hub, client, model, tmp_path):
    folder = tmp_path / "sharded"
    CounterfactualDDIMPipeline.from_pretrained(model).save_pretrained(folder, max_shard_size="20KB")
    shards = [name for name in files_of(folder) if "unet/diffusion_pytorch_model-0000" in name]
    assert len(shards) > 1 and load(folder) == load(model)
    hub.put("user/sharded", files_of(folder))
    assert client(load, "user/sharded", cache_dir=tmp_path / "cache") == load(model)
    assert set(shards) <= set(hub.downloads("user/sharded"))
