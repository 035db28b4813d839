"""Benchmarks: every figure is a ratio of two things measured in one run on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from swiftkv_train.errors import UserError


def finish(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Print a result, and write it to `output` if there is one."""
    text = json.dumps(result, indent=2)
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    if as_json:
        print(text)
        return
    console = Console(highlight=False)
    console.print(f"[bold]{result['benchmark']}[/bold]")
    for line in result["summary"]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """The numbers of a command line's list. Raises UserError unless they look like `example`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} must look like {example}") from None
