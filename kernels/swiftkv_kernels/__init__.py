"""Tensor operations of SwiftKV training and inference: torch and, where present, triton; nothing of transformers."""

from swiftkv_kernels.causal_attention import causal_attention, causal_attention_backend, causal_attention_reference
from swiftkv_kernels.distillation_kl import distillation_kl, distillation_kl_backend, distillation_kl_reference

__all__ = [
    "causal_attention",
    "causal_attention_backend",
    "causal_attention_reference",
    "distillation_kl",
    "distillation_kl_backend",
    "distillation_kl_reference",
]
