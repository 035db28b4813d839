"""`swiftkv bench kv-memory`: bytes that a SinkWindowCache really allocates, by AcrossKV group and storage format, and
what a format costs in quality on real text.

Bytes are of the cache's own memory (K, V, scales, positions) over its slots, against the base's through transformers'
cache. Quality is of a model with K/V in 8 bits against the same model with them as they are: what the format does,
apart from what the rewrite does, and in fp32, apart from what rounding in bf16 does (which is about as much); of a
checkpoint also against the base, what both do. Texts are scored whole, their K/V quantised as later tokens meet them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from swiftkv_models import rewrite
from swiftkv_models.segment_cache import QUANTIZATIONS, SinkWindowCache
from swiftkv_models.shared_prefix import num_cached_layers
from swiftkv_train.bench.baselines import allocated_bytes, cache_tensors
from swiftkv_train.bench.texts import tokenized
from swiftkv_train.bench.turns import this_device
from swiftkv_train.errors import UserError
from swiftkv_train.evaluate import parse_sources
from swiftkv_train.evaluate.speed import cache_bytes_per_token
from swiftkv_train.loading import Model, load_model
from swiftkv_train.machine import environment
from swiftkv_train.progress import Reporter
from swiftkv_train.quality import Quality, check_finite_quality, summarise, token_measures
from swiftkv_train.recipe import Source

WINDOW, SINKS = 1020, 4
GROUP_SIZES = (1, 2, 4)
STORAGES = ("none", *QUANTIZATIONS)


@torch.no_grad()
def measure(
    base: str, checkpoints: list[str] | None, data: list[str] | None, tokens: int, sequence_length: int
) -> dict[str, Any]:
    """Bytes of all forms; with `data` (NAME=PATH) also quality, of the base and of `checkpoints`."""
    if sequence_length < 2:
        raise UserError(f"--sequence-length must be at least 2, not {sequence_length}")
    device = this_device()
    sources = parse_sources(data or [])
    model = load_model(base, families=("llama",)).to(device)
    rows = _memory(model)
    quality: list[dict[str, Any]] = []
    against_base: list[dict[str, Any]] = []
    texts = {source.name: _rows_of_text(source, base, model, tokens, sequence_length) for source in sources}
    scored = [None, *(checkpoints or [])] if sources else []  # None: the base
    total = sum(len(ids) for ids in texts.values()) * len(scored)
    with Reporter().bar("quality", total, "texts") as advance:
        unchanged = load_model(base, dtype="float32", families=("llama",)).to(device) if sources else None
        for checkpoint in scored:
            path, exact = base, unchanged
            if checkpoint is not None:
                path = checkpoint
                exact = load_model(path, dtype="float32", families=("llama_swiftkv",)).to(device)
            form = {"model": checkpoint or "base", **_form(exact)}
            for source, ids in texts.items():
                of_format, of_all = _quality(exact, unchanged, ids.to(device), advance)
                for found, lines in ((of_format, quality), (of_all if checkpoint else {}, against_base)):
                    for storage, measured in found.items():
                        check_finite_quality({source: measured}, path, f"{path} with K/V in {storage}")
                        lines.append({"source": source, **form, **_row(storage, measured)})
    options = "".join(f" --checkpoint {path}" for path in checkpoints or [])
    options += "".join(f" --data {text}" for text in data or [])
    return {
        "benchmark": "memory of the K/V cache, and what 8 bits cost",
        "command": f"swiftkv bench kv-memory {base}{options} --tokens {tokens} --sequence-length {sequence_length}",
        "environment": environment(model),
        "window": WINDOW,
        "sinks": SINKS,
        "rows": rows,
        "quality": quality,
        "quality_against_base": against_base,
        "summary": [
            *map(_memory_line, rows),
            *map(_quality_line, quality),
            *(f"{_quality_line(row)} of the base" for row in against_base),
        ],
    }


def _memory(base: Model) -> list[dict[str, Any]]:
    layers, own = base.config.num_hidden_layers, cache_bytes_per_token(base)
    forms = [
        rewrite(base, num_key_value_layers=layers // 2, key_value_group_size=size)
        for size in GROUP_SIZES
        if size <= layers - layers // 2
    ]
    rows = []
    for model in (base, *forms):
        cached = num_cached_layers(model.config)
        for storage in STORAGES:
            found = _bytes_per_token(model, storage)
            rows.append(
                {
                    **_form(model),
                    "cached_layers": cached,
                    "quantization": storage,
                    "bytes_per_token": found,
                    "base_bytes_per_token": own,
                    "ratio": found / own,
                    "layers_ratio": cached / layers,  # what the ratio would be of K and V alone, as they are
                }
            )
    return rows


def _form(model: Any) -> dict[str, Any]:
    layers = model.config.num_hidden_layers
    return {
        "num_key_value_layers": getattr(model.config, "num_key_value_layers", layers),
        "num_hidden_layers": layers,
        "key_value_group_size": getattr(model.config, "key_value_group_size", 1),
        "key_value_groups": getattr(model.config, "key_value_groups", None),
    }


def _cache(model: Model, window: int, storage: str) -> SinkWindowCache:
    quantization = None if storage == "none" else storage
    return SinkWindowCache(model.config, window=window, attention_sinks=SINKS, quantization=quantization)


def _bytes_per_token(model: Model, storage: str) -> float:
    cache = _cache(model, WINDOW, storage)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)  # allocates
    return allocated_bytes(cache_tensors(cache)) / cache.num_slots


def _rows_of_text(source: Source, base: str, model: Model, tokens: int, length: int) -> torch.Tensor:
    """[N, length] token ids: the documents end to end, cut."""
    with tokenized(source, base, model) as found:
        ids = torch.tensor(found.tokens[:tokens], dtype=torch.long)
    rows = len(ids) // length
    if rows == 0:
        raise UserError(f"--data {source.name}={source.path} has {len(ids)} of the {length} tokens of one text")
    return ids[: rows * length].view(rows, length)


def _quality(
    model: Any, base: Any, texts: torch.Tensor, advance: Callable[[int], None]
) -> tuple[dict[str, Quality], dict[str, Quality]]:
    """Of every 8-bit format against the model's own K/V, and of every format against the base."""
    of_format: dict[str, list[torch.Tensor]] = {storage: [] for storage in QUANTIZATIONS}
    of_all: dict[str, list[torch.Tensor]] = {storage: [] for storage in STORAGES}
    for ids in texts.split(1):
        wanted = base(ids, use_cache=False).logits[0, :-1]
        found = {
            storage: model(ids, past_key_values=_cache(model, ids.shape[1], storage), use_cache=True).logits[0, :-1]
            for storage in STORAGES
        }
        for measures, exact in ((of_format, found["none"]), (of_all, wanted)):
            for storage, listed in measures.items():
                listed.append(token_measures(found[storage], exact, ids[0, 1:]).cpu())
        advance(1)
    first, second = (
        {storage: summarise(torch.cat(listed)) for storage, listed in measures.items()}
        for measures in (of_format, of_all)
    )
    return first, second


def _row(storage: str, quality: Quality) -> dict[str, Any]:
    return {
        "quantization": storage,
        "tokens": quality.tokens,
        "kl": quality.kl,
        "agreement": quality.agreement,
        "perplexity": quality.base_perplexity,
        "quantised_perplexity": quality.student_perplexity,
        "perplexity_ratio": quality.perplexity_ratio,
    }


def _memory_line(row: dict[str, Any]) -> str:
    form = f"l {row['num_key_value_layers']}/{row['num_hidden_layers']}, g {row['key_value_group_size']}"
    return (
        f"{form}, {row['quantization']:<4}: {row['bytes_per_token']:>9,.0f} bytes a token against "
        f"{row['base_bytes_per_token']:,.0f}: x {row['ratio']:.3f}"
    )


def _quality_line(row: dict[str, Any]) -> str:
    return (
        f"{row['source']}, {row['model']}, {row['quantization']}: KL {row['kl']:.2e}, "
        f"agreement {row['agreement']:.2%}, perplexity {row['quantised_perplexity']:.3f} against "
        f"{row['perplexity']:.3f}: x {row['perplexity_ratio']:.4f}"
    )
