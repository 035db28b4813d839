"""Attention of one decoding step over prompts that rows share, several ways, for `swiftkv bench relay`.

    ours           segment_attention: a prefix stored once and read once for all rows that begin with it
    plain          a copy of its prefix before every row's own tokens; torch's attention
    per request    stored once, read for every row: torch's attention over a view that repeats it, merged with that over
                   the row's own tokens by log-sum-exp. What sharing pages of a paged cache comes to
    flashinfer     its cascade (MultiLevelCascadeAttentionWrapper), on GPUs where it is installed

On CPU the R query heads of a K/V head are rows of one product for all of them; torch on GPU does that of itself.

    B rows   M prefixes, rows B / M apart   H query heads   G K/V heads   C head size
    P tokens of a prefix   S own tokens of a row, the newest among them
"""

from __future__ import annotations

import importlib.util
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swiftkv_kernels.attention_partials import joined, merge_outputs
from swiftkv_kernels.segment_attention import PrefixSegment, segment_attention
from swiftkv_kernels.segment_attention_torch import attend_all, attend_shared
from swiftkv_models.shared_prefix import sharing_pays
from swiftkv_train.bench.turns import OURS

PLAIN, PER_REQUEST, FLASHINFER = "plain", "per request", "flashinfer"
PAGE = 16  # tokens
WORKSPACE_BYTES = 128 << 20  # that FlashInfer asks for


