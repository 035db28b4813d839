"""Trackers beside metrics.jsonl: Weights & Biases and TensorBoard, for runs whose recipe asks for them.

One that cannot start ends the run before any work is done. One that fails later is dropped with a warning and the run
goes on: metrics.jsonl has every figure.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from swiftkv_train.durable import write_text
from swiftkv_train.errors import UserError
from swiftkv_train.loading import one_line
from swiftkv_train.recipe import Recipe, WandbSection
from swiftkv_train.stopping import Stopped

FINISH_TIMEOUT = 600.0  # seconds that a run which is done waits for wandb to upload; `wandb sync` sends the rest


class Tracker(Protocol):
    name: str

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class WandbTracker:
    """A Weights & Biases run, the same one when the run is resumed: its id is kept in RUN/wandb/id.

    wandb's own step may only rise, and a run that was killed is resumed some steps before the last one logged. So the
    step is a figure like the others and the axis they are drawn over; steps that are logged twice coincide.
    """

    name = "wandb"

    def __init__(self, section: WandbSection, recipe: Recipe, directory: Path):
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb needs wandb: pip install 'swiftkv-train[wandb]'") from None
        try:
            self._run = wandb.init(
                project=section.project,
                name=section.name,
                mode=section.mode,
                id=_wandb_id(directory),
                resume="allow" if section.mode == "online" else None,  # offline the same id is enough
                dir=str(directory),
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(finish_timeout=FINISH_TIMEOUT),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            hint = "" if section.mode == "offline" else "; run `wandb login`, or set logging.wandb.mode=offline"
            raise UserError(f"logging.wandb does not start: {one_line(error).rstrip('.')}{hint}") from None

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log({"step": step, **figures})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TensorboardTracker:
    """Event files in RUN/tensorboard. What an earlier process logged after `resumed_step` is hidden."""

    name = "tensorboard"

    def __init__(self, directory: Path, resumed_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("logging.tensorboard needs tensorboard: pip install 'swiftkv-train[tensorboard]'") from None
        purge = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge, flush_secs=10)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Trackers:
    def __init__(self, warn: Callable[[str], None]):
        self.open: list[Tracker] = []
        self._warn = warn

    def log(self, row: dict[str, Any]) -> None:
        """Pass a row of metrics.jsonl on."""
        figures = flatten(row)
        self._each(lambda tracker: tracker.log(figures, row["step"]))

    def close(self, *, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed=failed))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self.open):
            try:
                act(tracker)
            except Exception as error:
                self.open.remove(tracker)
                self._warn(
                    f"warning     {tracker.name} failed ({one_line(error)}) and is left; metrics.jsonl has every figure"
                )


@contextmanager
def open_trackers(
    recipe: Recipe, directory: Path, *, resumed_step: int | None, enabled: bool, warn: Callable[[str], None]
) -> Iterator[Trackers]:
    """The trackers of a recipe; none when not `enabled`. Raises UserError when one cannot start.

    resumed_step: of the checkpoint that the run goes on from.
    """
    trackers = Trackers(warn)
    try:
        if enabled and recipe.logging.tensorboard:
            trackers.open.append(TensorboardTracker(directory, resumed_step))
        if enabled and recipe.logging.wandb is not None:
            trackers.open.append(WandbTracker(recipe.logging.wandb, recipe, directory))
        yield trackers
    except BaseException as error:
        trackers.close(failed=not isinstance(error, Stopped | KeyboardInterrupt))
        raise
    trackers.close(failed=False)


def flatten(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a row under one name each (`held_out/SOURCE/kl`), without its step and what it has none of."""
    figures = {key: value for key, value in row.items() if key not in ("step", "held_out") and value is not None}
    for source, quality in row.get("held_out", {}).items():
        figures |= {f"held_out/{source}/{key}": value for key, value in quality.items()}
    return figures


def _wandb_id(directory: Path) -> str:
    file = directory / "wandb/id"
    known = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        file.parent.mkdir(exist_ok=True)
        write_text(file, known)
    return known
