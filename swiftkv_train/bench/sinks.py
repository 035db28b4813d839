"""`swiftkv bench sinks`: perplexity along one long text by the number of attention sinks, at the same memory.

What StreamingLLM shows of larger models (arXiv 2309.17453, figure 3 and table 2), of the model at hand. Without sinks
it gets worse as soon as the first tokens leave the window; a dense cache does beyond the length that it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache, DynamicCache

from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_train.bench.texts import tokenized
from swiftkv_train.bench.turns import numbers_from
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.evaluate import parse_sources
from swiftkv_train.loading import Model, load_for_inference
from swiftkv_train.machine import environment
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Source

POINTS = 40  # of a curve


@torch.no_grad()
def measure(path: str, data: str, kept: str, sinks: str, tokens: int, chunk: int) -> dict[str, Any]:
    """Perplexity of the tokens behind the largest of `kept`, up to the trained length and beyond it, and in pieces.

    kept: numbers of tokens in the cache, of which `sinks` are the first of the text.
    """
    sizes = numbers_from("--kept", kept, 1, "128,1024")
    numbers = numbers_from("--sinks", sinks, 0, "0,4")
    if sizes[0] <= numbers[-1]:
        raise UserError(f"--kept {sizes[0]} must be more than --sinks {numbers[-1]}, which are among them")
    (source,) = parse_sources([data])
    model = load_for_inference(path)
    trained = model.config.max_position_embeddings
    ids = _longest_document(source, path, model)[:tokens]
    least = sizes[-1] + POINTS + 1
    if len(ids) < least:
        raise UserError(
            f"--data {data}: its longest document, cut to --tokens, has {len(ids)} of at least {least} tokens"
        )

    forms = [(size, number) for size in sizes for number in numbers]
    rows = []
    with Reporter().bar("sinks", (1 + len(forms)) * len(ids), "tokens") as advance:
        losses = _losses(model, ids, DynamicCache(config=model.config), chunk, advance)
        rows.append({"kept": None, "sinks": None, **_perplexities(losses, sizes[-1], trained)})
        for size, number in forms:
            cache = SinkWindowCache(model.config, window=size - number, attention_sinks=number)
            losses = _losses(model, ids, cache, chunk, advance)
            rows.append({"kept": size, "sinks": number, **_perplexities(losses, sizes[-1], trained)})
    return {
        "benchmark": "perplexity of a stream by attention sinks",
        "command": f"swiftkv bench sinks {path} --data {data} --kept {kept} --sinks {sinks} --tokens {tokens} "
        f"--chunk {chunk}",
        "environment": environment(model),
        "model_type": model.config.model_type,
        "source": source.name,
        "tokens": len(ids),
        "scored_from": sizes[-1],
        "trained_length": trained,
        "rows": rows,
        "summary": [_line(row, trained) for row in rows],
    }


def _longest_document(source: Source, path: str, model: Model) -> Tensor:
    """[N] token ids."""
    with tokenized(source, path, model) as found:
        first, last = max(zip(found.offsets[:-1], found.offsets[1:], strict=True), key=lambda ends: ends[1] - ends[0])
        return torch.tensor(found.tokens[first:last], dtype=torch.long, device=model.device)


def _losses(model: Model, ids: Tensor, cache: Cache, chunk: int, advance: Callable[[int], None]) -> Tensor:
    """-log p of each token but the first [N - 1], in nats."""
    losses = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        logits = model(part[None], past_key_values=cache, use_cache=True).logits[0]
        targets = ids[start + 1 : start + 1 + len(part)]
        losses.append(cross_entropy(logits[: len(targets)].float(), targets, reduction="none").cpu())
        advance(len(part))
    return torch.cat(losses).double()


def _perplexities(losses: Tensor, first: int, trained: int) -> dict[str, Any]:
    """Of tokens first, first + 1, ...: losses[i] is of token i + 1."""
    if not losses.isfinite().all():
        raise RunError("what the model predicts is not finite: nan or infinity in its weights, or an overflow")
    step = math.ceil(len(losses) / POINTS)
    points = [
        {"tokens": start + len(piece) + 1, "perplexity": math.exp(piece.mean())}
        for start, piece in zip(range(0, len(losses), step), losses.split(step), strict=True)
    ]
    within, beyond = losses[first - 1 : trained - 1], losses[max(first, trained) - 1 :]
    return {
        "perplexity": math.exp(within.mean()) if len(within) else None,
        "perplexity_beyond": math.exp(beyond.mean()) if len(beyond) else None,
        "points": points,
    }


def _line(row: dict[str, Any], trained: int) -> str:
    cache = "dense" if row["kept"] is None else f"{row['sinks']} + {row['kept'] - row['sinks']:,} tokens"
    figures = [(row["perplexity"], f"up to {trained:,} tokens"), (row["perplexity_beyond"], "beyond")]
    return f"{cache}: perplexity " + ", ".join(f"{value:,.2f} {where}" for value, where in figures if value is not None)
