"""segment_attention in plain torch: the CPU path, and any other device's where triton is missing.

All of it is attention of queries at positions over keys at positions (a prefix key's is its index), in parts:

    own, few queries     all rows of the batch and all their slots at once; what is hidden is masked
    own, many queries    row by row, pinned and window slots apart, keys sorted by position: a block of queries at a
                         time, against the run of keys that any of them may see
    a group's prefix     the queries of all rows of the group side by side, as if of one row: its K/V are read once for
                         all rows (of a long chunk once for every block of its queries)

`attend_all` and `attend_shared` are the steps of decoding that a cache asks for most, without checks. The R query heads
of a K/V head are rows of one product throughout: rows [B, G, R, T, C]; other shapes as in segment_attention. Partial
outputs are in the query's dtype (fp32 for fp16 where torch's flash operator is missing), log-sum-exps in fp32 or fp64.
"""

from __future__ import annotations

import contextlib
import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from swiftkv_kernels.causal_attention import half_precision_products
from swiftkv_kernels.kv_quantize import float16_of_float8, kv_dequantize

FLASH = "_scaled_dot_product_flash_attention_for_cpu"  # private, but the only one on CPU that gives a log-sum-exp
BLOCK = 128  # queries
PACKED_FROM = 64  # bf16 queries, by torch's flash operator
# bf16 query heads of a K/V head: with AMX two are 1.2 times as fast one by one, three as fast or a little faster.
FEW_HEADS = 3
# Queries over 8-bit K/V, unpacked to their dtype for it: 384 take a third of the time, 48 as long.
FLASH_UNPACKED_FROM = 64
WORK = 1 << 20  # numbers in a temporary: scores, unpacked keys. More would leave the cache

# Added to hidden scores. Not -inf: what the operator then gives a row that sees nothing depends on its version. With
# this, its log-sum-exp tells.
_HIDDEN = -1e38


