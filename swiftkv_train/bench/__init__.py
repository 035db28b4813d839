"""Benchmarks: every figure is a ratio of two things measured in one run on one machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from swiftkv_train.allocator import keep_freed_memory
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.results import check_target, plot_of, to_json, write_result

# What bench/plots.py has a picture of.
DRAWN = ("decode", "kv-memory", "prefill", "quality", "relay", "serve", "sinks", "stream")


def check_output(benchmark: str, output: Path) -> None:
    """Raises UserError unless --output may be written, and the plot beside it. `benchmark`: its name as a command."""

    def is_own(held: Any) -> bool:
        return isinstance(held, dict) and str(held.get("command")).split()[:3] == ["swiftkv", "bench", benchmark]

    plots = [plot_of("--output", output)] if benchmark in DRAWN else []
    check_target("--output", output, is_own, plots)


def finish(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Print a result, and write it to `output` if there is one."""
    text = to_json(result, result["command"])
    if output is not None:
        write_result("--output", output, result, result["command"])
    if as_json:
        print(text)
        return
    console = Console(highlight=False)
    console.print(f"[bold]{result['benchmark']}[/bold]")
    for line in result["summary"]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def run_script(main: Callable[[], None]) -> None:
    """`main` of a script under benchmarks/: with the allocator of the commands, and what goes wrong in a line."""
    keep_freed_memory()
    try:
        main()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """The numbers of a command line's list. Raises UserError unless they look like `example`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} must look like {example}") from None
