"""Several ways to do the same thing, timed in turns in one process, so that all meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from swiftkv_train.bench import whole_numbers
from swiftkv_train.errors import UserError
from swiftkv_train.loading import one_line
from swiftkv_train.machine import synchronize

OURS = "ours"
Cell = dict[str, Any]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def in_turns(
    works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, *, must_run: str = OURS
) -> dict[str, Cell]:
    """Of each `seconds`, the median, and `all_seconds`; or `failed`, why it cannot run, which `must_run` has to.

    A first turn of each is not counted: it meets cold memory, and compiles.
    """
    cells: dict[str, Cell] = {name: {"all_seconds": []} for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            if "failed" in cells[name]:
                continue
            try:
                elapsed = seconds_of(work, device)
            except Exception as error:  # whatever a library raises on a device, version or size that is not for it
                if name == must_run:
                    raise
                cells[name] = {"failed": reason(error)}
                continue
            if turn:
                cells[name]["all_seconds"].append(elapsed)
    for cell in cells.values():
        if "failed" not in cell:
            cell["seconds"] = statistics.median(cell["all_seconds"])
    return cells


def compare(cells: Mapping[str, Cell], ours: str = OURS) -> None:
    """Add how many times as fast ours is as each of the others, and its share of their peak, where they have one."""
    mine = cells[ours]
    for name, cell in cells.items():
        if name == ours or "failed" in cell:
            continue
        cell["speedup"] = cell["seconds"] / mine["seconds"]
        if "peak_bytes" in cell and "peak_bytes" in mine:
            cell["peak_ratio"] = mine["peak_bytes"] / max(cell["peak_bytes"], 1)


def comparison(cells: Mapping[str, Cell], ours: str = OURS) -> str:
    """One line of ours against each of the others, losses named."""
    mine = cells[ours]["seconds"] * 1e3
    parts = []
    for name, cell in cells.items():
        if "failed" in cell:
            parts.append(f"{name} not measured ({cell['failed']})")
        elif name != ours:
            slower = ", SLOWER" if cell["speedup"] < 1 else ""
            parts.append(f"{name} {cell['seconds'] * 1e3:,.3g} ms (x {cell['speedup']:.2f}{slower})")
    return f"{ours} {mine:,.3g} ms against " + "; ".join(parts) if parts else f"{ours} {mine:,.3g} ms"


def target(what: str, wanted: float, found: float | None) -> Cell:
    """A figure that was to be reached: at least `wanted`. `found` is None where it was not measured."""
    return {"what": what, "wanted": wanted, "found": found, "reached": found is not None and found >= wanted}


def target_lines(targets: Sequence[Cell]) -> list[str]:
    lines = []
    for row in targets:
        verdict = "reached" if row["reached"] else "MISSED"
        if row["found"] is not None:
            lines.append(f"target {row['what']}: x {row['wanted']} wanted, x {row['found']:.2f} found, {verdict}")
    return lines


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def numbers_from(option: str, text: str, least: int, example: str) -> list[int]:
    """The numbers of a command line's list, in order, each once. Raises UserError below `least`."""
    numbers = whole_numbers(option, text, example)
    if min(numbers) < least:
        raise UserError(f"{option} {text!r}: every number must be at least {least}")
    return sorted(set(numbers))
