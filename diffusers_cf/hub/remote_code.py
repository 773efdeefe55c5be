"""The code that a repository carries for users without this package: one readable file, made of the package's own.

`DiffusionPipeline.from_pretrained("user/name", trust_remote_code=True)` takes the pipeline from a file at the top of the
repository, which may not import its neighbours, and a component's class from a file in its folder.
"""

import ast
from pathlib import Path

import diffusers_cf


PIPELINE_MODULE = "pipeline_counterfactual_ddim"
PIPELINE_CLASS = [PIPELINE_MODULE, "CounterfactualDDIMPipeline"]  # `_class_name` in model_index.json

# In the order in which they build on each other.
_MODULES = (
    "errors",
    "files",
    "guidance",
    "forward",
    "heatmaps",
    "images",
    "models",
    "schedulers",
    "mirrored",
    "settings",
)
_MODULES += ("hub_download", "loading", "saving", "model_folder", PIPELINE_MODULE)
_COMPONENTS = {"class_encoder": "models", "scheduler": "schedulers", "inverse_scheduler": "schedulers"}


def code_files(components: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Names in the repository and contents of what a model needs as code.

    Args:
        components: library and class of each component, as `loading.check_model_folder` returns them.
    """
    files = {f"{PIPELINE_MODULE}.py": bundled_pipeline()}
    for component, (library, _) in components.items():
        if library.startswith("diffusers_cf."):
            files[f"{component}/{library}.py"] = _source(library.removeprefix("diffusers_cf."))
    return files


def code_names() -> set[str]:
    """Every name that `code_files` may give a file."""
    return {f"{PIPELINE_MODULE}.py"} | {f"{folder}/diffusers_cf.{name}.py" for folder, name in _COMPONENTS.items()}


def bundled_pipeline() -> str:
    """The pipeline and all of the package that it needs as one module, without its imports of each other."""
    imports, bodies = set(), []
    for name in _MODULES:
        body, needed = _body(_source(name))
        imports |= needed
        bodies.append(f"# ---- diffusers_cf/{name}.py\n\n{body}")
    return "\n\n\n".join([_source(PIPELINE_MODULE).split("\n", 1)[0], "\n".join(sorted(imports)), *bodies]) + "\n"


def _body(source: str) -> tuple[str, set[str]]:
    """A module's text without docstring and imports, and its imports of other packages, one name a line."""
    lines, imports = source.splitlines(), set()
    first, *others = ast.parse(source).body
    for node in (first, *others):
        own = isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "diffusers_cf")
        if isinstance(node, ast.ImportFrom) and not own:
            imports |= {ast.unparse(ast.ImportFrom(node.module, [alias], 0)) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {ast.unparse(ast.Import([alias])) for alias in node.names}
        if node is first or isinstance(node, (ast.Import, ast.ImportFrom)):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None).strip(), imports


def _source(module: str) -> str:
    return (Path(diffusers_cf.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
