"""Measure a checkpoint against its base: `swiftkv evaluate CHECKPOINT --base BASE --report DIR`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from swiftkv_train.data import held_out_batches, tokenize_source
from swiftkv_train.data.chat import render
from swiftkv_train.data.documents import BadRow
from swiftkv_train.durable import write_text
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.evaluate.quality import source_quality
from swiftkv_train.evaluate.report import check_report, write_report
from swiftkv_train.evaluate.speed import cache_bytes_per_token, time_to_first_token
from swiftkv_train.evaluate.tasks import compare_on_tasks, load_tasks
from swiftkv_train.export.card import replace_figures
from swiftkv_train.loading import Model, Tokenizer, load_tokenizer, pad_token_id
from swiftkv_train.machine import environment
from swiftkv_train.pair import load_pair
from swiftkv_train.progress import Reporter
from swiftkv_train.quality import check_finite_quality, summarise
from swiftkv_train.recipe import Recipe, Source
from swiftkv_train.student import training_attention

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short polite e-mail asking a colleague to move our meeting to Thursday.",
)
# figure -> whether a gate's value is the most (True) or the least (False) allowed
GATES = {"kl": True, "perplexity_ratio": True, "agreement": False, "time_to_first_token_ratio": True}


def evaluate(
    checkpoint: str,
    *,
    base: str,
    report_dir: str | Path,
    data: list[str] | None = None,
    tokens: int = 16_384,
    prompt_lengths: tuple[int, ...] = (512, 2048),
    new_tokens: int = 64,
    gates: list[str] | None = None,
    tasks: list[str] | None = None,
    task_limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare `checkpoint` with `base` and write report.json, report.md and plots to `report_dir`.

    Args:
        data: `NAME=PATH` held-out sources; left out, `data.test` (or else `data.held_out`) of the recipe that the
            checkpoint carries, and the figures also go into the checkpoint's README.md.
        tokens: held-out tokens per source.
        gates: `FIGURE=LIMIT`; see GATES. Of quality: every source of `data`, else all kinds trained on, together.
        tasks: of lm-evaluation-harness, or files of such; `task_limit`: only their first questions.

    Raises:
        UserError: no such model, another base, no held-out data, a malformed gate, a report that cannot be written, an
            unknown task.
        RunError: predictions that are no numbers, or a gate is exceeded (the report is written all the same).
    """
    limits = [_parse_gate(gate) for gate in gates or []]
    directory = Path(report_dir)
    check_report(directory)
    asked = load_tasks(tasks) if tasks else None
    report = Reporter(enabled=not quiet)
    student_model, base_model = load_pair(checkpoint, base)
    tokenizer = load_tokenizer(checkpoint)
    recipe = _recipe_of(checkpoint)
    recipes = (recipe.data.test or recipe.data.held_out) if recipe else []
    sources = parse_sources(data) if data else recipes
    if not sources:
        raise UserError(f"{checkpoint} names no held-out data; give --data NAME=PATH")
    trained_kinds = {source.name for source in recipe.data.train} if recipe else set()
    length = recipe.data.sequence_length if recipe else 512
    cache_dir = recipe.data.cache_dir if recipe else "outputs/token-cache"
    pad = pad_token_id(tokenizer)
    vocabulary = student_model.config.vocab_size
    said_by = recipe.model.model_copy(update={"base": base}) if recipe else None  # what a `generate` source is

    figures: dict[str, Any] = {}
    pooled = []
    for source in sources:
        tokenized = tokenize_source(
            source, tokenizer, vocab_size=vocabulary, cache_dir=cache_dir, base=said_by, report=report
        )
        batches = held_out_batches(tokenized, length, tokens, 4, pad)
        total = sum(batch.input_ids.numel() for batch in batches)
        with (
            report.bar(f"quality {source.name}", total, "tokens") as advance,
            training_attention(student_model, base_model),
        ):
            quality = source_quality(student_model, base_model, batches, advance)
        check_finite_quality({source.name: quality.overall}, base, checkpoint)
        figures[source.name] = {**quality.to_dict(), "kind_trained_on": source.name in trained_kinds}
        if source.name in trained_kinds:
            pooled.append(quality.measures)
        prompt = batches[0].input_ids[0]
    context = student_model.config.max_position_embeddings
    lengths = [length for length in prompt_lengths if length < context] or [context - 1]
    with report.bar("first token", total=6 * len(lengths), unit="turns") as advance:
        first_token = time_to_first_token(student_model, base_model, prompt, lengths, advance=advance)
    of_tasks = None
    if asked:
        of_tasks = compare_on_tasks(asked, {"base": base_model, "student": student_model}, tokenizer, task_limit)
    result = {
        "checkpoint": checkpoint,
        "base": base,
        "environment": environment(student_model),
        "own_data": bool(data),
        "sources": figures,
        "held_out": summarise(torch.cat(pooled)).to_dict() if pooled else None,
        "time_to_first_token": first_token,
        "cache_bytes_per_token": {
            "base": cache_bytes_per_token(base_model),
            "student": cache_bytes_per_token(student_model),
        },
        "tasks": of_tasks,
        "generations": side_by_side(student_model, base_model, tokenizer, new_tokens, report),
    }
    try:
        write_report(result, directory)
    except OSError as error:
        raise UserError(f"report {directory} cannot be written: {error.strerror}") from None
    report.line(f"report      {directory / 'report.md'}")
    if not data:
        _update_card(Path(checkpoint) / "README.md", result, report)
    for figure, limit in limits:
        _check_gate(result, figure, limit)
    return result


