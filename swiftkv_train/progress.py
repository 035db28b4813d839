"""What a long run shows: bars with rate and time left on a terminal, plain lines now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from swiftkv_train.calibrate import LayerFit
    from swiftkv_train.quality import Quality

PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal


class Reporter:
    """Writes to standard error, so that `--json` output stays clean; says nothing when not enabled."""

    def __init__(self, *, enabled: bool = True):
        self.enabled = enabled
        self.console = Console(stderr=True, highlight=False, quiet=not enabled)

    def line(self, text: str) -> None:
        with suppress(OSError):  # a log file on a full disk must not end a run
            self.console.print(text, soft_wrap=True, markup=False)

    def table(self, table: Table) -> None:
        with suppress(OSError):
            self.console.print(table)

    @contextmanager
    def bar(self, task: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Progress towards `total` units; call the result with the units just done."""
        started = time.perf_counter()
        done = 0
        if not self.console.is_terminal:
            yield lambda amount: None
            self.line(f"{task:<11} {total:,} {unit} in {time.perf_counter() - started:.1f} s")
            return
        with _progress(self.console, TextColumn("{task.fields[rate]}")) as progress:
            handle = progress.add_task(task, total=total, rate="")

            def advance(amount: int) -> None:
                nonlocal done
                done += amount
                rate = done / (time.perf_counter() - started)
                progress.update(handle, advance=amount, rate=f"{rate:,.0f} {unit}/s")

            yield advance

    @contextmanager
    def training(self, steps: int, first: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Progress over optimizer steps; call the result with the row of every step."""
        started = last = time.perf_counter()

        if not self.console.is_terminal:

            def write(row: dict[str, Any]) -> None:
                nonlocal last
                now = time.perf_counter()
                if now - last > PLAIN_INTERVAL or row["step"] in (first + 1, steps):
                    last = now
                    left = timedelta(seconds=round((now - started) / (row["step"] - first) * (steps - row["step"])))
                    self.line(f"distil      step {row['step']}/{steps}  {step_figures(row)}  {left} left")

            yield write
            return
        with _progress(self.console, MofNCompleteColumn(), TextColumn("{task.fields[status]}")) as progress:
            handle = progress.add_task("distil", total=steps, completed=first, status="")
            yield lambda row: progress.update(handle, completed=row["step"], status=step_figures(row))

    def tokenising(self, source: str, documents: int, tokens: int, *, goes_on: bool = False) -> None:
        verb, so_far = ("tokenising", " so far") if goes_on else ("tokenised ", "")
        self.line(f"{verb}  {source}: {documents:,} documents, {tokens:,} tokens{so_far}")

    def data(self, sources: list[dict[str, Any]]) -> None:
        for source in sources:
            self.line(
                f"data        {source['name']}: {source['documents']:,} documents, {source['tokens']:,} tokens, "
                f"{source['target_tokens']:,} with loss, {source['packing_efficiency']:.1%} packed, "
                f"share {source['share']:.0%}"
            )

    def fits(self, fits: list[LayerFit]) -> None:
        self.line("calibrated  R² of the fit of every tail layer's keys and values:")
        table = Table()
        table.add_column("layer", justify="right")
        table.add_column("keys", justify="right")
        table.add_column("values", justify="right")
        for fit in fits:
            table.add_row(str(fit.layer), f"{fit.r2_keys:.3f}", f"{fit.r2_values:.3f}")
        self.table(table)

    def quality(self, step: int, found: dict[str, Quality]) -> None:
        for name, quality in found.items():
            self.line(
                f"held out    step {step}, {name}: KL {quality.kl:.4f}, agreement {quality.agreement:.1%}, "
                f"perplexity {quality.student_perplexity:.2f} against {quality.base_perplexity:.2f} "
                f"(x {quality.perplexity_ratio:.3f})"
            )


def step_figures(row: dict[str, Any]) -> str:
    """Loss, gradient norm, rate and, where it is known, MFU of a step."""
    norm = "overflow" if row["grad_norm"] is None else f"{row['grad_norm']:.3g}"
    figures = [f"loss {row['loss']:.4f}", f"grad norm {norm}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in row:
        figures.append(f"MFU {row['mfu']:.1%}")
    return "  ".join(figures)


def _progress(console: Console, *columns: Any) -> Progress:
    return Progress(
        TextColumn("{task.description:<11}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=False,
    )
