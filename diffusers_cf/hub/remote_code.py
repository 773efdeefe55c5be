"""The code that a repository holds for users without this package: one readable file for each class.

`DiffusionPipeline.from_pretrained("user/name", trust_remote_code=True)` loads the pipeline from a file at the top of the
repository, which can't import other files, and the class of a component from a file in its folder.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

import diffusers_cf
from diffusers_cf.loading import PIPELINE_CLASS_WITH_CODE


PIPELINE_MODULE, PIPELINE_CLASS = PIPELINE_CLASS_WITH_CODE


def code_files(components: Mapping[str, list[str]], facts: Mapping) -> dict[str, str]:
    """Return the code that a model needs: content by file name in the repository.

    Args:
        components (`Mapping`): library and class by component, from `loading.read_components`.
        facts (`Mapping`): the published preprocessing.json; diffusers does not download that file.
    """
    pipeline = f"{bundle(PIPELINE_MODULE)}\n\n{PIPELINE_CLASS}._preprocessing = {dict(facts)!r}\n"
    files = {f"{PIPELINE_MODULE}.py": pipeline}
    for component, (library, _) in components.items():
        if library.startswith("diffusers_cf."):
            files[f"{component}/{library}.py"] = bundle(library.removeprefix("diffusers_cf."))
    return files


def is_code(name: str) -> bool:
    """Return whether a file in a repository has a name of `code_files`."""
    return name == f"{PIPELINE_MODULE}.py" or Path(name).match("*/diffusers_cf.*.py")


def bundle(module: str) -> str:
    """Return the text of a module together with the modules of the package that it imports, as one module."""
    imports, bodies = set(), []
    for name in _with_imported(module, []):
        body, needed = _without_imports(_source(name))
        imports |= needed
        bodies.append(f"# ---- diffusers_cf/{name}.py\n\n{body}")
    return "\n\n\n".join([_source(module).split("\n", 1)[0], "\n".join(sorted(imports)), *bodies]) + "\n"


def _with_imported(module: str, found: list[str]) -> list[str]:
    """Append to `found` the modules of the package that a module imports, then the module itself."""
    for node in ast.parse(_source(module)).body:
        if _is_ours(node) and (name := node.module.removeprefix("diffusers_cf.")) not in found:
            _with_imported(name, found)
    found.append(module)
    return found


def _is_ours(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module.startswith("diffusers_cf.")


def _without_imports(source: str) -> tuple[str, set[str]]:
    """Return a module's text without docstring and imports, and its imports of other packages, one name a line."""
    lines, imports = source.splitlines(), set()
    docstring, *others = ast.parse(source).body
    removed = [docstring, *(node for node in others if isinstance(node, (ast.Import, ast.ImportFrom)))]
    for node in reversed(removed):
        del lines[node.lineno - 1 : node.end_lineno]
        if isinstance(node, ast.ImportFrom) and not _is_ours(node):
            imports |= {ast.unparse(ast.ImportFrom(node.module, [alias], 0)) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {ast.unparse(ast.Import([alias])) for alias in node.names}
    return "\n".join(lines).strip(), imports


def _source(module: str) -> str:
    return (Path(diffusers_cf.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
