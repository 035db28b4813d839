"""Distil a base model into its SwiftKV form: `swiftkv distill`, or `accelerate launch -m swiftkv_train.distill`.

One module is both models (`distillation_module`). Only `*_swiftkv` weights are trained, as fp32 master weights under
bf16 autocast. The loss is the sum over the loss tokens of the whole optimizer step divided by their number over all
processes and micro-batches, so that neither changes the result.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.calibrate import calibrate
from swiftkv_train.checkpointing import Checkpointer, on_main
from swiftkv_train.data import Batch, held_out_batches, load_held_out, load_training_data
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.divergence import Divergence, save_failed_batch
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.flops import device_peak, distillation_flops
from swiftkv_train.loading import compute_device, compute_dtype, describe_dtype, load_tokenizer, pad_token_id
from swiftkv_train.progress import Reporter
from swiftkv_train.quality import Quality, check_finite_quality, summarise
from swiftkv_train.quantized_base import quantize_base
from swiftkv_train.recipe import Recipe, TrainingSection
from swiftkv_train.run_state import CALIBRATION, RunLock, recorded_state
from swiftkv_train.sequence_parallel import check_heads, sequence_group, use_sequence_parallel_attention
from swiftkv_train.stopping import Stop, Stopped
from swiftkv_train.strategies import make_strategy
from swiftkv_train.student import (
    add_adapters,
    build_model,
    checkpoint_tail,
    load_exported_tail,
    trainable_parameters,
    use_training_attention,
)
from swiftkv_train.tracking import Trackers, open_trackers


def learning_rate(training: TrainingSection, step: int) -> float:
    """Linear warm-up, then from the peak to `final_learning_rate` of it by `schedule`. `step` counts from 0."""
    warmup = math.ceil(training.warmup * training.steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.schedule == "cosine":
        progress = (step - warmup) / max(1, training.steps - warmup)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        assert training.decay is not None  # set where the recipe leaves it out
        falling = min(math.floor(training.decay * training.steps), training.steps - warmup)
        height = min(1.0, (training.steps - step) / (falling + 1))
    floor = training.final_learning_rate
    return training.learning_rate * (floor + (1 - floor) * height)


class Distillation:
    """One run, from its recipe to its last checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        allow_changed: bool = False,
        quiet: bool = False,
        stop: Stop | None = None,
    ):
        from accelerate.utils import set_seed

        self.recipe, self.stop = recipe, stop or Stop()
        training = recipe.training
        if recipe.model.dtype == "float16" and compute_device().type == "cpu":
            raise UserError("model.dtype: float16 trains on a GPU only; use bfloat16 or float32")
        self.strategy = make_strategy(recipe)
        self.accelerator = self.strategy.accelerator
        self.group = sequence_group(recipe, self.accelerator)
        size = recipe.distributed.sequence_parallel
        # Which of how many shares of the sequences this process works on, together with its group.
        self.share, self.shares = self.accelerator.process_index // size, self.accelerator.num_processes // size
        if training.batch_size < self.shares:
            processes = f"{self.accelerator.num_processes} processes" + f" in groups of {size}" * (size > 1)
            raise UserError(f"training.batch_size {training.batch_size} is smaller than the {processes}")
        set_seed(training.seed)
        self.report = Reporter(enabled=self.accelerator.is_main_process and not quiet)
        self.lock = RunLock(Path(training.output_dir))
        on_main(self.accelerator, self.lock.take)
        self.checkpoints = Checkpointer(recipe, self.strategy, self.report, resume=resume, allow_changed=allow_changed)
        self.run = self.checkpoints.run
        self.step = self.checkpoints.saved or 0
        self.evaluated: set[int] = set()  # steps whose held-out figures are logged
        self.divergence = Divergence(training.max_loss_ratio, loss_scaling=recipe.model.dtype == "float16")
        self.refused = False  # whether the disk refused the last row
        self.trackers = Trackers(self.report.line)

    def prepare(self) -> None:
        """Load the model and the data, start the tail, wrap for training."""
        recipe, training, accelerator, report = self.recipe, self.recipe.training, self.accelerator, self.report
        dtype = compute_dtype(recipe.model.dtype)
        report.line(f"base        {recipe.model.base}")
        report.line(f"dtype       {describe_dtype(recipe.model.dtype, dtype)}")
        model = build_model(recipe, dtype)
        tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
        pad = pad_token_id(tokenizer)
        vocabulary = model.config.vocab_size
        check_heads(recipe, model.config)
        mistake: UserError | None = None
        with accelerator.main_process_first():  # which an error must not leave: the others wait for its end
            try:
                self.data = load_training_data(
                    recipe.data, tokenizer, vocabulary, pad, base=recipe.model, report=report
                )
                sources = load_held_out(recipe.data, tokenizer, vocabulary, base=recipe.model, report=report)
            except UserError as error:
                mistake = error
        if mistake is not None:
            raise mistake
        self.held_out = {
            source.name: held_out_batches(
                source, recipe.data.sequence_length, training.evaluate_tokens, training.micro_batch_size, pad
            )
            for source in sources
        }
        report.data(self.data.describe())
        self.checkpoints.compare(self.data, sources)

        model.requires_grad_(False)
        quantization = recipe.model.quantization
        if not (self.strategy.shards_weights or quantization):  # else a device may be too small for all of it
            model.to(accelerator.device)
        use_training_attention(model, accelerator.device)
        checkpoint = self.checkpoints.resumed
        if checkpoint is None:
            self._start_tail(model)
        if quantization:
            quantize_base(model, quantization, accelerator.device)
            model.to(accelerator.device)
        if training.lora is not None:
            add_adapters(model, training.lora)
        parameters = trainable_parameters(model)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()  # fp32 master weights; autocast makes the bf16 copies
            parameter.requires_grad_(True)
        if checkpoint is not None:
            self.checkpoints.load_weights(checkpoint, model)
        trained = sum(parameter.numel() for parameter in parameters.values())
        total = sum(parameter.numel() for parameter in model.parameters())
        report.line(f"trained     {trained:,} of {total:,} parameters ({trained / total:.1%})")
        self.config, self.peak = model.config, device_peak(accelerator.device, dtype)
        half = None if dtype == torch.float32 else dtype
        if self.group is not None:
            use_sequence_parallel_attention(model)
        self.strategy.wrap(DistillationModule(model, recipe.loss, half, self.group))
        if training.gradient_checkpointing:
            checkpoint_tail(model)
        if checkpoint is not None:
            self.checkpoints.load_optimizer(checkpoint)
            self.evaluated = {row["step"] for row in self.run.metrics.rows() if "held_out" in row}
            if state := checkpoint.progress.get("divergence"):  # one of an earlier version has none
                self.divergence.restore(state)

    def _start_tail(self, model: LlamaSwiftKVForCausalLM) -> None:
        rewriting = self.recipe.rewrite
        if rewriting.init == "checkpoint" and rewriting.init_from is not None:
            load_exported_tail(model, rewriting.init_from)
        elif rewriting.init == "calibrated" and rewriting.num_key_value_layers < model.config.num_hidden_layers:
            fits = calibrate(model, self.data, self.recipe, self.accelerator, self.report)
            self.report.fits(fits)
            if self.accelerator.is_main_process:
                self.run.write_json(CALIBRATION, [fit.to_dict() for fit in fits])

    def evaluate(self) -> dict[str, Quality]:
        """Student against base on every held-out source."""
        # DDP's own forward exchanges buffers, equally often everywhere.
        module = self.strategy.module if self.strategy.equal_forwards else self.strategy.unwrapped
        found = {}
        for name, batches in self.held_out.items():
            rows = [torch.empty(0, 4, device=self.accelerator.device)]
            with torch.no_grad():
                ranks = self.accelerator.num_processes
                mine = batches[self.accelerator.process_index :: ranks]
                for index, batch in enumerate(self._evened(mine, math.ceil(len(batches) / ranks), batches[0])):
                    if index < len(batches) // ranks:  # of which every process has one
                        self.stop.check(self.accelerator)
                    rows.append(module(*batch.model_inputs(), compare=True))
            measures = torch.cat(rows)
            if self.accelerator.num_processes > 1:
                measures = self.accelerator.gather(self.accelerator.pad_across_processes(measures, pad_index=-1.0))
                measures = measures[measures[:, 2] != -1]  # the padding; a token of nan stays
            found[name] = summarise(measures)
        return found

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next `batch_size` sequences; returns what it logs."""
        training, accelerator = self.recipe.training, self.accelerator
        batch = self.data.batch(self.step * training.batch_size, training.batch_size)
        loss_tokens = int(batch.loss_mask.sum())
        # Gradients are averaged over processes; the sum is wanted.
        scale = accelerator.num_processes / loss_tokens
        sums = torch.zeros(2, device=accelerator.device)
        mine = batch.share(self.share, self.shares).split(training.micro_batch_size)
        most = math.ceil(math.ceil(training.batch_size / self.shares) / training.micro_batch_size)
        micro_batches = self._evened(mine, most, batch)
        fewest = math.ceil(training.batch_size // self.shares / training.micro_batch_size)
        for index, micro in enumerate(micro_batches):
            if 0 < index < fewest:  # before any process exchanges gradients
                self.stop.check(accelerator)
            with self.strategy.micro_step(last=index + 1 == len(micro_batches)):
                total, kl = self.strategy.module(*micro.model_inputs())
                self.strategy.backward(total * scale)
            sums += torch.stack([total.detach(), kl])
        loss, kl = (accelerator.reduce(sums, reduction="sum") / loss_tokens).tolist()
        rate = learning_rate(training, self.step)
        self._stop_at(self.divergence.loss_problem(loss), batch, {"loss": loss, "grad_norm": None})

        def check(norm: float) -> None:
            self._stop_at(self.divergence.gradient_problem(norm), batch, {"loss": loss, "grad_norm": norm})

        norm = self.strategy.step(rate, check)
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "kl": kl,
            "learning_rate": rate,
            "grad_norm": norm if math.isfinite(norm) else None,  # an overflow of fp16, whose update is left out
            "tokens": batch.input_ids.numel(),
            "loss_tokens": loss_tokens,
            "flops": distillation_flops(
                self.config,
                tokens=int(batch.token_mask.sum()),
                pairs=int((batch.position_ids + 1)[batch.token_mask].sum()),
                loss_tokens=loss_tokens,
                lora_rank=training.lora.rank if training.lora else 0,
            ),
        }

    def _stop_at(self, problem: str | None, batch: Batch, figures: dict[str, float | None]) -> None:
        """Raises RunError when there is a problem with the step that is being made; its batch is kept."""
        if problem is None:
            return
        step, kept = self.step + 1, "is kept by the main process"
        sources = [self.data.packed[index].source.name for index in batch.source_ids.tolist()]
        if self.accelerator.is_main_process:
            kept = save_failed_batch(self.run.path, step, batch, sources, figures)
        self.accelerator.wait_for_everyone()  # the first process to end takes the others with it
        saved = self.checkpoints.saved
        again = "start again" if saved is None else f"go on from step {saved} with --resume --allow-changed"
        raise RunError(
            f"{problem} at step {step}, which is discarded; its batch (of {', '.join(sorted(set(sources)))}) {kept}: "
            f"look at it, or {again} and a lower training.learning_rate (now {self.recipe.training.learning_rate:g})"
        )

    def _evened(self, mine: list[Batch], number: int, any_batch: Batch) -> list[Batch]:
        """This process's batches on its device, filled up to `number` where all processes must run equally many."""
        if self.strategy.equal_forwards and len(mine) < number:
            mine = [*mine, any_batch.share(0, len(any_batch.input_ids)).without_loss()]
        return [batch.to(self.accelerator.device) for batch in mine]

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self._write(row)
        self.trackers.log(row)

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self.run.metrics.append(row)
        except OSError as error:
            if not self.refused:
                self.report.line(f"warning     {self.run.metrics.path} cannot be written: {error.strerror}; rows wait")
            self.refused = True
        else:
            self.refused = False

    def log_quality(self) -> None:
        """Held-out figures, where they are due and not logged yet: at the start, every `evaluate_every`, at the end."""
        training = self.recipe.training
        due = self.step in (0, training.steps) or (training.evaluate_every and self.step % training.evaluate_every == 0)
        if not self.held_out or not due or self.step in self.evaluated:
            return
        found = self.evaluate()
        if self.step == 0:  # later a loss that is not finite stops the run, and nothing is lost by a figure
            base = self.recipe.model.base
            check_finite_quality(found, base, f"{base} in SwiftKV form")
        self.report.quality(self.step, found)
        self.evaluated.add(self.step)
        self.log({"step": self.step, "held_out": {name: quality.to_dict() for name, quality in found.items()}})

    def train(self, *, calibrate_only: bool = False) -> int:
        """Run to the last step. Returns the exit status: 0, or 130 when stopped with Ctrl-C."""
        recipe, run, is_main = self.recipe, self.run, self.accelerator.is_main_process
        with (
            recorded_state(run, self.lock, enabled=is_main) as self.record,
            open_trackers(
                recipe, run.path, resumed_step=self.checkpoints.saved, enabled=is_main, warn=self.report.line
            ) as self.trackers,
        ):
            try:
                self.prepare()
                self.log_quality()
                if not calibrate_only:
                    self._steps()
                self.checkpoints.save_last(self.step, self.divergence, self.stop)
            except Stopped:
                return self._leave()
            if calibrate_only:
                self.record.ending = "calibrated"
        if not calibrate_only:
            self.report.line(f"finished    {self.step} steps; next: swiftkv export {self.run.path} --to DIR")
        return 0

    def _steps(self) -> None:
        """The steps that are left. Raises Stopped where nothing is half done."""
        training = self.recipe.training
        self.record.trained = True
        self.stop.defer()
        with self.report.training(training.steps, self.step) as advance:
            while self.step < training.steps:
                started = time.perf_counter()
                row = self.train_step()
                row["seconds"] = time.perf_counter() - started
                row["tokens_per_second"] = row["tokens"] / row["seconds"]
                if self.peak:
                    row["mfu"] = row["flops"] / row["seconds"] / (self.peak * self.accelerator.num_processes)
                advance(row)
                if self.step % training.log_every == 0 or self.step == training.steps:
                    self.log(row)
                self.log_quality()
                if self.step == training.steps:
                    break
                self.stop.check(self.accelerator)
                if training.checkpoint_every and self.step % training.checkpoint_every == 0:
                    self.checkpoints.save(self.step, self.divergence)

    def _leave(self) -> int:
        """Save what is done of a run that was asked to stop; its exit status."""
        self.record.ending = "stopped"
        if self.step == 0:
            self.report.line("stopped     before the first step; there is nothing to save")
        elif self.checkpoints.save(self.step, self.divergence):
            steps = self.recipe.training.steps
            go_on = "which is the last" if self.step == steps else "continue with --resume"
            self.report.line(f"stopped     at step {self.step} of {steps}; {go_on}")
        else:
            raise self.checkpoints.not_saved(self.step)
        return self.stop.status


def distill(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changed: bool = False,
    calibrate_only: bool = False,
    quiet: bool = False,
    stop: Stop | None = None,
) -> int:
    """Run a recipe; returns the exit status. Raises UserError and RunError (see `swiftkv_train.errors`).

    Args:
        resume: go on from the last checkpoint in `training.output_dir`.
        allow_changed: even if the recipe, the data or the base is not what it was made from.
        stop: watches for signals, which are left to the caller otherwise.
    """
    stop = stop or Stop()
    with stop.not_alone():
        distillation = Distillation(recipe, resume=resume, allow_changed=allow_changed, quiet=quiet, stop=stop)
        status = distillation.train(calibrate_only=calibrate_only)
    distillation.strategy.close()
    return status


if __name__ == "__main__":
    from swiftkv_train.cli import main as command

    command("distill")
