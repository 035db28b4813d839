"""Causal attention over whole (packed) sequences, as training and scoring need it: no cache, all positions at once.

    O = softmax(Q K' / sqrt(C) + mask) V        mask: causal, and where given only the pairs that `allowed` marks

    B batch   T tokens   H query heads   G K/V heads (H = G R)   C head size   S rows of a block
    query [B, H, T, C]   key, value [B, G, T, C]   allowed [B, 1, T, T] bool   ->   [B, H, T, C]

torch's own operator makes the output everywhere, and the gradients but on a CPU. There it multiplies small tiles head
by head backward, at a fraction of the machine's rate, and blocks of rows are taken instead: the R query heads of a K/V
head are rows of one product, S positions at a time against the keys from the first that any of them may see up to their
own end, so that most of the future, and of other documents packed before, is never computed. Scores and softmax are
fp32, as there, and a block's probabilities are computed again, as there (arXiv 2205.14135).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK = 128


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, allowed: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """See the module's docstring. `scaling` replaces 1 / sqrt(C). Rows that may attend to nothing give 0.
    All are of one dtype and device.

    Raises ValueError on shapes that do not fit.
    """
    _check(query, key, value, allowed)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if causal_attention_backend(query.device) == "cpu":
        return _BlockAttention.apply(query, key, value, allowed, scaling)
    return _operator(query, key, value, allowed, scaling)


def causal_attention_backend(device: torch.device | str) -> str:
    """'cpu' (blocks of rows, see the module's docstring) or 'sdpa' (torch's own operator for all)."""
    return "cpu" if torch.device(device).type == "cpu" else "sdpa"


def causal_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, allowed: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """All scores at once, in fp32 (fp64 if the query is)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    ratio = query.shape[1] // key.shape[1]
    keys, values = (tensor.to(dtype).repeat_interleave(ratio, dim=1) for tensor in (key, value))
    scores = query.to(dtype) @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    length = query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if allowed is not None:
        visible = visible & allowed
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1).nan_to_num(0.0)
    return (weights @ values).to(query.dtype)


def _operator(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scaling: float) -> Tensor:
    if allowed is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    # With a mask and shared heads torch would hold all scores.
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed.tril(), scale=scaling)


