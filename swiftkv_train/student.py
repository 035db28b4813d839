"""The model a run trains: a base in SwiftKV form, its trainable tensors, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from swiftkv_models import PACKED_CAUSAL, SDPA, LlamaSwiftKVForCausalLM, RewriteError, rewrite
from swiftkv_models.rope import inverse_frequencies
from swiftkv_train.errors import UserError
from swiftkv_train.loading import Model, check_context, compute_dtype, load_model
from swiftkv_train.pair import first_difference
from swiftkv_train.quantized_base import quiet_bitsandbytes
from swiftkv_train.recipe import LoraSection, Recipe

ROUNDING = 0.02  # of a tensor's norm: more than bf16's, and less than models that were trained apart differ by


def build_model(recipe: Recipe, dtype: torch.dtype | str | None = None) -> LlamaSwiftKVForCausalLM:
    """The base of a recipe in SwiftKV form, weights of the tail as `rewrite` leaves them; in what it computes in here,
    or a `dtype` ('auto': as it is stored).
    """
    base = load_model(
        recipe.model.base,
        dtype=dtype or compute_dtype(recipe.model.dtype),
        attention=recipe.model.attention,
        revision=recipe.model.revision,
        families=("llama",),
    )
    return rewritten(base, recipe)


def rewritten(base: Model, recipe: Recipe) -> LlamaSwiftKVForCausalLM:
    """`base` in the form that a recipe wants. Raises UserError where it has none to train, or too short a context."""
    check_context(recipe, base.config)
    try:
        inverse_frequencies(base.config, "a checkpoint that streams")
    except ValueError as error:
        raise UserError(f"model {recipe.model.base}: {error}") from None
    first, layers = recipe.rewrite.num_key_value_layers, base.config.num_hidden_layers
    if first == layers:
        raise UserError(f"rewrite.num_key_value_layers {first} leaves no layer to train; give 1 to {layers - 1}")
    try:
        return rewrite(base, **recipe.rewrite.form())
    except RewriteError as error:
        raise UserError(f"rewrite: {error}") from None


def tail_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All tensors that the rewrite added, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if "_swiftkv" in name}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of them that are trained: the adapters where there are any, else all."""
    tail = tail_parameters(model)
    return {name: parameter for name, parameter in tail.items() if ".lora_" in name} or tail


def add_adapters(model: LlamaSwiftKVForCausalLM, lora: LoraSection) -> None:
    """Put low-rank adapters, which change nothing yet, on the tail's projections."""
    quiet_bitsandbytes()  # which peft imports where it is installed
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("training.trainable lora needs peft: pip install 'swiftkv-train[lora]'") from None
    inject_adapter_in_model(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=r".*\.[qkv]_proj_swiftkv"), model
    )


def merge_adapters(weights: Mapping[str, torch.Tensor], lora: LoraSection | None) -> dict[str, torch.Tensor]:
    """The tensors of a tail without adapters that does what `weights`, of one with them, does: W + alpha / rank B A."""
    if lora is None:
        return dict(weights)
    merged = {}
    for name, tensor in weights.items():
        layer, inner, kind = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if inner and kind == "weight":
            down, up = (weights[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
            tensor = tensor.float() + lora.alpha / lora.rank * (up @ down)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def checkpoint_tail(model: LlamaSwiftKVForCausalLM) -> None:
    """Keep only each tail layer's input for the backward pass, and run the layer again there.

    The trunk has no backward pass. Nothing in a layer is random, so no state of a generator is kept either.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in model.model.layers[model.config.num_key_value_layers :]:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, again
        layer.training = True  # of the layer alone: transformers asks for it, and its parts stay as they are


def use_training_attention(model: Model, device: torch.device | None = None) -> None:
    """Where torch's own attention is slow for whole sequences (CPU), take the kernels' instead.

    `device`: what the model will run on, if it is not there yet.
    """
    if (device or model.device).type == "cpu" and model.config._attn_implementation in SDPA:
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


@contextmanager
def layer_by_layer(device: torch.device, model: LlamaSwiftKVForCausalLM) -> Iterator[None]:
    """Run a model that `device` may be too small for: each part is there only while it runs, and is not changed."""
    decoder = model.model
    parts = [decoder.embed_tokens, decoder.rotary_emb, decoder.norm, decoder.norm_swiftkv, *decoder.layers]
    home: dict[torch.Tensor, torch.Tensor] = {}

    def fetch(module: nn.Module, _inputs: Any) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            home[tensor] = tensor.data
            tensor.data = tensor.data.to(device)

    def give_back(module: nn.Module, *_: Any) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = home.pop(tensor)

    handles = [part.register_forward_pre_hook(fetch) for part in parts]
    handles += [part.register_forward_hook(give_back, always_call=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_trained(model: LlamaSwiftKVForCausalLM, weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put a tail's tensors into `model`. Raises UserError unless they are exactly its `*_swiftkv` tensors."""
    parameters = tail_parameters(model)
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
    for name in ("num_key_value_layers", "key_value_group_size", "key_value_groups"):
        if getattr(exported.config, name) != getattr(model.config, name):
            raise UserError(
                f"rewrite.init_from {path} has {name}={getattr(exported.config, name)}, "
                f"the recipe says {getattr(model.config, name)}"
            )
    if odd := first_difference(exported, model, ROUNDING):
        raise UserError(f"rewrite.init_from {path} was made from another base: {odd} differs; give one of this base")
    load_trained(model, tail_parameters(exported), f"rewrite.init_from {path}")
