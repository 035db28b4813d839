"""Models whose linear layers are packed for the CPU (`swiftkv_kernels.packed_linear`): the same numbers, sooner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from swiftkv_kernels.packed_linear import PackedWeight, packed_linear, packed_linear_backend


class PackedLinear(nn.Module):
    """A linear layer that stays as it is: its weight is held packed, once, and gets no gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = PackedWeight(linear.weight)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def weight(self) -> torch.Tensor:
        """[O, I], a copy."""
        return self.packed.dense()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # as tie_weights does, and who writes a weight by hand
            self._pack(value.detach())
        else:
            super().__setattr__(name, value)

    def _pack(self, weight: torch.Tensor) -> None:
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"the weight of this layer is {(self.out_features, self.in_features)}, not {tuple(weight.shape)}"
            )
        self.packed = PackedWeight(weight.to(self.packed.device, self.packed.dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(self.packed.dtype)
        return packed_linear(hidden_states, self.packed, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        key = f"{prefix}weight"
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        weight, shape = state_dict.get(key), (self.out_features, self.in_features)
        if weight is None:
            missing.extend([key] if strict else [])
        elif weight.shape != shape:
            errors.append(f"size mismatch for {key}: {tuple(weight.shape)} in the checkpoint, {shape} in the model.")
        else:
            self._pack(weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        moved = fn(torch.empty(0, dtype=self.packed.dtype))
        if (moved.device, moved.dtype) != (self.packed.device, self.packed.dtype):
            raise ValueError(
                f"linear layers packed for {self.packed.dtype} on {self.packed.device} cannot become {moved.dtype} on "
                f"{moved.device}: load the model again, and pack it after `to`"
            )
        super()._apply(fn, recurse)
        return self


def pack_linears(model: nn.Module) -> nn.Module:
    """`model`, its linear layers packed in place where this machine can: then they stay as they are.

    A step of few tokens takes two thirds of the time; training would gain 4% (measured, and left alone). Weights are
    not held twice, but for a head that is tied to the embeddings and, with a `SinkWindowCache`, the tail's K/V
    projections. On a GPU, and where torch has no oneDNN for the
    dtype, the model stays as it was; so do layers of other classes (adapters, quantised ones).
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _packable(child.weight):
                setattr(parent, name, PackedLinear(child))
    return model


def num_parameters(model: Any) -> int:
    """`model.num_parameters()` as it was before layers were packed, whose weights are no parameters any more."""
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    packed = (module for module in model.modules() if isinstance(module, PackedLinear) and module is not tied)
    return model.num_parameters() + sum(module.in_features * module.out_features for module in packed)


def _packable(weight: torch.Tensor) -> bool:
    return is_plain(weight) and packed_linear_backend(weight.device, weight.dtype) == "onednn"


def is_plain(weight: torch.Tensor) -> bool:
    """Not of a library that quantises, whose tensors are of a class of their own."""
    return type(weight) in (torch.Tensor, nn.Parameter)
