"""What inference costs per token, in the base and in its SwiftKV form: FLOPs and bytes of K/V cache.

FLOPs are those of the matrix products, 2 per multiply-add, causal attention at the pairs that it needs. A model whose
l is the number of its layers is the base, so one count serves both.
"""

from __future__ import annotations

from typing import cast

from swiftkv_models import LlamaSwiftKVConfig


def prefill_flops(config: LlamaSwiftKVConfig, tokens: int) -> int:
    """FLOPs from a prompt of `tokens` to the logits of its last one: prompt tokens skip the tail."""
    layer, key_value, pair = _products(config)
    trunk, tail = config.num_key_value_layers, config.num_hidden_layers - config.num_key_value_layers
    prompt = tokens * (trunk * (layer + key_value) + _tail_leaders(config) * key_value)
    prompt += tokens * (tokens + 1) // 2 * trunk * pair
    return 2 * (prompt + tail * (layer + tokens * pair) + config.hidden_size * config.vocab_size)


def decode_flops(config: LlamaSwiftKVConfig, context: int) -> int:
    """FLOPs of one generated token that attends to `context` tokens, itself among them."""
    layer, key_value, pair = _products(config)
    layers = config.num_hidden_layers * (layer + context * pair) + config.num_cached_layers * key_value
    return 2 * (layers + config.hidden_size * config.vocab_size)


def cache_bytes_per_token(config: LlamaSwiftKVConfig, itemsize: int) -> int:
    """Bytes of K and V that the cache holds per token, in a dtype of `itemsize` bytes."""
    return config.num_cached_layers * 2 * _key_value_size(config) * itemsize


def _products(config: LlamaSwiftKVConfig) -> tuple[int, int, int]:
    """Multiply-adds of a layer: per token without K and V, of K and V, and per pair of query and key."""
    query_size = config.num_attention_heads * cast(int, config.head_dim)
    layer = config.hidden_size * (2 * query_size + 3 * config.intermediate_size)  # q_proj, o_proj; the MLP
    return layer, 2 * config.hidden_size * _key_value_size(config), 2 * query_size


def _key_value_size(config: LlamaSwiftKVConfig) -> int:
    return cast(int, config.num_key_value_heads) * cast(int, config.head_dim)


def _tail_leaders(config: LlamaSwiftKVConfig) -> int:
    return config.num_cached_layers - config.num_key_value_layers
