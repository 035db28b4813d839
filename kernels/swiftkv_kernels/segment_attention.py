"""Attention of new queries over two segments of K/V: a row's own slots, and a prefix that it shares with other rows.

    O = softmax over all visible scores of both segments together,   score = q k' / sqrt(C)

    own slot j of row b       visible to query i where 0 <= p_bj <= t_bi and (j < pinned or t_bi - p_bj < window)
    prefix key s of group n   visible to query i where s < lengths_n and s <= t_bi

    B batch   T queries   H query heads   G K/V heads (H = G R)   C head size   N own slots   M groups   P prefix slots
    query, pinned_query [B, H, T, C]   key, value [B, G, N, C]   p = key_positions [B, N]   t = query_positions [B, T]
    prefix: key, value [M, G, P, C]   lengths [M]   groups [B] (-1: no prefix)   ->   [B, H, T, C]

A row's slots are `pinned` attention sinks and a ring window, in any order: K is stored rotated at its absolute position
and a slot tells which that is (-1: empty). RoPE being relative, positions in the cache, as StreamingLLM counts them
(arXiv 2309.17453), only take a second rotation of the query, `pinned_query`, for pinned slots and prefix. A shared
prefix is read once for all rows of its group (relay attention, arXiv 2402.14808).

Each part gives an output and its natural log-sum-exp, and these merge exactly, whatever is empty or dominates:

    O = sum_i w_i O_i,   w = softmax(LSE)        LSE_i = -inf and O_i = 0 where part i shows a query nothing
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from swiftkv_kernels.backends import device_backend, resolve_backend
from swiftkv_kernels.kv_quantize import LIMITS
from swiftkv_kernels.segment_attention_torch import segment_attention_torch
from swiftkv_kernels.segment_attention_triton import segment_attention_triton


class PrefixSegment(NamedTuple):
    """Prefixes stored once each, and which row of the batch goes on from which. See the module's docstring."""

    key: Tensor  # [M, G, P, C]
    value: Tensor  # [M, G, P, C]
    lengths: Tensor  # [M] int32
    groups: Tensor  # [B] int32, -1 for a row without prefix
    key_scale: Tensor | None = None  # [M, G, P] fp32
    value_scale: Tensor | None = None  # [M, G, P] fp32


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    query_positions: Tensor,
    *,
    window: int,
    pinned: int = 0,
    pinned_query: Tensor | None = None,
    prefix: PrefixSegment | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scaling: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """See the module's docstring. Queries that see nothing give 0. There is no backward pass.

    key and value may be strided views (contiguous in their last dimension), in the query's dtype, or int8 or
    float8_e4m3fn with key_scale and value_scale [B, G, N] fp32, one per token and K/V head. What empty slots hold must
    be finite. Positions, lengths and groups are int32; `pinned_query` None is `query`, `scaling` None 1 / sqrt(C), and
    `key_positions` None lets a single query see all slots.

    backend 'cpu', 'torch' or 'triton' overrules `segment_attention_backend`. Under 'triton' positions, lengths and
    groups are read by the device alone: launches depend on shapes only, and a CUDA graph may replay them. Raises
    ValueError on misfits.
    """
    _check_key_value("key", query, key, value, key_scale, value_scale)
    _check_own(query, pinned_query, key, key_positions, query_positions, window, pinned)
    if prefix is not None:
        _check_key_value("prefix.key", query, prefix.key, prefix.value, prefix.key_scale, prefix.value_scale)
        _check_prefix(query, key, prefix)
        prefix = prefix if prefix.key.numel() else None
    tensors = (query, pinned_query, key, value, *((prefix.key, prefix.value) if prefix is not None else ()))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("segment_attention has no backward pass: call it under torch.no_grad()")
    triton = resolve_backend(backend, query) == "triton"
    if query.numel() == 0:
        return torch.empty_like(query)
    if key_positions is None and triton:
        key_positions = query_positions.expand(-1, key.shape[2])  # where all is visible
    path: Callable[..., Tensor] = segment_attention_triton if triton else segment_attention_torch
    return path(
        query,
        key,
        value,
        key_positions,
        query_positions,
        window=window,
        pinned=pinned,
        pinned_query=pinned_query,
        prefix=prefix,
        key_scale=key_scale,
        value_scale=value_scale,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )


def segment_attention_backend(device: torch.device | str) -> str:
    """The path a device takes: 'cpu'; 'triton' on CUDA; 'torch' (the CPU path's code) without triton and elsewhere.

    fp64 takes 'torch' in place of 'triton'.
    """
    return device_backend(device)


