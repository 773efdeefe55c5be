"""Repositories with code: they load without the package, and their code only runs with `trust_remote_code=True`."""

import ast
from collections import Counter

import pytest
from diffusers import DiffusionPipeline
from hub_client import MODEL_FACTS, command_line
from model_files import load, write_model
from without_package import load_without_package, sha256

from diffusers_cf.hub.remote_code import bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MODEL_FACTS)


@pytest.fixture(scope="module")
def published(hub, client, model):
    code, _, err = client(command_line, "publish", model, "--repo-id", "user/code", "--with-code")
    assert code == 0, err
    return "user/code"


def load_generically(repo_id, **options):
    return DiffusionPipeline.from_pretrained(repo_id, **options)


@pytest.mark.slow
def test_with_and_without_the_package_the_maps_are_the_same(hub, client, model, published, tmp_path):
    expected = load(model)
    (bare,) = load_without_package(hub, tmp_path, (published, {}))
    assert bare == {"heatmaps": sha256(expected["heatmaps"]), "facts": expected["preprocessing"]}
    hub.requests.clear()
    assert client(load, published, cache_dir=tmp_path / "ours") == expected
    assert not [name for name in hub.downloads(published) if name.endswith(".py")]


def test_a_clone_loads_with_the_package_and_its_code_is_not_run(hub, model, published, tmp_path):
    for name, content in hub.files(published).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"raise SystemExit" if name.endswith(".py") else content)
    assert load(tmp_path) == load(model)


def test_code_does_not_run_without_trust_remote_code(client, published, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        client(load_generically, published, cache_dir=tmp_path)


@pytest.mark.parametrize("module", ["pipeline_counterfactual_ddim", "models", "schedulers"])
def test_a_bundle_is_one_module_on_its_own(module):
    tree = ast.parse(bundle(module))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert not [name for name in modules if name.startswith("diffusers_cf")]
    names = [alias.asname or alias.name for node in imports if node in tree.body for alias in node.names]
    names += [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
