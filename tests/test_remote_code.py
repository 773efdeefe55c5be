"""The ways back from the Hub beside our own class: diffusers' generic loading, with the package and without it."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_client import command_line
from model_files import FACTS, UNET, fingerprint, load, tiny_pipeline
from without_package import load_without_package

import diffusers_cf
from diffusers_cf.errors import InputError
from diffusers_cf.hub.remote_code import _MODULES, bundled_pipeline, code_names
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


RECOMMENDED = {"settings": FACTS["settings"]}


def push(folder, repo_id, **options):
    CounterfactualDDIMPipeline.from_pretrained(folder).push_to_hub(repo_id, **options)


def load_generically(repo_id, **options):
    pipe = DiffusionPipeline.from_pretrained(repo_id, **options)
    assert type(pipe) is CounterfactualDDIMPipeline
    return fingerprint(pipe)


def load_and_leave_the_hub(repo_id, **options):
    """The facts where the Hub is away once the weights are there."""
    import huggingface_hub

    pipe = DiffusionPipeline.from_pretrained(repo_id, **options)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return pipe.preprocessing
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = False


def sha256(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module", params=["brain", "leaf"])
def model(request, tmp_path_factory):
    """Two classes of two channels; and three classes of one channel that are no brains."""
    folder = tmp_path_factory.mktemp("models") / request.param
    pipe = tiny_pipeline()
    if request.param == "leaf":
        pipe = tiny_pipeline(channels=1, class_names=("sound", "rust", "mildew"))
        pipe.preprocessing = {"modalities": ["grey"], "class_names": ["sound", "rust", "mildew"]} | RECOMMENDED
    pipe.save_pretrained(folder)
    return folder


def test_all_ways_back_give_the_same_maps(hub, client, model, tmp_path):
    expected = load(model)
    plain, coded = f"user/{model.name}", f"user/{model.name}-with-code"
    client(push, model, plain)
    client(push, model, coded, with_code=True)
    assert client(load, plain, cache_dir=tmp_path / "1") == expected
    assert client(load_generically, plain, cache_dir=tmp_path / "2") == expected
    assert load_generically(model) == expected
    assert client(load, coded, cache_dir=tmp_path / "3") == expected
    assert not [name for name in hub.downloads(coded) if name.endswith(".py")]
    (bare,) = load_without_package(hub, tmp_path, (coded, {}))
    assert bare["heatmaps"] == sha256(expected["heatmaps"]) and bare["facts"] == expected["preprocessing"]
    assert bare["facts"]["settings"] == FACTS["settings"]  # all ways gave these facts
    assert bare["publish"] == "to publish a model, install diffusers_cf"
    assert f'"{coded}", trust_remote_code=True' in hub.files(coded)["README.md"].decode()


def test_the_command_publishes_a_model_of_leaves(hub, client, tmp_path):
    pipe = tiny_pipeline(channels=1, class_names=("sound", "rust", "mildew"))
    facts = {"modalities": ["grey"], "class_names": ["sound", "rust", "mildew"], "source": "folder"} | RECOMMENDED
    pipe.preprocessing = facts
    pipe.save_pretrained(tmp_path / "leaf")
    options = ["--with-code", "--data-license", "cc0-1.0"]
    code, _, err = client(command_line, "publish", tmp_path / "leaf", "--repo-id", "user/leaves", *options)
    assert code == 0, err
    expected = load(tmp_path / "leaf")
    assert expected["preprocessing"] == facts
    assert client(load, "user/leaves", cache_dir=tmp_path / "1") == expected
    (bare,) = load_without_package(hub, tmp_path, ("user/leaves", {}))
    assert bare["heatmaps"] == sha256(expected["heatmaps"]) and bare["facts"] == facts
    assert client(command_line, "publish", tmp_path / "leaf", "--repo-id", "user/leaves")[0] == 0
    assert client(load_generically, "user/leaves", cache_dir=tmp_path / "2") == expected
    card = hub.files("user/leaves")["README.md"].decode()
    assert (
        "how an image would look as `sound`" in card and "- medical" not in card and "lesion localisation" not in card
    )


def test_code_runs_for_nobody_who_has_not_said_so(hub, client, model, tmp_path):
    client(push, model, "user/code", with_code=True)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        client(load_generically, "user/code", cache_dir=tmp_path)


def test_pushing_again_without_code_takes_it_away(hub, client, model, tmp_path):
    client(push, model, "user/again", with_code=True)
    assert code_names() <= set(hub.files("user/again"))
    client(push, model, "user/again")
    assert not code_names() & set(hub.files("user/again"))
    assert client(load_generically, "user/again", cache_dir=tmp_path) == load(model)


def test_recommended_settings_are_never_lost_unnoticed(hub, client, model, tmp_path):
    """diffusers leaves preprocessing.json on the Hub; where it can't be fetched afterwards, there is no guessing."""
    client(push, model, "user/facts")
    assert client(load_and_leave_the_hub, "user/facts", cache_dir=tmp_path)["settings"] == FACTS["settings"]
    client(push, model, "user/facts-with-code", with_code=True)
    (bare,) = load_without_package(hub, tmp_path, ("user/facts-with-code", {"leave": True}))
    assert "user/facts-with-code: preprocessing.json: not a folder, not in the local cache" in bare["error"]
    hub.put("user/no-facts", {k: v for k, v in hub.files("user/facts").items() if k != "preprocessing.json"})
    assert client(load_generically, "user/no-facts", cache_dir=tmp_path)["preprocessing"] == {}


def test_a_folder_without_weights_is_not_pushed(hub, client, model, tmp_path):
    from diffusers_cf.hub.publishing import push_model

    pipe = CounterfactualDDIMPipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path)
    for name in (UNET, UNET.replace("unet", "class_encoder")):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="has no weights"):
        client(push_model, tmp_path, "user/empty")
    assert "models/user/empty" not in hub.repositories


def names_from_siblings():
    """What the bundled modules take from each other."""
    trees = [ast.parse((Path(diffusers_cf.__file__).parent / f"{name}.py").read_text()) for name in _MODULES]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {a.name for n in nodes if n.module.startswith("diffusers_cf.") for a in n.names}


def test_the_bundle_is_one_module_on_its_own():
    tree = ast.parse(bundled_pipeline())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports]
    assert not [module for module in modules if module.startswith("diffusers_cf")]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports)
    names = [alias.asname or alias.name for node in imports if node in tree.body for alias in node.names]
    names += [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert torch.__name__ in names and "CounterfactualDDIMPipeline" in names
    assert names_from_siblings() <= set(names)
