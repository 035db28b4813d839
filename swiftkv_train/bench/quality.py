"""`swiftkv bench quality`: recipes side by side, their held-out quality against training tokens.

Every recipe is a variant and trains in a run directory of its own under `runs`, named as its file; what is there of an
earlier call is gone on from, or taken as it is once it has ended. All variants have the same base and seeds and are
measured on the same text: the kinds trained on, and others. The first recipe is the one that the others are compared
with: how many tokens each needs to be as near to the base as that one is at its end.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swiftkv_train.distill import Distillation
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.machine import environment
from swiftkv_train.origin import recipe_origin
from swiftkv_train.quality import ALL, OTHER_KINDS, TRAINED_ON, Quality, by_kind
from swiftkv_train.recipe import Recipe, Source
from swiftkv_train.recipe_file import as_override, load_recipe
from swiftkv_train.run_directory import RunDirectory
from swiftkv_train.stopping import Stop, Stopped

TEST, HELD_OUT = "test", "held_out"
GROUPS = (TRAINED_ON, OTHER_KINDS, ALL)


def measure(arguments: Sequence[str], runs: str, points: int, tokens: int, on: str) -> dict[str, Any]:
    """`arguments`: recipe files, and `key=value` overrides for all of them. `points`: measurements along each run, on
    `tokens` of every source of the recipes' data.test or data.held_out (`on`)."""
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    recipes = _recipes(files, overrides, Path(runs), points, tokens, on)
    options = f"--points {points} --tokens {tokens}" + (f" --on {on}" if on != TEST else "") + f" --runs {runs}"
    command = " ".join(["swiftkv bench quality", *arguments, options])
    return compared(recipes, {name: settings_of(recipe) for name, recipe in recipes.items()}, command, on)


