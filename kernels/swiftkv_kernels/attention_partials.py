"""Attention over one set of keys, or over several merged: its output and its log-sum-exp, in plain torch.

By torch's flash operator for CPUs, whose own log-sum-exp it gives, or by two products and a softmax between them where
that is missing, on other devices and over 8-bit K/V. The R query heads of a K/V head are rows of one product: rows
[B, G, R, T, C]. Outputs are in the query's dtype (fp32 for fp16 without the operator), log-sum-exps in fp32 or fp64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from swiftkv_kernels.backends import cpu_supports
from swiftkv_kernels.causal_attention import half_precision_products
from swiftkv_kernels.kv_quantize import float16_of_float8, kv_dequantize

FLASH = "_scaled_dot_product_flash_attention_for_cpu"  # private, but the only one on CPU that gives a log-sum-exp
PACKED_FROM = 64  # bf16 queries, by torch's flash operator
# Queries over 8-bit K/V, unpacked to their dtype for it: 384 take a third of the time, 48 as long.
FLASH_UNPACKED_FROM = 64
WORK = 1 << 20  # numbers in a temporary: scores, unpacked keys. More would leave the cache

# Added to hidden scores. Not -inf: what the operator then gives a row that sees nothing depends on its version. With
# this, its log-sum-exp tells.
HIDDEN = -1e38


class Keys(NamedTuple):
    """K and V [B, G, N, C] at positions [B, N]; with scales [B, G, N] if quantised."""

    key: Tensor
    value: Tensor
    positions: Tensor | None  # None: a single query sees them all; of a prefix, indices
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def rows(self, part: slice) -> Keys:
        scales = (None if scale is None else scale[part] for scale in self[3:])
        positions = None if self.positions is None else self.positions[part]
        return Keys(self.key[part], self.value[part], positions, *scales)

    def heads(self, part: slice) -> Keys:
        scales = (None if scale is None else scale[:, part] for scale in self[3:])
        return Keys(self.key[:, part], self.value[:, part], self.positions, *scales)

    def slots(self, start: int, stop: int) -> Keys:
        if (start, stop) == (0, self.key.shape[2]):
            return self
        part = slice(start, stop)
        scales = (None if scale is None else scale[:, :, part] for scale in self[3:])
        positions = None if self.positions is None else self.positions[:, part]
        return Keys(self.key[:, :, part], self.value[:, :, part], positions, *scales)

    def sorted(self) -> Keys:
        """One row's, by position: empty slots first."""
        assert self.positions is not None
        positions, order = self.positions[0].sort()
        scales = (None if scale is None else scale.index_select(2, order) for scale in self[3:])
        return Keys(self.key.index_select(2, order), self.value.index_select(2, order), positions[None], *scales)


