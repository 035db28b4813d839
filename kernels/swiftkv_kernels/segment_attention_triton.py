"""segment_attention as Triton kernels: split keys, fp32 partials, merged at once. Launches depend on shapes alone.

    _prefixes     a program per block of queries of a group's rows, K/V head, and share of the prefix's keys: partials.
                  It finds its group and rows by counting through `groups`
    _own_slots    a program per row of the batch, K/V head, block of the row's T R queries, and share of its slots. The
                  only one of a block, or the last of its programs to come to its end, merges the block's partials,
                  the prefix's too, into the output

The R query heads of a K/V head are rows of one tile. Where a tile of keys shows a block nothing, K and V are not read.
Shapes as in segment_attention; partials [parts, B, H, T, C] and natural log-sum-exps [parts, B, H, T], prefixes' last.
A block's programs count themselves in `ended`: a release of what each has written, an acquire for the last (the
pattern of CUDA's threadFenceReduction sample).
float8_e4m3fn is read as bits: Triton casts it from compute capability 8.9 on only, its interpreter loses subnormals.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from swiftkv_kernels.backends import import_triton, made_once

tl: Any = None  # triton.language, set by _kernels(): a kernel looks up in its module what it calls

_SPLIT = 256  # keys that are worth a program of their own
_MOST_PARTS = 32  # of a segment
_MERGED_AT_ONCE = 4096  # numbers of partials: 32 registers of each of 128 threads


def segment_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    *,
    window: int,
    pinned: int,
    pinned_query: Tensor | None,
    prefix: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scaling: float,
) -> Tensor:
    """See segment_attention."""
    own_slots, prefixes = _kernels()
    (batch, heads, length, size), (groups, slots) = query.shape, key.shape[1:3]
    query, pinned_query = _strided_alike(query, query if pinned_query is None else pinned_query)
    query_positions = query_positions.contiguous()
    rows = heads // groups * length
    # Products of fp32 run on the plain units, from registers: tiles that fit them.
    narrow, wide = query.dtype.itemsize == 2, size > 128
    most = 64 if narrow else 16 if wide else 32
    block = _power_of_two(rows, most=most)
    grid = (batch * groups, -(-rows // block))
    own_parts = _parts(slots, grid[0] * grid[1], query.device)
    prefix_grid, prefix_block = (0, 0, 0), _power_of_two(batch * rows, most=most)
    group_of_row, prefix_count = query_positions, 0  # a pointer that is not followed
    if prefix is not None:
        group_of_row, prefix_count = prefix[3].contiguous(), len(prefix[0])
        # Of every group the last block may be incomplete.
        blocks = (batch * rows + min(prefix_count, batch) * (prefix_block - 1)) // prefix_block
        least_blocks = -(-batch * rows // prefix_block)  # with one group, as most often
        prefix_grid = (blocks, groups, _parts(prefix[0].shape[2], least_blocks * groups, query.device))
    parts = own_parts + prefix_grid[2]

    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partials = log_sum_exps = output  # pointers that are not followed
    ended = query_positions
    if parts > 1:
        partials = query.new_empty((parts, *query.shape), dtype=torch.float32)
        log_sum_exps = query.new_empty((parts, batch, heads, length), dtype=torch.float32)
    if own_parts > 1:
        ended = query.new_zeros(grid, dtype=torch.int32)
    padded = _power_of_two(size)
    sizes: dict[str, Any] = {"R": heads // groups, "C": size, "BLOCK_C": padded}
    sizes |= {"BLOCK_N": (64 if narrow else 32) // (1 + wide), "UPCAST": not query.is_cuda}
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        if prefix is not None:
            prefix_key, prefix_value, lengths, _, *scales = prefix
            prefixes[prefix_grid](
                *(pinned_query, *pinned_query.stride()[:3]),
                *_stored(prefix_key, prefix_value, *scales),
                *(lengths.contiguous(), group_of_row, query_positions),
                *(partials, log_sum_exps, scaling, batch, length, prefix_count, prefix_key.shape[2], own_parts),
                BLOCK_GROUPS=_power_of_two(prefix_count),
                BLOCK_B=_power_of_two(batch, most=64),
                BLOCK_M=prefix_block,
                **sizes,
            )
        own_slots[(*grid, own_parts)](
            *(query, pinned_query, *query.stride()[:3]),
            *_stored(key, value, key_scale, value_scale),
            *(key_positions, *key_positions.stride(), query_positions),
            *(group_of_row, prefix_count, partials, log_sum_exps, ended, output),
            *(scaling, window, length, slots, pinned, parts),
            G=groups,
            BLOCK_M=block,
            BLOCK_PARTS=max(1, _MERGED_AT_ONCE // (block * padded)),
            SPLIT=own_parts > 1,
            **sizes,
        )
    return output


def _own_slots(
    query,
    pinned_query,
    query_b,
    query_h,
    query_t,
    key,
    key_b,
    key_g,
    key_n,
    value,
    value_b,
    value_g,
    value_n,
    key_scale,
    value_scale,
    scale_b,
    scale_g,
    scale_n,
    positions,
    positions_b,
    positions_n,
    query_positions,
    group_of_row,
    prefix_count,
    partials,
    log_sum_exps,
    ended,
    output,
    scaling,
    window,
    length,
    slots,
    pinned,
    all_parts,
    G: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = (tl.program_id(0) // G).to(tl.int64)
    group = (tl.program_id(0) % G).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    index = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < length * R
    time = (index // R).to(tl.int64)
    head = group * R + index % R
    asked = tl.load(query_positions + row * length + time, mask=inside, other=-1)
    where = row * query_b + head * query_h + time * query_t

    key += row * key_b + group * key_g
    value += row * value_b + group * value_g
    key_scale += row * scale_b + group * scale_g
    value_scale += row * scale_b + group * scale_g
    positions += row * positions_b
    keys = (key, key_n, value, value_n, key_scale, value_scale, scale_n, positions, positions_n)
    state = _nothing_seen(BLOCK_M, BLOCK_C)
    if pinned > 0:
        q = _queries(pinned_query, where, inside, C, BLOCK_C, UPCAST)
        pinned_end = tl.where(part == 0, pinned, 0)
        state = _attend(state, q, asked, keys, 0, pinned_end, window, scaling, True, False, C, BLOCK_N, BLOCK_C)
    share = tl.cdiv(tl.cdiv(slots - pinned, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    first = pinned + tl.program_id(2) * share
    end = tl.minimum(first + share, slots)
    q = _queries(query, where, inside, C, BLOCK_C, UPCAST)
    state = _attend(state, q, asked, keys, first, end, window, scaling, True, True, C, BLOCK_N, BLOCK_C)

    place = (row * (G * R) + head) * length + time
    queries = tl.num_programs(0).to(tl.int64) * R * length
    own_parts = tl.num_programs(2)
    first_part = own_parts  # what the prefix has left for this program's own state
    if SPLIT:
        _store_partial(partials, log_sum_exps, state, part * queries + place, inside, C, BLOCK_C)
        tl.debug_barrier()  # all of this block of threads have stored
        if tl.atomic_add(ended + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1) < own_parts - 1:
            return
        state, first_part = _nothing_seen(BLOCK_M, BLOCK_C), 0
    parts = own_parts
    if all_parts > own_parts:
        prefix = tl.load(group_of_row + row)
        parts = tl.where((prefix >= 0) & (prefix < prefix_count), all_parts, own_parts)
    for start in range(first_part, parts, BLOCK_PARTS):
        state = _merge(state, partials, log_sum_exps, place, queries, start, parts, inside, C, BLOCK_C, BLOCK_PARTS)
    _, total, mean = state
    channel = tl.arange(0, BLOCK_C)
    mean = (mean / tl.where(total > 0, total, 1.0)[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] * C + channel[None, :], mean, mask=inside[:, None] & (channel < C)[None, :])


def _prefixes(
    query,
    query_b,
    query_h,
    query_t,
    key,
    key_m,
    key_g,
    key_n,
    value,
    value_m,
    value_g,
    value_n,
    key_scale,
    value_scale,
    scale_m,
    scale_g,
    scale_n,
    lengths,
    group_of_row,
    query_positions,
    partials,
    log_sum_exps,
    scaling,
    batch,
    length,
    count,
    capacity,
    own_parts,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Groups have their blocks one after the other: whose is this one?
    block = tl.program_id(0)
    prefix = tl.arange(0, BLOCK_GROUPS)
    members = tl.zeros([BLOCK_GROUPS], tl.int32)
    for start in range(0, batch, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        its_group = tl.load(group_of_row + row, mask=row < batch, other=-1)
        members += tl.sum((its_group[None, :] == prefix[:, None]).to(tl.int32), axis=1)
    blocks = tl.where(prefix < count, tl.cdiv(members * length * R, BLOCK_M), 0)
    ends = tl.cumsum(blocks, axis=0)
    mine = tl.sum((ends <= block).to(tl.int32), axis=0)
    if mine >= count:
        return
    index = (block - tl.sum(tl.where(prefix == mine, ends - blocks, 0), axis=0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < tl.sum(tl.where(prefix == mine, members, 0), axis=0) * length * R

    # Queries lie member by member: the rows of the batch that these members are.
    member = index // (length * R)
    row_of = tl.zeros([BLOCK_M], tl.int32)
    before = 0
    for start in range(0, batch, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        is_mine = (tl.load(group_of_row + row, mask=row < batch, other=-1) == mine).to(tl.int32)
        number = before + tl.cumsum(is_mine, axis=0) - 1
        is_this = (is_mine[None, :] > 0) & (number[None, :] == member[:, None])
        row_of += tl.sum(tl.where(is_this, row[None, :], 0), axis=1)
        before += tl.sum(is_mine, axis=0)

    group = tl.program_id(1).to(tl.int64)
    rest = index % (length * R)
    time = (rest // R).to(tl.int64)
    head = group * R + rest % R
    row = row_of.to(tl.int64)
    asked = tl.load(query_positions + row * length + time, mask=inside, other=-1)
    where = row * query_b + head * query_h + time * query_t

    stored = tl.minimum(tl.load(lengths + mine), capacity)
    share = tl.cdiv(tl.cdiv(stored, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    first = tl.program_id(2) * share
    end = tl.minimum(first + share, stored)
    prefix_index = mine.to(tl.int64)
    key += prefix_index * key_m + group * key_g
    value += prefix_index * value_m + group * value_g
    key_scale += prefix_index * scale_m + group * scale_g
    value_scale += prefix_index * scale_m + group * scale_g
    keys = (key, key_n, value, value_n, key_scale, value_scale, scale_n, lengths, 0)
    q = _queries(query, where, inside, C, BLOCK_C, UPCAST)
    state = _nothing_seen(BLOCK_M, BLOCK_C)
    state = _attend(state, q, asked, keys, first, end, 0, scaling, False, False, C, BLOCK_N, BLOCK_C)
    part = own_parts + tl.program_id(2).to(tl.int64)
    place = ((part * batch + row) * (tl.num_programs(1) * R) + head) * length + time
    _store_partial(partials, log_sum_exps, state, place, inside, C, BLOCK_C)


def _nothing_seen(BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per query: the largest score, the sum of weights relative to that, the sum of V by these weights [M, C]."""
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return largest, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)


