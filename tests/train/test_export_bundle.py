"""The modelling code that travels with a checkpoint: flat, relative, complete."""

import ast
import importlib
import sys

import pytest

bundling = importlib.import_module("swiftkv_train.export.bundle")  # the package has a function of that name

FILES = {
    "__init__.py": "from pack.late import late\n",
    "model.py": "import torch\nfrom pack.ops.add import (\n    add,\n    twice,\n)\nfrom pack.names import ONE\n\n"
    "def run(x):\n    from pack import late\n\n    return late(twice(add(x, ONE)))\n",
    "names.py": "ONE = 1\n",
    "late.py": "from pack.names import ONE\n\ndef late(x):\n    return x - ONE\n",
    "unused.py": "raise SystemExit\n",
    "ops/__init__.py": "",
    "ops/add.py": "from pack.names import ONE  # noqa\n\ndef add(x, y):\n    return x + y\n\ndef twice(x):\n"
    "    return 2 * x * ONE\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package `pack` that the bundle takes for ours."""
    monkeypatch.setattr(bundling, "PACKAGES", ("pack",))
    monkeypatch.syspath_prepend(tmp_path)

    def write(**changes):
        for name, source in {**FILES, **changes}.items():
            path = tmp_path / "pack" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in ("pack", "flat")]:
        del sys.modules[name]


def test_nested_modules_become_flat_files_that_work_alone(package, tmp_path, monkeypatch):
    package()
    files = bundling.bundle("pack.model", "modeling")
    assert set(files) == {"modeling.py", "pack_ops_add.py", "pack_names.py", "pack_late.py"}
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1, name
                assert node.module is None or "." not in node.module
    (tmp_path / "flat").mkdir()
    for name, source in files.items():
        (tmp_path / "flat" / name).write_text(source)
    monkeypatch.setattr(bundling, "PACKAGES", ())
    sys.modules.update(dict.fromkeys(("pack", "pack.names", "pack.ops", "pack.late")))  # not importable any more
    assert importlib.import_module("flat.modeling").run(3) == 2 * (3 + 1) - 1


def test_an_import_that_cannot_be_flattened_is_refused(package):
    package(**{"late.py": "import pack.names\n\ndef late(x):\n    return x\n"})
    with pytest.raises(ValueError, match=r"pack\.late, line 1: write `from MODULE import NAME`"):
        bundling.bundle("pack.model", "modeling")


def test_a_name_taken_from_a_package_is_refused(package):
    package(**{"__init__.py": "from pack.names import ONE\n", "model.py": "from pack import ONE\n"})
    with pytest.raises(ValueError, match="import from the module that defines the name"):
        bundling.bundle("pack.model", "modeling")


def test_our_own_modelling_code_can_be_bundled():
    files = bundling.bundle("swiftkv_models.llama", "modeling_llama_swiftkv")
    assert "modeling_llama_swiftkv.py" in files
    imported = set()
    for source in files.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"torch", "transformers", "huggingface_hub", "triton"}  # triton where there is a GPU for it