@dataclass(frozen=True)
class Shape:
    batch: int
    prefix: int
    suffix: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    prefixes: int = 1

    @property
    def shared_tokens(self) -> int:
        """Whose K/V are kept where every prefix is kept once."""
        return self.prefixes * self.prefix + self.batch * self.suffix

    @property
    def ceiling(self) -> float:
        """Bytes of K/V that a step reads without sharing over those with it: what relay attention can gain at most."""
        return self.batch * (self.prefix + self.suffix) / self.shared_tokens

    def key_value_bytes(self, tokens: int) -> int:
        return 2 * tokens * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class LayerTensors:
    """One layer's; random."""

    query: Tensor  # [B, H, 1, C]
    prefix_key: Tensor  # [M, G, P, C]
    prefix_value: Tensor
    key: Tensor  # [B, G, S, C]
    value: Tensor
    groups: list[int]  # each row's prefix, in order

    @classmethod
    def random(cls, shape: Shape, device: torch.device) -> LayerTensors:
        def drawn(rows: int, heads: int, tokens: int) -> Tensor:
            return torch.randn(rows, heads, tokens, shape.head_dim, device=device).to(shape.dtype)

        prefix_key, prefix_value = (drawn(shape.prefixes, shape.kv_heads, shape.prefix) for _ in range(2))
        key, value = (drawn(shape.batch, shape.kv_heads, shape.suffix) for _ in range(2))
        groups = [row * shape.prefixes // shape.batch for row in range(shape.batch)]
        return cls(drawn(shape.batch, shape.heads, 1), prefix_key, prefix_value, key, value, groups)


Attention = Callable[[], Tensor]  # -> [B, H, 1, C]


def shares(layer: LayerTensors) -> bool:
    """Whether a `SinkWindowCache` shares the prefixes here, or copies them into the rows."""
    count, kv_heads, prefix, size = layer.prefix_key.shape
    return sharing_pays(layer.groups, [prefix] * count, kv_heads * size, layer.key.device)


def ours(layer: LayerTensors) -> Attention:
    """What a `SinkWindowCache` runs at a step of decoding, its rows without padding."""
    (batch, _, suffix, _), prefix, device = layer.key.shape, layer.prefix_key.shape[2], layer.key.device
    positions = torch.arange(prefix, prefix + suffix, dtype=torch.int32, device=device).repeat(batch, 1)
    last = positions[:, -1:].contiguous()
    if not shares(layer):
        key, value = with_prefix(layer)
        if device.type == "cpu":
            return partial(attend_all, layer.query, key, value, layer.query.shape[-1] ** -0.5)
        return partial(segment_attention, layer.query, key, value, None, last, window=suffix, pinned=prefix)
    count = len(layer.prefix_key)
    if device.type == "cpu" and count == 1:  # where the cache knows that all is visible
        scaling = layer.query.shape[-1] ** -0.5
        own = (layer.query, None, layer.key, layer.value)
        return partial(attend_shared, *own, layer.prefix_key, layer.prefix_value, scaling)
    lengths = torch.full([count], prefix, dtype=torch.int32, device=device)
    groups = torch.tensor(layer.groups, dtype=torch.int32, device=device)
    segment = PrefixSegment(layer.prefix_key, layer.prefix_value, lengths, groups)
    tensors = (layer.query, layer.key, layer.value, None if device.type == "cpu" else positions, last)
    return partial(segment_attention, *tensors, window=suffix, prefix=segment)


def with_prefix(layer: LayerTensors) -> tuple[Tensor, Tensor]:
    """K and V [B, G, P + S, C] of rows that each have a copy of their prefix."""
    key = torch.cat([layer.prefix_key[layer.groups], layer.key], dim=2)
    value = torch.cat([layer.prefix_value[layer.groups], layer.value], dim=2)
    return key, value


def plain(layer: LayerTensors) -> Attention:
    key, value = with_prefix(layer)
    if layer.key.device.type == "cpu":
        return partial(attend_all, layer.query, key, value)
    return partial(scaled_dot_product_attention, layer.query, key, value, enable_gqa=True)


def per_request(layer: LayerTensors) -> Attention:
    (batch, heads, _, size), kv_heads = layer.query.shape, layer.key.shape[1]
    query = layer.query.reshape(batch, kv_heads, heads // kv_heads, size)
    members = [layer.groups.count(group) for group in range(len(layer.prefix_key))]
    repeated = [  # of each prefix its rows' queries, and K and V for each of these
        (rows, key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1))
        for rows, key, value in zip(query.split(members), layer.prefix_key, layer.prefix_value, strict=True)
    ]

    def attend() -> Tensor:
        of_prefix = joined([attention_with_log_sum_exp(*tensors) for tensors in repeated], dim=0)
        of_own = attention_with_log_sum_exp(query, layer.key, layer.value)
        return merge_outputs(*of_prefix, *of_own).to(query.dtype).reshape(layer.query.shape)

    return attend


def attention_with_log_sum_exp(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """torch's attention of query [B, G, R, C] over K and V [B, G, N, C], and its natural log-sum-exp [B, G, R]."""
    operators: Any = torch.ops.aten
    if query.device.type == "cpu":
        return operators._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if query.dtype == torch.float32:
        output, log_sum_exp, *_ = operators._scaled_dot_product_efficient_attention(query, key, value, None, True)
    else:
        output, log_sum_exp, *_ = operators._scaled_dot_product_flash_attention(query, key, value)
    return output, log_sum_exp[..., : query.shape[2]]  # some round its length up


def flashinfer_is_installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer(layer: LayerTensors) -> Attention:
    from flashinfer import MultiLevelCascadeAttentionWrapper

    (batch, heads, _, size), (_, kv_heads, suffix, _) = layer.query.shape, layer.key.shape
    (count, _, prefix, _), device = layer.prefix_key.shape, layer.key.device
    shared, own = -(-prefix // PAGE), -(-suffix // PAGE)  # pages of one
    pages = torch.zeros(count * shared + batch * own, 2, PAGE, kv_heads, size, dtype=layer.key.dtype, device=device)
    for place, segments in enumerate(((layer.prefix_key, layer.key), (layer.prefix_value, layer.value))):
        for part, states in zip(pages[:, place].split([count * shared, batch * own]), segments, strict=True):
            rows, _, tokens, _ = states.shape
            in_pages = part.new_zeros(rows, len(part) // rows * PAGE, kv_heads, size)
            in_pages[:, :tokens] = states.transpose(1, 2)
            part.copy_(in_pages.view(part.shape))

    def integers(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    wrapper = MultiLevelCascadeAttentionWrapper(
        2, torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD"
    )
    wrapper.plan(
        [integers([bisect_left(layer.groups, group) for group in range(count + 1)]), integers(range(batch + 1))],
        [integers(range(0, count * shared + 1, shared)), integers(range(0, batch * own + 1, own))],
        [integers(range(count * shared)), integers(range(count * shared, len(pages)))],
        [integers([(prefix - 1) % PAGE + 1] * count), integers([(suffix - 1) % PAGE + 1] * batch)],
        heads,
        kv_heads,
        size,
        PAGE,
        sm_scale=1 / math.sqrt(size),
        q_data_type=layer.query.dtype,
    )
    query = layer.query.squeeze(2).contiguous()
    return lambda: wrapper.run(query, pages).unsqueeze(2)


WAYS: dict[str, Callable[[LayerTensors], Attention]] = {
    OURS: ours,
    PLAIN: plain,
    PER_REQUEST: per_request,
    FLASHINFER: flashinfer,
}
