"""The frozen base in 8 or 4 bits while its tail is trained (`model.quantization`), as QLoRA does (arXiv 2305.14314).

Only the linear layers inside the decoder layers that nothing trains are quantised, by bitsandbytes: int8 with one scale
per row and outliers in half precision (arXiv 2208.07339), nf4 in blocks of 64 with quantised scales. Embeddings, head,
norms and the tail's new projections stay as they are. The calibration runs before, on exact weights; base and student
then see the same quantised trunk. What is exported is the unquantised base with the trained tail.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.errors import UserError

Quantization = Literal["int8", "nf4"]
# Bytes per weight: int8; 4 bits, 8-bit scales of blocks of 64, fp32 scales of blocks of 256 of those.
BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}


def quiet_bitsandbytes() -> None:
    """It would say which kernels of a hub it does not find, and at every product that int8 takes its inputs in fp16."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def import_bitsandbytes(needed_by: str) -> Any:
    """The package. Raises UserError where it is not installed."""
    quiet_bitsandbytes()
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f"{needed_by} needs bitsandbytes: pip install 'swiftkv-train[bitsandbytes]'") from None
    return bitsandbytes


def quantizable_layers(model: LlamaSwiftKVForCausalLM) -> dict[str, nn.Linear]:
    """The linear layers that are quantised, by name: those of the base in its decoder layers."""
    return {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear) and "_swiftkv" not in name
    }


def quantize_base(model: LlamaSwiftKVForCausalLM, kind: Quantization, device: torch.device) -> None:
    """Replace the base's linear layers by quantised ones on `device`, one at a time: it never holds them whole.

    Raises UserError where bitsandbytes is missing.
    """
    bnb = import_bitsandbytes(f"model.quantization {kind}")
    for name, linear in quantizable_layers(model).items():
        weight, shape = linear.weight.data, (linear.in_features, linear.out_features)
        has_bias = linear.bias is not None
        if kind == "nf4":
            quantized = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=weight.dtype, device="meta")
            quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
            quantized.support_avx512bf16_for_cpu = False  # a layout for inference, through which no gradient flows
        else:
            quantized = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False, device="meta")
            quantized.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        if has_bias:
            quantized.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.model.layers.get_submodule(parent), child, quantized.to(device).eval())
