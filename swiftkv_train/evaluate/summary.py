"""The closing table of an evaluation, and what to do next with the checkpoint."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def _tasks_table(tasks: dict[str, Any]) -> Table:
    table = Table(title="tasks, differences in points", title_justify="left")
    for column in ("task", "questions", "chance", "base", "SwiftKV", "difference", "± standard error"):
        table.add_column(column, justify="left" if column == "task" else "right")
    average = tasks["average"]
    rows = [(row["task"], f"{row['questions']:,}", f"{row['chance']:.1%}", row) for row in tasks["rows"]]
    if average:
        rows.append((f"average of {average['tasks']} above chance", "", "", average))
    for name, questions, chance, row in rows:
        table.add_row(
            name,
            questions,
            chance,
            f"{row['base']:.1%}",
            f"{row['student']:.1%}",
            f"{100 * row['difference']:+.1f}",
            f"{100 * row['standard_error']:.1f}",
        )
    return table


def print_summary(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    quality = Table(title="held-out quality", title_justify="left")
    for column in ("text", "kind trained on", "KL", "agreement", "perplexity base", "SwiftKV", "ratio"):
        quality.add_column(column, justify="left" if column == "text" else "right")
    rows = list(result["sources"].items())
    if result["held_out"]:
        rows.append(("all kinds trained on", {**result["held_out"], "kind_trained_on": True}))
    for name, row in rows:
        quality.add_row(
            name,
            "yes" if row["kind_trained_on"] else "no",
            f"{row['kl']:.3f}",
            f"{row['agreement']:.1%}",
            f"{row['base_perplexity']:.2f}",
            f"{row['student_perplexity']:.2f}",
            f"{row['perplexity_ratio']:.3f}",
        )
    console.print(quality)
    speed = Table(title="speed and memory", title_justify="left")
    for column in ("", "base", "SwiftKV", "ratio"):
        speed.add_column(column, justify="left" if not column else "right")
    for row in result["time_to_first_token"]:
        speed.add_row(
            f"first token after {row['prompt_tokens']} tokens",
            f"{row['base_seconds'] * 1e3:.0f} ms",
            f"{row['student_seconds'] * 1e3:.0f} ms",
            f"{row['ratio']:.2f}",
        )
    cache = result["cache_bytes_per_token"]
    ratio = cache["student"] / cache["base"]
    speed.add_row("K/V bytes per token", f"{cache['base']:,.0f}", f"{cache['student']:,.0f}", f"{ratio:.2f}")
    console.print(speed)
    if result["tasks"]:
        console.print(_tasks_table(result["tasks"]))
    for row in result["generations"]:
        console.print(f"\n{row['prompt']}", markup=False, style="bold")
        console.print(f"  base     {' '.join(row['base'].split())}", markup=False)
        console.print(f"  SwiftKV  {' '.join(row['student'].split())}", markup=False)
    checkpoint = result["checkpoint"]
    console.print("\nUse the checkpoint:", style="bold")
    for command in (
        f'swiftkv chat {checkpoint} --prompt "Why is the sky blue?"',
        f"swiftkv chat {checkpoint}",
        f"swiftkv serve {checkpoint}",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)
