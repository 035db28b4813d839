"""Attention implementations for transformers on a CPU, where its own are slow.

`packed_causal`: `swiftkv_kernels.causal_attention`, for whole sequences: training.
`grouped_sdpa`: for inference with any of transformers' caches. Its own sdpa repeats K/V for the query heads that share
them; here these heads are rows of one product, for a single query.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from swiftkv_kernels.causal_attention import causal_attention
from swiftkv_kernels.segment_attention_torch import attend_all

PACKED_CAUSAL = "packed_causal"
GROUPED = "grouped_sdpa"
SDPA = ("sdpa", GROUPED)  # which leave the causal mask to the operator where nothing is padded


def packed_causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention; output [B, T, H, C]. All positions at once: no cache, no dropout."""
    if dropout or query.shape[2] != key.shape[2]:
        raise ValueError(f"attention implementation {PACKED_CAUSAL!r} takes whole sequences, without cache or dropout")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in another
    output = causal_attention(query, key, value, allowed=attention_mask, scaling=scaling)
    return output.transpose(1, 2).contiguous(), None


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' calling convention; output [B, T, H, C]. What it has nothing better for, sdpa does."""
    if query.device.type == "cpu" and query.shape[2] == 1 and not dropout:
        return attend_all(query, key, value, scaling, attention_mask).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


for _name, _attention in ((PACKED_CAUSAL, packed_causal_attention), (GROUPED, grouped_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
