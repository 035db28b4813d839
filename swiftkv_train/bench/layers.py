"""`swiftkv bench layers`: what forms of a model are predicted to lose (see layer_choice.py), and what they do lose.

Every form is calibrated and measured on the recipe's held-out text or its tests, without training.
"""

from __future__ import annotations

import math
import re
import tempfile
from typing import Any

import torch

from swiftkv_models.llama import uniform_groups
from swiftkv_train.bench.quality import HELD_OUT, figures_of, sources_of
from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.layer_choice import Predictor, look
from swiftkv_train.machine import environment
from swiftkv_train.quality import ALL, OTHER_KINDS, TRAINED_ON, by_kind, check_finite_quality
from swiftkv_train.recipe_file import as_override, load_recipe

EXAMPLE = "15,15x2,22,15:1+2+3+9"
Form = tuple[int, list[list[int]]]  # l, and the tail's groups


def measure(recipe: str, overrides: list[str] | None, forms: str | None, on: str) -> dict[str, Any]:
    """`forms`: values of l, separated by commas; `lxg`: in groups of g; `l:a+b+c`: in groups of these sizes."""
    settings = load_recipe(recipe, overrides)
    sources = sources_of(settings, recipe, on)
    trained = {source.name for source in settings.data.train}
    asked = None if forms is None else forms.split(",")
    for text in asked or ():
        _check(text)
    model, sums = look(settings)
    layers, first = model.config.num_hidden_layers, model.config.num_key_value_layers
    predictor = Predictor(model, sums, settings.calibration.ridge)
    wanted = {text: _form(text, layers) for text in asked} if asked else _usual(predictor, first, layers)
    for text, (own, _) in wanted.items():
        if own not in sums.candidates:
            raise UserError(
                f"--forms {text}: the sums of l = {own} do not fit into memory beside the others; leave it out"
            )
    same: dict[str, str] = {}
    for text, form in wanted.items():
        if (other := same.setdefault(str(form), text)) != text:
            raise UserError(f"--forms: {other} and {text} are the same form; leave one out")
    predicted = {text: predictor.loss(*form) for text, form in wanted.items()}
    sums.samples.clear()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for text, (own, groups) in wanted.items():
            changes = [
                f"rewrite.num_key_value_layers={own}",
                "rewrite.key_value_group_size=1",
                f"rewrite.key_value_groups={groups}",
                as_override("training.output_dir", f"{scratch}/{len(rows)}"),
            ]
            changed = load_recipe(recipe, [*(overrides or []), *changes])
            changed.data.held_out = sources
            distillation = Distillation(changed)
            distillation.prepare()
            found = distillation.evaluate()
            check_finite_quality(found, settings.model.base, f"{settings.model.base} in the form {text}")
            kinds = by_kind(found, trained)
            distillation.strategy.close()
            rows.append(
                {
                    "form": text,
                    "num_key_value_layers": own,
                    "key_value_groups": groups,
                    "predicted": predicted[text],
                    **kinds.pop(ALL).to_dict(),
                    **{kind: quality.to_dict() for kind, quality in kinds.items()},
                }
            )
    agreement = rank_correlation([row["predicted"] for row in rows], [row["kl"] for row in rows])
    return {
        "benchmark": "predicted loss of forms against the KL of the calibrated models",
        "command": " ".join(
            [
                *("swiftkv bench layers", recipe, *(overrides or []), *(["--forms", forms] if forms else [])),
                *(["--on", on] if on != HELD_OUT else []),
            ]
        ),
        "environment": environment(model),
        "calibration_tokens": settings.calibration.tokens,
        "measured_on": on,
        "rank_correlation": agreement,
        "rows": rows,
        "summary": [
            *(
                f"{row['form']:<28} predicted {row['predicted']:.3f}; "
                + "; ".join(figures_of(row, group) for group in (TRAINED_ON, OTHER_KINDS) if group in row)
                for row in sorted(rows, key=lambda row: row["predicted"])
            ),
            *([] if agreement is None else [f"Spearman's rank correlation of prediction and KL: {agreement:.3f}"]),
        ],
    }


def _check(text: str) -> None:
    number = "[1-9][0-9]{0,5}"
    if not re.fullmatch(rf"{number}(x{number}|:{number}(\+{number})*)?", text):
        raise UserError(f"--forms: {text!r} is no form; they look like {EXAMPLE}")


def _form(text: str, layers: int) -> Form:
    first, _, rest = text.replace("x", ":").partition(":")
    leader = int(first)
    sizes = [int(size) for size in rest.split("+")] if rest else [1]
    if not 1 <= leader < layers:
        raise UserError(f"--forms {text}: l must be between 1 and {layers - 1}")
    if "x" in text or not rest:
        return leader, uniform_groups(leader, layers, sizes[0])
    if sum(sizes) != layers - leader:
        raise UserError(f"--forms {text}: the sizes must add up to the {layers - leader} layers from {leader} on")
    groups, at = [], leader
    for size in sizes:
        groups.append(list(range(at, at + size)))
        at += size
    return leader, groups


def _usual(predictor: Predictor, first: int, layers: int) -> dict[str, Form]:
    """Some l and g, and at the recipe's l the best groupings that take no more K/V than groups of 2 and 4."""
    found: dict[str, Form] = {}
    for own in dict.fromkeys((layers // 3, first, (first + layers) // 2, first + 3 * (layers - first) // 4)):
        for size in (1, 2, 4):
            if 1 <= own < layers and size <= layers - own:
                text = f"{own}x{size}"
                found[text] = _form(text, layers)
    best = {len(groups): groups for groups, _ in predictor.best_groups(first)}
    for size in (2, 4):
        groups = best.get(math.ceil((layers - first) / size))
        if groups is not None:
            found[f"{first}:{'+'.join(str(len(group)) for group in groups)}"] = (first, groups)
    return found


def rank_correlation(one: list[float], other: list[float]) -> float | None:
    """Spearman's, of values without ties. None of fewer than two."""
    if len(one) < 2:
        return None
    ranks = torch.tensor([one, other], dtype=torch.float64).argsort(dim=1).argsort(dim=1).double()
    return float(torch.corrcoef(ranks)[0, 1])
