"""Keys and values in one byte each: symmetric, one scale per token and head.

    scale = max |x| / limit        quantised = round(x / scale)        dequantised = quantised scale

    states x [..., C]: keys or values, C head size        quantised [..., C]        scale [...] fp32

    int8           limit 127   |x - dequantised| <= scale / 2 (rounded to nearest, ties to even)
    float8_e4m3fn  limit 448   |x - dequantised| <= max(2^-4 |x|, 2^-10 scale): half a step of 3 mantissa bits, or half
                               of the smallest subnormal, 2^-9 (arXiv 2209.05433)

Both up to fp32 rounding of the quotient and of the product. No scale is below fp32's smallest normal number: that is
the scale of zeros, which come back as zeros, and nothing is ever divided by zero. A vector that holds inf or NaN (or an
fp64 number that makes its scale overflow fp32) gets a scale that is not finite, whatever its quantised numbers are, and
no number of it comes back finite: what was broken stays visible.

Keys are quantised after RoPE: what is stored is what attention multiplies with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@torch.no_grad()
def kv_quantize(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`states` [..., C], fp16, bf16, fp32 or fp64, as (quantised [..., C] of `dtype`, scale [...] fp32).

    `dtype` is torch.int8 or torch.float8_e4m3fn. Carries no gradient. Raises ValueError on misfits.
    """
    _check(states, dtype)
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    limit: Any = LIMITS[dtype]
    if exact.device.type != "cpu":
        limit = exact.new_full((), limit)  # with a number CUDA would multiply by its rounded inverse
    scale = (exact.abs().amax(-1) / limit).to(torch.float32).clamp_min_(SMALLEST_SCALE)
    # A quotient exceeds the limit by a rounding at most, and rounds to it: nothing is left to clamp.
    steps = exact / scale.unsqueeze(-1)
    if dtype == torch.int8:
        steps.round_()
    return steps.to(dtype), scale


def kv_dequantize(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`quantised` [..., C] times `scale` [...], multiplied in fp32 (fp64 if `dtype` is), rounded once to `dtype`.

    Raises ValueError on misfits.
    """
    if quantised.dtype not in LIMITS:
        raise ValueError(f"quantised must be int8 or float8_e4m3fn, not {quantised.dtype}")
    if scale.shape != quantised.shape[:-1] or quantised.ndim == 0:
        raise ValueError(f"scale must be {tuple(quantised.shape[:-1])}, one per vector, not {tuple(scale.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype, not {dtype}")
    if quantised.dtype == torch.float8_e4m3fn and quantised.device.type == "cpu":
        quantised = float16_of_float8(quantised)
    states = quantised.to(torch.promote_types(dtype, torch.float32))
    return states.mul_(scale.unsqueeze(-1)).to(dtype)


def kv_quantize_reference(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same from fp64, clamped before it is cast."""
    limit = LIMITS[dtype]
    exact = states.double()
    scale = (exact.abs().amax(-1) / limit).float().clamp_min(SMALLEST_SCALE)
    steps = (exact / scale.double().unsqueeze(-1)).clamp(-limit, limit)
    return (steps.round() if dtype == torch.int8 else steps.float()).to(dtype), scale


def kv_quantize_backend(device: torch.device | str) -> str:
    """'cpu' or 'torch' (the same code elsewhere). On CUDA, kv_projection's kernel quantises what it writes itself."""
    return "cpu" if torch.device(device).type == "cpu" else "torch"


def float16_of_float8(quantised: Tensor) -> Tensor:
    """float8_e4m3fn as fp16, exactly (but NaN: 480), by moving bits: torch casts one at a time on CPU, 7 times slower.

    Sign, 4 bits of exponent and 3 of mantissa land where fp16 has its sign, the low 4 of 5 and the high 3 of 10, which
    stands for 2^-8 of the number (the biases are 7 and 15), subnormals included.
    """
    bits = quantised.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return bits.bitwise_and_(~(1 << 14)).view(torch.float16).mul_(256)  # bit 14: a copy of the sign


def _check(states: Tensor, dtype: torch.dtype) -> None:
    if dtype not in LIMITS:
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, not {dtype}")
    if not states.is_floating_point() or states.dtype.itemsize < 2:
        raise ValueError(f"states must be fp16, bf16, fp32 or fp64, not {states.dtype}")
    if states.ndim == 0 or states.shape[-1] == 0:
        raise ValueError(f"states must be [..., C] with C at least 1, not {tuple(states.shape)}")
