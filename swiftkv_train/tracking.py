"""Weights & Biases, for runs whose recipe asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Recipe


@contextmanager
def wandb_run(recipe: Recipe, directory: Path, *, enabled: bool) -> Iterator[Any]:
    """The wandb run that a recipe asks for, or None; its files go to `directory`."""
    section = recipe.logging.wandb
    if section is None or not enabled:
        yield None
        return
    try:
        import wandb
    except ImportError:
        raise UserError("logging.wandb needs wandb: pip install 'swiftkv-train[wandb]'") from None
    tracker = wandb.init(
        project=section.project,
        name=section.name,
        mode=section.mode,
        dir=str(directory),
        config=recipe.model_dump(mode="json"),
    )
    try:
        yield tracker
    finally:
        tracker.finish()
