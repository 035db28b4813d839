"""A tiny model and its data on disk, and recipes over them."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from debug_recipe import write_recipe
from swiftkv_train.cli import main
from swiftkv_train.fetch import fetch
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import load_recipe


@pytest.fixture(scope="session")
def debug_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models/debug and data/debug are, which all tests of a process share: to be copied, not changed."""
    root = tmp_path_factory.mktemp("debug")
    fetch("debug", root / "models/debug", data_dir=root / "data/debug", report=lambda text: None)

    def contents() -> dict[Path, bytes]:
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    before = contents()
    yield root
    assert contents().items() >= before.items(), "a test changed the files that all share"


@pytest.fixture
def make_recipe(debug_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A checked recipe over the debug files, fp32, whose relative paths are below `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(debug_files / name)

    def make(**changes: Any) -> Recipe:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return load_recipe(write_recipe(tmp_path / "recipe.yaml", dotted))

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """Within `small_files(size)` the system refuses this process larger files, as a full disk does: half written."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def bench(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `swiftkv bench ARGUMENTS` beside recipe.yaml: exit status, standard output, standard error."""
    make_recipe()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that are started

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["swiftkv", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def result_of(bench: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, Any]]:
    """The result of `swiftkv bench ARGUMENTS`, with what all of them have checked."""

    def run(*arguments: str) -> dict[str, Any]:
        status, out, err = bench(*arguments, "--json", "--output", "results/result.json")
        assert status == 0, err
        result = json.loads(out)
        assert result == json.loads(Path("results/result.json").read_text())
        assert result["command"].startswith(f"swiftkv bench {arguments[0]}")
        assert {"device", "threads", "python", "torch", "transformers", "date"} <= result["environment"].keys()
        assert result["benchmark"]
        assert all(line and "\n" not in line for line in result["summary"])
        return result

    return run
