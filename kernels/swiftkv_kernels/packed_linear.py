"""A linear layer whose weight lies as the CPU's matrix kernels read it.

    y = x W' + b        x [..., I]   W [O, I]   b [O]   y [..., O]

torch gives oneDNN (or, in fp32, MKL) the weight row by row, and it is brought into tiles anew in every call, which for
the few rows of a decoding step costs more than the product. A weight that does not change is brought there once: the
same products, of 1 to 16 rows two to four times as fast. Source: oneDNN's blocked memory formats ("Understanding Memory
Formats"), which torch reaches through the operators that its compiler uses for frozen weights. Those are private: they
are tried once, and where they are missing or wrong, `packed_linear_backend` says 'torch' and there is nothing to pack.

Products are summed in fp32 and rounded once, as torch's own. A gradient goes to x and b, none to W.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_ROWS = 1024  # that the layout is chosen for; in fp32 one for a single row is slow for many, this one for neither


class PackedWeight:
    """W [O, I], a copy. Raises ValueError where `packed_linear_backend` is not 'onednn'."""

    def __init__(self, weight: Tensor):
        if weight.ndim != 2 or packed_linear_backend(weight.device, weight.dtype) != "onednn":
            raise ValueError(f"a weight {tuple(weight.shape)} of {weight.dtype} on {weight.device} cannot be packed")
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._forward = _pack(weight.detach())
        self._backward: Any = None

    def __len__(self) -> int:
        return self.shape[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self  # it never changes, and oneDNN's tensors cannot be copied

    def dense(self) -> Tensor:
        """[O, I], a copy."""
        return self._forward.to_dense()

    def product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """x W' + b."""
        return _product(hidden, self._forward, bias)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """g W [..., I] for g [..., O]; the first one packs the transposed weight."""
        if self._backward is None:
            self._backward = _pack(self.dense().t())
        return _product(gradient, self._backward, None)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(hidden, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_hidden = ctx.weight.transposed_product(gradient) if ctx.needs_input_grad[0] else None
        to_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return to_hidden, to_bias, None


def packed_linear(hidden: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """[..., O] of hidden [..., I], both in the weight's dtype on CPU. Raises ValueError where hidden does not fit."""
    if hidden.dtype != weight.dtype or hidden.device != weight.device or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., {weight.shape[1]}] of {weight.dtype} on {weight.device}, not "
            f"{tuple(hidden.shape)} of {hidden.dtype} on {hidden.device}"
        )
    if torch.is_grad_enabled() and (hidden.requires_grad or (bias is not None and bias.requires_grad)):
        return _PackedLinear.apply(hidden, bias, weight)
    return weight.product(hidden, bias)


def packed_linear_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same from the plain weight, in fp32 (fp64 if hidden is)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def packed_linear_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """'onednn' where weights of this dtype on this device can be packed, else 'torch': leave them as they are."""
    if torch.device(device).type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "torch"
    return "onednn" if torch.backends.mkldnn.is_available() and _works(dtype) else "torch"


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)


def _product(hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")


@cache
@torch.no_grad()
def _works(dtype: torch.dtype) -> bool:
    """Whether this torch on this processor packs, multiplies and unpacks: numbers that every dtype holds exactly."""
    weight = (torch.arange(33 * 16) % 5 - 2).view(33, 16).to(dtype)
    hidden = (torch.arange(3 * 16) % 7 - 3).view(1, 3, 16).to(dtype)
    try:
        packed = _pack(weight)
        products = _product(hidden, packed, hidden.new_ones(33))
        return torch.equal(packed.to_dense(), weight) and torch.equal(products, linear(hidden, weight) + 1)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
