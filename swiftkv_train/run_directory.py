"""A run on disk: the resolved recipe, metrics.jsonl, calibration.json and checkpoints/step-N.

A checkpoint holds the trained `*_swiftkv` weights and the optimizer's moments as safetensors and its progress as JSON.
It is written under a temporary name, flushed to disk and renamed, so a name that exists is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from swiftkv_train.durable import publish_directory
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.loading import one_line
from swiftkv_train.recipe import Recipe, load_recipe

WEIGHTS, MOMENTS, PROGRESS = "student.safetensors", "optimizer.safetensors", "progress.json"
# What a run leaves that ended over its model or its data: nothing that is worth keeping from the corrected one.
BEFORE_THE_FIRST_FIGURE = {"recipe.yaml", "calibration.json", "wandb"}


@dataclass
class Checkpoint:
    path: Path
    step: int
    progress: dict[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by parameter name, fp32."""
        return _load(self.path / WEIGHTS)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return _load(self.path / MOMENTS)


class RunDirectory:
    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> RunDirectory:
        """A new run directory. Raises UserError when `path` already holds anything but a run that never began."""
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"training.output_dir {run.path} is a file; choose another directory")
        if run.path.exists() and not {item.name for item in run.path.iterdir()} <= BEFORE_THE_FIRST_FIGURE:
            holds = "other files; choose another directory"
            if run.recipe_path.exists():
                holds = "a run that stopped before its first checkpoint; remove it or choose another directory"
                if run.checkpoints():
                    holds = "another run; continue it with --resume, or choose another directory"
            raise UserError(f"training.output_dir {run.path} holds {holds}")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.recipe_path.write_text(recipe.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"training.output_dir {run.path} cannot be written: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        run = cls(path)
        if not run.recipe_path.is_file():
            raise UserError(f"{run.path} is not a run directory (no recipe.yaml); `swiftkv distill RECIPE` makes one")
        return run

    def recipe(self) -> Recipe:
        return load_recipe(self.recipe_path)

    def check_same_recipe(self, recipe: Recipe) -> None:
        """Raises UserError naming the first key in which `recipe` is not the one this run was started with."""
        old, new = _flatten(self.recipe().model_dump(mode="json")), _flatten(recipe.model_dump(mode="json"))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"the run in {self.path} was started with {key}={old.get(key)!r}, the recipe now says "
                    f"{new.get(key)!r}; restore it to resume, or choose another training.output_dir"
                )

    def log(self, row: dict[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far; one that a kill cut off is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise UserError(f"{self.metrics_path} is damaged; remove the lines that are not JSON") from None

    def trim_metrics(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again."""
        if not self.metrics_path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
        temporary = self.metrics_path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.metrics_path)

    def write_json(self, name: str, content: Any) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path / name)

    def read_json(self, name: str) -> Any:
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError):
            raise UserError(f"{file} is damaged; remove it") from None

    def checkpoints(self) -> list[Checkpoint]:
        """Whole checkpoints, oldest first."""
        found = []
        for path in (self.path / "checkpoints").glob("step-*"):
            try:
                progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
                found.append(Checkpoint(path, progress["step"], progress))
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(f"{path / PROGRESS} is damaged; remove {path} to use the checkpoint before") from None
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def last_checkpoint(self) -> Checkpoint:
        found = self.checkpoints()
        if not found:
            raise UserError(
                f"run {self.path} holds no checkpoint yet; `swiftkv distill` writes one when it ends or is stopped"
            )
        return found[-1]

    def save_checkpoint(
        self,
        progress: dict[str, Any],
        weights: dict[str, torch.Tensor],
        optimizer_state: dict[str, torch.Tensor],
        keep_last: int,
    ) -> Checkpoint:
        """Write checkpoints/step-N and remove all but the last `keep_last`. Raises RunError when the disk refuses."""
        directory = self.path / "checkpoints"
        final = directory / f"step-{progress['step']:06d}"
        temporary = directory / f".{final.name}.partial"
        try:
            directory.mkdir(exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, temporary / WEIGHTS)
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in optimizer_state.items()}, temporary / MOMENTS
            )
            (temporary / PROGRESS).write_text(json.dumps(progress, indent=2), encoding="utf-8")
            publish_directory(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"checkpoint {final} cannot be written: {one_line(error)}") from None
        for old in self.checkpoints()[:-keep_last]:
            shutil.rmtree(old.path, ignore_errors=True)
        return Checkpoint(final, progress["step"], progress)


def optimizer_tensors(optimizer: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state as flat tensors named `PARAMETER:KEY`."""
    state = optimizer.state
    return {f"{name}:{key}": value for name, p in parameters.items() for key, value in state.get(p, {}).items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters[name]
        # `step` is a scalar that AdamW keeps on the CPU.
        optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is damaged ({one_line(error)}); remove its directory to use the checkpoint before"
        ) from None


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = {str(index): item for index, item in enumerate(value)}.items()
    else:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, item in items for key, leaf in _flatten(item, f"{prefix}{name}.").items()}
