"""The model a run trains: a base in SwiftKV form, its trainable tensors, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from swiftkv_models import PACKED_CAUSAL, LlamaSwiftKVForCausalLM, RewriteError, rewrite
from swiftkv_train.errors import UserError
from swiftkv_train.loading import Model, load_model
from swiftkv_train.recipe import Recipe


def build_model(recipe: Recipe) -> LlamaSwiftKVForCausalLM:
    """The base of a recipe in SwiftKV form, weights of the tail as `rewrite` leaves them."""
    base = load_model(
        recipe.model.base,
        dtype=recipe.model.dtype,
        attention=recipe.model.attention,
        revision=recipe.model.revision,
        families=("llama",),
    )
    length, context = recipe.data.sequence_length, base.config.max_position_embeddings
    if length > context:
        raise UserError(f"data.sequence_length {length} is longer than the context of {recipe.model.base}, {context}")
    first, layers = recipe.rewrite.num_key_value_layers, base.config.num_hidden_layers
    if first == layers:
        raise UserError(f"rewrite.num_key_value_layers {first} leaves no layer to train; give 1 to {layers - 1}")
    try:
        return rewrite(
            base,
            num_key_value_layers=recipe.rewrite.num_key_value_layers,
            key_value_group_size=recipe.rewrite.key_value_group_size,
        )
    except RewriteError as error:
        raise UserError(f"rewrite: {error}") from None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "_swiftkv" in name}


def use_training_attention(model: Model) -> None:
    """Where torch's own attention is slow for whole sequences (CPU), take the kernels' instead."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED_CAUSAL)


@contextmanager
def training_attention(*models: Model) -> Iterator[None]:
    """`use_training_attention` for a while: for scoring whole sequences."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        use_training_attention(model)
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


def load_trained(model: LlamaSwiftKVForCausalLM, weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put trained tensors into `model`. Raises UserError unless they are exactly its `*_swiftkv` tensors."""
    parameters = trainable_parameters(model)
    if odd := sorted(weights.keys() ^ parameters.keys()):
        raise UserError(f"{origin} does not fit this rewrite: {odd[0]} is on one side only")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise UserError(f"{origin}: {name} is {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(weights[name])


def load_exported_tail(model: LlamaSwiftKVForCausalLM, path: str) -> None:
    """Continue from an exported checkpoint (`init: checkpoint`)."""
    exported = load_model(path, dtype="float32", families=("llama_swiftkv",))
    for name in ("num_key_value_layers", "key_value_group_size"):
        if getattr(exported.config, name) != getattr(model.config, name):
            raise UserError(
                f"rewrite.init_from {path} has {name}={getattr(exported.config, name)}, "
                f"the recipe says {getattr(model.config, name)}"
            )
    load_trained(model, trainable_parameters(exported), f"rewrite.init_from {path}")
