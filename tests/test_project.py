"""The project as a whole: wheel, pins, commands of the README, import direction, size and hygiene of its files."""

import ast
import graphlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SHIPPED_MODELS = {Path("diffusers_cf/pretrained", name) for name in ("phantom_small", "flair_tumour_small")}

# Every module and room of the package with its level: one imports only what lies on a lower level, or its own room.
LEVELS = {
    "__init__": 0, "errors": 0,
    "files": 1, "images": 1, "logs": 1, "losses": 1, "models": 1, "plots": 1, "provenance": 1, "schedulers": 1, "settings": 1,
    "arguments": 2, "maps": 2,
    "loading": 3,
    "pipeline_counterfactual_ddim": 4, "data": 4,
    "evaluation": 5,
    "inference": 6,
    "training": 7, "hub": 7,
    "baselines": 8, "segmentation": 8,
    "benchmark": 9, "app": 9,
    "commands": 10,
    "cli": 11,
}  # fmt: skip
# The method, loading, slices, training and measuring: what somebody reads who wants to know how it works.
CORE = (
    "pipeline_counterfactual_ddim", "schedulers", "models", "maps", "images", "losses", "settings", "loading",
    "data.slices", "training", "evaluation.protocol", "evaluation.pixel_counts",
)  # fmt: skip
MOST_LINES = {"core": 3250, "package": 14400, "modules at the root": 19, "tests": 13400}
MACHINE_PATH = re.compile(rb"(?<![\w.~/-])/(?:work|root|home|Users)/")


def project_files():
    """All files of the checkout that git does not ignore, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file())


def package_files():
    return [path for path in project_files() if path.parts[0] == "diffusers_cf"]


def imported_names(path):
    """Dotted names, as tuples, of what a Python file imports anywhere in it; relative imports resolved."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, *module, alias.name) for alias in node.names)


def modules_of_package():
    """Dotted name of every module of the package, with its file."""
    files = [path for path in package_files() if path.suffix == ".py"]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported_modules(path, modules):
    """Modules of the package that a file imports, or names in a string that could be imported."""
    strings = {
        tuple(node.value.split("."))
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in modules
    }
    for name in {*imported_names(path), *strings}:
        found = [".".join(name[:count]) for count in range(len(name), 0, -1) if ".".join(name[:count]) in modules]
        yield from found[:1]


def normalise(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement).group()).lower()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder like site-packages that holds the unpacked wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in project_files():
        if path.parts[0] == "diffusers_cf" or len(path.parts) == 1:
            (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / "source" / path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder / "dist", folder / "source"], check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(site):
    (info,) = site.glob("*.dist-info")
    return importlib.metadata.Distribution.at(info)


def test_wheel_holds_the_package_the_script_and_the_shipped_weights_and_nothing_else(site):
    packed = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    info = {path for path in packed if path.parts[0].endswith(".dist-info")}
    assert packed - info == {*package_files(), Path("train_counterfactual.py")}
    assert {"LICENSE", "THIRD_PARTY.md"} <= {path.name for path in info} and (site / "diffusers_cf/py.typed").exists()


