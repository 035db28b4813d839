"""The keys and values of all tail layers from one hidden state: one product, RoPE on K, written into the caches.

    [k_1 v_1 ... k_L v_L] = h W' + b        K_l = k_l cos + rotate_half(k_l) sin        rotate_half([x, y]) = [-y, x]
    key_cache[l, b, :, slots[b, t]] = K_l[b, t]         value_cache[l, b, :, slots[b, t]] = v_l[b, t]

    B batch   T tokens   D hidden size   L layers that own K/V   G K/V heads   C head size   R slots of a cache
    hidden h [B, T, D]   weight W [L 2 G C, D]: layer by layer K's rows, then V's   bias b [L 2 G C]
    cos, sin [B, T, C] or [1, T, C]   slots [B, T] int64, negative: the token is dropped
    key_cache, value_cache [L, B, G, R, C]   key_scale, value_scale [L, B, G, R] fp32

In SwiftKV (arXiv 2410.03960) every tail layer projects the same tensor: a prompt costs the tail this one product, and
the layers' own weights are views of W. RoPE (arXiv 2104.09864) in the layout of transformers' Llama.

The product is rounded to its dtype, as a linear layer's is; K is rotated in fp32 and rounded once, to the cache's dtype
or by `kv_quantize`. Tokens go through in parts, so that what is held beside the caches is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from swiftkv_kernels.backends import device_backend, resolve_backend
from swiftkv_kernels.kv_projection_triton import rotate_and_store
from swiftkv_kernels.kv_quantize import LIMITS, kv_quantize, kv_quantize_reference
from swiftkv_kernels.packed_linear import PackedWeight, packed_linear

_WORKSPACE_BYTES = 64 << 20  # a part's hidden states and products
_TILE_BYTES = 16 << 20  # K of the tokens that torch rotates and writes at a time: it holds up to four such tensors
_CPU_TILE_BYTES = 768 << 10  # there they stay in a core's own cache, which halves the time


@torch.no_grad()
def kv_projection(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Fills the slots of the kept tokens in place and touches no others; shapes in the module's docstring.

    hidden, weight and bias share a floating dtype; a packed weight is faster for few tokens. cos and sin are fp32 or
    fp64. The caches have that dtype too, or are int8 or float8_e4m3fn with their scales; strided views will do if the
    last dimension is contiguous. No two kept tokens of a row may share a slot. backend 'cpu', 'torch' or 'triton'
    overrules `kv_projection_backend`; only 'cpu' reads slots on the host. Carries no gradient. Raises ValueError on
    misfits, 'cpu' also on a slot past the end of the cache ('triton' drops its token).
    """
    _check(hidden, weight, bias, cos, sin, slots, key_cache, value_cache, key_scale, value_scale)
    backend = resolve_backend(backend, hidden)
    batch, length, _ = hidden.shape
    if batch * length == 0:
        return
    some_dropped = True  # perhaps: only on CPU does looking cost nothing
    if backend == "cpu":
        lowest, highest = (int(slot) for slot in slots.aminmax())
        if highest >= key_cache.shape[3]:
            raise ValueError(f"slots must be below the {key_cache.shape[3]} of the cache, not {highest}")
        some_dropped = lowest < 0

    inputs = hidden, cos.expand(batch, -1, -1), sin.expand(batch, -1, -1), slots
    most = max(1, _WORKSPACE_BYTES // ((len(weight) + hidden.shape[2]) * hidden.dtype.itemsize))
    workspace = None if isinstance(weight, PackedWeight) else hidden.new_empty(min(most, batch * length), len(weight))
    for part in _parts(batch, length, most):
        tokens, token_cos, token_sin, token_slots = (tensor[part] for tensor in inputs)
        keys = key_cache[:, part[0]], None if key_scale is None else key_scale[:, part[0]]
        values = value_cache[:, part[0]], None if value_scale is None else value_scale[:, part[0]]
        if backend == "triton":
            product = _product(tokens, weight, bias, workspace)
            rotate_and_store(product, token_cos, token_sin, token_slots, keys, values)
            continue
        at_rows, some_written = torch.arange(len(tokens), device=hidden.device).unsqueeze(1), None
        if some_dropped:
            at_rows, at_times, some_written = (_kept if backend == "cpu" else _kept_twice)(token_slots)
            tokens, token_cos, token_sin, token_slots = (
                tensor[at_rows, at_times] for tensor in (tokens, token_cos, token_sin, token_slots)
            )
        at_rows = at_rows.expand_as(token_slots)
        product = _product(tokens, weight, bias, workspace).view(*token_slots.shape, len(weight))
        for tile in _parts(len(tokens), tokens.shape[1], _tile_tokens(product, backend)):
            written = None if some_written is None else some_written[tile[0]]
            place = at_rows[tile], token_slots[tile], written
            _rotate_and_store(product[tile], token_cos[tile], token_sin[tile], place, keys, values)


def kv_projection_reference(
    hidden: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """The same layer by layer and token by token, in fp32 (fp64 if hidden is) up to the cache."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    layers, batch, heads, _, size = key_cache.shape
    products = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        products = products + bias.to(dtype)
    key, value = products.view(batch, -1, layers, 2, heads, size).unbind(3)
    first, second = key.chunk(2, dim=-1)
    rotated = key * cos[:, :, None, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None, None]
    for row, time in (slots >= 0).nonzero().tolist():
        slot = int(slots[row, time])
        for states, cache, scale in ((rotated, key_cache, key_scale), (value, value_cache, value_scale)):
            if scale is None:
                cache[:, row, :, slot] = states[row, time].to(cache.dtype)
            else:
                cache[:, row, :, slot], scale[:, row, :, slot] = kv_quantize_reference(states[row, time], cache.dtype)


def kv_projection_backend(device: torch.device | str) -> str:
    """The path a device takes: 'cpu'; 'triton' on CUDA; 'torch' without triton and elsewhere.

    fp64 takes 'torch' in place of 'triton'.
    """
    return device_backend(device)


def _parts(batch: int, length: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Rows and times of parts of at most `limit` tokens: some times of all rows or, if rows are many, one of some."""
    rows, times = min(batch, limit), max(1, limit // batch)
    for first_row in range(0, batch, rows):
        for first_time in range(0, length, times):
            yield slice(first_row, first_row + rows), slice(first_time, first_time + times)


def _tile_tokens(product: Tensor, backend: str) -> int:
    """Tokens whose K, in fp32 or wider, fill a tile."""
    exact = torch.promote_types(product.dtype, torch.float32)
    return max(1, (_CPU_TILE_BYTES if backend == "cpu" else _TILE_BYTES) // (product.shape[-1] // 2 * exact.itemsize))


def _kept(slots: Tensor) -> tuple[Tensor, Tensor, None]:
    """Row and time of the kept tokens, as if they were one row's: [1, N] each. Needs their number on the host."""
    rows, times = (slots >= 0).nonzero(as_tuple=True)
    return rows.unsqueeze(0), times.unsqueeze(0), None


def _kept_twice(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row [B, 1] and time [B, T] of a kept token for every token: itself or, for a dropped one, its row's first kept.

    No number has to come to the host, and what is written twice is the same. Third [B, 1]: whether the row keeps any.
    """
    batch, length = slots.shape
    kept = slots >= 0
    first_kept = kept.to(torch.uint8).argmax(1, keepdim=True)
    times = torch.where(kept, torch.arange(length, device=slots.device), first_kept)
    return torch.arange(batch, device=slots.device).unsqueeze(1), times, kept.any(1, keepdim=True)


def _product(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, workspace: Tensor | None) -> Tensor:
    """[tokens, L 2 G C], into the workspace: with `out`, autocast leaves the dtype alone. None: a packed weight."""
    tokens = hidden.reshape(-1, hidden.shape[2])
    if isinstance(weight, PackedWeight):
        return packed_linear(tokens, weight, bias)
    assert workspace is not None
    product = workspace[: len(tokens)]
    if bias is None:
        return torch.mm(tokens, weight.t(), out=product)
    return torch.addmm(bias, tokens, weight.t(), out=product)


def _rotate_and_store(
    product: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: tuple[Tensor, Tensor, Tensor | None],
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
) -> None:
    """What rotate_and_store does, for product [B, T, L 2 G C] and rows and slots [B, T] of the caches (see `_put`).

    Copied to [L, G, B, T, C] at once: then writes go through a cache plane by plane, as it lies in memory.
    """
    layers, _, heads, _, size = keys[0].shape
    key, value = product.unflatten(2, (layers, 2, heads, size)).permute(3, 2, 4, 0, 1, 5)
    exact = torch.promote_types(key.dtype, cos.dtype)
    key = _rotate(key.to(exact, memory_format=torch.contiguous_format).contiguous(), cos, sin)
    for states, (cache, scale) in (key, keys), (value.contiguous(), values):
        if scale is None:
            states = states.to(cache.dtype)
        else:
            states, scales = kv_quantize(states, cache.dtype)
            _put(scales, scale, *place)
        _put(states, cache, *place)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In place. torch is fast at whole contiguous vectors, not at their halves."""
    halves, sin_halves = states.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    swapped = torch.cat(halves[::-1], dim=-1)
    return states.mul_(cos).addcmul_(swapped, torch.cat([-sin_halves[0], sin_halves[1]], dim=-1))


def _put(states: Tensor, cache: Tensor, rows: Tensor, slots: Tensor, some_written: Tensor | None) -> None:
    """States [L, G, B, T, ...] into cache [L, B, G, R, ...] at rows and slots, where `some_written` [B, 1] is true."""
    rest = range(4, cache.ndim)
    by_slot, states = cache.permute(1, 3, 0, 2, *rest), states.permute(2, 3, 0, 1, *rest)
    if cache.dtype == torch.float8_e4m3fn:  # has few operators of its own
        by_slot, states = by_slot.view(torch.uint8), states.view(torch.uint8)
    if some_written is not None:
        slots = slots.clamp_min(0)
        states = torch.where(some_written[(..., *[None] * (cache.ndim - 2))], states, by_slot[rows, slots])
    by_slot.index_put_((rows, slots), states)


def _check(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    if hidden.ndim != 3 or not hidden.is_floating_point() or hidden.dtype.itemsize < 2:
        raise ValueError(f"hidden must be [B, T, D] in a floating dtype, not {tuple(hidden.shape)} {hidden.dtype}")
    batch, length, hidden_size = hidden.shape
    if key_cache.ndim != 5 or 0 in key_cache.shape[2:] or key_cache.shape[-1] % 2 or key_cache.shape[1] != batch:
        raise ValueError(f"key_cache must be [L, B = {batch}, G, R, C] with C even, not {tuple(key_cache.shape)}")
    layers, _, heads, _, size = key_cache.shape
    width = layers * 2 * heads * size
    tensor: Tensor | PackedWeight | None
    for name, tensor, shape in (
        ("weight", weight, (width, hidden_size)),
        ("bias", bias, (width,)),
        ("value_cache", value_cache, key_cache.shape),
        ("slots", slots, (batch, length)),
        ("key_scale", key_scale, key_cache.shape[:4]),
        ("value_scale", value_scale, key_cache.shape[:4]),
        ("cos", cos, (len(cos) if len(cos) == 1 else batch, length, size)),
        ("sin", sin, (len(sin) if len(sin) == 1 else batch, length, size)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.device != hidden.device):
            raise ValueError(
                f"{name} must be {tuple(shape)} on {hidden.device}, not {tuple(tensor.shape)} on {tensor.device}"
            )
    for name, tensor, dtypes in (
        ("weight", weight, (hidden.dtype,)),
        ("bias", bias, (hidden.dtype,)),
        ("cos", cos, (torch.float32, torch.float64)),
        ("sin", sin, (torch.float32, torch.float64)),
        ("slots", slots, (torch.int64,)),
        ("key_cache", key_cache, (hidden.dtype, *LIMITS)),
        ("value_cache", value_cache, (key_cache.dtype,)),
        ("key_scale", key_scale, (torch.float32,)),
        ("value_scale", value_scale, (torch.float32,)),
    ):
        if tensor is not None and tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if key_cache.stride(-1) != 1 or value_cache.stride(-1) != 1:
        raise ValueError("key_cache and value_cache must be contiguous in their last dimension")
    quantised = key_cache.dtype in LIMITS
    if (key_scale is not None) != quantised or (value_scale is not None) != quantised:
        raise ValueError(f"{key_cache.dtype} caches need {'key_scale and value_scale' if quantised else 'no scales'}")
