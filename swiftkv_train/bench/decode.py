"""`swiftkv bench decode`: the time of a generated token of a checkpoint and of its base, by batch and context.

Both through transformers' DynamicCache and through a SinkWindowCache whose window is just full: the same number of
tokens is attended to. `base` is what a user has without this project, transformers' own sdpa and linear layers; on a
CPU the others are made ready for it by `optimize_for_cpu`.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch

from swiftkv_models import optimize_for_cpu
from swiftkv_train.bench.baselines import Dense, Ours, sharing_weights
from swiftkv_train.bench.turns import in_turns, numbers_from
from swiftkv_train.loading import Model
from swiftkv_train.machine import environment
from swiftkv_train.pair import load_pair
from swiftkv_train.progress import Reporter

SINKS = 4
BASE = "base"  # through transformers alone: what the others are compared with
CONTENDERS = {  # name -> which model, and whether its cache is ours
    BASE: (BASE, False),
    "base optimized": ("base optimized", False),
    "base optimized, sinks + window": ("base optimized", True),
    "SwiftKV": ("SwiftKV", False),
    "SwiftKV, sinks + window": ("SwiftKV", True),
}


@torch.no_grad()
def measure(checkpoint: str, base: str, batches: str, contexts: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step of B tokens (medians, taking turns); `speedup`: over the base through transformers alone."""
    rows_of_batch = numbers_from("--batch", batches, 1, "1,16")
    lengths = numbers_from("--context", contexts, SINKS + 1, "512,4096")
    student, teacher = load_pair(checkpoint, base, optimized=False)
    models = {"SwiftKV": student, "base": teacher, "base optimized": optimize_for_cpu(sharing_weights(teacher))}
    rows = []
    with Reporter().bar("decode", len(rows_of_batch) * len(lengths), "cells") as advance:
        for length in lengths:
            for batch in rows_of_batch:
                rows.append(_row(models, batch, length, repeats))
                advance(1)
                gc.collect()
    config = student.config
    return {
        "benchmark": "time of a generated token",
        "command": f"swiftkv bench decode {checkpoint} --base {base} --batch {batches} --context {contexts} "
        f"--repeats {repeats}",
        "environment": environment(student),
        "num_key_value_layers": config.num_key_value_layers,
        "num_hidden_layers": config.num_hidden_layers,
        "key_value_group_size": config.key_value_group_size,
        "sinks": SINKS,
        "rows": rows,
        "summary": [_line(row) for row in rows],
    }


def _row(models: dict[str, Model], batch: int, context: int, repeats: int) -> dict[str, Any]:
    token = torch.zeros(batch, 1, dtype=torch.long, device=models[BASE].device)
    works = {}
    for name, (of, with_ours) in CONTENDERS.items():
        model = models[of]
        if with_ours:
            ours = Ours(model, window=context - SINKS, attention_sinks=SINKS, batch=batch)
            ours.fill(context)
            works[name] = partial(ours.feed, token)
            continue
        dense = Dense(model, batch=batch)
        dense.reach(context)
        if name == BASE:
            dense.model.config._attn_implementation = "sdpa"
        works[name] = partial(dense.feed, token)
    cells = in_turns(works, repeats, token.device, must_run=BASE)
    for cell in cells.values():
        if "failed" not in cell:
            cell["tokens_per_second"] = batch / cell["seconds"]
            cell["speedup"] = cells[BASE]["seconds"] / cell["seconds"]
    return {"batch": batch, "context": context, "contenders": cells}


def _line(row: dict[str, Any]) -> str:
    parts = []
    for name, cell in row["contenders"].items():
        if "failed" in cell:
            parts.append(f"{name} not measured ({cell['failed']})")
            continue
        beside = f" (x {cell['speedup']:.2f}{', SLOWER' if cell['speedup'] < 1 else ''})" if name != BASE else ""
        parts.append(f"{name} {cell['seconds'] * 1e3:,.3g} ms{beside}")
    return f"batch {row['batch']}, {row['context']:,} tokens of context: {'; '.join(parts)}"
