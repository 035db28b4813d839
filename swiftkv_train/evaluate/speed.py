"""Time to first token and K/V bytes of two models, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from swiftkv_train.loading import Model
from swiftkv_train.machine import synchronize


@torch.no_grad()
def seconds_to_first_token(model: Model, input_ids: torch.Tensor) -> float:
    """Wall-clock seconds of `generate` for one new token after `input_ids` [1, T]."""
    synchronize(model.device)
    started = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=1,
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
    )
    synchronize(model.device)
    return time.perf_counter() - started


def time_to_first_token(
    student: Model,
    base: Model,
    prompt: torch.Tensor,
    lengths: list[int],
    repeats: int = 5,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[dict[str, Any]]:
    """Medians per prompt length, the two models taking turns so that both meet the same machine.

    `prompt` [N] is repeated to the length asked for. Each model has one untimed turn first.
    """
    rows = []
    for length in lengths:
        ids = prompt.repeat(-(-length // len(prompt)))[:length].unsqueeze(0).to(student.device)
        times: dict[str, list[float]] = {"base": [], "student": []}
        for turn in range(repeats + 1):
            for name, model in (("base", base), ("student", student)):
                seconds = seconds_to_first_token(model, ids)
                if turn:
                    times[name].append(seconds)
            advance(1)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            {
                "prompt_tokens": length,
                "base_seconds": medians["base"],
                "student_seconds": medians["student"],
                "ratio": medians["student"] / medians["base"],
                "all_seconds": times,
            }
        )
    return rows


@torch.no_grad()
def cache_bytes_per_token(model: Model, tokens: int = 32) -> float:
    """Bytes that the K/V cache really holds per token, read off a cache that `generate`'s default makes."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in stored) / tokens
