"""Leaving checkpoints and going on from one, for all processes of a run together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from swiftkv_train.errors import RunError, UserError
from swiftkv_train.loading import one_line
from swiftkv_train.machine import device_name
from swiftkv_train.origin import content_changes, content_origin, recipe_changes, recipe_origin, refuse
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe
from swiftkv_train.run_directory import CANNOT_WRITE, MOMENTS, WEIGHTS, Checkpoint, RunDirectory, save_tensors
from swiftkv_train.stopping import Stop
from swiftkv_train.strategies import DataParallel
from swiftkv_train.student import load_trained

if TYPE_CHECKING:
    from accelerate import Accelerator

    from swiftkv_models import LlamaSwiftKVForCausalLM
    from swiftkv_train.data import TokenizedSource, TrainingData
    from swiftkv_train.divergence import Divergence

T = TypeVar("T")
# How long the last checkpoint waits for room on a full disk: all that was done since the one before would be lost.
SAVE_TRIES, SECONDS_BETWEEN_TRIES = 10, 30


def on_main(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """What `find` gives on the main process, on every process; its UserError is raised on every process."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = find()
        except UserError as error:
            found[1] = str(error)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
        # Until its thread is done with the broadcast, torch hangs in a process that ends.
        accelerator.wait_for_everyone()
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


class Checkpointer:
    """The checkpoints of one run. Every process calls its methods at the same points; the main one reads and writes.

    Nothing in training is random but the order of the data, which follows from the step: so weights, the optimizer's
    moments, the step and fp16's loss scale are all that a run needs to go on exactly.

    Raises UserError when there is no place for a new run, or nothing that can be resumed.
    """

    def __init__(
        self, recipe: Recipe, strategy: DataParallel, report: Reporter, *, resume: bool, allow_changed: bool
    ) -> None:
        self.recipe, self.strategy, self.report, self.allow_changed = recipe, strategy, report, allow_changed
        self.accelerator = strategy.accelerator
        self.run = RunDirectory(recipe.training.output_dir)
        self.resumed = on_main(self.accelerator, self._find if resume else self._create)
        self.saved = self.resumed.step if self.resumed else None  # step of the newest whole checkpoint

    def _create(self) -> None:
        RunDirectory.create(self.run.path, self.recipe)

    def _find(self) -> Checkpoint | None:
        if not self.run.checkpoints():
            RunDirectory.create(self.run.path, self.recipe, restart=True)
            self.report.line(f"resumed     {self.run.path} holds no checkpoint yet: from the beginning")
            return None
        checkpoint = self.run.last_checkpoint(self.report.line)
        before = checkpoint.progress["recipe"]
        if (its := before["training.optimizer"]) != (wanted := self.recipe.training.optimizer):
            raise UserError(
                f"{checkpoint.path} holds the state of training.optimizer {its}, not of {wanted}; restore that"
            )
        changes = recipe_changes(before, recipe_origin(self.recipe))
        self._judge(checkpoint, changes)
        return checkpoint

    def _judge(self, checkpoint: Checkpoint, changes: list[str]) -> None:
        if changes and not self.allow_changed:
            raise refuse(checkpoint.path, changes)
        for change in changes:
            self.report.line(f"changed     {change}")

    def compare(self, data: TrainingData, held_out: list[TokenizedSource]) -> None:
        """Note what the run is made from. Raises UserError when the checkpoint was made from something else."""

        def find() -> dict[str, Any]:
            content = content_origin(self.recipe.model, data, held_out)
            if self.resumed is not None:
                self._judge(self.resumed, content_changes(self.resumed.progress["content"], content))
            return {"recipe": recipe_origin(self.recipe), "content": content}

        self._origin = on_main(self.accelerator, find)

    def load_weights(self, checkpoint: Checkpoint, model: LlamaSwiftKVForCausalLM) -> None:
        """Put the checkpoint's trained tensors into `model`, whose own must be fp32 already to take them exactly."""
        load_trained(model, checkpoint.weights(), str(checkpoint.path))
        left = self.recipe.training.steps - checkpoint.step
        self.report.line(f"resumed     {checkpoint.path}, {left} steps left")
        if changes := recipe_changes(checkpoint.progress["machine"], self._machine()):
            self.report.line(f"resumed     elsewhere, so later figures differ in their rounding: {'; '.join(changes)}")

    def load_optimizer(self, checkpoint: Checkpoint) -> None:
        """Put back the optimizer's state, and drop from the run what came after the checkpoint."""
        self.strategy.restore_optimizer(checkpoint.optimizer_state())
        if self.accelerator.scaler is not None and checkpoint.progress["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.progress["scaler"])
        on_main(self.accelerator, lambda: self.run.rewind(checkpoint, self.recipe))

    def save(self, step: int, divergence: Divergence) -> bool:
        """Write the checkpoint of `step`, if it is not there. False, with a warning, when the disk refuses it."""
        if self.saved == step:
            return True
        # Putting tensors together takes every process.
        tensors = {WEIGHTS: self.strategy.tail_tensors(), MOMENTS: self.strategy.optimizer_tensors()}
        refusal = on_main(self.accelerator, lambda: self._write(step, divergence, tensors))
        if refusal is not None:
            last = "there is none before it" if self.saved is None else f"the last one is of step {self.saved}"
            self.report.line(f"warning     the checkpoint of step {step} cannot be written: {refusal}; {last}")
            return False
        self.saved = step
        return True

    def _write(self, step: int, divergence: Divergence, tensors: dict[str, dict[str, torch.Tensor]]) -> str | None:
        """What the disk says when it refuses."""
        training, scaler = self.recipe.training, self.accelerator.scaler
        progress = {
            "step": step,
            "steps": training.steps,
            **self._origin,
            "divergence": divergence.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "machine": self._machine(),
        }
        try:
            with self.run.new_checkpoint(step, progress, training.keep_last) as folder:
                for name, content in tensors.items():
                    save_tensors(content, folder / name)
        except CANNOT_WRITE as error:
            return one_line(error)
        self.report.line(f"saved       {self.run.path / 'checkpoints'}/step-{step:06d}")
        return None

    def _machine(self) -> dict[str, Any]:
        """What the rounding of a figure depends on."""
        device = self.accelerator.device
        return {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "strategy": self.recipe.distributed.strategy,
            "torch": torch.__version__,
        }

    def save_last(self, step: int, divergence: Divergence, stop: Stop) -> None:
        """`save` for the end of a run: a full disk is given time. Raises RunError when it stays full."""
        for attempt in range(SAVE_TRIES):
            if self.save(step, divergence):
                return
            if attempt == 0:
                minutes = SAVE_TRIES * SECONDS_BETWEEN_TRIES // 60
                self.report.line(f"waiting     {minutes} minutes for room on the disk")
            for _ in range(SECONDS_BETWEEN_TRIES):
                stop.check(self.accelerator)
                time.sleep(1)
        raise self.not_saved(step)

    def not_saved(self, step: int) -> RunError:
        go_on = "start again" if self.saved is None else f"go on from step {self.saved}"
        return RunError(f"step {step} of {self.run.path} is not saved; make room on the disk and {go_on} with --resume")
