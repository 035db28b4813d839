"""`swiftkv bench init`: calibrated against copied initialisation, before any training."""

from __future__ import annotations

import tempfile
from typing import Any

from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.machine import environment
from swiftkv_train.quality import by_kind, check_finite_quality
from swiftkv_train.recipe_file import as_override, load_recipe


def measure(recipe: str, overrides: list[str] | None) -> dict[str, Any]:
    """Held-out figures of both starts on the same text: the recipe's `data.test`, or else `data.held_out`."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for init in ("copy", "calibrated"):
            place = as_override("training.output_dir", f"{scratch}/{init}")
            changes = [*(overrides or []), f"rewrite.init={init}", place]
            settings = load_recipe(recipe, changes)
            settings.data.held_out = settings.data.test or settings.data.held_out
            if not settings.data.held_out:
                raise UserError(f"recipe {recipe} names no data.test or data.held_out to measure on")
            distillation = Distillation(settings)
            distillation.prepare()
            sources = distillation.evaluate()
            base = settings.model.base
            check_finite_quality(sources, base, f"{base} in SwiftKV form, {init}")
            sources |= by_kind(sources, {source.name for source in settings.data.train})
            found[init] = {name: quality.to_dict() for name, quality in sources.items()}
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
