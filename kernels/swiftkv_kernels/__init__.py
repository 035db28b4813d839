"""Tensor operations of SwiftKV training and inference: torch, triton where it is present, no transformers."""

from swiftkv_kernels.distillation_kl import distillation_kl, distillation_kl_backend, distillation_kl_reference

__all__ = ["distillation_kl", "distillation_kl_backend", "distillation_kl_reference"]