def side_by_side(
    student: Model,
    base: Model,
    tokenizer: Tokenizer,
    new_tokens: int,
    report: Reporter,
) -> list[dict[str, str]]:
    """Greedy answers of both models to PROMPTS."""
    rows = []
    with report.bar("answers", total=2 * len(PROMPTS), unit="answers") as advance:
        for prompt in PROMPTS:
            row = {"prompt": prompt}
            for name, model in (("base", base), ("student", student)):
                row[name] = answer(model, tokenizer, prompt, new_tokens)
                advance(1)
            rows.append(row)
    return rows


@torch.no_grad()
def answer(model: Model, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> str:
    """The model's greedy answer, through the chat template where there is one that takes a lone question."""
    text, special = prompt, True
    if tokenizer.chat_template:
        with suppress(BadRow):
            text = render([{"role": "user", "content": prompt}], tokenizer, generation_prompt=True)
            special = False  # the template has written them
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"].to(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id(tokenizer),
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _recipe_of(checkpoint: str) -> Recipe | None:
    file = Path(checkpoint) / "swiftkv.json"
    if not file.is_file():
        return None
    try:
        return Recipe.model_validate_json(json.dumps(json.loads(file.read_text(encoding="utf-8"))["recipe"]))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is damaged; export the checkpoint again or give --data NAME=PATH") from None


def parse_sources(data: Sequence[str]) -> list[Source]:
    """--data NAME=PATH, of which each has a name of its own. Raises UserError."""
    sources: list[Source] = []
    for text in data:
        name, separator, path = text.partition("=")
        if not separator or not name or not path:
            raise UserError(f"--data {text!r} must look like NAME=PATH")
        if any(source.name == name for source in sources):
            raise UserError(f"--data names {name!r} twice; give each source its own name")
        sources.append(Source(name=name, path=path))  # type: ignore[call-arg]
    return sources


def _parse_gate(text: str) -> tuple[str, float]:
    figure, _, value = text.partition("=")
    if figure not in GATES:
        raise UserError(f"--gate {text!r}: unknown figure {figure!r}; known: {', '.join(GATES)}")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UserError(f"--gate {text!r} must look like {figure}=0.2")
    return figure, limit


def _check_gate(result: dict[str, Any], figure: str, limit: float) -> None:
    if figure == "time_to_first_token_ratio":
        found = [row["ratio"] for row in result["time_to_first_token"]]
    else:
        together = None if result["own_data"] else result["held_out"]
        rows = [together] if together else list(result["sources"].values())
        found = [row[figure] for row in rows]
    at_most = GATES[figure]
    # Asked this way round, for nan passes no limit.
    if beyond := [value for value in found if not (value <= limit if at_most else value >= limit)]:
        worst = (max if at_most else min)(beyond)
        raise RunError(f"gate: {figure} is {worst:.4f}, not at {'most' if at_most else 'least'} {limit}")


def _update_card(card: Path, result: dict[str, Any], report: Reporter) -> None:
    """Put the figures into the checkpoint's model card, if it has one, and say so."""
    if not card.is_file():
        return
    rows = [
        (name, row["kl"], row["agreement"], row["base_perplexity"], row["student_perplexity"])
        for name, row in result["sources"].items()
    ]
    try:
        write_text(card, replace_figures(card.read_text(encoding="utf-8"), rows))
    except (OSError, UnicodeDecodeError) as error:
        report.line(f"warning     the figures in {card} are not renewed: {getattr(error, 'strerror', error)}")
    else:
        report.line(f"card        {card} has these figures")
