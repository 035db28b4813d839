"""`swiftkv plan`: what a recipe will train, compute and hold, from the base's configuration alone."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.errors import UserError
from swiftkv_train.flops import causal_pairs, distillation_flops
from swiftkv_train.loading import compute_dtype, load_config, one_line
from swiftkv_train.plan.advice import first_that_fits
from swiftkv_train.plan.inference import cache_bytes_per_token, decode_flops, prefill_flops
from swiftkv_train.plan.memory import training_memory
from swiftkv_train.recipe import Recipe
from swiftkv_train.sequence_parallel import check_heads, check_parts
from swiftkv_train.strategies import check_precision
from swiftkv_train.student import add_adapters, rewritten, trainable_parameters


def plan(
    recipe: Recipe,
    *,
    processes: int = 1,
    device: str = "cuda",
    context: int | None = None,
    gpu_memory: int | None = None,
) -> dict[str, Any]:
    """The plan of a recipe: parameters, tokens, FLOPs, and bytes by part.

    Args:
        processes: GPUs, one process on each.
        device: 'cuda' or 'cpu', which need not be present.
        context: tokens of the prompt that inference is counted for; left out, `data.sequence_length`.
        gpu_memory: bytes of one GPU; the result then says whether a step fits, and what would make it fit.

    Raises:
        UserError: no such base, or a recipe that cannot be trained so.
    """
    training, length = recipe.training, recipe.data.sequence_length
    group = recipe.distributed.sequence_parallel
    check_precision(recipe)
    check_parts(recipe, processes)
    if training.batch_size < processes // group:
        sharing = f"{processes // group} processes or groups that share it"
        raise UserError(f"training.batch_size {training.batch_size} is smaller than the {sharing}")
    model = model_on_meta(recipe, device)
    config = model.config
    check_heads(recipe, config)
    base = copy.copy(config)
    base.num_key_value_layers, base.key_value_groups = config.num_hidden_layers, None
    context = context or length
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    tokens, rank = training.batch_size * length, training.lora.rank if training.lora else 0
    pairs = training.batch_size * causal_pairs(length)
    flops = distillation_flops(config, tokens=tokens, pairs=pairs, loss_tokens=tokens, lora_rank=rank)
    memory = training_memory(model, recipe, processes=processes, device=device)
    result: dict[str, Any] = {
        "base": recipe.model.base,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_layers": config.num_key_value_layers,
        "key_value_group_size": config.key_value_group_size,
        "key_value_groups": config.key_value_groups,
        "parameters": {"trained": trained, "frozen": sum(p.numel() for p in model.parameters()) - trained},
        "training": {
            "steps": training.steps,
            "sequence_length": length,
            "tokens_per_step": tokens,
            "tokens": training.steps * tokens,
            "flops_per_token": flops / tokens,
            "flops": training.steps * flops,
        },
        "memory": {
            "device": device,
            "processes": processes,
            "strategy": recipe.distributed.strategy,
            "micro_batch_size": training.micro_batch_size,
            "bytes": {**asdict(memory), "peak": memory.peak},
        },
        "inference": {
            "context": context,
            "cache_bytes_per_token": {
                "base": cache_bytes_per_token(base, model.dtype.itemsize),
                "swiftkv": cache_bytes_per_token(config, model.dtype.itemsize),
            },
            "prefill_flops_per_token": {
                "base": prefill_flops(base, context) / context,
                "swiftkv": prefill_flops(config, context) / context,
            },
            "decode_flops_per_token": {"base": decode_flops(base, context), "swiftkv": decode_flops(config, context)},
        },
    }
    if gpu_memory is not None:
        fit = first_that_fits(model, recipe, processes=processes, gpu_memory=gpu_memory)
        result["fit"] = {"gpu_memory": gpu_memory, "fits": fit is not None and not fit.changes}
        if fit is not None and fit.changes:
            result["fit"]["change"] = {"settings": fit.changes, "peak": fit.memory.peak}
    return result


def model_on_meta(recipe: Recipe, device: str) -> LlamaSwiftKVForCausalLM:
    """The model that the recipe trains on `device`, adapters too, without weights: only the base's config is read."""
    config = load_config(recipe.model.base, revision=recipe.model.revision, families=("llama",))
    with torch.device("meta"):
        try:
            base = AutoModelForCausalLM.from_config(config, dtype=compute_dtype(recipe.model.dtype, device))
        except Exception as error:  # whatever the settings of a damaged config lead to
            raise UserError(f"model {recipe.model.base}: no model follows from its config: {one_line(error)}") from None
        model = rewritten(base, recipe)
        if recipe.training.lora is not None:
            add_adapters(model, recipe.training.lora)
    return model
