"""One tiny model, its data, one finished run and its checkpoint, shared: tests copy what they change."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commanding import Result, run_here, run_process

from debug_recipe import write_recipe
from swiftkv_train.fetch import fetch


@dataclass
class Project:
    """A directory as a user has it: models and data, a recipe, its finished run and its checkpoint."""

    root: Path
    distilled: Result
    exported: Result

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def base(self) -> Path:
        return self.root / "models/debug"

    @property
    def run(self) -> Path:
        return self.root / "outputs/debug/run"

    @property
    def checkpoint(self) -> Path:
        return self.root / "outputs/debug/checkpoint"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    fetch("debug", root / "models/debug", data_dir=root / "data/debug", report=lambda text: None)
    recipe = write_recipe(root / "recipe.yaml")
    distilled = run_process("distill", recipe, cwd=root)
    assert distilled.status == 0, distilled.err
    exported = run_process("export", "outputs/debug/run", "--to", "outputs/debug/checkpoint", cwd=root)
    assert exported.status == 0, exported.err
    return Project(root, distilled, exported)


@pytest.fixture
def workplace(project: Project, tmp_path: Path) -> Path:
    """A directory of this test's own with the shared model and data linked into it."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(project.root / name)
    (tmp_path / "recipe.yaml").write_text(project.recipe.read_text())
    return tmp_path


@pytest.fixture
def command(workplace: Path):
    """Run `swiftkv ARGUMENTS` in `workplace`, in this process."""

    def run(*arguments: str | Path) -> Result:
        return run_here(*arguments, cwd=workplace)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 700 kB. Needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)
