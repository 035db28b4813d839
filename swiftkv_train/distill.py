"""Distil a base model into its SwiftKV form: `swiftkv distill`, or `accelerate launch -m swiftkv_train.distill`.

One module is both models. A step runs the trunk once and the base's tail without gradient, the student's tail with
gradient, and forms the KL and its gradient in the forward (`swiftkv_kernels.distillation_kl`). Only `*_swiftkv` weights
are trained, as fp32 master weights under bf16 autocast. The loss is the sum over the loss tokens of the whole optimizer
step divided by their number over all processes and micro-batches, so that neither changes the result.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swiftkv_kernels import distillation_kl
from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.calibrate import LayerFit, accumulate_moments, solve
from swiftkv_train.data import Batch, TrainingData, held_out_batches, load_held_out, load_training_data
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.loading import load_tokenizer, pad_token_id
from swiftkv_train.progress import Reporter
from swiftkv_train.quality import Quality, summarise, token_measures
from swiftkv_train.recipe import LossSection, Recipe, TrainingSection
from swiftkv_train.run_directory import RunDirectory, optimizer_tensors, restore_optimizer
from swiftkv_train.stopping import Stop
from swiftkv_train.student import (
    build_model,
    load_exported_tail,
    load_trained,
    trainable_parameters,
    use_training_attention,
)
from swiftkv_train.tracking import wandb_run

if TYPE_CHECKING:
    from accelerate import Accelerator


class DistillationModule(nn.Module):
    """Base and student as one module whose forward is the loss; ZeRO-3 and FSDP shard it, so all reading is inside."""

    def __init__(self, model: LlamaSwiftKVForCausalLM, loss: LossSection):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the True positions of `loss_mask` [B, T]: the loss, and its KL part (T^2-scaled, detached)."""
        decoder = self.model.model
        with torch.no_grad():
            trunk = decoder.run_trunk(input_ids, position_ids=position_ids, use_cache=False)
            base = decoder.run_tail(trunk, base=True)
        student = decoder.run_tail(trunk)
        kl = distillation_kl(
            student.last_hidden_state[loss_mask],
            base.last_hidden_state[loss_mask],
            self.model.lm_head.weight,
            temperature=self.loss.temperature,
        )
        total = kl
        if self.loss.hidden_mse:
            difference = (student.last_layer_input - base.last_layer_input)[loss_mask].float()
            total = total + self.loss.hidden_mse * difference.square().mean(-1).sum()
        return total, kl.detach()

    @torch.no_grad()
    def compare(self, batch: Batch) -> torch.Tensor:
        """`token_measures` [N, 4] of the loss positions of `batch`."""
        decoder = self.model.model
        trunk = decoder.run_trunk(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        mask = batch.loss_mask
        base = decoder.run_tail(trunk, base=True).last_hidden_state[mask]
        student = decoder.run_tail(trunk).last_hidden_state[mask]
        next_ids = batch.input_ids.roll(-1, dims=1)[mask]
        head = self.model.lm_head
        rows = [
            token_measures(head(student[part]), head(base[part]), next_ids[part])
            for part in torch.arange(len(next_ids), device=mask.device).split(256)
        ]
        return torch.cat(rows) if rows else torch.empty(0, 4, device=mask.device)


def learning_rate(training: TrainingSection, step: int) -> float:
    """Linear warm-up, then a cosine from the peak to `final_learning_rate` of it. `step` counts from 0."""
    warmup = math.ceil(training.warmup * training.steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, training.steps - warmup)
    floor = training.final_learning_rate
    return training.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def calibrate(
    model: LlamaSwiftKVForCausalLM, data: TrainingData, recipe: Recipe, accelerator: Accelerator, report: Reporter
) -> list[LayerFit]:
    """Set the tail's K/V projections to their closed-form start, every process reading its share of the tokens."""
    length, rows = recipe.data.sequence_length, recipe.training.micro_batch_size
    sequences = max(1, recipe.calibration.tokens // length)
    ranks = accelerator.num_processes
    mine = [index for index in range(sequences) if index % ranks == accelerator.process_index]

    def batches() -> Iterator[Batch]:
        for start in range(0, len(mine), rows):
            yield data.batch_of(mine[start : start + rows])

    with report.bar("calibrate", total=len(mine) * length, unit="tokens") as advance:
        moments = accumulate_moments(model, batches(), advance)
    if ranks > 1:
        for tensor in moments.tensors():
            tensor.copy_(accelerator.reduce(tensor, reduction="sum"))
    try:
        return solve(model, moments, recipe.calibration.ridge)
    except torch.linalg.LinAlgError:
        raise UserError(
            f"calibration: {int(moments.tokens)} tokens do not determine the fit at ridge "
            f"{recipe.calibration.ridge}; raise calibration.tokens or calibration.ridge"
        ) from None


class Distillation:
    """One run, from its recipe to its last checkpoint."""

    def __init__(self, recipe: Recipe, *, resume: bool = False, quiet: bool = False):
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        self.recipe, self.resume = recipe, resume
        training = recipe.training
        precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}[recipe.model.dtype]
        self.accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
        if precision == "fp16" and self.accelerator.device.type == "cpu":
            raise UserError("model.dtype: float16 trains on a GPU only; use bfloat16 or float32")
        if training.batch_size < self.accelerator.num_processes:
            processes = self.accelerator.num_processes
            raise UserError(f"training.batch_size {training.batch_size} is smaller than the {processes} processes")
        set_seed(training.seed)
        self.report = Reporter(enabled=self.accelerator.is_main_process and not quiet)
        self.run = self._open_run()
        self.tracker: Any = None

    def _open_run(self) -> RunDirectory:
        """Main process makes or checks the directory; the others wait and then look."""
        output = self.recipe.training.output_dir
        if self.resume:
            run = RunDirectory.open(output)
            run.check_same_recipe(self.recipe)
            run.last_checkpoint()
        else:
            failure: list[str | None] = [None]
            if self.accelerator.is_main_process:
                try:
                    RunDirectory.create(output, self.recipe)
                except UserError as error:
                    failure = [str(error)]
            if self.accelerator.num_processes > 1:
                from accelerate.utils import broadcast_object_list

                broadcast_object_list(failure)
            if failure[0]:
                raise UserError(failure[0])
            run = RunDirectory.open(output)
        return run

    def prepare(self) -> None:
        """Load the model and the data, start the tail, wrap for training."""
        recipe, training, accelerator, report = self.recipe, self.recipe.training, self.accelerator, self.report
        report.line(f"base        {recipe.model.base}")
        model = build_model(recipe)
        tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
        pad = pad_token_id(tokenizer)
        vocabulary = model.config.vocab_size
        with accelerator.main_process_first():
            self.data = load_training_data(recipe.data, tokenizer, vocabulary, pad, progress=report.tokenising)
            sources = load_held_out(recipe.data, tokenizer, vocabulary)
        self.held_out = {
            source.name: held_out_batches(
                source, recipe.data.sequence_length, training.evaluate_tokens, training.micro_batch_size, pad
            )
            for source in sources
        }
        report.data(self.data.describe())

        model.requires_grad_(False)
        model.to(accelerator.device)
        use_training_attention(model)
        checkpoint = self.run.last_checkpoint() if self.resume else None
        if checkpoint is None:
            self._start_tail(model)
        else:
            load_trained(model, checkpoint.weights(), str(checkpoint.path))
            if checkpoint.progress["data_fingerprint"] != self.data.fingerprint:
                raise UserError(f"the training data changed since {checkpoint.path} was written; it cannot be resumed")
            report.line(f"resumed     {checkpoint.path}, {training.steps - checkpoint.step} steps left")
        parameters = trainable_parameters(model)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()  # fp32 master weights; autocast makes the bf16 copies
            parameter.requires_grad_(True)
        trained = sum(parameter.numel() for parameter in parameters.values())
        total = sum(parameter.numel() for parameter in model.parameters())
        report.line(f"trained     {trained:,} of {total:,} parameters ({trained / total:.1%})")
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=training.learning_rate, betas=training.betas, weight_decay=training.weight_decay
        )
        self.step = 0
        self.evaluated: set[int] = set()  # steps whose held-out figures are logged
        if checkpoint is not None:
            self.step = checkpoint.step
            self.evaluated = {
                row["step"] for row in self.run.metrics() if "held_out" in row and row["step"] <= self.step
            }
            restore_optimizer(self.optimizer, parameters, checkpoint.optimizer_state())
            if accelerator.is_main_process:
                self.run.trim_metrics(self.step)
        self.module: Any
        self.module, self.optimizer = accelerator.prepare(DistillationModule(model, recipe.loss), self.optimizer)
        self.module.eval()  # no dropout: base and student must see the same network

    def _start_tail(self, model: LlamaSwiftKVForCausalLM) -> None:
        rewriting = self.recipe.rewrite
        if rewriting.init == "checkpoint" and rewriting.init_from is not None:
            load_exported_tail(model, rewriting.init_from)
        elif rewriting.init == "calibrated" and rewriting.num_key_value_layers < model.config.num_hidden_layers:
            fits = calibrate(model, self.data, self.recipe, self.accelerator, self.report)
            self.report.fits(fits)
            if self.accelerator.is_main_process:
                self.run.write_json("calibration.json", [fit.to_dict() for fit in fits])

    def evaluate(self) -> dict[str, Quality]:
        """Student against base on every held-out source."""
        module = self.accelerator.unwrap_model(self.module)
        found = {}
        for name, batches in self.held_out.items():
            mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
            with self.accelerator.autocast():
                rows = [module.compare(batch.to(self.accelerator.device)) for batch in mine]
            measures = torch.cat([torch.empty(0, 4, device=self.accelerator.device), *rows])
            if self.accelerator.num_processes > 1:
                measures = self.accelerator.gather(self.accelerator.pad_across_processes(measures, pad_index=-1.0))
                measures = measures[measures[:, 2] >= 0]
            found[name] = summarise(measures)
        return found

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next `batch_size` sequences; returns what it logs."""
        training, accelerator = self.recipe.training, self.accelerator
        batch = self.data.batch(self.step * training.batch_size, training.batch_size)
        loss_tokens = int(batch.loss_mask.sum())
        mine = batch.share(accelerator.process_index, accelerator.num_processes).to(accelerator.device)
        # DDP averages gradients over processes; the sum is wanted.
        scale = accelerator.num_processes / loss_tokens
        sums = torch.zeros(2, device=accelerator.device)
        micro_batches = mine.split(training.micro_batch_size)
        for index, micro in enumerate(micro_batches):
            with ExitStack() as stack:
                if index + 1 < len(micro_batches):
                    stack.enter_context(accelerator.no_sync(self.module))
                total, kl = self.module(micro.input_ids, micro.position_ids, micro.loss_mask)
                accelerator.backward(total * scale)
            sums += torch.stack([total.detach(), kl])
        norm = accelerator.clip_grad_norm_(list(self.parameters.values()), training.max_grad_norm)
        rate = learning_rate(training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        loss, kl = (accelerator.reduce(sums, reduction="sum") / loss_tokens).tolist()
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {self.step}; lower training.learning_rate (now {rate:.1e})")
        return {
            "step": self.step,
            "loss": loss,
            "kl": kl,
            "learning_rate": rate,
            "grad_norm": float(norm),
            "tokens": batch.input_ids.numel(),
            "loss_tokens": loss_tokens,
        }

    def save(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint = self.run.save_checkpoint(
                {"step": self.step, "steps": self.recipe.training.steps, "data_fingerprint": self.data.fingerprint},
                {name: parameter.detach() for name, parameter in self.parameters.items()},
                optimizer_tensors(self.optimizer, self.parameters),
                self.recipe.training.keep_last,
            )
            self.report.line(f"saved       {checkpoint.path}")
        self.accelerator.wait_for_everyone()

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.log(row)
        if self.tracker is not None:
            flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
            for source, quality in row.get("held_out", {}).items():
                flat |= {f"held_out/{source}/{key}": value for key, value in quality.items()}
            self.tracker.log(flat, step=row["step"])

    def log_quality(self) -> None:
        if not self.held_out or self.step in self.evaluated:
            return
        found = self.evaluate()
        self.report.quality(self.step, found)
        self.evaluated.add(self.step)
        self.log({"step": self.step, "held_out": {name: quality.to_dict() for name, quality in found.items()}})

    def train(self, *, calibrate_only: bool = False) -> int:
        """Run to the last step. Returns the exit status: 0, or 130 when stopped with Ctrl-C."""
        training = self.recipe.training
        with (
            Stop().watching() as stop,
            wandb_run(self.recipe, self.run.path, enabled=self.accelerator.is_main_process) as self.tracker,
        ):
            self.prepare()
            if not self.resume:
                self.log_quality()
            if calibrate_only:
                self.save()
                return 0
            status = self._steps(stop)
            if status is not None:
                return status
            self.log_quality()
            self.save()
        self.report.line(f"finished    {training.steps} steps; next: swiftkv export {self.run.path} --to DIR")
        return 0

    def _steps(self, stop: Stop) -> int | None:
        """The steps that are left; an exit status when asked to stop before the last one."""
        training = self.recipe.training
        with self.report.training(training.steps, self.step) as advance:
            while self.step < training.steps:
                started = time.perf_counter()
                row = self.train_step()
                row["seconds"] = time.perf_counter() - started
                row["tokens_per_second"] = row["tokens"] / row["seconds"]
                advance(row)
                if self.step % training.log_every == 0 or self.step == training.steps:
                    self.log(row)
                if training.evaluate_every and self.step % training.evaluate_every == 0:
                    self.log_quality()
                if stop.agreed(self.accelerator):
                    self.save()
                    self.report.line(f"stopped     at step {self.step} of {training.steps}; continue with --resume")
                    return 130 if stop.signal == signal.SIGINT else 0
                if (
                    training.checkpoint_every
                    and self.step % training.checkpoint_every == 0
                    and self.step < training.steps
                ):
                    self.save()
        return None


def distill(recipe: Recipe, *, resume: bool = False, calibrate_only: bool = False, quiet: bool = False) -> int:
    """Run a recipe; returns the exit status. Raises UserError and RunError (see `swiftkv_train.errors`)."""
    return Distillation(recipe, resume=resume, quiet=quiet).train(calibrate_only=calibrate_only)


if __name__ == "__main__":
    from swiftkv_train.cli import main as command

    command("distill")
