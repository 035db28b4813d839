"""segment_attention written a second time, in fp64 and one query and head at a time, and inputs for both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkv_kernels.segment_attention import PrefixSegment

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
ROUNDOFF = {FP64: 2.0**-53, FP32: 2.0**-24, BF16: 2.0**-9, FP16: 2.0**-12}


class Case(NamedTuple):
    """Arguments of segment_attention: those without a name and those with one."""

    tensors: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, operation, **more: Any) -> Tensor:
        return operation(*self.tensors, **self.options, **more)

    def change(self, **options: Any) -> Case:
        return Case(self.tensors, {**self.options, **options})


def make(
    batch: int,
    length: int,
    slots: int,
    prefix: int = 0,
    *,
    pinned: int = 0,
    ratio: int = 3,
    size: int = 64,
    kv_heads: int = 2,
    prefixes: int = 2,
    dtype: torch.dtype = FP32,
    storage: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Slots at random positions or empty, queries at random ones: slots are past, future, and out of the window.

    K/V in `storage` (int8 or float8_e4m3fn) have random scales. Prefixes have `prefix` slots, one is full, others are
    not; some rows have none. The last query of row 0 sees all of the full one.
    """
    random = torch.Generator().manual_seed(seed)

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=FP64).to(dtype).to(device)

    def stored(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if storage is None:
            return states(rows, kv_heads, tokens, size), states(rows, kv_heads, tokens, size), None, None
        limit = 127 if storage == INT8 else 448  # reached by 3 standard deviations
        key, value = (
            (torch.randn(rows, kv_heads, tokens, size, generator=random) * limit / 3).clamp(-limit, limit).to(storage)
            for _ in range(2)
        )
        scales = ((0.5 + torch.rand(rows, kv_heads, tokens, generator=random)) * 3 / limit for _ in range(2))
        key_scale, value_scale = (scale.to(device) for scale in scales)
        return key.to(device), value.to(device), key_scale, value_scale

    query, pinned_query = (states(batch, kv_heads * ratio, length, size) for _ in range(2))
    key, value, key_scale, value_scale = stored(batch, slots)
    horizon = prefix + 2 * slots + 2
    positions = torch.stack([torch.randperm(horizon, generator=random)[:slots] for _ in range(batch)])
    positions = positions.masked_fill(torch.rand(batch, slots, generator=random) < 0.2, -1)
    asked = torch.randint(-1, horizon + length, (batch, length), generator=random).sort(dim=1).values
    options: dict[str, Any] = {
        "window": max(1, slots),
        "pinned": min(pinned, slots),
        "pinned_query": pinned_query,
        "key_scale": key_scale,
        "value_scale": value_scale,
    }
    if prefixes:
        lengths = torch.randint(0, prefix + 1, (prefixes,), generator=random)
        lengths[-1] = prefix
        groups = torch.randint(-1, prefixes, (batch,), generator=random)
        groups[0] = prefixes - 1
        asked[0, -1:] = asked[0, -1:].clamp_min(prefix)
        prefix_key, prefix_value, *scales = stored(prefixes, prefix)
        integers = (tensor.int().to(device) for tensor in (lengths, groups))
        options["prefix"] = PrefixSegment(prefix_key, prefix_value, *integers, *scales)
    return Case((query, key, value, positions.int().to(device), asked.int().to(device)), options)


def naive_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    *,
    window: int,
    pinned: int = 0,
    pinned_query: Tensor | None = None,
    prefix: PrefixSegment | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """[B, H, T, C] in fp64 on the CPU."""

    def exact(stored: Tensor, scale: Tensor | None) -> Tensor:
        stored = stored.cpu().double()
        return stored if scale is None else stored * scale.cpu().double().unsqueeze(-1)

    own_keys, own_values = exact(key, key_scale), exact(value, value_scale)
    queries = query.cpu().double()
    pinned_queries = queries if pinned_query is None else pinned_query.cpu().double()
    held, asked = key_positions.tolist(), query_positions.tolist()
    lengths = groups = None
    if prefix is not None:
        lengths, groups = prefix.lengths.tolist(), prefix.groups.tolist()
        prefix_keys = exact(prefix.key, prefix.key_scale)
        prefix_values = exact(prefix.value, prefix.value_scale)
    batch, heads, length, size = query.shape
    ratio = heads // key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    output = torch.zeros(batch, heads, length, size, dtype=FP64)
    for b in range(batch):
        for i, now in enumerate(asked[b]):
            seen = [j for j, then in enumerate(held[b]) if 0 <= then <= now]
            sinks = [j for j in seen if j < pinned]
            ring = [j for j in seen if j >= pinned and now - held[b][j] < window]
            shared = max(0, min(lengths[groups[b]], now + 1)) if groups and groups[b] >= 0 else 0
            for h in range(heads):
                g = h // ratio
                scores = [own_keys[b, g, sinks] @ pinned_queries[b, h, i], own_keys[b, g, ring] @ queries[b, h, i]]
                values = [own_values[b, g, sinks], own_values[b, g, ring]]
                if shared:
                    scores.append(prefix_keys[groups[b], g, :shared] @ pinned_queries[b, h, i])
                    values.append(prefix_values[groups[b], g, :shared])
                weights = torch.cat(scores) * scaling
                if len(weights):
                    weights = (weights - weights.max()).exp()
                    output[b, h, i] = (weights / weights.sum()) @ torch.cat(values)
    return output


def tolerance(case: Case, backend: str) -> float:
    """Largest admissible error: in units of the largest V, 3 roundings to the working dtype (weights; a partial output;
    the output), and 1e-5 for fp32 scores and sums. The kernel keeps fp16's weights in bf16 where V is quantised."""
    query, _, value, *_ = case.tensors
    scale, prefix = case.options.get("value_scale"), case.options.get("prefix")
    roundoff = ROUNDOFF[query.dtype]
    if scale is not None and query.dtype == FP16 and backend == "triton":
        roundoff = ROUNDOFF[BF16]
    largest = 1.0
    for stored, its_scale in [(value, scale)] + ([(prefix.value, prefix.value_scale)] if prefix is not None else []):
        states = stored.float() if its_scale is None else stored.float() * its_scale.unsqueeze(-1)
        largest = max(largest, float(states.abs().max()) if states.numel() else 0.0)
    return largest * (3 * roundoff + (1e-12 if query.dtype == FP64 else 1e-5))


def assert_close(found: Tensor, expected: Tensor, case: Case, backend: str) -> None:
    assert found.dtype == case.tensors[0].dtype
    assert found.shape == expected.shape
    assert found.isfinite().all()
    error = (found.double().cpu() - expected).abs().max().item() if found.numel() else 0.0
    assert error <= tolerance(case, backend), f"error {error:.2e}, limit {tolerance(case, backend):.2e}"
