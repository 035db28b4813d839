"""`swiftkv runs`: the runs below a directory, what each is doing and how far it is."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swiftkv_train.errors import UserError
from swiftkv_train.loading import one_line
from swiftkv_train.metrics import Metrics
from swiftkv_train.recipe_file import load_recipe
from swiftkv_train.run_state import CHECKPOINTS, METRICS, RECIPE, STATE, checkpoint_paths, is_locked, read_json


@dataclass
class RunSummary:
    """A run as its directory shows it; None is what it does not say."""

    path: str
    state: str  # running, finished, calibrated, stopped, failed, crashed (killed), damaged or unknown
    base: str | None = None
    step: int = 0
    steps: int | None = None
    checkpoint_step: int | None = None  # where it can be resumed
    loss: float | None = None  # last logged
    held_out_kl: float | None = None  # last evaluated, mean over the tokens of all sources
    when: str | None = None  # ISO 8601, UTC: its end, or its last sign of life
    error: str | None = None


def list_runs(directory: Path) -> list[RunSummary]:
    """The runs in and below `directory`, by path. Raises UserError when that is none, or cannot be read."""
    if not os.path.isdir(directory):
        raise UserError(f"{directory} is not a directory; `swiftkv distill` makes runs in training.output_dir")
    try:
        os.listdir(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    return [summarise(path) for path in find_runs(directory)]


def find_runs(directory: Path) -> Iterator[Path]:
    """Run directories in and below `directory`. What lies inside of one is not looked at, nor are links followed."""
    for folder, names, files in os.walk(directory):
        path = Path(folder)
        if RECIPE in files and (STATE in files or METRICS in files or CHECKPOINTS in names):
            names.clear()
            yield path
        names[:] = sorted(name for name in names if not name.startswith("."))


def summarise(path: Path) -> RunSummary:
    try:
        return _summary(path)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # whatever files of an odd shape lead to: the other runs are to be seen
        problem = f"its files are not as a run leaves them ({type(error).__name__}: {one_line(error)})"
    return RunSummary(str(path), "damaged", error=problem)


def _summary(path: Path) -> RunSummary:
    recorded = _read_state(path)
    run = RunSummary(str(path), _state(path, recorded.get("state")))
    run.error = str(recorded["error"]) if run.state == "failed" and "error" in recorded else None
    recipe = load_recipe(path / RECIPE)
    run.base, run.steps = recipe.model.base, recipe.training.steps
    rows = Metrics(path / METRICS).rows()
    run.checkpoint_step = max((step for step, _ in checkpoint_paths(path / CHECKPOINTS)), default=None)
    run.step = max([run.checkpoint_step or 0, *(row["step"] for row in rows[-1:])])
    run.loss = next((_finite(row["loss"]) for row in reversed(rows) if "loss" in row), None)
    run.held_out_kl = next((_pooled_kl(row["held_out"]) for row in reversed(rows) if "held_out" in row), None)
    ended = recorded.get("ended") if run.state == recorded.get("state") else None
    run.when = datetime.fromisoformat(ended).isoformat() if ended else _last_change(path)
    return run


def _state(path: Path, recorded: str | None) -> str:
    """A lock that is held is a process that lives; a run that was running and holds none was killed."""
    locked = is_locked(path)
    if locked:
        return "running"
    if recorded == "running":
        return "unknown" if locked is None else "crashed"
    return str(recorded or "unknown")


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path / STATE, default={})
    if not isinstance(state, dict):
        raise UserError(f"{path / STATE} is damaged; remove it")
    return state


def _finite(figure: Any) -> float | None:
    return None if figure is None or not math.isfinite(figure) else float(figure)


def _pooled_kl(sources: dict[str, dict[str, Any]]) -> float | None:
    """None where a source's is not finite."""
    figures = [(_finite(row["kl"]), row["tokens"]) for row in sources.values()]
    known = [(kl, tokens) for kl, tokens in figures if kl is not None]
    return sum(kl * n for kl, n in known) / sum(n for _, n in known) if len(known) == len(figures) else None


def _last_change(path: Path) -> str:
    times = [file.stat().st_mtime for name in (RECIPE, METRICS, STATE) if (file := path / name).exists()]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds")


def to_json(runs: list[RunSummary]) -> list[dict[str, Any]]:
    return [asdict(run) for run in runs]


def print_runs(runs: list[RunSummary], directory: Path) -> None:
    # Without a terminal nobody sees where a line ends: paths stay whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 400)
    if not runs:
        console.print(f"no runs in {directory}", markup=False)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("run", "base"):
        table.add_column(column, overflow="fold")
    for column in ("state", "step", "loss", "held-out KL", "when"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "held-out KL")
    for run in runs:
        table.add_row(
            *(Text(_printable(text)) for text in (run.path, run.base or "", run.state)),
            "" if run.steps is None else f"{run.step}/{run.steps}",
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.held_out_kl is None else f"{run.held_out_kl:.4f}",
            "" if run.when is None else f"{datetime.fromisoformat(run.when).astimezone():%Y-%m-%d %H:%M}",
        )
    console.print(table)
    for run in runs:
        if run.error:
            console.print(_printable(f"{run.path}: {run.error}"), markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """In one line, names that are not UTF-8 too."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split("\n"))
