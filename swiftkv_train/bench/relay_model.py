"""Time to first token and time of a token with a shared prompt and without, of whole models, for `swiftkv bench relay`.

ours       SinkWindowCache with the SharedPrefix, whose prefill is done
unshared   the same cache and every row's whole prompt in it
dense      transformers' DynamicCache
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_models.shared_prefix import SharedPrefix
from swiftkv_train.bench.baselines import allocated_bytes, cache_tensors, sharing_weights
from swiftkv_train.bench.turns import OURS, compare, comparison, in_turns
from swiftkv_train.loading import Model
from swiftkv_train.progress import Reporter

UNSHARED, DENSE = "unshared", "dense"
SINKS = 4
MOST_PREFILLS, LEAST_TOKENS = 3, 16  # that are timed: the one takes long, the other is short


def end_to_end(model: Model, batches: Sequence[int], prefix: int, suffix: int, repeats: int) -> dict[str, Any]:
    """Seconds of a whole model's step after B prompts of `prefix` common and `suffix` own tokens, shared or not."""
    rows = []
    with Reporter().bar("end to end", len(batches), "batches") as advance:
        for batch in batches:
            rows.append(_row(model, batch, prefix, suffix, repeats))
            advance(1)
            gc.collect()
    return {
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prefix": prefix,
        "suffix": suffix,
        "rows": rows,
        "summary": [
            f"B={row['batch']}, {prefix:,} + {suffix} tokens, {what}: {comparison(row[figure])}"
            for row in rows
            for figure, what in (("first_token", "first token"), ("token", "a token"))
        ],
    }


def _row(model: Model, batch: int, prefix: int, suffix: int, repeats: int) -> dict[str, Any]:
    turns = max(repeats, LEAST_TOKENS)
    ids = _prompts(model, batch, prefix, suffix)
    ways = caches(model, ids, SharedPrefix.from_ids(model, ids[0, :prefix]), window=suffix + turns + 2)
    first = in_turns(
        {name: partial(_prefill, way) for name, way in ways.items()}, min(repeats, MOST_PREFILLS), ids.device
    )
    compare(first)

    started = {name: _prefill(way) for name, way in ways.items()}
    right = started[DENSE][2].float()
    for name, (_, _, logits) in started.items():
        first[name]["difference"] = float((logits.float() - right).abs().max() / right.abs().max())
    token = torch.zeros(batch, 1, dtype=torch.long, device=ids.device)
    steps = {
        name: partial(step_model, token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for name, (step_model, cache, _) in started.items()
    }
    cells = in_turns(steps, turns, ids.device)
    compare(cells)
    for name, (_, cache, _) in started.items():
        cells[name]["held_bytes"] = allocated_bytes(cache_tensors(cache))
    return {"batch": batch, "first_token": first, "token": cells}


def _prompts(model: Model, batch: int, prefix: int, suffix: int) -> Tensor:
    """B prompts [B, P + S] that begin alike."""
    generator = torch.Generator().manual_seed(batch)
    shared, own = (
        torch.randint(0, model.config.vocab_size, shape, generator=generator)
        for shape in ((1, prefix), (batch, suffix))
    )
    return torch.cat([shared.expand(batch, -1), own], dim=1).to(model.device)


Start = Callable[[], tuple[Model, Any, Tensor]]  # a new cache, its model, and the token ids that it is to be fed first


def caches(model: Model, ids: Tensor, prefix: SharedPrefix, window: int) -> dict[str, Start]:
    """`window`: tokens kept beside the prefix."""
    dense_model = sharing_weights(model)

    def shared() -> tuple[Model, Any, Tensor]:
        cache = SinkWindowCache(model.config, window=window, attention_sinks=SINKS, prefixes=prefix, input_ids=ids)
        return model, cache, ids[:, cache.columns :]

    def unshared() -> tuple[Model, Any, Tensor]:
        return model, SinkWindowCache(model.config, window=len(prefix) - SINKS + window, attention_sinks=SINKS), ids

    def dense() -> tuple[Model, Any, Tensor]:
        return dense_model, DynamicCache(config=dense_model.config), ids

    return {OURS: shared, UNSHARED: unshared, DENSE: dense}


def _prefill(start: Start) -> tuple[Model, Any, Tensor]:
    """The model, the filled cache, and the logits of the first token."""
    model, cache, ids = start()
    return model, cache, model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
