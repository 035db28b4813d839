"""StreamingLLM's rule written a second time, as the paper states it, for base Llama and SwiftKV models.

Tokens are fed one by one. A cache keeps un-rotated keys of the first tokens and the last ones; at every step all of
them are rotated anew, each at its place in the cache, and the query at the last place. fp64, plain loops, one sequence.
"""

from __future__ import annotations

import math

import torch
from naive_swiftkv import frequencies, leader_of, rms_norm, rope


def naive_streaming_logits(model, ids: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Logits [T, V] of token ids [T]."""
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    layers = config.num_hidden_layers
    first = getattr(config, "num_key_value_layers", layers)
    eps, size = config.rms_norm_eps, config.head_dim
    ratio = config.num_attention_heads // config.num_key_value_heads
    inverse = frequencies(config)
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]  # un-rotated K, and V, [G, C]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        out = weights[f"{name}.weight"] @ x
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    logits = []
    for token in ids.tolist():
        h = weights["model.embed_tokens.weight"][token]
        shared = None
        for layer in range(layers):
            prefix, suffix, leader = f"model.layers.{layer}", "", layer
            normed = rms_norm(h, weights[f"{prefix}.input_layernorm.weight"], eps)
            source = normed
            if layer >= first:
                if shared is None:
                    shared = rms_norm(h, weights["model.norm_swiftkv.weight"], eps)
                suffix, source, leader = "_swiftkv", shared, leader_of(config, layer)
            if leader == layer:
                k, v = (linear(source, f"{prefix}.self_attn.{kind}_proj{suffix}").view(-1, size) for kind in ("k", "v"))
                caches[layer].append((k, v))
                if len(caches[layer]) > sinks + window:
                    del caches[layer][sinks]
            cache = caches[leader]
            places = torch.arange(len(cache), dtype=torch.float64)
            keys = rope(torch.stack([k for k, _ in cache]), places, inverse)
            values = torch.stack([v for _, v in cache])
            q = linear(normed, f"{prefix}.self_attn.q_proj{suffix}").view(1, -1, size)
            q = rope(q, places[-1:], inverse)[0]
            mixed = torch.stack(
                [
                    torch.softmax(keys[:, head // ratio] @ q[head] / math.sqrt(size), 0) @ values[:, head // ratio]
                    for head in range(len(q))
                ]
            )
            h = h + linear(mixed.flatten(), f"{prefix}.self_attn.o_proj")
            normed = rms_norm(h, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
            gate, up = linear(normed, f"{prefix}.mlp.gate_proj"), linear(normed, f"{prefix}.mlp.up_proj")
            h = h + linear(gate / (1 + torch.exp(-gate)) * up, f"{prefix}.mlp.down_proj")
        logits.append(weights["lm_head.weight"] @ rms_norm(h, weights["model.norm.weight"], eps))
    return torch.stack(logits)