def _attend(
    state,
    q,
    asked,
    keys,
    first,
    end,
    window,
    scaling,
    HAS_POSITIONS: tl.constexpr,
    WINDOWED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`state` after an online softmax of queries q [M, C] at positions `asked` over the keys first .. end - 1 too."""
    largest, total, mean = state
    key, key_n, value, value_n, key_scale, value_scale, scale_n, positions, positions_n = keys
    element: tl.constexpr = key.dtype.element_ty
    QUANTISED: tl.constexpr = element == tl.int8 or element == tl.uint8
    # In fp16, weights times a small scale would be lost.
    weight_type: tl.constexpr = tl.bfloat16 if QUANTISED and q.dtype == tl.float16 else q.dtype
    channel = tl.arange(0, BLOCK_C)
    newest = tl.max(asked, axis=0)
    too_old = tl.min(tl.where(asked >= 0, asked, 2147483647), axis=0) - window
    for start in range(first, end, BLOCK_N):
        slot = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        if HAS_POSITIONS:
            held = tl.load(positions + slot * positions_n, mask=slot < end, other=-1)
        else:
            held = tl.where(slot < end, slot, -1).to(tl.int32)
        needed = (held >= 0) & (held <= newest)
        if WINDOWED:
            needed = needed & (held > too_old)
        if tl.max(needed.to(tl.int32), axis=0) > 0:
            inside = needed[:, None] & (channel < C)[None, :]
            k = tl.load(key + slot[:, None] * key_n + channel[None, :], mask=inside, other=0)
            v = tl.load(value + slot[:, None] * value_n + channel[None, :], mask=inside, other=0)  # while k is used
            scores = tl.dot(q, tl.trans(_unpacked(k, q.dtype)), input_precision="ieee") * scaling
            if QUANTISED:
                scores *= tl.load(key_scale + slot * scale_n, mask=needed, other=0.0)[None, :]
            seen = (held >= 0)[None, :] & (held[None, :] <= asked[:, None])
            if WINDOWED:
                seen = seen & (asked[:, None] - held[None, :] < window)
            scores = tl.where(seen, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            reference = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp(scores - reference[:, None])
            shrink = tl.exp(largest - reference)
            largest = larger
            total = total * shrink + tl.sum(weights, axis=1)
            if QUANTISED:
                weights *= tl.load(value_scale + slot * scale_n, mask=needed, other=0.0)[None, :]
            mean = mean * shrink[:, None]
            mean = tl.dot(weights.to(weight_type), _unpacked(v, weight_type), mean, input_precision="ieee")
    return largest, total, mean


def _merge(
    state,
    partials,
    log_sum_exps,
    place,
    queries,
    first,
    end,
    inside,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """`state` after the partials first .. end - 1, BLOCK_PARTS at most: each a key, its log-sum-exp the score."""
    largest, total, mean = state
    part = first + tl.arange(0, BLOCK_PARTS)
    where = part.to(tl.int64)[:, None] * queries + place[None, :]
    written = (part < end)[:, None] & inside[None, :]
    channel = tl.arange(0, BLOCK_C)[None, None, :]
    scores = tl.load(log_sum_exps + where, mask=written, other=float("-inf"))
    means = tl.load(partials + where[:, :, None] * C + channel, mask=written[:, :, None] & (channel < C), other=0.0)
    larger = tl.maximum(largest, tl.max(scores, axis=0))
    reference = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp(scores - reference[None, :])
    shrink = tl.exp(largest - reference)
    mean = mean * shrink[:, None] + tl.sum(weights[:, :, None] * means, axis=0)
    return larger, total * shrink + tl.sum(weights, axis=0), mean


def _queries(query, where, inside, C: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr):
    """As tiles; in fp32 where the interpreter multiplies, which gets bf16 wrong."""
    channel = tl.arange(0, BLOCK_C)
    q = tl.load(query + where[:, None] + channel[None, :], mask=inside[:, None] & (channel < C)[None, :], other=0.0)
    return q.to(tl.float32) if UPCAST else q


def _unpacked(stored, dtype: tl.constexpr):
    if stored.dtype == tl.uint8:
        # Sign, exponent and mantissa to where fp16 has them: 2^-8 of the number, as the biases are 7 and 15.
        bits = stored.to(tl.int32)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(dtype)
    else:
        return stored.to(dtype)


def _store_partial(partials, log_sum_exps, state, place, inside, C: tl.constexpr, BLOCK_C: tl.constexpr):
    largest, total, mean = state
    some = total > 0
    total = tl.where(some, total, 1.0)
    channel = tl.arange(0, BLOCK_C)
    mean = (mean / total[:, None]).to(partials.dtype.element_ty)
    tl.store(partials + place[:, None] * C + channel[None, :], mean, mask=inside[:, None] & (channel < C)[None, :])
    tl.store(log_sum_exps + place, tl.where(some, largest + tl.log(total), float("-inf")), mask=inside)


@made_once
def _kernels() -> tuple[Any, Any]:
    """The kernels above, made on first use: importing this module does not import triton."""
    triton = import_triton()
    called = (_nothing_seen, _attend, _merge, _queries, _unpacked, _store_partial)
    globals().update({function.__name__: triton.jit(function) for function in called}, tl=triton.language)
    # Their number grows while a window fills: specialised to 1 or to multiples of 16, kernels would be made anew.
    changing = {"do_not_specialize": ["own_parts", "all_parts"]}
    return triton.jit(_own_slots, **changing), triton.jit(_prefixes, **changing)


def _strided_alike(query: Tensor, pinned_query: Tensor) -> tuple[Tensor, Tensor]:
    """With the same strides, the last of them 1."""
    if query.stride() == pinned_query.stride() and query.stride(3) == 1:
        return query, pinned_query
    return query.contiguous(), pinned_query.contiguous()


def _stored(key: Tensor, value: Tensor, key_scale: Tensor | None, value_scale: Tensor | None) -> tuple[Any, ...]:
    """A segment's K/V, scales and strides as the kernels take them."""
    if key.dtype == torch.float8_e4m3fn:
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    states = (key, *key.stride()[:3], value, *value.stride()[:3])
    if key_scale is None or value_scale is None:
        return (*states, key, value, 0, 0, 0)  # pointers that are not followed
    if key_scale.stride() != value_scale.stride():
        key_scale, value_scale = key_scale.contiguous(), value_scale.contiguous()
    return (*states, key_scale, value_scale, *key_scale.stride())


def _parts(keys: int, programs: int, device: torch.device) -> int:
    """Into how many shares keys are split so that four programs fall to every multiprocessor."""
    wanted = -(-4 * _multiprocessors(device) // max(1, programs))
    return max(1, min(wanted, -(-keys // _SPLIT), _MOST_PARTS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power_of_two(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The next one, as tiles need it."""
    return min(most, max(least, 1 << (size - 1).bit_length()))