def test_metadata(metadata):
    import diffusers_cf

    assert metadata.metadata["Name"] == "diffusers_cf"
    assert metadata.version == diffusers_cf.__version__
    assert metadata.metadata["Requires-Python"] == ">=3.11"
    (script,) = metadata.entry_points
    assert (script.name, script.value) == ("diffusers-cf", "diffusers_cf.cli:main")
    assert {"phantom", "app", "dicom", "train", "test", "dev"} <= set(metadata.metadata.get_all("Provides-Extra"))
    links = re.findall(r"\]\(([^)\s]+)\)", metadata.metadata.get_payload())
    assert any("/raw/main/results/" in link for link in links) and any("/blob/main/" in link for link in links)
    assert all(re.match("https://|#", link) for link in links)  # the page of an index has no files beside it
    assert f"\n## {diffusers_cf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_wheel_works_outside_the_checkout(site, tmp_path):
    code = (
        "import pathlib, sys; import diffusers_cf, train_counterfactual\n"
        "for module in (diffusers_cf, train_counterfactual): assert module.__file__.startswith(sys.argv[1])\n"
        "for model in sys.argv[2:]: diffusers_cf.CounterfactualDDIMPipeline.from_pretrained(model)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, site, *(model.name for model in SHIPPED_MODELS)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)


def test_every_import_is_a_declared_dependency(metadata):
    """So nothing imports the scripts `train_counterfactual` and `setup`."""
    declared = {normalise(requirement) for requirement in metadata.requires}
    distributions = importlib.metadata.packages_distributions()
    own = {"diffusers_cf", *sys.stdlib_module_names}
    undeclared = {
        f"{path}: {name[0]}"
        for path in [*package_files(), Path("train_counterfactual.py")]
        if path.suffix == ".py"
        for name in imported_names(path)
        if name[0] not in own and not declared & {normalise(d) for d in distributions.get(name[0], [name[0]])}
    }
    assert not undeclared


def test_constraints_pin_whatever_make_installs(metadata):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    # a local version such as +cpu exists on some machines only
    assert all(re.fullmatch(r"[0-9.]+", version) for version in pins.values())
    assert {normalise(requirement) for requirement in metadata.requires} <= {normalise(name) for name in pins}


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert ci[-1] == "make test-all" and 'export CI="${CI-true}"' in ci  # so that no browser is a failure there
    assert {"make test", "make test-all", "make demo"} <= {line.split("#")[0].strip() for line in readme}


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_every_module_imports_only_from_lower_levels():
    modules = modules_of_package()

    def room(module):
        return (module.split(".") + ["__init__"])[1]

    assert {room(module) for module in modules} == set(LEVELS)
    graph = {module: set(imported_modules(path, modules)) - {module} for module, path in modules.items()}
    # an allow-list of classes, not an import: loading checks a model folder before it imports any of them
    graph["diffusers_cf.loading"] -= {"diffusers_cf.models", "diffusers_cf.schedulers"}
    wrong = {
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported
        if room(module) != room(other) and LEVELS[room(other)] >= LEVELS[room(module)]
    }
    assert not wrong
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError where modules import each other


def test_sizes():
    """Every file stays readable, the package small enough to be read, its core in an evening."""
    lines = {path: len((ROOT / path).read_bytes().splitlines()) for path in project_files() if path.suffix == ".py"}
    assert {path: count for path, count in lines.items() if count > 400} == {}
    modules, core = modules_of_package(), tuple(f"diffusers_cf.{name}." for name in CORE)
    found = {
        "core": sum(lines[path] for name, path in modules.items() if f"{name}.".startswith(core)),
        "package": sum(lines[path] for path in modules.values()),
        "modules at the root": sum(len(path.parts) == 2 for path in modules.values()),
        "tests": sum(count for path, count in lines.items() if path.parts[0] == "tests"),
    }
    assert {name: count for name, count in found.items() if count > MOST_LINES[name]} == {}


def test_no_file_names_a_path_of_one_machine():
    assert [path for path in project_files() if MACHINE_PATH.search((ROOT / path).read_bytes())] == []


def test_the_shipped_models_are_the_only_ones_and_small():
    found = {path.parent for path in project_files() if path.name == "model_index.json"}
    assert found == SHIPPED_MODELS
    for folder in found:
        assert sum(path.stat().st_size for path in (ROOT / folder).rglob("*") if path.is_file()) < 16 << 20


def test_the_image_gets_the_files_that_pip_needs():
    """What the Dockerfile copies is there, .dockerignore lets it in, and setup.py reads nothing else."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
    read = set(re.findall(r'ROOT / "([^"/]+)', (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "THIRD_PARTY.md", "diffusers_cf"} | read <= copied
