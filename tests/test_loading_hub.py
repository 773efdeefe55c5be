"""To the Hub and back: a stand-in on loopback, the real client, and models that come back bit-equal."""

import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from model_files import CONFIGS, UNET, edit_json, files_of, load, tiny_pipeline

from diffusers_cf import saving
from diffusers_cf.errors import InputError
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


UNET_FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"


# `load`, `push` and `save_and_push` run in the client process, whose Hub is the stand-in.
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
    saving.write_checksums(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


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
    saving.write_checksums(copy)
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
    saving.write_checksums(folder)
    shards = [name for name in files_of(folder) if "unet/diffusion_pytorch_model-0000" in name]
    assert len(shards) > 1 and load(folder) == load(model)
    hub.put("user/sharded", files_of(folder))
    assert client(load, "user/sharded", cache_dir=tmp_path / "cache") == load(model)
    assert set(shards) <= set(hub.downloads("user/sharded"))


def test_the_stand_in_serves_ranges(hub):
    hub.put("user/range", {"file": b"0123456789"})
    request = urllib.request.Request(f"{hub.url}/user/range/resolve/main/file", headers={"Range": "bytes=4-6"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"456", "bytes 4-6/10")
