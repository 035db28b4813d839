"""What kv_projection does with its product, as one Triton kernel: rotates K, quantises, writes K and V to their slots.

A program per token, layer, K or V, and block of heads (most often all): it reads its part of the product once and
writes nothing but the caches. Slots are read on the device. Shapes and formulas as in kv_projection and kv_quantize.

float8_e4m3fn is put together from fp32's bits: Triton casts to it from compute capability 8.9 on only, and its
interpreter loses subnormals.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from swiftkv_kernels.backends import import_triton, made_once
from swiftkv_kernels.kv_quantize import SMALLEST_SCALE

tl: Any = None  # triton.language, set by _kernel(): a kernel looks up in its module what it calls

_BLOCK = 2048  # numbers in a program


def rotate_and_store(
    product: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
) -> None:
    """product [B T, L 2 G C] contiguous; cos, sin [B, T, C]; keys and values: a cache and its scale.

    Tokens whose slot is not one of the cache's are dropped.
    """
    layers, _, heads, slots_of_cache, size = keys[0].shape
    stores = []
    for cache, scale in (keys, values):
        cache = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
        stores += [cache, cache if scale is None else scale]  # without scales, a pointer that is not followed
    half_block = 1 << (size // 2 - 1).bit_length()
    head_block = min(1 << (heads - 1).bit_length(), max(1, _BLOCK // (2 * half_block)))
    grid = (len(product), layers, 2 * -(-heads // head_block))
    with torch.cuda.device(product.device) if product.is_cuda else contextlib.nullcontext():
        _kernel()[grid](
            product,
            *(argument for table in (cos, sin) for argument in (table, *table.stride())),
            slots,
            *slots.stride(),
            *(argument for tensor in stores for argument in (tensor, *tensor.stride()[:4])),
            slots.shape[1],
            slots_of_cache,
            HEADS=heads,
            HALF=size // 2,
            SMALLEST_SCALE=SMALLEST_SCALE,
            HEAD_BLOCK=head_block,
            HALF_BLOCK=half_block,
            num_warps=4,
        )


def _rotate_and_store(
    product,
    cos,
    cos_b,
    cos_t,
    cos_c,
    sin,
    sin_b,
    sin_t,
    sin_c,
    slots,
    slots_b,
    slots_t,
    key_cache,
    key_l,
    key_b,
    key_g,
    key_r,
    key_scale,
    key_scale_l,
    key_scale_b,
    key_scale_g,
    key_scale_r,
    value_cache,
    value_l,
    value_b,
    value_g,
    value_r,
    value_scale,
    value_scale_l,
    value_scale_b,
    value_scale_g,
    value_scale_r,
    length,
    slots_of_cache,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    is_value = tl.program_id(2) % 2
    head = tl.program_id(2) // 2 * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    column = tl.arange(0, HALF_BLOCK)
    row = token // length
    time = token % length
    slot = tl.load(slots + row * slots_b + time * slots_t)
    if (slot < 0) | (slot >= slots_of_cache):
        return

    inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
    states = product + ((token * tl.num_programs(1) + layer) * 2 + is_value) * (2 * HEADS * HALF)
    states += head[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(states, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(states + HALF, mask=inside, other=0.0).to(tl.float32)
    if is_value:
        cache = value_cache + layer * value_l + row * value_b + slot * value_r
        scale = value_scale + layer * value_scale_l + row * value_scale_b + slot * value_scale_r
        _store_heads(first, second, cache, scale, value_g, value_scale_g, head, column, HEADS, HALF, SMALLEST_SCALE)
    else:
        known = column < HALF
        cos_1 = cos + row * cos_b + time * cos_t + column * cos_c
        sin_1 = sin + row * sin_b + time * sin_t + column * sin_c
        cos_2 = tl.load(cos_1 + HALF * cos_c, mask=known, other=0.0).to(tl.float32)[None, :]
        sin_2 = tl.load(sin_1 + HALF * sin_c, mask=known, other=0.0).to(tl.float32)[None, :]
        cos_1 = tl.load(cos_1, mask=known, other=0.0).to(tl.float32)[None, :]
        sin_1 = tl.load(sin_1, mask=known, other=0.0).to(tl.float32)[None, :]
        cache = key_cache + layer * key_l + row * key_b + slot * key_r
        scale = key_scale + layer * key_scale_l + row * key_scale_b + slot * key_scale_r
        _store_heads(
            first * cos_1 - second * sin_1,
            second * cos_2 + first * sin_2,
            cache,
            scale,
            key_g,
            key_scale_g,
            head,
            column,
            HEADS,
            HALF,
            SMALLEST_SCALE,
        )


def _store_heads(
    first,
    second,
    cache,
    scale,
    cache_g,
    scale_g,
    head,
    column,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
):
    """Both halves [HEAD_BLOCK, HALF_BLOCK] of the heads to where cache and scale point: one layer, row and slot."""
    element: tl.constexpr = cache.dtype.element_ty
    if element == tl.int8 or element == tl.uint8:
        limit: tl.constexpr = 127.0 if element == tl.int8 else 448.0
        # A maximum passes over NaN: the scale has to show it.
        largest_1 = tl.max(tl.where(first == first, tl.abs(first), float("inf")), axis=1)
        largest_2 = tl.max(tl.where(second == second, tl.abs(second), float("inf")), axis=1)
        # div_rn rounds as IEEE has it; a plain / does not on a GPU.
        scales = tl.maximum(tl.div_rn(tl.maximum(largest_1, largest_2), limit), SMALLEST_SCALE)
        tl.store(scale + head * scale_g, scales, mask=head < HEADS)
        first = _one_byte(tl.div_rn(first, scales[:, None]), element == tl.int8)
        second = _one_byte(tl.div_rn(second, scales[:, None]), element == tl.int8)
    inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
    cache += head[:, None] * cache_g + column[None, :]
    tl.store(cache, first.to(element), mask=inside)
    tl.store(cache + HALF, second.to(element), mask=inside)


def _one_byte(steps, IS_INT8: tl.constexpr):
    """int8, or the bits of float8_e4m3fn: to nearest, ties to even."""
    magic = 12582912.0  # 1.5 x 2^23: fp32 has no bits behind the point there
    if IS_INT8:
        return ((steps + magic) - magic).to(tl.int8)
    else:
        bits = steps.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # 20 of 23 bits of mantissa are rounded off, the exponent's bias goes from 127 to 7
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = ((tl.abs(steps) * 512.0 + magic) - magic).to(tl.int32)  # in units of 2^-9
        return (tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)  # 2^-6


@made_once
def _kernel() -> Any:
    """The kernel above, made on first use: importing this module does not import triton."""
    triton = import_triton()
    globals().update(tl=triton.language, _store_heads=triton.jit(_store_heads), _one_byte=triton.jit(_one_byte))
    return triton.jit(_rotate_and_store)
