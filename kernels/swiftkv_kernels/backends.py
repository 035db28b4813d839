"""Which path an operation takes."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def device_backend(device: torch.device | str) -> str:
    """The path of a device: 'cpu'; 'triton' on CUDA; 'torch' without triton and elsewhere."""
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpu"
    return "triton" if kind == "cuda" and _can_compile() else "torch"


@functools.cache
def _can_compile() -> bool:
    """Whether triton is there and, on Linux, what it builds its launchers with: a C compiler and Python's headers.

    CUDA wheels of torch bring triton along to where those are missing, and it would fail in the first launch.
    """
    if not importlib.util.find_spec("triton"):
        return False
    lacking = []
    if sys.platform == "linux":
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            lacking.append("a C compiler (gcc)")
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            lacking.append("Python's headers (python3-dev)")
    if lacking:
        warnings.warn(
            f"swiftkv: triton's kernels need {' and '.join(lacking)}; slower operations of torch run instead",
            stacklevel=2,
        )
    return not lacking


def multiplies_natively(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a device's own matrix products take `dtype`. Elsewhere torch unpacks 16-bit numbers in loops of its own,
    several times slower than products of fp32.

    On a CPU that is oneDNN's to say: it takes bf16 with AVX-512 (by fp32's units if need be), AMX or ARM's bf16, and
    fp16 on fewer. A GPU has bf16 from compute capability 8.0 on; one that is not there is taken for such.
    """
    kind = torch.device(device).type
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if kind == "cpu":
        half = "bf16" if dtype == torch.bfloat16 else "fp16"
        try:
            return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")())
        except (AttributeError, RuntimeError):  # a torch without oneDNN
            return False
    if kind == "cuda" and dtype == torch.bfloat16 and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


@functools.cache
def cpu_supports(feature: str) -> bool:
    """Whether the CPU has 'avx2', 'avx512', 'avx512_bf16', 'amx_tile', ...: what torch.cpu can tell of."""
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", bool)())  # False where it goes by another name


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


def made_once(make: Callable[[], Made]) -> Callable[[], Made]:
    """`make`, called once, whichever threads ask first: a second call would find what the first has changed."""
    lock = threading.Lock()
    made: list[Made] = []

    @functools.wraps(make)
    def get() -> Made:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


def import_triton() -> Any:
    """triton, with triton.language, on first use of a kernel. Raises ImportError that says how to install it."""
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise ImportError("backend 'triton' needs triton: pip install 'swiftkv-train[triton]'") from error
    return triton