def segment_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    query_positions: Tensor,
    *,
    window: int,
    pinned: int = 0,
    pinned_query: Tensor | None = None,
    prefix: PrefixSegment | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """The same from one softmax over all keys side by side, computed and returned in fp32 (fp64 if an input is)."""
    tensors = (query, key, value, pinned_query, key_scale, value_scale, *(prefix or ()))
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    ratio = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query.to(dtype) * scaling
    pinned_queries = queries if pinned_query is None else pinned_query.to(dtype) * scaling

    def heads(stored: Tensor, scale: Tensor | None) -> Tensor:
        stored = stored.to(dtype) if scale is None else stored.to(dtype) * scale.to(dtype).unsqueeze(-1)
        return stored.repeat_interleave(ratio, dim=1)

    keys, values = heads(key, key_scale), heads(value, value_scale)
    is_pinned = torch.arange(key.shape[2], device=key.device) < pinned
    scores = torch.where(is_pinned, pinned_queries @ keys.transpose(2, 3), queries @ keys.transpose(2, 3))
    if key_positions is None:
        key_positions = query_positions.expand(-1, key.shape[2])
    age = query_positions.unsqueeze(2) - key_positions.unsqueeze(1)
    visible = (key_positions.unsqueeze(1) >= 0) & (age >= 0) & (is_pinned | (age < window))
    if prefix is not None and prefix.key.shape[0]:
        row = prefix.groups.long().clamp_min(0)
        prefix_keys = heads(prefix.key, prefix.key_scale)[row]
        scores = torch.cat([scores, pinned_queries @ prefix_keys.transpose(2, 3)], dim=3)
        values = torch.cat([values, heads(prefix.value, prefix.value_scale)[row]], dim=2)
        position = torch.arange(prefix.key.shape[2], device=key.device)
        stored = (position < prefix.lengths[row].unsqueeze(1)) & (prefix.groups >= 0).unsqueeze(1)
        reached = stored.unsqueeze(1) & (position <= query_positions.unsqueeze(2))
        visible = torch.cat([visible, reached], dim=2)
    weights = torch.softmax(scores.masked_fill(~visible.unsqueeze(1), float("-inf")), dim=3).nan_to_num(0.0)
    return weights @ values


def _check_key_value(
    name: str, query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor | None, value_scale: Tensor | None
) -> None:
    """One segment's K/V against the query."""
    other = name.replace("key", "value")
    if query.ndim != 4 or not query.is_floating_point():
        raise ValueError(f"query must be floating [B, H, T, C], not {query.dtype} {tuple(query.shape)}")
    if key.ndim != 4 or key.shape[3] != query.shape[3] or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{name} must be [.., G, .., C] with query [B, H, T, C], H a multiple of G, not {tuple(key.shape)} with "
            f"{tuple(query.shape)}"
        )
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"{other} must be like {name}, {key.dtype} {tuple(key.shape)}, not {value.dtype} {tuple(value.shape)}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(f"{name} and {other} must be on {query.device}, not {key.device} and {value.device}")
    if key.shape[3] > 1 and not key.stride(3) == value.stride(3) == 1:
        raise ValueError(f"{name} and {other} must be contiguous in their last dimension")
    if key.dtype not in LIMITS:
        if key.dtype != query.dtype:
            raise ValueError(f"{name} must be {query.dtype} as query, int8 or float8_e4m3fn, not {key.dtype}")
        if key_scale is not None or value_scale is not None:
            raise ValueError(f"{name}_scale and {other}_scale are for int8 and float8_e4m3fn, not for {key.dtype}")
        return
    for scale_name, scale in ((f"{name}_scale", key_scale), (f"{other}_scale", value_scale)):
        if scale is None:
            raise ValueError(f"{name} of {key.dtype} needs {scale_name} {tuple(key.shape[:3])}")
        _check_tensor(scale_name, scale, torch.float32, key.shape[:3], query)


def _check_own(
    query: Tensor,
    pinned_query: Tensor | None,
    key: Tensor,
    key_positions: Tensor | None,
    query_positions: Tensor,
    window: int,
    pinned: int,
) -> None:
    (batch, _, length, _), slots = query.shape, key.shape[2]
    if key.shape[0] != batch:
        raise ValueError(f"key must have the batch of query, {batch}, not {key.shape[0]}")
    if key_positions is not None:
        _check_tensor("key_positions", key_positions, torch.int32, (batch, slots), query)
    elif length != 1:
        raise ValueError(f"key_positions may be None for one query, not for {length}")
    _check_tensor("query_positions", query_positions, torch.int32, (batch, length), query)
    if pinned_query is not None:
        _check_tensor("pinned_query", pinned_query, query.dtype, query.shape, query)
    if not 1 <= window < 2**31:
        raise ValueError(f"window must be between 1 and 2^31 - 1, not {window}")
    if not 0 <= pinned <= slots:
        raise ValueError(f"pinned must be between 0 and the {slots} slots of key, not {pinned}")


def _check_prefix(query: Tensor, key: Tensor, prefix: PrefixSegment) -> None:
    if prefix.key.shape[1] != key.shape[1]:
        raise ValueError(f"prefix.key must have the K/V heads of key, {key.shape[1]}, not {prefix.key.shape[1]}")
    _check_tensor("prefix.lengths", prefix.lengths, torch.int32, prefix.key.shape[:1], query)
    _check_tensor("prefix.groups", prefix.groups, torch.int32, query.shape[:1], query)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], query: Tensor) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != query.device:
        raise ValueError(
            f"{name} must be {dtype} {tuple(shape)} on {query.device}, not {tensor.dtype} {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
