"""All K/V projections of the tail as one matrix, and their product straight into a `SinkWindowCache`.

The leaders' `k_proj_swiftkv` and `v_proj_swiftkv` share one input, so one product serves them all. Their weights become
views of the stacked matrix: nothing is held twice, and what is loaded into them later is seen here. Packed ones, which
never change, stay as they are, beside a packed copy of them all.

    L leaders   B rows   T new tokens   D hidden size   G K/V heads   C head size   N slots
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swiftkv_kernels.kv_projection import kv_projection
from swiftkv_kernels.packed_linear import PackedWeight
from swiftkv_models.packed import PackedLinear, is_plain
from swiftkv_models.segment_cache import SinkWindowCache


class TailProjection:
    """The stacked projections of leader attention modules. Make it by `stack`."""

    def __init__(self, modules: Sequence[nn.Linear | PackedLinear]):
        self.modules = list(modules)
        # Of packed modules what they are packed as: it is replaced, not written to.
        self.packed = [module.packed for module in modules if isinstance(module, PackedLinear)]
        stacked = self._stack("weight")
        self.weight = PackedWeight(stacked) if self.packed else stacked
        self.bias = self._stack("bias") if self.modules[0].bias is not None else None

    @classmethod
    def stack(cls, attentions: Sequence[Any]) -> TailProjection | None:
        """None where they are no plain linear layers of one device and dtype (adapters, models in parts)."""
        modules = _projections(attentions)
        if {type(module) for module in modules} not in ({nn.Linear}, {PackedLinear}):
            return None
        if not all(is_plain(module.weight) for module in modules):
            return None
        kinds = {(module.weight.device, module.weight.dtype) for module in modules}
        if len(kinds) > 1 or modules[0].weight.device.type == "meta":
            return None
        return cls(modules)

    @torch.inference_mode(False)  # else the parameters would become tensors that cannot be trained
    @torch.no_grad()
    def _stack(self, name: str) -> torch.Tensor:
        tensors = [getattr(module, name) for module in self.modules]
        stacked = torch.cat(tensors)
        if self.packed:
            return stacked
        for tensor, view in zip(tensors, stacked.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = view
        return stacked

    def serves(self, attentions: Sequence[Any]) -> bool:
        """Whether it is theirs and their weights still are its views: `to` and some ways of loading replace them."""
        modules = _projections(attentions)
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return False
        if isinstance(self.weight, PackedWeight):
            return all(module.packed is packed for module, packed in zip(modules, self.packed, strict=True))
        return _lie_in(self.weight, [module.weight for module in modules]) and (
            self.bias is None or _lie_in(self.bias, [module.bias for module in modules])
        )

    def write(
        self,
        cache: SinkWindowCache,
        first: int,
        states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Put K and V of states [B, T, D] into the slots of the cache's layers from `first` on."""
        assert cache.step is not None  # the trunk has made both
        assert cache.storage is not None
        keys, values = (part[first:] for part in cache.storage[:2])
        key_scale, value_scale = (None if part is None else part[first:] for part in cache.storage[2:])
        cos, sin = (table.to(torch.promote_types(table.dtype, torch.float32)) for table in position_embeddings)
        kv_projection(
            states,
            self.weight,
            cos,
            sin,
            keys,
            values,
            cache.step.slots.to(states.device),
            bias=self.bias,
            key_scale=key_scale,
            value_scale=value_scale,
        )


def _projections(attentions: Sequence[Any]) -> list[Any]:
    return [module for attention in attentions for module in (attention.k_proj_swiftkv, attention.v_proj_swiftkv)]


def _lie_in(stacked: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Whether the parts are all of `stacked`, one after the other."""
    at = stacked.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.dtype != stacked.dtype:
            return False
        at += part.numel() * part.element_size()
    return True
