"""What makes a run fit into a GPU: the first change of settings, mildest first, under which it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.plan.memory import Memory, training_memory
from swiftkv_train.quantized_base import Quantization
from swiftkv_train.recipe import Recipe

# What CUDA's context, the libraries' workspaces and fragmentation are given of a GPU: an assumption, not measured.
RESERVED = 2**30
QUANTIZATIONS: list[Quantization | None] = [None, "int8", "nf4"]
STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Fit:
    """Settings that fit: `key=value` overrides and options of the command, none where the recipe fits as it is."""

    changes: list[str]
    memory: Memory


def first_that_fits(model: LlamaSwiftKVForCausalLM, recipe: Recipe, *, processes: int, gpu_memory: int) -> Fit | None:
    """The recipe's own settings if they fit, else the nearest: a lighter calibration, then a smaller micro-batch, then
    gradient checkpointing, then a quantised base or sharding, then more processes, each with the changes before it
    where they are needed too.
    """
    for changed, count in _candidates(recipe, processes):
        memory = training_memory(model, changed, processes=count, device="cuda")
        if memory.peak + RESERVED <= gpu_memory:
            return Fit(_changes(recipe, changed, processes, count), memory)
    return None


def _candidates(recipe: Recipe, processes: int) -> Iterator[tuple[Recipe, int]]:
    training, own = recipe.training, recipe.distributed.strategy
    counts = [processes]
    while counts[-1] * 2 <= training.batch_size:
        counts.append(counts[-1] * 2)
    sizes = [training.micro_batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    shardable = training.optimizer == "adamw" and recipe.model.dtype != "float16"  # as the strategies ask for
    bound = recipe.distributed.deepspeed_config is not None  # to the strategy that the file is written for
    strategies = STRATEGIES[STRATEGIES.index(own) :] if shardable and not bound else [own]
    quantizations = QUANTIZATIONS[QUANTIZATIONS.index(recipe.model.quantization) :]
    weightings = ["head", "layer"] if recipe.calibration.weighting == "head" else [recipe.calibration.weighting]
    for count, strategy, quantization, checkpointing, size, weighting in product(
        counts, strategies, quantizations, sorted({training.gradient_checkpointing, True}), sizes, weightings
    ):
        if strategy != own and count == 1:  # one process has nobody to share with
            continue
        if strategy != "ddp" and quantization is not None:
            continue
        changed = recipe.model_copy(deep=True)
        changed.model.quantization = quantization
        changed.calibration.weighting = weighting  # type: ignore[assignment]
        changed.training.micro_batch_size = size
        changed.training.gradient_checkpointing = checkpointing
        changed.distributed.strategy = strategy  # type: ignore[assignment]
        yield changed, count


def _changes(recipe: Recipe, changed: Recipe, processes: int, count: int) -> list[str]:
    found = []
    if changed.calibration.weighting != recipe.calibration.weighting:
        found.append(f"calibration.weighting={changed.calibration.weighting}")
    if changed.training.micro_batch_size != recipe.training.micro_batch_size:
        found.append(f"training.micro_batch_size={changed.training.micro_batch_size}")
    if changed.training.gradient_checkpointing != recipe.training.gradient_checkpointing:
        found.append("training.gradient_checkpointing=true")
    if changed.model.quantization != recipe.model.quantization:
        found.append(f"model.quantization={changed.model.quantization}")
    if changed.distributed.strategy != recipe.distributed.strategy:
        found.append(f"distributed.strategy={changed.distributed.strategy}")
    if count != processes:
        found.append(f"--processes {count}")
    return found
