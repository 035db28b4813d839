"""The recipe of recipes/debug made shorter, and what a run of it logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

DEBUG_RECIPE = Path(__file__).parents[1] / "recipes/debug/debug.yaml"
SHORT = {
    "training.steps": 4,
    "training.checkpoint_every": 2,
    "training.evaluate_tokens": 512,
    "data.sequence_length": 64,
    "calibration.tokens": 2048,
}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def write_recipe(path: Path, changes: dict[str, Any] | None = None, *, remove: str | None = None) -> Path:
    """The debug recipe, made shorter, at `path`; `changes` and `remove` name keys by dotted path."""
    recipe = yaml.safe_load(DEBUG_RECIPE.read_text())
    for key, value in {**SHORT, **(changes or {})}.items():
        _set(recipe, key, value)
    if remove:
        *parents, last = remove.split(".")
        node = recipe
        for name in parents:
            node = node[int(name) if isinstance(node, list) else name]
        del node[last]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _set(node: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    node[int(last) if isinstance(node, list) else last] = value