def attend(
    rows: Tensor, keys: Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """One softmax over `keys`: output [B, G, R, T, C], 0 where nothing is seen, and log-sum-exp [B, G, R, T].

    hidden [B, 1, 1, T, N]; change [B, G, R, T, S] is added to the scores of the first S keys.
    """
    if keys.key.shape[2] == 0:
        return torch.zeros_like(rows), torch.full_like(rows[..., 0], float("-inf"), dtype=accumulate(rows))
    if rows.device.type == "cpu" and has_flash(rows.dtype):
        if keys.key_scale is None:
            return _flash(rows, keys, hidden, change, scaling)
        if rows.shape[2] * rows.shape[3] >= FLASH_UNPACKED_FROM:
            return _in_tiles(_flash_unpacked, rows.shape[-1], rows, keys, hidden, change, scaling)
    return _products(rows, keys, hidden, change, scaling)


def attend_rows(queries: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`attend` of queries [B, G, Q, C] to all keys."""
    if queries.stride(-1) != 1:
        queries = queries.contiguous()  # the operator reads whatever is beside, and does not complain
    if queries.device.type == "cpu" and has_flash(queries.dtype):
        return getattr(torch.ops.aten, FLASH)(queries, key, value, scale=scaling)
    output, log_sum_exp = _products(queries.unsqueeze(2), Keys(key, value, None), None, None, scaling)
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


def joined(partials: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    if len(partials) == 1:
        return partials[0]
    outputs, log_sum_exps = zip(*partials, strict=True)
    return torch.cat(outputs, dim), torch.cat(log_sum_exps, dim)


def _flash(
    rows: Tensor, keys: Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    operator = getattr(torch.ops.aten, FLASH)
    mask = None
    if hidden is not None or change is not None:
        batch, groups, ratio, length, _ = rows.shape
        mask = torch.zeros(batch, 1, 1, length, keys.key.shape[2], dtype=accumulate(rows), device=rows.device)
        if hidden is not None:
            mask.masked_fill_(hidden, HIDDEN)
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
    if mask is None and (filled := fastest_rows(given, queries.dtype, keys.key.shape[2])) > given:
        queries = functional.pad(queries, (0, 0, 0, filled - given))
    output, log_sum_exp = operator(queries, keys.key, keys.value, attn_mask=mask, scale=scaling)
    if queries.shape[2] != given:
        output, log_sum_exp = output[:, :, :given], log_sum_exp[:, :, :given]
    output, log_sum_exp = output.view(rows.shape), log_sum_exp.reshape(rows.shape[:-1])
    if hidden is not None and log_sum_exp.min() < HIDDEN / 2:
        return _without_blind(output, log_sum_exp)
    return output, log_sum_exp


def _flash_unpacked(
    rows: Tensor, keys: Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    assert keys.key_scale is not None
    assert keys.value_scale is not None
    key = kv_dequantize(keys.key, keys.key_scale, rows.dtype)
    value = kv_dequantize(keys.value, keys.value_scale, rows.dtype)
    return _flash(rows, Keys(key, value, keys.positions), hidden, change, scaling)


def _products(
    rows: Tensor, keys: Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    numbers = max(rows.shape[2] * rows.shape[3], rows.shape[4])  # scores, or the unpacked key
    return _in_tiles(_product, numbers, rows, keys, hidden, change, scaling)


def _in_tiles(
    attend: Callable[..., tuple[Tensor, Tensor]],
    numbers: int,
    rows: Tensor,
    keys: Keys,
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
        by_row.append(joined(by_group, dim=1))
    return joined(by_row, dim=0)


def _parts(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _product(
    rows: Tensor, keys: Keys, hidden: Tensor | None, change: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scales multiply scores and weights, fp32 both: packed K/V are exact in bf16 without them."""
    dtype = accumulate(rows)
    # fp16 would lose weights that a small scale makes smaller still.
    weight_dtype = rows.dtype if rows.dtype == torch.bfloat16 else dtype
    queries, key = rows.to(dtype).flatten(2, 3).flatten(0, 1), unpacked(keys.key, dtype).flatten(0, 1)
    with half_precision_products(rows.dtype):
        scores = torch.bmm(queries, key.transpose(1, 2)).view(*rows.shape[:-1], -1)
    scores.mul_(scaling if keys.key_scale is None else keys.key_scale[:, :, None, None].to(dtype) * scaling)
    if change is not None:
        scores[..., : change.shape[-1]].add_(change)
    if hidden is not None:
        scores.masked_fill_(hidden, HIDDEN)
    weights = torch.softmax(scores, dim=-1)
    log_sum_exp = scores.amax(-1) - weights.amax(-1).log_()  # the largest weight is exp(largest score - log-sum-exp)
    if keys.value_scale is not None:
        weights.mul_(keys.value_scale[:, :, None, None])
    weights = weights.to(weight_dtype).flatten(2, 3).flatten(0, 1)
    output = torch.bmm(weights, unpacked(keys.value, weight_dtype).flatten(0, 1)).view(rows.shape)
    return (output, log_sum_exp) if hidden is None else _without_blind(output, log_sum_exp)


def _without_blind(output: Tensor, log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that see nothing have been given a mean of what is hidden from them."""
    blind = log_sum_exp < HIDDEN / 2
    return output.masked_fill(blind.unsqueeze(-1), 0.0), log_sum_exp.masked_fill(blind, float("-inf"))


def unpacked(stored: Tensor, dtype: torch.dtype) -> Tensor:
    # Through fp32: torch converts fp16 to bf16 one at a time.
    return (float16_of_float8(stored).float() if stored.dtype == torch.float8_e4m3fn else stored).to(dtype)


def accumulate(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def fastest_rows(count: int, dtype: torch.dtype, slots: int) -> int:
    """`count`, or more rows that torch's flash operator is done with sooner: it lays K and V out for AMX for them.

    Over 4,096 keys 40 rows take it 0.73 ms, 64 0.64 ms; over 256 they take 0.054 and 0.066 ms.
    """
    few = PACKED_FROM * 5 // 8 <= count < PACKED_FROM
    return PACKED_FROM if few and slots >= 1024 and dtype == torch.bfloat16 and cpu_supports("amx_tile") else count


def has_flash(dtype: torch.dtype) -> bool:
    """Whether this torch has the flash operator for CPUs, for this dtype, as it is called here."""
    return _tried(FLASH, dtype)


@functools.cache
def _tried(operator: str, dtype: torch.dtype) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 2, 8, generator=generator, device="cpu").to(dtype)
    mask = torch.zeros(1, 1, 2, 2, dtype=accumulate(query), device="cpu")
    try:
        output, log_sum_exp = getattr(torch.ops.aten, operator)(query, key, value, attn_mask=mask, scale=1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    scores = (query.double() @ key.double().transpose(2, 3)).log_softmax(-1)
    expected = scores.exp() @ value.double()
    sums = torch.logsumexp(query.double() @ key.double().transpose(2, 3), -1)
    errors = (output.double() - expected).abs().max(), (log_sum_exp.double() - sums).abs().max()
    return all(bool(error <= 16 * torch.finfo(dtype).eps) for error in errors)
