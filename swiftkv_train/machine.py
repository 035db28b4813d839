"""What a measured number depends on, and when the work of a device is done."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swiftkv_kernels.backends import cpu_supports

if TYPE_CHECKING:
    from swiftkv_train.loading import Model


def environment(model: Model) -> dict[str, Any]:
    """What a measured number depends on."""
    import transformers

    return {
        "device": device_name(model.device),
        **({"instructions": _instructions()} if model.device.type == "cpu" else {}),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """Of the GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _instructions() -> str:
    """Of the processor, the best that matrix products have a use for."""
    named = {"amx_tile": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512": "AVX-512", "avx2": "AVX2"}
    return next((name for feature, name in named.items() if cpu_supports(feature)), platform.machine())


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
