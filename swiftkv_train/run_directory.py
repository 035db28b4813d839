"""A run on disk: the resolved recipe, metrics.jsonl, calibration.json and checkpoints/step-N.

A checkpoint holds the trained `*_swiftkv` weights and the optimizer's moments as safetensors, its progress as JSON and
the SHA-256 of each file. It is written under a temporary name, flushed to disk and renamed, so a name that exists was
whole; what was spoilt since is found by the checksums, and the checkpoint before is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from swiftkv_train.checksum import first_damage, write_checksums
from swiftkv_train.durable import publish_directory, write_text
from swiftkv_train.errors import UserError
from swiftkv_train.metrics import Metrics
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import load_recipe
from swiftkv_train.run_state import CALIBRATION, CHECKPOINTS, METRICS, RECIPE, STATE, checkpoint_paths, read_json

WEIGHTS, MOMENTS, PROGRESS = "student.safetensors", "optimizer.safetensors", "progress.json"
CANNOT_WRITE = (OSError, SafetensorError)  # what writing a checkpoint raises when the disk refuses
# What a run leaves that ended over its model or its data: nothing that is worth keeping from the corrected one.
BEFORE_THE_FIRST_FIGURE = {RECIPE, CALIBRATION, STATE, "wandb", "tensorboard"}


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    @cached_property
    def progress(self) -> dict[str, Any]:
        return json.loads((self.path / PROGRESS).read_text(encoding="utf-8"))

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by parameter name, fp32."""
        return load_file(self.path / WEIGHTS)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        # Copied, for what is loaded is a map of the file, which is removed one day.
        return {name: tensor.clone() for name, tensor in load_file(self.path / MOMENTS).items()}


class RunDirectory:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_path = self.path / RECIPE
        self.metrics = Metrics(self.path / METRICS)

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, *, restart: bool = False) -> RunDirectory:
        """A new run directory. Raises UserError when `path` already holds anything but a run that never began.

        A recipe.yaml that no run has written is the user's own and never replaced. `restart`: a run without a
        checkpoint begins again; the figures that it logged are removed.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"training.output_dir {run.path} is a file; choose another directory")
        if run._holds_foreign_recipe(recipe):
            raise UserError(
                f"training.output_dir {run.path} holds a recipe.yaml that no run has written; choose another directory "
                "or give that file another name"
            )
        restart = restart and run.recipe_path.exists() and not run.checkpoints()
        held = {item.name for item in run.path.iterdir()} if run.path.exists() else set()
        visible = {name for name in held if not name.startswith(".")}  # the rest is locks and temporary files
        if not restart and not visible <= BEFORE_THE_FIRST_FIGURE:
            is_run = run.recipe_path.exists()
            holds = "another run; continue it with --resume, or" if is_run else "other files;"
            raise UserError(f"training.output_dir {run.path} holds {holds} choose another directory")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.metrics.path.unlink(missing_ok=True)
            write_text(run.recipe_path, recipe.to_yaml())
        except OSError as error:
            raise UserError(f"training.output_dir {run.path} cannot be written: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        run = cls(path)
        if not run.recipe_path.is_file():
            raise UserError(f"{run.path} is not a run directory (no recipe.yaml); `swiftkv distill RECIPE` makes one")
        return run

    def _holds_foreign_recipe(self, recipe: Recipe) -> bool:
        """Whether writing `recipe` would replace what no run has stored: a run keeps state.json from its first second.

        What would be stored already is no loss: that of a run which was killed before.
        """
        if not self.recipe_path.is_file() or (self.path / STATE).exists() or self.checkpoints():
            return False
        return self.recipe_path.read_bytes() != recipe.to_yaml().encode()

    def recipe(self) -> Recipe:
        return load_recipe(self.recipe_path)

    def write_json(self, name: str, content: Any) -> None:
        try:
            write_text(self.path / name, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be written: {error.strerror}") from None

    def read_json(self, name: str) -> Any:
        return read_json(self.path / name)

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints by their names, oldest first; whether they are whole still is not looked at."""
        return [Checkpoint(path, step) for step, path in checkpoint_paths(self._checkpoints)]

    def last_checkpoint(self, report: Callable[[str], None]) -> Checkpoint:
        """The newest checkpoint whose checksums are right; those passed over are told to `report`, a line each.

        Raises UserError when there is none, or one may not be read.
        """
        found = self.checkpoints()
        for checkpoint in reversed(found):
            try:
                damage = first_damage(checkpoint.path)
            except PermissionError as error:  # not to be taken for damage, which a run that goes on removes
                raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
            if damage is None:
                return checkpoint
            report(f"damaged     {checkpoint.path}: {damage}; looking for the checkpoint before")
        if found:
            raise UserError(f"run {self.path} holds no checkpoint that is whole; start it again in another directory")
        raise UserError(
            f"run {self.path} holds no checkpoint yet; `swiftkv distill` writes one when it ends or is stopped"
        )

    def rewind(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        """Make the run what it was at `checkpoint`, to go on under `recipe`. Raises UserError when the disk refuses."""
        try:
            self._remove_leftovers()
            self.metrics.trim(checkpoint.step)
            write_text(self.recipe_path, recipe.to_yaml())
        except OSError as error:
            raise UserError(f"run {self.path} cannot be written: {error.strerror}") from None

    def partial_checkpoint(self, step: int) -> Path:
        """Where the files of a checkpoint are written before it gets its name."""
        return self._checkpoints / f".step-{step:06d}.partial"

    @contextmanager
    def new_checkpoint(self, step: int, progress: dict[str, Any], keep_last: int) -> Iterator[Path]:
        """A folder, `partial_checkpoint(step)`, to write a checkpoint into.

        When the block ends well it is flushed to disk and gets its name, and the `keep_last` newest up to it are kept:
        what is newer was found damaged, or the run would not have come to this step again. When the block or the disk
        fails it is removed and the older ones stand; the error (`CANNOT_WRITE`) is passed on.
        """
        partial, final = self.partial_checkpoint(step), self._checkpoints / f"step-{step:06d}"
        self._remove_leftovers()
        try:
            partial.mkdir(parents=True)
            yield partial
            (partial / PROGRESS).write_text(json.dumps(progress, indent=2), encoding="utf-8")
            write_checksums(partial)
            self.metrics.sync()  # a checkpoint vouches for the rows up to its step
            publish_directory(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        kept = [checkpoint.path for checkpoint in self.checkpoints() if checkpoint.step <= step][-keep_last:]
        for checkpoint in self.checkpoints():
            if checkpoint.path not in kept:
                with suppress(OSError):  # renamed first: a name that exists was whole
                    checkpoint.path.rename(self._checkpoints / f".{checkpoint.path.name}.removed")
        self._remove_leftovers()

    @property
    def _checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def _remove_leftovers(self) -> None:
        for path in self._checkpoints.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Raises one of `CANNOT_WRITE`."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)
