"""Which path an operation takes."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor


def device_backend(device: torch.device | str) -> str:
    """The path of a device: 'cpu'; 'triton' on CUDA; 'torch' without triton and elsewhere."""
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpu"
    return "triton" if kind == "cuda" and importlib.util.find_spec("triton") else "torch"


def resolve_backend(asked: str | None, tensor: Tensor) -> str:
    """The path for a tensor like this: the one asked for, or its device's ('torch' in place of 'triton' for fp64).

    Raises ValueError where that cannot be.
    """
    device, double = tensor.device, tensor.dtype == torch.float64
    if asked is None:
        backend = device_backend(device)
        return "torch" if backend == "triton" and double else backend
    if asked not in {"cpu", "torch", "triton"}:
        raise ValueError(f"backend must be 'cpu', 'torch' or 'triton', not {asked!r}")
    if asked == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' cannot take tensors on {device}")
    if asked == "triton" and double:
        raise ValueError("backend 'triton' computes in fp32: fp64 needs backend 'torch'")
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}
    if asked == "triton" and device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 for CPU ones; these are on {device}"
        )
    return asked
