"""`swiftkv bench init`: calibrated against copied initialisation, before any training."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.evaluate import environment
from swiftkv_train.recipe import load_recipe


def _together(sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures over the tokens of all sources."""
    total = sum(row["tokens"] for row in sources.values())

    def mean(figure: Callable[[dict[str, Any]], float]) -> float:
        return sum(row["tokens"] * figure(row) for row in sources.values()) / total

    base = math.exp(mean(lambda row: math.log(row["base_perplexity"])))
    student = math.exp(mean(lambda row: math.log(row["student_perplexity"])))
    return {
        "tokens": total,
        "kl": mean(lambda row: row["kl"]),
        "agreement": mean(lambda row: row["agreement"]),
        "base_perplexity": base,
        "student_perplexity": student,
        "perplexity_ratio": student / base,
    }


def measure(recipe: str, overrides: list[str] | None) -> dict[str, Any]:
    """Held-out figures of both starts on the same text: the recipe's `data.test`, or else `data.held_out`."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for init in ("copy", "calibrated"):
            output = Path(scratch) / init
            changes = [*(overrides or []), f"rewrite.init={init}", f"training.output_dir={output}"]
            settings = load_recipe(recipe, changes)
            settings.data.held_out = settings.data.test or settings.data.held_out
            if not settings.data.held_out:
                raise UserError(f"recipe {recipe} names no data.test or data.held_out to measure on")
            distillation = Distillation(settings)
            distillation.prepare()
            found[init] = {name: quality.to_dict() for name, quality in distillation.evaluate().items()}
            trained = {source.name for source in settings.data.train}
            kinds = {name: row for name, row in found[init].items() if name in trained}
            found[init] |= {"all together": _together(found[init])}
            if kinds:
                found[init]["all kinds trained on"] = _together(kinds)
    rows = {
        name: {
            "copied": found["copy"][name],
            "calibrated": found["calibrated"][name],
            "kl_ratio": found["calibrated"][name]["kl"] / found["copy"][name]["kl"],
        }
        for name in found["copy"]
    }
    model = distillation.strategy.model
    return {
        "benchmark": "calibrated against copied initialisation, no training",
        "command": " ".join(["swiftkv bench init", recipe, *(overrides or [])]),
        "environment": environment(model),
        "num_key_value_layers": settings.rewrite.num_key_value_layers,
        "key_value_group_size": settings.rewrite.key_value_group_size,
        "calibration_tokens": settings.calibration.tokens,
        "sources": rows,
        "summary": [
            f"{name:<12} KL {row['calibrated']['kl']:.3f} against {row['copied']['kl']:.3f}: x {row['kl_ratio']:.3f}; "
            f"perplexity ratio {row['calibrated']['perplexity_ratio']:.3f} against "
            f"{row['copied']['perplexity_ratio']:.3f}"
            for name, row in rows.items()
        ],
    }
