"""`swiftkv_kernels.causal_attention` as an attention implementation of transformers, for training on CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from swiftkv_kernels.causal_attention import causal_attention

PACKED_CAUSAL = "packed_causal"


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
    output = causal_attention(query, key, value, allowed=attention_mask, scaling=scaling)
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="packed_causal"` known to transformers."""
    AttentionInterface.register(PACKED_CAUSAL, packed_causal_attention)
    AttentionMaskInterface.register(PACKED_CAUSAL, sdpa_mask)
