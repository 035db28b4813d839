"""The modelling code that travels with a checkpoint: our modules as flat files that import each other relatively.

transformers copies only relatively imported neighbours of a `trust_remote_code` module, and an absolute import of this
project would make the checkpoint unloadable elsewhere. So every module of ours that the model imports, directly or not,
becomes one file beside the weights, and its imports of our packages are rewritten.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

PACKAGES = ("swiftkv_models", "swiftkv_kernels")


def bundle(module: str, name: str) -> dict[str, str]:
    """File name -> source of `module`, renamed to `name`, and of everything of ours that it imports.

    Raises ValueError for an import form that cannot be flattened (`import swiftkv_models.x`).
    """
    names = {module: name}
    files: dict[str, str] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        source = _source(current)
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PACKAGES for alias in node.names):
                raise ValueError(f"{current}, line {node.lineno}: write `from MODULE import NAME`")
            if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] not in PACKAGES:
                continue
            imported = _defining_module(node)
            if imported not in names:
                names[imported] = imported.replace(".", "_")
                waiting.append(imported)
            line = node.lineno - 1
            lines[line] = lines[line].replace(f"from {node.module} ", f"from .{names[imported]} ", 1)
        files[f"{names[current]}.py"] = "".join(lines)
    return files


def _defining_module(node: ast.ImportFrom) -> str:
    """The module file behind `from PACKAGE import name`: the package re-exports names of modules that bear them."""
    assert node.module is not None
    if "." in node.module:
        return node.module
    candidates = {f"{node.module}.{alias.name}" for alias in node.names}
    found = [candidate for candidate in candidates if importlib.util.find_spec(candidate) is not None]
    if len(found) != 1 or len(candidates) != 1:
        raise ValueError(f"line {node.lineno}: import from the module that defines the name, not from {node.module}")
    return found[0]


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"module {module} has no source file")
    return Path(spec.origin).read_text(encoding="utf-8")
