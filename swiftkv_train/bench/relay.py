"""`swiftkv bench relay`: attention over a shared prompt by batch and length, against the ways of shared_storage.py, and
what it comes to in a whole model.

Every way is called for several layers in turn, so many that one layer's K/V have left the processor's caches before
they are read again, as in a model, where weights pass in between.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swiftkv_train.bench.relay_model import SINKS, end_to_end
from swiftkv_train.bench.shared_storage import (
    FLASHINFER,
    PER_REQUEST,
    PLAIN,
    WAYS,
    Attention,
    LayerTensors,
    Shape,
    flashinfer_is_installed,
    shares,
)
from swiftkv_train.bench.turns import (
    OURS,
    Cell,
    compare,
    comparison,
    in_turns,
    numbers_from,
    reason,
    seconds_of,
    target,
    target_lines,
    this_device,
)
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.loading import load_for_inference
from swiftkv_train.machine import environment
from swiftkv_train.progress import Reporter

DTYPES = ("float32", "bfloat16", "float16")
COLD_BYTES = 256 << 20  # of K/V between two calls for the same layer
MOST_LAYERS = 30
TURN_SECONDS = 0.02  # of ours, about: in less, a turn shows the machine's mood
LEAST_SPEEDUP = 0.95  # over plain; a cell below it is a mistake of the operation's choice of a path
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of outputs near 1 / sqrt(tokens)


@torch.no_grad()
def measure(
    batches: str,
    prefixes: str,
    groups: str,
    suffix: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    repeats: int,
    model: str | None,
    model_batches: str,
    model_prefix: int,
) -> dict[str, Any]:
    """Seconds of one layer's attention (medians, taking turns) in every cell of groups x prefix x batch.

    groups: numbers of different prefixes, which rows share evenly. `model`: also of whole models.
    """
    rows_of_batch = numbers_from("--batch", batches, 1, "1,16")
    lengths = numbers_from("--prefix", prefixes, 1, "64,4096")
    counts = numbers_from("--groups", groups, 1, "1,2")
    model_rows = numbers_from("--model-batch", model_batches, 1, "1,16")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    if heads % kv_heads:
        raise UserError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")
    if model is not None and model_prefix < SINKS:
        raise UserError(f"--model-prefix must be at least {SINKS}, not {model_prefix}: it takes the place of the sinks")
    device = this_device()
    whole_model = load_for_inference(model) if model is not None else None
    shape = Shape(1, 1, suffix, heads, kv_heads, head_dim, getattr(torch, dtype))
    shapes = [
        replace(shape, batch=batch, prefix=length, prefixes=count)
        for count in counts
        for length in lengths
        for batch in rows_of_batch
        if batch >= count
    ]
    if not shapes:
        raise UserError(f"--groups {groups!r}: no --batch of {batches} has that many rows")
    rows = []
    with Reporter().bar("relay", len(shapes), "cells") as advance:
        for one in shapes:
            rows.append(_row(one, repeats, device))
            advance(1)
            gc.collect()
    losing = [
        {**{key: row[key] for key in ("batch", "prefix", "groups")}, "speedup": row["contenders"][PLAIN]["speedup"]}
        for row in rows
        if row["contenders"][PLAIN].get("speedup", 1.0) < LEAST_SPEEDUP
    ]
    whole = None
    if whole_model is not None:
        whole = {"model": model, **end_to_end(whole_model, model_rows, model_prefix, suffix, repeats)}
    targets = _targets(rows, device)
    options = f" --model {model} --model-batch {model_batches} --model-prefix {model_prefix}" if model else ""
    return {
        "benchmark": "attention over a shared prompt",
        "command": f"swiftkv bench relay --batch {batches} --prefix {prefixes} --groups {groups} --suffix {suffix} "
        f"--heads {heads} --kv-heads {kv_heads} --head-dim {head_dim} --dtype {dtype} --repeats {repeats}{options}",
        "environment": environment(torch.empty(0, dtype=shape.dtype, device=device)),
        "suffix": suffix,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rows": rows,
        "slower_than_plain": losing,
        "end_to_end": whole,
        "targets": targets,
        "summary": [
            *map(_line, rows),
            *(whole["summary"] if whole else []),
            *target_lines(targets),
            f"below x {LEAST_SPEEDUP} of plain: "
            + ("; ".join(f"{_cell(cell)} (x {cell['speedup']:.2f})" for cell in losing) or "no cell"),
        ],
    }


def _row(shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    stored = {
        OURS: shape.shared_tokens,
        PLAIN: shape.batch * (shape.prefix + shape.suffix),
    }
    layers = {name: _layers(shape.key_value_bytes(tokens)) for name, tokens in stored.items()}
    torch.manual_seed(0)
    tensors = [LayerTensors.random(shape, device) for _ in range(max(layers.values()))]
    works: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    wanted: Tensor | None = None
    for name in (PLAIN, OURS, PER_REQUEST, FLASHINFER):  # plain tells what is right
        try:
            if name == FLASHINFER and (why := _no_flashinfer(shape, device)):
                raise RunError(why)
            calls = [WAYS[name](layer) for layer in tensors[: layers.get(name, layers[OURS])]]
            output = calls[0]()
            wanted = output if wanted is None else wanted
            difference = float((output.float() - wanted.float()).abs().max())
            if not difference <= TOLERANCES[shape.dtype]:
                raise RunError(f"its output is {difference:.1e} off")
            works[name] = _all_of(calls, device)
        except Exception as error:  # whatever a library raises on a device, version or size that is not for it
            if name == OURS:
                raise
            failed[name] = str(error) if isinstance(error, RunError) else reason(error)
    works = {name: works[name] for name in WAYS if name in works}
    works[OURS]()
    rounds = math.ceil(TURN_SECONDS / seconds_of(works[OURS], device))
    cells = in_turns({name: _repeated(work, rounds) for name, work in works.items()}, repeats, device)
    for name, cell in cells.items():
        if "failed" not in cell:
            calls_made = rounds * layers.get(name, layers[OURS])
            cell["all_seconds"] = [seconds / calls_made for seconds in cell["all_seconds"]]
            cell["seconds"] /= calls_made
    cells |= {name: {"failed": why} for name, why in failed.items()}
    compare(cells)
    speedup = cells[PLAIN].get("speedup")
    return {
        "batch": shape.batch,
        "prefix": shape.prefix,
        "groups": shape.prefixes,
        "ceiling": shape.ceiling,
        "shared": shares(tensors[0]),
        "share_of_ceiling": None if speedup is None else speedup / shape.ceiling,
        "contenders": cells,
    }


def _repeated(work: Callable[[], object], rounds: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(rounds):
            work()

    return run


def _layers(key_value_bytes: int) -> int:
    return min(MOST_LAYERS, -(-COLD_BYTES // key_value_bytes))


def _no_flashinfer(shape: Shape, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    if not flashinfer_is_installed():
        return "not installed: pip install flashinfer-python"
    return "takes float16 and bfloat16 only" if shape.dtype == torch.float32 else None


def _all_of(calls: list[Attention], device: torch.device) -> Callable[[], object]:
    """One call for each layer. On CUDA as a graph, without which short calls would show the time of their launching."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _targets(rows: list[dict[str, Any]], device: torch.device) -> list[Cell]:
    rows = [row for row in rows if row["groups"] == 1]
    if device.type == "cuda":  # where attention dominates: there is much to gain, and to read
        large = [row for row in rows if row["ceiling"] >= 8 and row["prefix"] >= 4096]
        shares = [row["share_of_ceiling"] for row in large if row["share_of_ceiling"] is not None]
        return [
            target(
                "share of the ceiling, batches of 16 and more, 4,096 tokens and more", 0.75, min(shares, default=None)
            )
        ]
    cells = [row["contenders"][PER_REQUEST] for row in rows if (row["batch"], row["prefix"]) == (16, 4096)]
    return [target("ours over per request, B=16 P=4096", 3.0, cells[0].get("speedup") if cells else None)]


def _line(row: dict[str, Any]) -> str:
    share = "" if row["share_of_ceiling"] is None else f"; {row['share_of_ceiling']:.0%} of x {row['ceiling']:.2f}"
    cells = {name: cell for name, cell in row["contenders"].items() if cell.get("failed") != "needs a GPU"}
    copied = "" if row["shared"] else "; copied: sharing would not pay"
    return f"{_cell(row)}: {comparison(cells)}{share}{copied}"


def _cell(row: dict[str, Any]) -> str:
    groups = "" if row["groups"] == 1 else f" in {row['groups']} groups"
    return f"B={row['batch']:<2} P={row['prefix']:<5}{groups}"
