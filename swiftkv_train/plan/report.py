"""A plan as tables, and the closing line about whether it fits."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from swiftkv_train.plan.advice import RESERVED
from swiftkv_train.plan.layers import budget_table, tables

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss_chunk": "loss chunk",
    "communication": "communication",
}


def print_plan(plan: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(_training(plan))
    console.print(_memory(plan["memory"]))
    console.print(_inference(plan["inference"]))
    if "layers" in plan:
        print_layers(plan["layers"])


def print_layers(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for table in tables(result):
        console.print(table)
    if "within_budget" in result:
        print_budget(result["within_budget"])


def print_budget(found: dict[str, Any]) -> None:
    Console(highlight=False).print(budget_table(found))


def _training(plan: dict[str, Any]) -> Table:
    parameters, training = plan["parameters"], plan["training"]
    total = parameters["trained"] + parameters["frozen"]
    layers, first = plan["num_hidden_layers"], plan["num_key_value_layers"]
    sizes = [len(group) for group in plan["key_value_groups"] or []] or [plan["key_value_group_size"]]
    groups = ", ".join(map(str, sizes))
    table = _table(f"{plan['base']}: {first} of {layers} layers for prompts, groups of {groups}")
    table.add_column("training")
    table.add_column("", justify="right")
    table.add_row("parameters trained", f"{parameters['trained']:,} ({parameters['trained'] / total:.1%})")
    table.add_row("parameters frozen", f"{parameters['frozen']:,}")
    table.add_row("steps", f"{training['steps']:,}")
    table.add_row("tokens per step", f"{training['tokens_per_step']:,}")
    table.add_row("tokens", f"{training['tokens']:,}")
    table.add_row("FLOPs per token", _count(training["flops_per_token"]))
    table.add_row("FLOPs", _count(training["flops"]))
    return table


def _memory(memory: dict[str, Any]) -> Table:
    on = "GPU" if memory["device"] == "cuda" else "process"
    processes = memory["processes"]
    shared = f", {memory['strategy']} over {processes} processes" if processes > 1 else ""
    table = _table(f"memory per {on}{shared}, micro-batches of {memory['micro_batch_size']}")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for key, name in PARTS.items():
        if memory["bytes"][key]:
            table.add_row(name, size(memory["bytes"][key]))
    table.add_section()
    table.add_row("peak of a step (not all meet)", size(memory["bytes"]["step"]))
    if memory["bytes"]["evaluation"]:
        table.add_row("peak of an evaluation", size(memory["bytes"]["evaluation"]))
    if memory["bytes"]["calibration"]:
        table.add_row("peak of the calibration", size(memory["bytes"]["calibration"]))
    return table


def _inference(inference: dict[str, Any]) -> Table:
    table = _table(f"inference, per token at a context of {inference['context']:,} tokens")
    for column in ("", "base", "SwiftKV", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for key, name, shown in (
        ("cache_bytes_per_token", "K/V bytes", lambda value: f"{value:,}"),
        ("prefill_flops_per_token", "FLOPs of a prompt token", _count),
        ("decode_flops_per_token", "FLOPs of a generated token", _count),
    ):
        base, swiftkv = inference[key]["base"], inference[key]["swiftkv"]
        table.add_row(name, shown(base), shown(swiftkv), f"{swiftkv / base:.3f}")
    return table


def verdict(plan: dict[str, Any]) -> str:
    """Whether the run fits into `plan["fit"]["gpu_memory"]`, in one line, and if not what to change."""
    fit, peak = plan["fit"], plan["memory"]["bytes"]["peak"]
    room = f"{size(fit['gpu_memory'])} less {size(RESERVED)} for CUDA itself"
    if fit["fits"]:
        return f"fits: {size(peak)} of {room}"
    if "change" not in fit:
        return f"does not fit: {size(peak)} of {room}; no settings that `swiftkv plan` tries make it fit"
    change = fit["change"]
    return f"does not fit: {size(peak)} of {room}; {' '.join(change['settings'])} fits with {size(change['peak'])}"


def size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _count(value: float) -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}"
    return f"{value:,.0f} "


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")
