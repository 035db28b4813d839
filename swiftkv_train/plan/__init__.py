"""`swiftkv plan`: what a recipe will train, compute and hold, from the base's configuration alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from swiftkv_models import LlamaSwiftKVForCausalLM, RewriteError, rewrite
from swiftkv_train.errors import UserError
from swiftkv_train.flops import causal_pairs, distillation_flops
from swiftkv_train.loading import dtype_of, load_config
from swiftkv_train.plan.advice import first_fitting
from swiftkv_train.plan.inference import cache_bytes_per_token, decode_flops, prefill_flops
from swiftkv_train.plan.memory import training_memory
from swiftkv_train.recipe import Recipe
from swiftkv_train.student import add_adapters, trainable_parameters

# Of a GPU's memory, what CUDA's context, the libraries' workspaces and fragmentation take: an assumption.
RESERVED = 2**30


def plan(
    recipe: Recipe,
    *,
    processes: int = 1,
    device: str = "cuda",
    context: int | None = None,
    gpu_memory: int | None = None,
) -> dict[str, Any]:
    """The plan of a recipe: parameters, tokens, FLOPs, bytes by part.

    Args:
        processes: GPUs, one process on each.
        device: 'cuda' or 'cpu', which need not be present.
        context: tokens of the prompt that inference is counted for; left out, `data.sequence_length`.
        gpu_memory: bytes of one GPU; the result then says whether the run fits, and what makes it fit.

    Raises:
        UserError: no such base, or a recipe that cannot be trained so.
    """
    training = recipe.training
    if training.batch_size < processes:
        raise UserError(f"training.batch_size {training.batch_size} is smaller than the {processes} processes")
    model = model_on_meta(recipe)
    config, base = model.config, model.config.__class__.from_dict(model.config.to_dict())
    base.num_key_value_layers = base.num_hidden_layers
    length = context or recipe.data.sequence_length
    itemsize = torch.empty(0, dtype=dtype_of(recipe.model.dtype)).element_size()
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    step_tokens = training.batch_size * recipe.data.sequence_length
    step_flops = distillation_flops(
        config,
        tokens=step_tokens,
        pairs=training.batch_size * causal_pairs(recipe.data.sequence_length),
        loss_tokens=step_tokens,
    )
    memory = training_memory(model, recipe, processes=processes, device=device)
    return {
        "base": recipe.model.base,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_layers": config.num_key_value_layers,
        "key_value_group_size": config.key_value_group_size,
        "parameters": {"trained": trained, "frozen": sum(p.numel() for p in model.parameters()) - trained},
    }
