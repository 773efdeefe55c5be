"""Model folders: what goes to the Hub comes back bit-equal, and what is foreign, unsafe or damaged is refused."""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from hub_server import HubServer

from diffusers_cf import loading
from diffusers_cf.errors import InputError
from diffusers_cf.models import ClassTokenEncoder
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


UNET = "unet/diffusion_pytorch_model.safetensors"
UNET_FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"
FACTS = {"modalities": ["flair", "t1"], "settings": {"num_inference_steps": 4, "strength": 0.5}}
CONFIGS = {
    "model_index.json",
    "preprocessing.json",
    "unet/config.json",
    "class_encoder/config.json",
    "scheduler/scheduler_config.json",
    "inverse_scheduler/scheduler_config.json",
}


def tiny_pipeline(seed: int = 0) -> CounterfactualDDIMPipeline:
    """The method at its smallest: 2 channels, 8 x 8 pixels."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=8,
        class_embed_type="identity",
    )
    encoder = ClassTokenEncoder(num_tokens=2, token_dim=8, vector_dim=32, embedding_dim=8)
    pipe = CounterfactualDDIMPipeline(unet, encoder, DynamicDDIMScheduler(), DynamicDDIMInverseScheduler())
    pipe.preprocessing = FACTS
    return pipe


def fingerprint(pipe) -> dict:
    """All weights, a heatmap and the facts, as values that compare by ==."""
    torch.set_num_threads(1)  # with several, rounding depends on where in memory the weights lie
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = {f"unet.{name}": value for name, value in pipe.unet.state_dict().items()}
    weights |= {f"class_encoder.{name}": value for name, value in pipe.class_encoder.state_dict().items()}
    return {
        "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
        "heatmaps": pipe(images).heatmaps.numpy().tobytes(),
        "preprocessing": pipe.preprocessing,
    }


# These run in the client process, whose Hub is the stand-in.


def load(name, **options):
    return fingerprint(CounterfactualDDIMPipeline.from_pretrained(name, **options))


def push(folder, repo_id, **options):
    CounterfactualDDIMPipeline.from_pretrained(folder).push_to_hub(repo_id, **options)


def save_and_push(folder, repo_id, **options):
    CounterfactualDDIMPipeline.from_pretrained(folder).save_pretrained(
        folder, push_to_hub=True, repo_id=repo_id, **options
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model folder; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    loading.write_checksums(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="module")
def hub():
    server = HubServer(lfs=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Calls a function in a process of its own: the Hub client reads its environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name, value in hub.environment(tmp_path_factory.mktemp("home")).items():
            patch.setenv(name, value)
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(timeout=120)


def files_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_save_and_load_is_bit_equal(model):
    pipe = CounterfactualDDIMPipeline.from_pretrained(model)
    assert fingerprint(pipe) == fingerprint(tiny_pipeline())
    assert type(pipe.scheduler) is DynamicDDIMScheduler and type(pipe.inverse_scheduler) is DynamicDDIMInverseScheduler


@pytest.mark.parametrize("lfs", [True, False])
def test_push_and_load_through_the_hub_is_bit_equal(hub, client, model, tmp_path, lfs):
    hub.lfs, repo_id = lfs, f"user/pushed-{lfs}"
    hub.requests.clear()
    client(push, model, repo_id)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests) is lfs
    assert set(hub.files(repo_id)) >= CONFIGS | {UNET, "README.md"}
    assert client(load, repo_id, cache_dir=tmp_path) == load(model)


def test_save_pretrained_pushes_what_it_saves(hub, client, copy, tmp_path):
    client(save_and_push, copy, "user/saved")
    assert client(load, "user/saved", cache_dir=tmp_path) == load(copy)
    assert set(hub.files("user/saved")) >= set(files_of(copy)) >= CONFIGS | {UNET, "checksums.json"}


def test_a_variant_is_fetched_alone_and_code_and_pickles_never(hub, client, copy, tmp_path):
    half = CounterfactualDDIMPipeline.from_pretrained(copy, dtype=torch.float16)
    half.save_pretrained(copy, variant="fp16")
    loading.write_checksums(copy)
    extra = ["pipeline.py", "unet/diffusion_pytorch_model.bin", "class_encoder/diffusers_cf.models.py", "unet/a.txt"]
    hub.put("user/variant", files_of(copy) | dict.fromkeys(extra, b"raise SystemExit"))
    fetched = CONFIGS | {"checksums.json", "checksums.fp16.json"}

    got = client(load, "user/variant", variant="fp16", dtype=torch.float32, cache_dir=tmp_path)
    assert got["weights"] == load(copy, variant="fp16", dtype=torch.float32)["weights"] != load(copy)["weights"]
    assert set(hub.downloads("user/variant")) == fetched | {UNET_FP16, UNET_FP16.replace("unet", "class_encoder")}
    with pytest.raises(InputError, match="user/variant in the local cache: .* has weights of the variant 'fp16' only"):
        client(load, "user/variant", cache_dir=tmp_path, local_files_only=True)
    hub.requests.clear()

    assert client(load, "user/variant", cache_dir=tmp_path) == load(copy)
    assert {UNET} <= set(hub.downloads("user/variant")) <= fetched | {UNET, UNET.replace("unet", "class_encoder")}
    with pytest.raises(InputError, match="user/variant: there are no weights of the variant 'bf16'"):
        client(load, "user/variant", variant="bf16", cache_dir=tmp_path)


def test_pushing_a_variant_later_keeps_the_checksums_of_the_rest(hub, client, model, tmp_path):
    client(push, model, "user/twice")
    client(push, model, "user/twice", variant="ema")
    expected = load(model)["weights"]
    assert client(load, "user/twice", cache_dir=tmp_path)["weights"] == expected
    assert client(load, "user/twice", variant="ema", cache_dir=tmp_path)["weights"] == expected


def test_a_revision_is_a_branch_or_a_commit(hub, client, model, tmp_path):
    other = tmp_path / "other"
    tiny_pipeline(seed=1).save_pretrained(other)
    hub.put("user/revisions", files_of(other), branch="v1")
    commit = hub.put("user/revisions", files_of(model))
    hub.put("user/revisions", {"model_index.json": b"broken"})
    weights = {"v1": load(other)["weights"], commit: load(model)["weights"]}
    assert weights["v1"] != weights[commit]
    for revision in weights:
        got = client(load, "user/revisions", revision=revision, cache_dir=tmp_path / "cache")
        assert got["weights"] == weights[revision]


def test_a_second_load_needs_no_network(hub, client, model, tmp_path):
    hub.put("user/offline", files_of(model))
    first = client(load, "user/offline", cache_dir=tmp_path)
    hub.requests.clear()
    assert client(load, "user/offline", cache_dir=tmp_path, local_files_only=True) == first
    assert hub.requests == []
    hub.stop()
    try:
        assert client(load, "user/offline", cache_dir=tmp_path) == first
        with pytest.raises(InputError, match="user/other: .*not in the local cache"):
            client(load, "user/other", cache_dir=tmp_path)
        with pytest.raises(InputError, match="user/offline: the download failed: .*refused"):
            client(load, "user/offline", cache_dir=tmp_path, force_download=True)
    finally:
        hub.start()
    with pytest.raises(InputError, match="user/offline: .*not in the local cache"):
        client(load, "user/offline", cache_dir=tmp_path / "empty", local_files_only=True)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("user/absent", {}, "neither a folder nor a repository on the Hub"),
        ("user/private", {"token": False}, "neither a folder nor a repository on the Hub"),
        ("user/public", {"revision": "v9"}, "no revision 'v9'"),
        ("user/public", {}, "no model_index.json"),
        ("no/such/folder", {}, "neither a folder nor a repository id"),
    ],
)
def test_what_the_hub_lacks_is_said_in_one_line(hub, client, model, tmp_path, name, options, reason):
    hub.put("user/public", {"README.md": b"nothing else"})
    hub.put("user/private", files_of(model), private=True)
    with pytest.raises(InputError, match=reason) as caught:
        client(load, name, cache_dir=tmp_path, **options)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


def test_a_private_repository_opens_with_a_token(hub, client, model, tmp_path):
    hub.put("user/private", files_of(model), private=True)
    assert client(load, "user/private", cache_dir=tmp_path, token="a-token") == load(model)


def test_a_foreign_model_is_refused_before_its_weights_are_fetched(hub, client, copy, tmp_path):
    edit_json(copy / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    hub.put("user/foreign", files_of(copy))
    with pytest.raises(InputError, match="foreign component 'vae'"):
        client(load, "user/foreign", cache_dir=tmp_path)
    assert hub.downloads("user/foreign") == ["model_index.json"]


def test_sharded_weights_load_from_disk_and_hub(hub, client, model, tmp_path):
    folder = tmp_path / "sharded"
    CounterfactualDDIMPipeline.from_pretrained(model).save_pretrained(folder, max_shard_size="20KB")
    loading.write_checksums(folder)
    shards = [name for name in files_of(folder) if "unet/diffusion_pytorch_model-0000" in name]
    assert len(shards) > 1 and load(folder) == load(model)
    hub.put("user/sharded", files_of(folder))
    assert client(load, "user/sharded", cache_dir=tmp_path / "cache") == load(model)
    assert set(shards) <= set(hub.downloads("user/sharded"))


def test_plain_diffusion_pipeline_finds_our_class(model):
    importlib.import_module("diffusers_cf")
    pipe = DiffusionPipeline.from_pretrained(model)
    assert type(pipe) is CounterfactualDDIMPipeline and fingerprint(pipe) == load(model)


def test_a_class_of_diffusers_is_never_replaced():
    foreign = type("DDIMPipeline", (), {"__module__": "diffusers_cf.other"})
    loading.register_with_diffusers(foreign)
    assert importlib.import_module("diffusers").DDIMPipeline is not foreign


def test_every_allowed_class_exists():
    for name, pairs in loading.ALLOWED_COMPONENTS.items():
        for library, class_name in pairs:
            assert library is None or isinstance(getattr(importlib.import_module(library), class_name), type), name


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    sums = loading.write_checksums(copy)
    assert set(sums) == {UNET, UNET.replace("unet", "class_encoder")}
    flip_a_byte(copy)
    (copy / "checksums.old.json").write_text("{}")
    changed = loading.write_checksums(copy)
    assert {name for name in sums if sums[name] != changed[name]} == {UNET}
    assert json.loads((copy / "checksums.json").read_text()) == changed and not (copy / "checksums.old.json").exists()
    loading.check_model_folder(copy)


def test_preprocessing_is_written_whole_or_not_at_all(tmp_path):
    assert loading.read_preprocessing(tmp_path) == {}
    loading.write_preprocessing(tmp_path / "new", FACTS)
    with pytest.raises(ValueError, match="JSON compliant"):
        loading.write_preprocessing(tmp_path / "new", {"settings": {"threshold": float("nan")}})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
        loading.write_preprocessing(tmp_path / "new", {})
    assert loading.read_preprocessing(tmp_path / "new") == FACTS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["preprocessing.json"]


def test_the_stand_in_serves_ranges(hub):
    hub.put("user/range", {"file": b"0123456789"})
    request = urllib.request.Request(f"{hub.url}/user/range/resolve/main/file", headers={"Range": "bytes=4-6"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"456", "bytes 4-6/10")