class _BlockAttention(torch.autograd.Function):
    """Shapes inside: rows of a K/V head are (position, query head) pairs, [B G, T R, C]."""

    @staticmethod
    def forward(ctx, query, key, value, allowed, scaling):
        ctx.save_for_backward(query, key, value, allowed)
        ctx.scaling = scaling
        return _operator(query, key, value, allowed, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, allowed = ctx.saved_tensors
        rows, keys, values = _rows(query, key.shape[1]), key.flatten(0, 1), value.flatten(0, 1)
        grad_rows = _rows(grad_output, key.shape[1])
        grad_query = torch.empty_like(rows)
        accumulate = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(keys, dtype=accumulate), torch.zeros_like(values, dtype=accumulate)
        for part, seen, weights in _blocks(rows, keys, allowed, ctx.scaling, query.shape):
            grad_part = grad_rows[:, part]
            grad_value[:, seen] += torch.bmm(weights.transpose(1, 2), grad_part)
            grad_weights = torch.bmm(grad_part, values[:, seen].transpose(1, 2))
            products = grad_weights * weights
            mean = products.sum(-1, keepdim=True, dtype=accumulate).to(products.dtype)
            grad_scores = products.addcmul_(weights, mean, value=-1).mul_(ctx.scaling)
            torch.bmm(grad_scores, keys[:, seen], out=grad_query[:, part])
            grad_key[:, seen] += torch.bmm(grad_scores.transpose(1, 2), rows[:, part])
        return (
            _heads(grad_query, query.shape),
            grad_key.to(key.dtype).view(key.shape),
            grad_value.to(value.dtype).view(value.shape),
            None,
            None,
        )


def _blocks(
    rows: Tensor, keys: Tensor, allowed: Tensor | None, scaling: float, shape: torch.Size
) -> Iterator[tuple[slice, slice, Tensor]]:
    """For every block of positions: its rows, the run of keys they may see, and their weights [B G, S R, keys]."""
    batch, heads, length, _ = shape
    groups = len(keys) // batch
    ratio = heads // groups
    dtype = torch.promote_types(rows.dtype, torch.float32)
    transposed = keys.to(dtype).transpose(1, 2)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=rows.device).triu(1)
    # A row that sees itself sees something; only others need the pass over all weights that takes out 0 / 0.
    some_see_nothing = allowed is not None and not bool(allowed.diagonal(dim1=2, dim2=3).all())
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        size = end - start
        part = slice(start * ratio, end * ratio)
        first = 0 if allowed is None else _first_seen(allowed[:, 0, start:end, :start])
        seen = slice(first, end)
        with half_precision_products(rows.dtype):
            scores = torch.bmm(rows[:, part].to(dtype), transposed[:, :, seen]).mul_(scaling)
        by_position = scores.view(batch, groups, size, ratio, end - first)
        if allowed is None:
            by_position[..., start:].masked_fill_(future[:size, None, :size], float("-inf"))
        else:
            hidden = ~allowed[:, :, start:end, seen]
            hidden[..., start - first :] |= future[:size, :size]
            by_position.masked_fill_(hidden.unsqueeze(3), float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if some_see_nothing:
            weights.nan_to_num_(0.0)
        yield part, seen, weights.to(rows.dtype)


def _first_seen(allowed: Tensor) -> int:
    """The first of `allowed`s [B, S, keys] earlier keys that a row of the block may see; their number if none."""
    columns = allowed.flatten(0, 1).any(0).nonzero()
    return int(columns[0]) if len(columns) else allowed.shape[2]


@contextmanager
def half_precision_products(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products of tensors that hold bf16 values may run on the bf16 units: nothing is rounded, sums stay fp32.

    The setting is the process's: other threads' fp32 products, of whatever values, run so too meanwhile.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    if dtype != torch.bfloat16 or not hasattr(settings, "fp32_precision"):
        yield
        return
    _HalfPrecision.enter(settings)
    try:
        yield
    finally:
        _HalfPrecision.leave(settings)


class _HalfPrecision:
    """The setting is the process's: the first thread in changes it, the last one out changes it back."""

    lock, inside, before = threading.Lock(), 0, "none"

    @classmethod
    def enter(cls, settings: Any) -> None:
        with cls.lock:
            if cls.inside == 0:
                cls.before, settings.fp32_precision = settings.fp32_precision, "bf16"
            cls.inside += 1

    @classmethod
    def leave(cls, settings: Any) -> None:
        with cls.lock:
            cls.inside -= 1
            if cls.inside == 0:
                settings.fp32_precision = cls.before


def _rows(heads: Tensor, groups: int) -> Tensor:
    """[B, H, T, C] -> [B G, T R, C]."""
    return heads.unflatten(1, (groups, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _heads(rows: Tensor, shape: torch.Size) -> Tensor:
    """[B G, T R, C] -> [B, H, T, C]."""
    batch, heads, length, size = shape
    groups = rows.shape[0] // batch
    return rows.view(batch, groups, length, heads // groups, size).transpose(2, 3).flatten(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.shape != value.shape or key.ndim != 4:
        raise ValueError(f"query must be [B, H, T, C] and key and value [B, G, T, C], not {shapes}")
    batch, heads, length, size = query.shape
    if key.shape[::2] != (batch, length) or key.shape[3] != size or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"query must be [B, H, T, C] and key and value [B, G, T, C] with H a multiple of G, not {shapes}"
        )
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != (batch, 1, length, length)):
        raise ValueError(
            f"allowed must be bool {(batch, 1, length, length)}, not {allowed.dtype} {tuple(allowed.shape)}"
        )
