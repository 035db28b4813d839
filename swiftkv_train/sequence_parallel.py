"""Sequences in parts over several processes (DeepSpeed-Ulysses, arXiv 2309.14509), for those too long for one device.

Every process of a group takes an equal run of positions of the same sequences through all layers. Only attention needs
the others: there the parts are exchanged for a share of the heads over all positions, and back. The loss is a sum over
positions, so its parts add up over the processes of a group as they do over groups.

    B batch   T positions   P processes of a group   t = T / P
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swiftkv_train.errors import UserError
from swiftkv_train.strategies import import_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from swiftkv_train.loading import Model
    from swiftkv_train.recipe import Recipe


def check_parts(recipe: Recipe, processes: int) -> None:
    """Raises UserError when so many processes, the sequence or the attention cannot be parted as the recipe says."""
    size = recipe.distributed.sequence_parallel
    key = f"distributed.sequence_parallel {size}"
    if processes % size:
        raise UserError(f"{key} does not divide the number of processes, {processes}")
    if recipe.data.sequence_length % size:
        raise UserError(f"{key} does not divide data.sequence_length {recipe.data.sequence_length}")
    if size > 1 and recipe.model.attention != "sdpa":
        raise UserError(f"{key} needs model.attention sdpa, not {recipe.model.attention}")


def sequence_group(recipe: Recipe, accelerator: Accelerator) -> Any:
    """The group of this process, of `distributed.sequence_parallel` neighbours; None where sequences are whole.

    Raises UserError when the processes, the sequence or the attention cannot be parted so.
    """
    size, processes = recipe.distributed.sequence_parallel, accelerator.num_processes
    if size == 1:
        return None
    check_parts(recipe, processes)
    deepspeed = import_deepspeed(f"distributed.sequence_parallel {size}")
    if not deepspeed.comm.is_initialized():  # its exchange goes through its own front of torch.distributed
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    neighbours = [list(range(first, first + size)) for first in range(0, processes, size)]
    groups = [torch.distributed.new_group(ranks) for ranks in neighbours]  # every process must make all of them
    return groups[accelerator.process_index // size]


def check_heads(recipe: Recipe, config: Any) -> None:
    """Raises UserError when the heads of a model of this configuration cannot be shared out evenly in a group."""
    size = recipe.distributed.sequence_parallel
    for kind, heads in (("K/V", config.num_key_value_heads), ("query", config.num_attention_heads)):
        if heads % size:
            raise UserError(f"distributed.sequence_parallel {size} does not divide the model's {heads} {kind} heads")


def use_sequence_parallel_attention(model: Model) -> None:
    """Let the model's attention exchange parts where `sequence_group` is passed to it. See `check_heads`."""
    inner = model.config._attn_implementation
    name = f"ulysses_{inner}"
    AttentionInterface.register(name, partial(_ulysses_attention, ALL_ATTENTION_FUNCTIONS[inner]))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def part_of(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """This process's positions [B, t] of a tensor [B, T]."""
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    return tensor.chunk(size, dim=1)[rank]


def whole_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Which pairs of positions may attend, bool [B, 1, T, T]: causal, within documents, each of which begins at 0."""
    document = (position_ids == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril_()


def _ulysses_attention(
    inner: Any,
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, t, C]; key and value [B, G, t, C]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # [B, 1, T, T]
    sequence_group: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention; output [B, t, H, C]."""
    if sequence_group is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    from deepspeed.sequence.layer import DistributedAttention

    def attend(*parts: torch.Tensor) -> torch.Tensor:  # [B, T, some heads, C]
        return inner(module, *(part.transpose(1, 2) for part in parts), attention_mask, **kwargs)[0]

    exchange = DistributedAttention(attend, sequence_group, scatter_idx=2, gather_idx=1)
    return exchange(*(tensor.transpose(1, 2) for tensor in (query, key, value)), 0), None
