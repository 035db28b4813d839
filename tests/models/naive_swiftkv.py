"""SwiftKV written a second time, from the paper's formulas: one sequence, plain loops, no cache, nothing skipped."""

from __future__ import annotations

import math

import torch


def leader_of(config, layer: int) -> int:
    if config.key_value_groups is not None:
        return next(group[0] for group in config.key_value_groups if layer in group)
    first, size = config.num_key_value_layers, config.key_value_group_size
    return first + (layer - first) // size * size


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def frequencies(config) -> torch.Tensor:
    size = config.head_dim
    rope = config.rope_parameters
    inverse = [rope["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
    if rope["rope_type"] == "llama3":
        inverse = [llama3_frequency(value, rope) for value in inverse]
    return torch.tensor(inverse, dtype=torch.float64)


def llama3_frequency(frequency: float, rope: dict) -> float:
    wavelength = 2 * math.pi / frequency
    context = rope["original_max_position_embeddings"]
    if wavelength < context / rope["high_freq_factor"]:
        return frequency
    if wavelength > context / rope["low_freq_factor"]:
        return frequency / rope["factor"]
    smooth = (context / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    return (1 - smooth) * frequency / rope["factor"] + smooth * frequency


def rope(x: torch.Tensor, positions: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Dimensions f and f + C/2 of [T, heads, C] as a complex number, turned by position x frequency."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * positions[:, None, None] * inverse)
    return torch.cat([turned.real, turned.imag], dim=-1)


def naive_logits(model, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [T, V] of one sequence of token ids [T] from the fp64 weights of a SwiftKV model."""
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    positions = torch.arange(len(ids)) if positions is None else positions
    first, eps = config.num_key_value_layers, config.rms_norm_eps
    inverse = frequencies(config)
    ratio = config.num_attention_heads // config.num_key_value_heads

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(h, weights[f"{prefix}.input_layernorm.weight"], eps)
        if layer < first:
            q_name, kv_prefix, suffix, kv_input = f"{prefix}.self_attn.q_proj", f"{prefix}.self_attn", "", normed
        else:
            if layer == first:
                shared = rms_norm(h, weights["model.norm_swiftkv.weight"], eps)
            leader = leader_of(config, layer)
            q_name = f"{prefix}.self_attn.q_proj_swiftkv"
            kv_prefix, suffix, kv_input = f"model.layers.{leader}.self_attn", "_swiftkv", shared
        q = linear(normed, q_name).view(len(ids), -1, config.head_dim)
        k = linear(kv_input, f"{kv_prefix}.k_proj{suffix}").view(len(ids), -1, config.head_dim)
        v = linear(kv_input, f"{kv_prefix}.v_proj{suffix}").view(len(ids), -1, config.head_dim)
        q, k = rope(q, positions.double(), inverse), rope(k, positions.double(), inverse)
        mixed = torch.empty_like(q)
        for head in range(config.num_attention_heads):
            for t in range(len(ids)):
                keys, values = k[: t + 1, head // ratio], v[: t + 1, head // ratio]
                scores = torch.softmax(keys @ q[t, head] / math.sqrt(config.head_dim), dim=0)
                mixed[t, head] = scores @ values
        h = h + linear(mixed.flatten(1), f"{prefix}.self_attn.o_proj")
        normed = rms_norm(h, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate, up = linear(normed, f"{prefix}.mlp.gate_proj"), linear(normed, f"{prefix}.mlp.up_proj")
        h = h + linear(gate / (1 + torch.exp(-gate)) * up, f"{prefix}.mlp.down_proj")
    return rms_norm(h, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
