"""Tensor operations of SwiftKV training and inference: torch and, where present, triton; nothing of transformers."""

from swiftkv_kernels.causal_attention import causal_attention, causal_attention_backend, causal_attention_reference
from swiftkv_kernels.distillation_kl import distillation_kl, distillation_kl_backend, distillation_kl_reference
from swiftkv_kernels.kv_projection import kv_projection, kv_projection_backend, kv_projection_reference
from swiftkv_kernels.kv_quantize import kv_dequantize, kv_quantize, kv_quantize_backend, kv_quantize_reference
from swiftkv_kernels.packed_linear import (
    PackedWeight,
    packed_linear,
    packed_linear_backend,
    packed_linear_reference,
)
from swiftkv_kernels.segment_attention import (
    PrefixSegment,
    segment_attention,
    segment_attention_backend,
    segment_attention_reference,
)

__all__ = [
    "PackedWeight",
    "PrefixSegment",
    "causal_attention",
    "causal_attention_backend",
    "causal_attention_reference",
    "distillation_kl",
    "distillation_kl_backend",
    "distillation_kl_reference",
    "kv_dequantize",
    "kv_projection",
    "kv_projection_backend",
    "kv_projection_reference",
    "kv_quantize",
    "kv_quantize_backend",
    "kv_quantize_reference",
    "packed_linear",
    "packed_linear_backend",
    "packed_linear_reference",
    "segment_attention",
    "segment_attention_backend",
    "segment_attention_reference",
]
