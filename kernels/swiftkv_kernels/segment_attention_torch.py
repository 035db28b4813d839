"""segment_attention in plain torch: the CPU path, and any other device's where triton is missing.

All of it is attention of queries at positions over keys at positions (a prefix key's is its index), in parts:

    own, few queries     all rows of the batch and all their slots at once; what is hidden is masked
    own, many queries    row by row, pinned and window slots apart, keys sorted by position: a block of queries at a
                         time, against the run of keys that any of them may see
    a group's prefix     the queries of all rows of the group side by side, as if of one row: its K/V are read once for
                         all rows (of a long chunk once for every block of its queries)

`attend_all`, `attend_shared` and `attend_each_shared` are the steps of decoding that a cache asks for most, without
checks. The R query heads of a K/V head are rows of one product throughout: rows [B, G, R, T, C]; other shapes as in
segment_attention. What attends to one set of keys, and merges several, is in `attention_partials`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from swiftkv_kernels.attention_partials import (
    WORK,
    Keys,
    accumulate,
    attend,
    attend_rows,
    fastest_rows,
    joined,
    merge_outputs,
    merge_partials,
    unpacked,
)
from swiftkv_kernels.backends import cpu_supports

BLOCK = 128  # queries
# bf16 query heads of a K/V head: with AMX two are 1.2 times as fast one by one, three as fast or a little faster.
FEW_HEADS = 3


def segment_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
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
    batch, heads, length, size = query.shape
    groups, slots = key.shape[1:3]
    if key_positions is None and prefix is None and key_scale is None and (pinned_query is None or not pinned):
        return attend_all(query, key, value, scaling)
    if key_positions is None and prefix is not None and key_scale is None and not pinned and slots:
        seen = _seen_by_all(prefix, query_positions)
        if seen is not None:
            return attend_shared(query, pinned_query, key, value, *seen, scaling)
    shape = (batch, groups, heads // groups, length, size)
    rows = query.reshape(shape)
    pinned_rows = rows if pinned_query is None else pinned_query.reshape(shape)
    own = Keys(key, value, key_positions, key_scale, value_scale)
    if length == 1 or batch * heads * length * slots <= WORK:
        hidden = None if key_positions is None else _hidden(query_positions, key_positions, window, pinned)
        change = None if pinned_query is None or pinned == 0 else _change(rows, pinned_rows, own, pinned, scaling)
        partials = [attend(rows, own, hidden, change, scaling)]
    else:
        partials = [_row_by_row(rows, own.slots(pinned, slots), query_positions, window, scaling)]
        if pinned:
            partials.append(_row_by_row(pinned_rows, own.slots(0, pinned), query_positions, None, scaling))
    if prefix is not None:
        partials.append(_prefix(pinned_rows, query_positions, prefix, scaling))
    output, log_sum_exp = partials[0]
    for other in partials[1:-1]:
        output, log_sum_exp = merge_partials((output, other[0]), (log_sum_exp, other[1]))
    if len(partials) > 1:
        output = merge_outputs(output, log_sum_exp, *partials[-1])
    return output.reshape(query.shape).to(query.dtype)


def attend_all(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None, visible: Tensor | None = None
) -> Tensor:
    """One query a row, [B, H, 1, C], over K and V [B, G, N, C], all of them or those `visible` [B, 1, 1, N]; nothing is
    checked."""
    batch, heads, _, size = query.shape
    ratio = heads // key.shape[1]
    sdpa = functional.scaled_dot_product_attention
    if 1 < ratio <= FEW_HEADS and query.dtype == torch.bfloat16 and cpu_supports("amx_tile"):
        return sdpa(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    rows = query.reshape(batch, key.shape[1], ratio, size)
    return sdpa(rows, key, value, attn_mask=visible, scale=scaling).reshape(query.shape)


def attend_shared(
    query: Tensor,
    prefix_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
) -> Tensor:
    """One query a row, [B, H, 1, C], over all of its own K and V [B, G, N, C] and of a prefix's [1, G, P, C] that all
    rows share; nothing is checked.

    `prefix_query`, if given, is what meets the prefix. In as few operations as can be: checks, masks and views took a
    seventh of the time of 16 rows over 4,096 tokens.
    """
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    return _with_shared(query, prefix_query, attend_rows(rows, key, value, scaling), prefix_key, prefix_value, scaling)


def attend_each_shared(
    query: Tensor,
    prefix_query: Tensor | None,
    own: Sequence[tuple[Tensor, Tensor]],
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
) -> Tensor:
    """`attend_shared` of rows whose `own` K and V [1, G, N, C] are apart, with an N of their own each."""
    rows = query.reshape(len(query), prefix_key.shape[1], -1, query.shape[-1])
    each = [attend_rows(row, *its_own, scaling) for row, its_own in zip(rows.split(1), own, strict=True)]
    return _with_shared(query, prefix_query, joined(each, dim=0), prefix_key, prefix_value, scaling)


def _with_shared(
    query: Tensor,
    prefix_query: Tensor | None,
    own: tuple[Tensor, Tensor],
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
) -> Tensor:
    """Merges `own`, output [B, G, R, C] and log-sum-exp [B, G, R], with attention to the prefix."""
    (batch, heads, _, size), groups = query.shape, prefix_key.shape[1]
    ratio = heads // groups
    prefix_rows = (query if prefix_query is None else prefix_query).reshape(batch, groups, ratio, size)
    count = batch * ratio
    filled = fastest_rows(count, query.dtype, prefix_key.shape[2])
    side_by_side = query.new_zeros(1, groups, filled, size)
    side_by_side[0, :, :count].view(groups, batch, ratio, size).copy_(prefix_rows.transpose(0, 1))
    output, log_sum_exp = own
    of_prefix, other = attend_rows(side_by_side, prefix_key, prefix_value, scaling)
    of_prefix = of_prefix[0, :, :count].view(groups, batch, ratio, size).transpose(0, 1)
    other = other[0, :, :count].view(groups, batch, ratio).transpose(0, 1)
    weight = torch.sigmoid(other - log_sum_exp).unsqueeze(-1)
    merged = torch.lerp(output.to(weight.dtype), of_prefix.to(weight.dtype), weight)
    return merged.to(query.dtype).reshape(query.shape)


def _hidden(query_positions: Tensor, key_positions: Tensor, window: int | None, pinned: int = 0) -> Tensor:
    """Of [B, T] and [B, N], bool [B, 1, 1, T, N]. Without window, and of the first `pinned` slots, none is too old."""
    (batch, length), slots = query_positions.shape, key_positions.shape[1]
    asked, held = query_positions.view(batch, 1, 1, length, 1), key_positions.view(batch, 1, 1, 1, slots)
    if window is None:
        too_old = held < 0
    else:
        too_old = held <= (asked - window).clamp_min_(-1)
        if pinned:
            too_old[..., :pinned] = held[..., :pinned] < 0
    return (held > asked).logical_or_(too_old)


def _change(rows: Tensor, pinned_rows: Tensor, keys: Keys, pinned: int, scaling: float) -> Tensor:
    """What it changes in the scores of the first keys that `pinned_rows` meet them: [B, G, R, T, pinned]."""
    dtype = accumulate(rows)
    met = unpacked(keys.key[:, :, :pinned], dtype)
    if keys.key_scale is not None:
        met = met * keys.key_scale[:, :, :pinned, None]
    change = (pinned_rows.to(dtype) - rows.to(dtype)).flatten(2, 3) @ met.transpose(2, 3)
    return change.mul_(scaling).view(*rows.shape[:-1], pinned)


def _row_by_row(
    rows: Tensor, keys: Keys, query_positions: Tensor, window: int | None, scaling: float
) -> tuple[Tensor, Tensor]:
    partials = []
    for index in range(len(rows)):
        row = slice(index, index + 1)
        its_keys = keys.rows(row).sorted()
        assert its_keys.positions is not None
        held = its_keys.positions[0].tolist()
        partials.append(_in_blocks(rows[row], its_keys, held, query_positions[row], window, scaling))
    return joined(partials, dim=0)


def _in_blocks(
    rows: Tensor, keys: Keys, held: Sequence[int], query_positions: Tensor, window: int | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """One row's queries over keys at the positions `held`, which ascend."""
    _, groups, ratio, length, _ = rows.shape
    positions = query_positions[0].tolist()
    size = BLOCK
    if not _seen(held, positions, window)[1]:  # masks will be needed
        size = max(16, min(BLOCK, WORK // max(1, groups * ratio * len(held))))
    partials = []
    for start in range(0, length, size):
        slots, all_by_all = _seen(held, positions[start : start + size], window)
        seen = keys.slots(slots.start, slots.stop)
        part = slice(start, start + size)
        hidden = None
        if not all_by_all:
            at = seen.positions
            if at is None:  # positions are indices
                at = torch.arange(slots.start, slots.stop, dtype=torch.int32, device=rows.device)[None]
            hidden = _hidden(query_positions[:, part], at, window)
        partials.append(attend(rows[..., part, :], seen, hidden, None, scaling))
    return joined(partials, dim=3)


def _seen(held: Sequence[int], positions: list[int], window: int | None) -> tuple[slice, bool]:
    """Of keys at positions `held`, those that queries at `positions` see; whether every query sees all of those."""
    first, last = min(positions), max(positions)
    start, every_start = (
        bisect_right(held, -1 if window is None else max(-1, position - window)) for position in (first, last)
    )
    every_end, end = (bisect_right(held, position) for position in (first, last))
    return slice(start, max(start, end)), (start, end) == (every_start, every_end)


def _seen_by_all(
    prefix: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], query_positions: Tensor
) -> tuple[Tensor, Tensor] | None:
    """K and V [1, G, P, C] of the one prefix that all rows have, if each of them sees all of it."""
    key, value, lengths, groups, key_scale, _ = prefix
    first, last = (int(group) for group in groups.aminmax())
    if key_scale is not None or first != last or not 0 <= first < len(lengths):
        return None
    count = min(int(lengths[first]), key.shape[2])
    if not 0 < count <= 1 + int(query_positions.min()):
        return None
    return key[first : first + 1, :, :count], value[first : first + 1, :, :count]


def _prefix(
    rows: Tensor,
    query_positions: Tensor,
    prefix: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Of every row, the part that is its group's prefix."""
    key, value, lengths, groups, *scales = prefix
    _, kv_heads, ratio, length, size = rows.shape
    stored, counts = Keys(key, value, None, *scales), lengths.tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    partials = []
    for group, its_rows in members.items():
        # A row without prefix sees no key of the first.
        index, count = (group, counts[group]) if 0 <= group < len(counts) else (0, 0)
        count = max(0, min(count, key.shape[2]))
        keys = stored.rows(slice(index, index + 1)).slots(0, count)
        queries = _selected(rows, its_rows).permute(1, 2, 0, 3, 4).flatten(2, 3)[None]
        its_positions = _selected(query_positions, its_rows).reshape(1, -1)
        output, log_sum_exp = _in_blocks(queries, keys, range(count), its_positions, None, scaling)
        shape = (kv_heads, ratio, len(its_rows), length)
        output, log_sum_exp = output.view(*shape, size), log_sum_exp.view(shape)
        partials.append((output.permute(2, 0, 1, 3, 4), log_sum_exp.permute(2, 0, 1, 3)))
    output, log_sum_exp = joined(partials, dim=0)
    order = [row for its_rows in members.values() for row in its_rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    return _selected(output, back), _selected(log_sum_exp, back)


def _selected(tensor: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))
