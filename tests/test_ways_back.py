"""Every way back from the Hub in every circumstance: revisions, variants, private repositories, no network, foul files."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_client import client_process
from model_files import UNET, files_of, fingerprint, load, tiny_pipeline
from without_package import load_without_package

from diffusers_cf.errors import InputError
from diffusers_cf.hub.publishing import push_model
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


OFFLINE = {"HF_HUB_OFFLINE": "1"}
ENCODER = UNET.replace("unet", "class_encoder")


# What follows runs in the client's process, whose Hub is the stand-in.
def load_generically(name, **options):
    pipe = DiffusionPipeline.from_pretrained(name, **options)
    assert type(pipe) is CounterfactualDDIMPipeline
    return fingerprint(pipe)


WAYS = pytest.mark.parametrize("way", [load, load_generically])


def sha256(found):
    import hashlib

    return hashlib.sha256(found["heatmaps"]).hexdigest()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose variant `fp16` holds other weights than the plain ones."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(seed=1).save_pretrained(folder, variant="fp16")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny_pipeline(seed=2).save_pretrained(folder)
    return folder


@WAYS
def test_revisions_variants_and_private_repositories(hub, client, model, other, tmp_path, way):
    first = hub.put("user/way", files_of(other), private=True)
    hub.put("user/way", files_of(other), branch="v1")
    hub.put("user/way", files_of(model))
    plain, half = load(model), load(model, variant="fp16")
    assert plain["heatmaps"] != half["heatmaps"] != load(other)["heatmaps"] != plain["heatmaps"]
    assert client(way, "user/way", cache_dir=tmp_path) == plain
    assert client(way, "user/way", cache_dir=tmp_path, variant="fp16") == half
    for revision in ("v1", first):
        assert client(way, "user/way", cache_dir=tmp_path, revision=revision) == load(other)
    with client_process(hub.environment(tmp_path / "nobody") | {"HF_TOKEN": None}) as nobody:
        with pytest.raises((InputError, OSError), match="user/way"):
            nobody(way, "user/way")
        assert nobody(way, "user/way", token="hf_given") == plain


@WAYS
def test_a_second_time_needs_no_network(hub, client, model, tmp_path, way):
    hub.put("user/offline", files_of(model))
    first = client(way, "user/offline", cache_dir=tmp_path)
    with client_process(hub.environment(tmp_path) | OFFLINE) as offline:
        hub.requests.clear()
        assert offline(way, "user/offline", cache_dir=tmp_path) == first == load(model)
        with pytest.raises((InputError, OSError), match="user/never"):
            offline(way, "user/never", cache_dir=tmp_path)
        assert hub.requests == []
    hub.stop()
    try:
        assert client(way, "user/offline", cache_dir=tmp_path) == first
    finally:
        hub.start()


def test_all_of_that_without_the_package(hub, client, model, other, tmp_path):
    client(push_model, other, "user/coded", with_code=True, private=True)
    hub.put("user/coded", hub.files("user/coded"), branch="v1")
    first = hub.repositories["models/user/coded"].refs["main"]
    client(push_model, model, "user/coded", with_code=True)
    loads = [("user/coded", options) for options in ({}, {"variant": "fp16"}, {"revision": "v1"}, {"revision": first})]
    found = load_without_package(hub, tmp_path, *loads)
    wanted = [load(model), load(model, variant="fp16"), load(other), load(other)]
    assert [one.get("heatmaps", one) for one in found] == [sha256(one) for one in wanted]
    assert [one["facts"] for one in found] == [one["preprocessing"] for one in wanted]
    (nobody,) = load_without_package(hub, tmp_path / "..", loads[0], HF_TOKEN=None, HF_HOME=str(tmp_path / "nobody"))
    assert "user/coded" in nobody["error"]
    hub.requests.clear()
    # diffusers asks for the commit of code even where it may not; its folder in the cache needs nobody
    snapshot = tmp_path / "hub/models--user--coded/snapshots" / hub.repositories["models/user/coded"].refs["main"]
    by_name, by_folder = load_without_package(hub, tmp_path, loads[0], (str(snapshot), {}), **OFFLINE)
    assert "offline mode is enabled" in by_name["error"] and by_folder == found[0] and hub.requests == []


def foul(files, kind):
    """A repository's files, made unsafe or damaged, and what is said about it."""
    if kind == "pickle":
        return files | {UNET.replace("safetensors", "bin"): files[UNET]}, {UNET}, "its weights as a pickle only"
    if kind == "foreign":
        index = files["model_index.json"].replace(b"UNet2DConditionModel", b"UNet2DModel")
        return files | {"model_index.json": index}, set(), "component 'unet' is .*UNet2DModel.*, refused"
    return files | {ENCODER: files[ENCODER][:-5] + b"\1" + files[ENCODER][-4:]}, set(), "SHA-256 is not the one"


@WAYS
@pytest.mark.parametrize("kind", ["pickle", "foreign", "flipped byte"])
def test_generic_loading_checks_what_our_class_checks(hub, client, model, tmp_path, way, kind):
    files, gone, reason = foul({name: data for name, data in files_of(model).items() if "fp16" not in name}, kind)
    hub.put("user/foul", {name: data for name, data in files.items() if name not in gone})
    with pytest.raises(InputError, match=reason):
        client(way, "user/foul", cache_dir=tmp_path)
    assert not [name for name in hub.downloads("user/foul") if name.endswith(".bin")]


@WAYS
@pytest.mark.parametrize("name", ["model_index.json", "preprocessing.json", "checksums.json", UNET])
def test_what_is_too_large_is_refused_before_it_is_fetched(hub, client, model, tmp_path, way, name):
    repo_id = f"user/large-{name.partition('/')[0].partition('.')[0]}"
    hub.put(repo_id, files_of(model))
    hub.claimed_sizes = {name: 2**33 + 1}
    hub.requests.clear()
    try:
        with pytest.raises(InputError, match=f"{repo_id}: {name}: larger than (16 M|8 G)iB, refused"):
            client(way, repo_id, cache_dir=tmp_path)
    finally:
        hub.claimed_sizes = {}
    assert set(hub.downloads(repo_id)) == {"model_index.json"} - {name}
    assert client(way, repo_id, cache_dir=tmp_path) == load(model)


def test_a_pushed_variant_can_be_loaded_alone(hub, client, model, tmp_path):
    """A folder without plain weights is published and comes back by its variant."""
    folder = shutil.copytree(model, tmp_path / "half")
    for name in (UNET, ENCODER, "checksums.json"):
        (folder / name).unlink()
    client(push_model, folder, "user/half")
    assert client(load_generically, "user/half", variant="fp16", cache_dir=tmp_path)["weights"] == {
        name: data for name, data in load(model, variant="fp16", dtype=torch.float32)["weights"].items()
    }
