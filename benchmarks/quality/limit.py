"""What a linear map of one layer's input cannot know of the tail's K and V, as loss.

    python benchmarks/quality/limit.py RECIPE [key=value ...] [--tokens 2048] [--output FILE.json]

The calibrated model, untrained, is measured again with the base's own K or V put in the place of the fitted ones, in
all of the tail or a part of it. With both of them it is the base.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swiftkv_train.bench import finish, run_script
from swiftkv_train.bench.quality import TEST, figures_of, variant_of
from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.machine import environment
from swiftkv_train.moments import ProjectionRecorder
from swiftkv_train.quality import OTHER_KINDS, TRAINED_ON, by_kind


@contextmanager
def own_projections(model: Any, names: Sequence[str], layers: range) -> Iterator[None]:
    """While it lasts, the base's own `names` (k_proj, v_proj) of these layers stand in for the fitted ones."""
    first, handles = model.config.num_key_value_layers, []
    with ProjectionRecorder(model) as recorder:  # the base's tail runs before the student's
        for layer in layers:
            for name in names:
                own = recorder.outputs[layer - first]
                fitted = getattr(model.model.layers[layer].self_attn, f"{name}_swiftkv")
                handles.append(fitted.register_forward_hook(lambda *_, own=own, name=name: own[name]))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def measure(recipe: str, overrides: Sequence[str], tokens: int) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        settings = variant_of(recipe, overrides, Path(scratch) / "run", 1, tokens, TEST)
        if settings.rewrite.key_value_group_size != 1 or settings.rewrite.key_value_groups:
            raise UserError(f"recipe {recipe}: layers that share K/V have none of their own to put back")
        run = Distillation(settings)
        run.prepare()
        model: Any = run.strategy.model
        first, last = model.config.num_key_value_layers, model.config.num_hidden_layers
        tail, end = range(first, last), range(last - max(1, (last - first) // 3), last)
        for what, names, layers in (
            ("none", (), tail),
            ("K", ("k_proj",), tail),
            ("V", ("v_proj",), tail),
            (f"V of layers {end.start} to {end.stop - 1}", ("v_proj",), end),
            ("K and V", ("k_proj", "v_proj"), tail),
        ):
            with own_projections(model, names, layers):
                found = by_kind(run.evaluate(), {source.name for source in settings.data.train})
            rows.append({"own": what, **{group: quality.to_dict() for group, quality in found.items()}})
        run.strategy.close()
    return {
        "benchmark": "the base's own K or V in place of the calibrated ones",
        "command": " ".join(["python benchmarks/quality/limit.py", recipe, *overrides, f"--tokens {tokens}"]),
        "environment": environment(model),
        "rows": rows,
        "summary": [
            f"own {row['own']:<20} "
            + "; ".join(figures_of(row, group) for group in (TRAINED_ON, OTHER_KINDS) if group in row)
            for row in rows
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The calibrated model with the base's own K or V put back.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    given = parser.parse_intermixed_args()
    finish(measure(given.recipe, given.overrides, given.tokens), given.output, as_json=False)


if __name__ == "__main__":
    run_script(main)
