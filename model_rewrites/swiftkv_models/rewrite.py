"""Turn a base model's module into its SwiftKV form, weights and all."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import PreTrainedModel

from swiftkv_models.llama import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM
from swiftkv_models.rope import keep_frequencies

# model_type of the base -> configuration and model of its SwiftKV form
FAMILIES: dict[str, tuple[type[LlamaSwiftKVConfig], type[LlamaSwiftKVForCausalLM]]] = {
    "llama": (LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM),
}


class RewriteError(ValueError):
    """The model cannot be rewritten as asked. One line that names what is wrong."""


def rewrite(
    base: PreTrainedModel,
    *,
    num_key_value_layers: int,
    key_value_group_size: int = 1,
    key_value_groups: list[list[int]] | None = None,
) -> LlamaSwiftKVForCausalLM:
    """The SwiftKV form of `base`, sharing its tensors (nothing of the base is copied).

    The new `*_swiftkv` weights start as in SwiftKV's published training code (ArcticTraining): Q of the same layer, K
    and V the mean of the group's, the norm of layer l. A model already in this very form is returned as it is, with
    its weights.

    Args:
        base: a causal language model of a known family.
        num_key_value_layers: l, 1 to the number of layers.
        key_value_group_size: g, 1 to the number of tail layers.
        key_value_groups: the tail's layers in groups of any size, in place of g: [[15], [16, 17], [18, 19, 20], ...].

    Raises:
        RewriteError: unknown family, l, g or groups out of range, a tensor missing or unexpected, another SwiftKV form.
    """
    wanted = {
        "num_key_value_layers": num_key_value_layers,
        "key_value_group_size": key_value_group_size,
        "key_value_groups": key_value_groups,
    }
    if isinstance(base, LlamaSwiftKVForCausalLM):
        present = {name: getattr(base.config, name) for name in wanted}
        if present != wanted:
            raise RewriteError(f"the model is already rewritten with {_say(present)}, not {_say(wanted)}")
        return base
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        raise RewriteError("the model lies in parts on several devices: load it without device_map, and rewrite that")
    model_type = base.config.model_type
    if model_type not in FAMILIES:
        raise RewriteError(f"model family {model_type!r} is not known; known: {', '.join(FAMILIES)}")
    config_class, model_class = FAMILIES[model_type]
    fields = {key: value for key, value in base.config.to_dict().items() if key not in ("model_type", "architectures")}
    try:
        config = config_class.from_dict({**fields, **wanted, "base_projections": True})
    except Exception as error:  # `strict` wraps the ValueError in a type of its own
        raise RewriteError(_last_line(error)) from None
    config._attn_implementation = base.config._attn_implementation

    with torch.device("meta"):
        model = model_class(config)
    weights = base.state_dict(keep_vars=True)  # Parameters, so that tied ones stay tied
    expected = {name for name in model.state_dict() if "_swiftkv" not in name}
    problems = [f"{name} is missing" for name in sorted(expected - weights.keys())]
    problems += [f"{name} is unexpected" for name in sorted(weights.keys() - expected)]
    if problems:
        raise RewriteError(f"{len(problems)} tensors do not fit a {model_type} model: {'; '.join(problems[:3])}")
    weights |= _copied_start(config, weights)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise RewriteError(_last_line(error)) from None
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)  # its buffers are not in the state dict
    keep_frequencies(model.model.rotary_emb)  # of a base that was cast
    model.tie_weights()
    model.generation_config = base.generation_config
    return model.train(base.training)


def _copied_start(config: LlamaSwiftKVConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first, last = config.num_key_value_layers, config.num_hidden_layers
    norm = f"model.layers.{first}.input_layernorm.weight" if first < last else "model.norm.weight"
    groups = {group[0]: group for group in config.tail_groups}
    start = {"model.norm_swiftkv.weight": weights[norm].detach().clone()}
    for layer in range(first, last):
        members = groups.get(layer, [])
        for name in ("weight", "bias") if config.attention_bias else ("weight",):
            attention = f"model.layers.{layer}.self_attn"
            start[f"{attention}.q_proj_swiftkv.{name}"] = weights[f"{attention}.q_proj.{name}"].detach().clone()
            for kind in ("k", "v") if members else ():
                group = [weights[f"model.layers.{index}.self_attn.{kind}_proj.{name}"] for index in members]
                precise = torch.promote_types(group[0].dtype, torch.float32)
                mean = torch.stack([tensor.detach().to(precise) for tensor in group]).mean(0)
                start[f"{attention}.{kind}_proj_swiftkv.{name}"] = mean.to(group[0].dtype)
    return start


def _say(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\w*Error: ", "", lines[-1]) if lines else type(error).__name__