class _Keys(NamedTuple):
    """K and V [B, G, N, C] at positions [B, N]; with scales [B, G, N] if quantised."""

    key: Tensor
    value: Tensor
    positions: Tensor | None  # None: a single query sees them all; of a prefix, indices
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def rows(self, part: slice) -> _Keys:
        scales = (None if scale is None else scale[part] for scale in self[3:])
        positions = None if self.positions is None else self.positions[part]
        return _Keys(self.key[part], self.value[part], positions, *scales)

    def heads(self, part: slice) -> _Keys:
        scales = (None if scale is None else scale[:, part] for scale in self[3:])
        return _Keys(self.key[:, part], self.value[:, part], self.positions, *scales)

    def slots(self, start: int, stop: int) -> _Keys:
        if (start, stop) == (0, self.key.shape[2]):
            return self
        part = slice(start, stop)
        scales = (None if scale is None else scale[:, :, part] for scale in self[3:])
        positions = None if self.positions is None else self.positions[:, part]
        return _Keys(self.key[:, :, part], self.value[:, :, part], positions, *scales)

    def sorted(self) -> _Keys:
        """One row's, by position: empty slots first."""
        assert self.positions is not None
        positions, order = self.positions[0].sort()
        scales = (None if scale is None else scale.index_select(2, order) for scale in self[3:])
        return _Keys(self.key.index_select(2, order), self.value.index_select(2, order), positions[None], *scales)


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
    own = _Keys(key, value, key_positions, key_scale, value_scale)
    if length == 1 or batch * heads * length * slots <= WORK:
        hidden = None if key_positions is None else _hidden(query_positions, key_positions, window, pinned)
        change = None if pinned_query is None or pinned == 0 else _change(rows, pinned_rows, own, pinned, scaling)
        partials = [_attend(rows, own, hidden, change, scaling)]
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
    attend = functional.scaled_dot_product_attention
    if 1 < ratio <= FEW_HEADS and query.dtype == torch.bfloat16 and _supported("amx_tile"):
        return attend(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    rows = query.reshape(batch, key.shape[1], ratio, size)
    return attend(rows, key, value, attn_mask=visible, scale=scaling).reshape(query.shape)


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
    (batch, heads, _, size), groups = query.shape, key.shape[1]
    ratio = heads // groups
    rows = query.reshape(batch, groups, ratio, size)
    prefix_rows = rows if prefix_query is None else prefix_query.reshape(rows.shape)
    count = batch * ratio
    filled = PACKED_FROM if _more_rows_are_faster(count, rows.dtype, prefix_key.shape[2]) else count
    side_by_side = rows.new_zeros(1, groups, filled, size)
    side_by_side[0, :, :count].view(groups, batch, ratio, size).copy_(prefix_rows.transpose(0, 1))
    output, log_sum_exp = _attend_all(rows, key, value, scaling)
    of_prefix, other = _attend_all(side_by_side, prefix_key, prefix_value, scaling)
    of_prefix = of_prefix[0, :, :count].view(groups, batch, ratio, size).transpose(0, 1)
    other = other[0, :, :count].view(groups, batch, ratio).transpose(0, 1)
    weight = torch.sigmoid(other - log_sum_exp).unsqueeze(-1)
    merged = torch.lerp(output.to(weight.dtype), of_prefix.to(weight.dtype), weight)
    return merged.to(query.dtype).reshape(query.shape)


def _attend_all(queries: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`_attend` of queries [B, G, Q, C] to all keys."""
    if queries.stride(-1) != 1:
        queries = queries.contiguous()  # the operator reads whatever is beside, and does not complain
    with contextlib.suppress(AttributeError, RuntimeError):
        return getattr(torch.ops.aten, FLASH)(queries, key, value, scale=scaling)
    output, log_sum_exp = _products(queries.unsqueeze(2), _Keys(key, value, None), None, None, scaling)
    return output.squeeze(2), log_sum_exp.squeeze(2)


def merge_partials(outputs: Sequence[Tensor], log_sum_exps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint sets of keys from that over each: outputs [.., C], natural log-sum-exps [..].

    A set that shows a query nothing has output 0 and log-sum-exp -inf there, and so has a union of such sets.
    """
    output, log_sum_exp = outputs[0], log_sum_exps[0]
    for other_output, other in zip(outputs[1:], log_sum_exps[1:], strict=True):
        output = merge_outputs(output, log_sum_exp, other_output, other)
        log_sum_exp = torch.logaddexp(log_sum_exp, other)
    return output.to(log_sum_exp.dtype), log_sum_exp


def merge_outputs(output: Tensor, log_sum_exp: Tensor, other_output: Tensor, other: Tensor) -> Tensor:
    """The same of two sets, where nothing else will be added: the output alone."""
    # By operations that use no threads for so few numbers: softmax would.
    weight = torch.sigmoid(other - log_sum_exp).nan_to_num_(0.0)  # -inf less -inf
    return torch.lerp(output.to(weight.dtype), other_output.to(weight.dtype), weight.unsqueeze(-1))


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


def _change(rows: Tensor, pinned_rows: Tensor, keys: _Keys, pinned: int, scaling: float) -> Tensor:
    """What it changes in the scores of the first keys that `pinned_rows` meet them: [B, G, R, T, pinned]."""
    dtype = _accumulate(rows)
    met = _unpacked(keys.key[:, :, :pinned], dtype)
    if keys.key_scale is not None:
        met = met * keys.key_scale[:, :, :pinned, None]
    change = (pinned_rows.to(dtype) - rows.to(dtype)).flatten(2, 3) @ met.transpose(2, 3)
    return change.mul_(scaling).view(*rows.shape[:-1], pinned)


def _row_by_row(
    rows: Tensor, keys: _Keys, query_positions: Tensor, window: int | None, scaling: float
) -> tuple[Tensor, Tensor]:
    partials = []
    for index in range(len(rows)):
        row = slice(index, index + 1)
        its_keys = keys.rows(row).sorted()
        assert its_keys.positions is not None
        held = its_keys.positions[0].tolist()
        partials.append(_in_blocks(rows[row], its_keys, held, query_positions[row], window, scaling))
    return _joined(partials, dim=0)


def _in_blocks(
    rows: Tensor, keys: _Keys, held: Sequence[int], query_positions: Tensor, window: int | None, scaling: float
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
        partials.append(_attend(rows[..., part, :], seen, hidden, None, scaling))
    return _joined(partials, dim=3)


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
    stored, counts = _Keys(key, value, None, *scales), lengths.tolist()
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
    output, log_sum_exp = _joined(partials, dim=0)
    order = [row for its_rows in members.values() for row in its_rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    return _selected(output, back), _selected(log_sum_exp, back)


def _selected(tensor: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def _joined(partials: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    if len(partials) == 1:
        return partials[0]
    outputs, log_sum_exps = zip(*partials, strict=True)
    return torch.cat(outputs, dim), torch.cat(log_sum_exps, dim)


def _attend(
    rows: Tensor, keys: _Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """One softmax over `keys`: output [B, G, R, T, C], 0 where nothing is seen, and log-sum-exp [B, G, R, T].

    hidden [B, 1, 1, T, N]; change [B, G, R, T, S] is added to the scores of the first S keys.
    """
    if keys.key.shape[2] == 0:
        return torch.zeros_like(rows), torch.full_like(rows[..., 0], float("-inf"), dtype=_accumulate(rows))
    if rows.device.type == "cpu":
        with contextlib.suppress(AttributeError, RuntimeError):  # another torch may lack it, or take other arguments
            if keys.key_scale is None:
                return _flash(rows, keys, hidden, change, scaling)
            if rows.shape[2] * rows.shape[3] >= FLASH_UNPACKED_FROM:
                return _in_tiles(_flash_unpacked, rows.shape[-1], rows, keys, hidden, change, scaling)
    return _products(rows, keys, hidden, change, scaling)


def _flash(
    rows: Tensor, keys: _Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    operator = getattr(torch.ops.aten, FLASH)
    mask = None
    if hidden is not None or change is not None:
        batch, groups, ratio, length, _ = rows.shape
        mask = torch.zeros(batch, 1, 1, length, keys.key.shape[2], dtype=_accumulate(rows), device=rows.device)
        if hidden is not None:
            mask.masked_fill_(hidden, _HIDDEN)
        if change is None:
            mask = mask.expand(-1, -1, ratio, -1, -1)
        else:
            mask = mask.expand(-1, groups, ratio, -1, -1).contiguous()
            mask[..., : change.shape[-1]].add_(change)
        mask = mask.flatten(2, 3)
    queries = rows.flatten(2, 3)
    if queries.stride(-1) != 1:
        queries = queries.contiguous()  # the operator reads whatever is beside, and does not complain
    given = queries.shape[2]
    if mask is None and _more_rows_are_faster(given, queries.dtype, keys.key.shape[2]):
        queries = functional.pad(queries, (0, 0, 0, PACKED_FROM - given))
    output, log_sum_exp = operator(queries, keys.key, keys.value, attn_mask=mask, scale=scaling)
    if queries.shape[2] != given:
        output, log_sum_exp = output[:, :, :given], log_sum_exp[:, :, :given]
    output, log_sum_exp = output.view(rows.shape), log_sum_exp.reshape(rows.shape[:-1])
    if hidden is not None and log_sum_exp.min() < _HIDDEN / 2:
        return _without_blind(output, log_sum_exp)
    return output, log_sum_exp


def _flash_unpacked(
    rows: Tensor, keys: _Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    assert keys.key_scale is not None
    assert keys.value_scale is not None
    key = kv_dequantize(keys.key, keys.key_scale, rows.dtype)
    value = kv_dequantize(keys.value, keys.value_scale, rows.dtype)
    return _flash(rows, _Keys(key, value, keys.positions), hidden, change, scaling)


def _products(
    rows: Tensor, keys: _Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    numbers = max(rows.shape[2] * rows.shape[3], rows.shape[4])  # scores, or the unpacked key
    return _in_tiles(_product, numbers, rows, keys, hidden, change, scaling)


def _in_tiles(
    attend: Callable[..., tuple[Tensor, Tensor]],
    numbers: int,
    rows: Tensor,
    keys: _Keys,
    hidden: Tensor | None,
    change: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`attend` in tiles of rows, K/V heads and keys: so what it makes, `numbers` for a slot, stays in the cache."""
    batch, groups, slots = len(rows), rows.shape[1], keys.key.shape[2]
    few_slots = min(slots, max(1, WORK // numbers))
    fitting = max(1, WORK // (numbers * few_slots))
    few_groups = min(groups, fitting)
    few_rows = max(1, fitting // groups)
    by_row = []
    for row in _parts(batch, few_rows):
        by_group = []
        for group in _parts(groups, few_groups):
            its_keys, its_hidden = keys.rows(row).heads(group), None if hidden is None else hidden[row]
            its_change = None if change is None else change[row, group]
            by_slot = []
            for part in _parts(slots, few_slots):
                seen_hidden, seen_change = (None if x is None else x[..., part] for x in (its_hidden, its_change))
                seen = its_keys.slots(part.start, part.stop)
                by_slot.append(attend(rows[row, group], seen, seen_hidden, seen_change, scaling))
            by_group.append(by_slot[0] if len(by_slot) == 1 else merge_partials(*zip(*by_slot, strict=True)))
        by_row.append(_joined(by_group, dim=1))
    return _joined(by_row, dim=0)


def _parts(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _product(
    rows: Tensor, keys: _Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scales multiply scores and weights, fp32 both: packed K/V are exact in bf16 without them."""
    dtype = _accumulate(rows)
    # fp16 would lose weights that a small scale makes smaller still.
    weight_dtype = rows.dtype if rows.dtype == torch.bfloat16 else dtype
    queries, key = rows.to(dtype).flatten(2, 3).flatten(0, 1), _unpacked(keys.key, dtype).flatten(0, 1)
    with half_precision_products(rows.dtype):
        scores = torch.bmm(queries, key.transpose(1, 2)).view(*rows.shape[:-1], -1)
    scores.mul_(scaling if keys.key_scale is None else keys.key_scale[:, :, None, None].to(dtype) * scaling)
    if change is not None:
        scores[..., : change.shape[-1]].add_(change)
    if hidden is not None:
        scores.masked_fill_(hidden, _HIDDEN)
    weights = torch.softmax(scores, dim=-1)
    log_sum_exp = scores.amax(-1) - weights.amax(-1).log_()  # the largest weight is exp(largest score - log-sum-exp)
    if keys.value_scale is not None:
        weights.mul_(keys.value_scale[:, :, None, None])
    weights = weights.to(weight_dtype).flatten(2, 3).flatten(0, 1)
    output = torch.bmm(weights, _unpacked(keys.value, weight_dtype).flatten(0, 1)).view(rows.shape)
    return (output, log_sum_exp) if hidden is None else _without_blind(output, log_sum_exp)


def _without_blind(output: Tensor, log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that see nothing have been given a mean of what is hidden from them."""
    blind = log_sum_exp < _HIDDEN / 2
    return output.masked_fill(blind.unsqueeze(-1), 0.0), log_sum_exp.masked_fill(blind, float("-inf"))


def _unpacked(stored: Tensor, dtype: torch.dtype) -> Tensor:
    # Through fp32: torch converts fp16 to bf16 one at a time.
    return (float16_of_float8(stored).float() if stored.dtype == torch.float8_e4m3fn else stored).to(dtype)


def _accumulate(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _more_rows_are_faster(count: int, dtype: torch.dtype, slots: int) -> bool:
    """For so many rows torch's flash operator lays K and V out for AMX first: over 4,096 keys 40 take it 0.73 ms, 64
    0.64 ms, and over 256 they take 0.054 and 0.066 ms."""
    few = PACKED_FROM * 5 // 8 <= count < PACKED_FROM
    return few and slots >= 1024 and dtype == torch.bfloat16 and _supported("amx_tile")


@functools.cache
def _supported(feature: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", bool)())  # False where it goes by another name
