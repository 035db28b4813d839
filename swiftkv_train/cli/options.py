"""What the commands share: arguments, options, and how they speak."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value overrides, for instance training.steps=200.", show_default=False),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16; auto: as stored, or float32 where the processor multiplies no such "
        "numbers and memory for it is free."
    ),
]
PrefillBudget = Annotated[
    float | None,
    typer.Option(help="With --layers: which forms leave at most this share of the base's prefill, 0.6 for instance."),
]
KVBudget = Annotated[
    float | None,
    typer.Option(help="With --layers: which forms leave at most this share of the base's K/V bytes."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def example(command: str) -> str:
    return f"Example: `{command}`"


def print_json(result: Any) -> None:
    from swiftkv_train.results import to_json

    print(to_json(result, "--json"))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