def compared(
    recipes: Mapping[str, Recipe],
    settings: Mapping[str, Mapping[str, Any]],
    command: str,
    on: str,
    distillation: Callable[..., Distillation] = Distillation,
) -> dict[str, Any]:
    """The benchmark's result: every recipe trained, or what is left of it, as `distillation(recipe, resume=...)`.

    `settings`: of each; those that differ from the first one's are shown.
    """
    model = None
    variants = []
    for name, recipe in recipes.items():
        variant, model = _variant(name, recipe, distillation)
        variants.append(variant)
    reference = settings[variants[0]["name"]]
    differing = [
        key
        for key in dict.fromkeys(key for keys in settings.values() for key in keys)
        if any(keys.get(key) != reference.get(key) for keys in settings.values())
    ]
    for variant in variants:
        variant["settings"] = {key: settings[variant["name"]].get(key) for key in differing}
        variant["as_good_as_first"] = _as_good_as(variant, variants[0])
    return {
        "benchmark": "held-out quality against training tokens",
        "command": command,
        "environment": environment(model),
        "measured_on": on,
        "variants": variants,
        "summary": [line for variant in variants for line in _lines(variant, variants[0]["name"])],
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """By the path of their key; groups of layers as they stand in a recipe."""
    groups = "rewrite.key_value_groups"
    single = {key: value for key, value in recipe_origin(recipe).items() if not key.startswith(groups)}
    return {**single, groups: recipe.rewrite.key_value_groups}


def _recipes(
    files: Sequence[str], overrides: Sequence[str], runs: Path, points: int, tokens: int, on: str
) -> dict[str, Recipe]:
    """By name, each with its run directory and its points of measurement."""
    if not files:
        raise UserError("give the recipes to compare, the one that the others are compared with first")
    recipes: dict[str, Recipe] = {}
    for file in files:
        name = Path(file).stem
        if name in recipes:
            raise UserError(f"two recipes are named {name}; a variant is called by its file's name")
        recipes[name] = variant_of(file, overrides, runs / name, points, tokens, on)
    (first, one), *others = recipes.items()
    for name, other in others:
        for key, value in _shared(other).items():
            if value != _shared(one)[key]:
                raise UserError(f"{first} and {name} cannot be compared: {key} differs")
    return recipes


def variant_of(file: str, overrides: Sequence[str], run: Path, points: int, tokens: int, on: str) -> Recipe:
    """A recipe with its run directory, and its points of measurement for held-out figures."""
    recipe = load_recipe(file, [*overrides, as_override("training.output_dir", str(run))])
    recipe.data.held_out = sources_of(recipe, file, on)
    recipe.training.evaluate_tokens = tokens
    recipe.training.evaluate_every = math.ceil(recipe.training.steps / points)
    return recipe


def sources_of(recipe: Recipe, file: str, on: str) -> list[Source]:
    """What is measured on. Raises UserError where the recipe names none."""
    if on not in (TEST, HELD_OUT):
        raise UserError(f"--on {on!r} is not known; use {TEST} or {HELD_OUT}")
    sources = recipe.data.test if on == TEST else recipe.data.held_out
    if not sources:
        raise UserError(f"recipe {file} names no data.{on} to measure on")
    return sources


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What variants must agree in, by the name of its key."""
    data, training = recipe.data, recipe.training
    return {
        "model": recipe.model,
        "data.held_out or data.test": data.held_out,
        "data.sequence_length": data.sequence_length,
        "which of data.train's names are measured on": sorted(
            {source.name for source in data.train} & {source.name for source in data.held_out}
        ),
        "training.steps x training.batch_size": training.steps * training.batch_size,
        "data.seed": data.seed,
        "training.seed": training.seed,
    }


def _variant(name: str, recipe: Recipe, make: Callable[..., Distillation]) -> tuple[dict[str, Any], Any]:
    """Train it, or what is left of it. Also its model."""
    run = RunDirectory(recipe.training.output_dir)
    with Stop().watching() as stop:
        try:
            distillation = make(recipe, resume=run.recipe_path.exists(), stop=stop)
            distillation.report.line(f"variant     {name}")
            distillation.train()
        except Stopped:  # before there is a run
            pass
    if stop.signal:
        raise RunError(f"{name} was stopped; the same command goes on from there")
    distillation.strategy.close()
    trained = {source.name for source in recipe.data.train}
    rows = run.metrics.rows()
    for row in rows:
        if any(None in figures.values() for figures in row.get("held_out", {}).values()):
            raise RunError(f"{name}: held-out figures of step {row['step']} are not finite, see {run.metrics.path}")
    tokens = recipe.training.batch_size * recipe.data.sequence_length
    calibrated = recipe.rewrite.init == "calibrated"
    return {
        "name": name,
        "calibration_tokens": recipe.calibration.tokens if calibrated else 0,
        "train_seconds": sum(row["seconds"] for row in rows if "seconds" in row),
        "last_training_kl": _last_training_kl(recipe, rows),
        "points": [
            {"tokens": row["step"] * tokens, "sources": row["held_out"], **_grouped(row["held_out"], trained)}
            for row in rows
            if "held_out" in row
        ],
    }, distillation.strategy.model


def _last_training_kl(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the last tenth of the steps, of text just before it is trained on; None at another temperature than 1.

    Far below the held-out KL, it is text that has been read before.
    """
    logged = [row["kl"] for row in rows if "kl" in row and row["step"] > 0.9 * recipe.training.steps]
    return statistics.mean(logged) if logged and recipe.loss.temperature == 1 else None


def _grouped(sources: dict[str, dict[str, float]], trained: set[str]) -> dict[str, dict[str, float]]:
    fields = {field.name for field in dataclasses.fields(Quality)}
    found = {
        name: Quality(**{key: value for key, value in row.items() if key in fields})  # type: ignore[arg-type]
        for name, row in sources.items()
    }
    return {group: quality.to_dict() for group, quality in by_kind(found, trained).items()}


def _as_good_as(variant: dict[str, Any], first: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """By kinds of text, the first's last KL, and the tokens after which this variant was measured to be no worse.

    Tokens are those of training: a calibration reads `calibration_tokens` more, without a backward pass.
    """
    found: dict[str, dict[str, float | None]] = {}
    for group in GROUPS:
        if group not in first["points"][-1]:
            continue
        kl = first["points"][-1][group]["kl"]
        reached = [point["tokens"] for point in variant["points"] if point[group]["kl"] <= kl]
        tokens = min(reached, default=None)
        found[group] = {"kl": kl, "tokens": tokens}
    return found


def _lines(variant: dict[str, Any], first: str) -> list[str]:
    lines = [f"{variant['name']}: {', '.join(f'{key}={value}' for key, value in variant['settings'].items())}"]
    for point in variant["points"]:
        figures = "; ".join(figures_of(point, group) for group in (TRAINED_ON, OTHER_KINDS) if group in point)
        lines.append(f"  {point['tokens']:>9,} tokens  {figures}")
    for group, row in variant["as_good_as_first"].items():
        when = "not reached" if row["tokens"] is None else f"after {row['tokens']:,} training tokens"
        if variant["name"] != first:
            lines.append(f"  {group}: {first}'s last KL, {row['kl']:.3f}, {when}")
    return lines


def figures_of(row: Mapping[str, Any], group: str) -> str:
    found = row[group]
    ratio = f"perplexity ratio {found['perplexity_ratio']:.3f}"
    return f"{group}: KL {found['kl']:.3f}, agreement {found['agreement']:.1%}, {ratio}"
