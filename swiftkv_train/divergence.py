"""Stopping a run whose numbers went bad before the optimizer takes them, with the batch kept to look at.

Under ZeRO the norm of the gradients is known, and judged, only after the update; nothing of it is saved.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from swiftkv_train.loading import one_line

if TYPE_CHECKING:
    from swiftkv_train.data import Batch

WINDOW = 100  # steps whose median loss a step's is held against
FEWEST = 20  # steps before anything can be said of a median
# fp16's loss scale starts at 2^16 and is halved at every overflow: after twenty, no scale would help.
MOST_OVERFLOWS = 20


class Divergence:
    """Judges every step by its loss and gradient norm, both of all processes together, so that all stop together.

    Args:
        max_loss_ratio: a loss above this multiple of the median of the last `WINDOW` has exploded; 0: none has.
        loss_scaling: fp16, where the scaler skips steps whose gradient overflowed.
    """

    def __init__(self, max_loss_ratio: float, *, loss_scaling: bool = False):
        self.max_loss_ratio = max_loss_ratio
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.loss_scaling = loss_scaling
        self.overflows = 0  # in a row

    def state(self) -> dict[str, Any]:
        """For `restore`, as JSON."""
        return {"losses": list(self.losses), "overflows": self.overflows}

    def restore(self, state: dict[str, Any]) -> None:
        """Judge as the run did whose `state` this was."""
        self.losses.extend(state["losses"])
        self.overflows = state["overflows"]

    def loss_problem(self, loss: float) -> str | None:
        """What is wrong with a step's loss, if anything."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        median = statistics.median(self.losses) if len(self.losses) >= FEWEST else 0.0
        if self.max_loss_ratio and median > 0 and loss > self.max_loss_ratio * median:
            return (
                f"the loss is {loss:.4g}, {loss / median:.0f} times its running median "
                f"(training.max_loss_ratio is {self.max_loss_ratio:g}),"
            )
        self.losses.append(loss)
        return None

    def gradient_problem(self, norm: float) -> str | None:
        """What is wrong with the norm of a step's gradient, if anything."""
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > (MOST_OVERFLOWS if self.loss_scaling else 0):
            return f"the gradient norm is {norm}" + f" in {self.overflows} steps in a row" * self.loss_scaling
        return None


def save_failed_batch(
    directory: Path, step: int, batch: Batch, sources: list[str], figures: dict[str, float | None]
) -> str:
    """Write failed-batch-STEP.safetensors and .json; returns where they are, or why there are none.

    Args:
        batch: of all processes.
        sources: of each sequence of the batch, by name.
    """
    path = directory / f"failed-batch-{step:06d}.safetensors"
    # JSON knows no NaN and no infinity: they are told by name.
    facts: dict[str, Any] = {name: x if x is None or math.isfinite(x) else str(x) for name, x in figures.items()}
    try:
        tensors = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "loss_mask": batch.loss_mask}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
        content = json.dumps({"step": step, **facts, "sources": sources}, indent=2)
        path.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        return f"cannot be saved ({one_line(error)})"
    return f"is in {path}"
