"""`swiftkv bench step`: one distillation step against a reference-style step."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from swiftkv_train.bench.memory import peak_in_own_process, peak_memory
from swiftkv_train.bench.process import answer
from swiftkv_train.bench.reference import ReferenceStep
from swiftkv_train.bench.turns import this_device
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.errors import RunError
from swiftkv_train.machine import environment, synchronize
from swiftkv_train.student import trainable_parameters, use_training_attention

TEMPERATURE = 2.0


def measure(model: str, batch_size: int, sequence_length: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of both (medians, taking turns in one process) and peak memory (each in its own process).

    Both train the same tail of the same model (l = half of the layers) on the same random tokens, all of them with
    loss, and both take the same AdamW step; in the dtype it is stored in, or float32 where that is faster.
    """
    steps = _Steps(model, batch_size, sequence_length)
    times: dict[str, list[float]] = {"swiftkv_train": [], "reference": []}
    for turn in range(repeats + 1):
        for name, seconds in times.items():
            elapsed = steps.timed(name)
            if turn:  # the first step of each meets cold memory
                seconds.append(elapsed)
    tokens = batch_size * sequence_length
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    facts = environment(steps.model)
    del steps
    peaks = {
        name: peak_in_own_process("swiftkv_train.bench.step", [model, batch_size, sequence_length, name], name)
        for name in times
    }
    ratio = rates["swiftkv_train"] / rates["reference"]
    memory = peaks["swiftkv_train"] / peaks["reference"]
    return {
        "benchmark": "distillation step against a reference-style step",
        "command": f"swiftkv bench step {model} --batch-size {batch_size} --sequence-length {sequence_length} "
        f"--repeats {repeats}",
        "environment": facts,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "tokens_per_second": rates,
        "seconds": times,
        "peak_bytes": peaks,
        "throughput_ratio": ratio,
        "peak_memory_ratio": memory,
        "summary": [
            f"tokens/s     {rates['swiftkv_train']:,.0f} against {rates['reference']:,.0f}: x {ratio:.2f}",
            f"peak memory  {peaks['swiftkv_train'] / 2**20:,.0f} MiB against {peaks['reference'] / 2**20:,.0f} MiB "
            f"above the weights: x {memory:.2f}",
        ],
    }


class _Steps:
    """The two kinds of step over one model, whose frozen tensors they share."""

    def __init__(self, path: str, batch_size: int, sequence_length: int):
        from swiftkv_models import rewrite
        from swiftkv_train.loading import in_native_dtype, load_model
        from swiftkv_train.recipe import LossSection

        device = this_device()
        base = in_native_dtype(load_model(path, families=("llama",)), device).to(device)
        self.model = rewrite(base, num_key_value_layers=base.config.num_hidden_layers // 2)
        self.model.requires_grad_(False)
        parameters = list(trainable_parameters(self.model).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        # The reference trains in the model's dtype under an fp32 master copy; plain AdamW stands for both sides.
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        self.module = DistillationModule(self.model, LossSection(temperature=TEMPERATURE, hidden_mse=1.0)).eval()
        self.reference = ReferenceStep(base, self.model, TEMPERATURE)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, sequence_length)
        self.input_ids = torch.randint(0, base.config.vocab_size, shape, generator=generator).to(device)
        self.position_ids = torch.arange(sequence_length, device=device).expand(shape).contiguous()
        self.loss_mask = torch.ones(shape, dtype=torch.bool, device=device)

    def run(self, name: str) -> None:
        arguments = self.input_ids, self.position_ids, self.loss_mask
        if name == "reference":
            self.model.train()
            self.model.set_attn_implementation("sdpa")
            self.reference.backward(*arguments)
        else:
            self.model.eval()  # no checkpointing
            use_training_attention(self.model)
            total, _ = self.module(*arguments)
            (total / self.loss_mask.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self, name: str) -> float:
        synchronize(self.input_ids.device)
        started = time.perf_counter()
        self.run(name)
        synchronize(self.input_ids.device)
        return time.perf_counter() - started


def _peak() -> int:
    path, batch_size, sequence_length, name = sys.argv[1:]
    steps = _Steps(path, int(batch_size), int(sequence_length))
    # AdamW's moments are made by the first step, and weights are read from their file when first used: the same for
    # both, they are not what is compared.
    checksum = sum(float(parameter.sum()) for parameter in steps.model.parameters())
    if checksum != checksum:
        raise RunError(f"{path} holds weights that are not numbers")
    for parameter in steps.optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    steps.optimizer.step()
    steps.optimizer.zero_grad(set_to_none=True)
    with peak_memory(steps.input_ids.device) as peak:
        steps.run(name)
    return peak.bytes


if __name__ == "__main__":
    answer(_peak)
