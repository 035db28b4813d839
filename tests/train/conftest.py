"""A tiny model and its data on disk, and recipes over them."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from debug_recipe import write_recipe
from swiftkv_train.fetch import fetch
from swiftkv_train.recipe import Recipe, load_recipe


@pytest.fixture(scope="session")
def debug_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("debug")
    fetch("debug", root / "models/debug", data_dir=root / "data/debug", report=lambda text: None)
    return root


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
