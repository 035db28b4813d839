"""The loss: base and student in one module, which shares the trunk between them.

A call runs the trunk once and the base's tail without gradient, the student's tail with gradient, and forms the KL and
its gradient in the forward (`swiftkv_kernels.distillation_kl`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swiftkv_kernels import distillation_kl
from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.quality import ROWS, token_measures
from swiftkv_train.recipe import LossSection
from swiftkv_train.sequence_parallel import part_of, whole_mask


class DistillationModule(nn.Module):
    """Base and student as one module whose forward is the loss; ZeRO-3 and FSDP shard it, so all reading is inside.

    With `autocast` (torch.bfloat16 or float16) its products run in that dtype. With a `group` of processes each of them
    takes its part of the same sequences (see `sequence_parallel`).
    """

    def __init__(
        self,
        model: LlamaSwiftKVForCausalLM,
        loss: LossSection,
        autocast: torch.dtype | None = None,
        group: Any = None,
    ):
        super().__init__()
        self.model = model
        self.loss = loss
        self.autocast = autocast
        self.group = group

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor, *, compare: bool = False
    ) -> Any:
        """`losses` of packed sequences [B, T], or with `compare` their `token_measures`."""
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            return (self.compare if compare else self.losses)(input_ids, position_ids, loss_mask)

    def losses(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the True positions of `loss_mask` [B, T]: the loss, and its KL part (T^2-scaled, detached).

        Of a group's sequences, over this process's part of the positions.
        """
        decoder = self.model.model
        attention: dict[str, Any] = {}
        if self.group is not None:
            attention = {"attention_mask": whole_mask(position_ids), "sequence_group": self.group}
            input_ids, position_ids, loss_mask = (part_of(self.group, x) for x in (input_ids, position_ids, loss_mask))
        with torch.no_grad():
            trunk = decoder.run_trunk(input_ids, position_ids=position_ids, use_cache=False, **attention)
            base = decoder.run_tail(trunk, base=True)
        student = decoder.run_tail(trunk)
        kl = distillation_kl(
            student.last_hidden_state[loss_mask],
            base.last_hidden_state[loss_mask],
            self.model.lm_head.weight,
            temperature=self.loss.temperature,
        )
        total = kl
        if self.loss.hidden_mse:
            difference = (student.last_layer_input - base.last_layer_input)[loss_mask].float()
            total = total + self.loss.hidden_mse * difference.square().mean(-1).sum()
        return total, kl.detach()

    @torch.no_grad()
    def compare(self, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """`token_measures` [N, 4] of the N loss positions."""
        decoder = self.model.model
        trunk = decoder.run_trunk(input_ids, position_ids=position_ids, use_cache=False)
        base = decoder.run_tail(trunk, base=True).last_hidden_state[loss_mask]
        student = decoder.run_tail(trunk).last_hidden_state[loss_mask]
        next_ids = input_ids.roll(-1, dims=1)[loss_mask]
        head = self.model.lm_head.weight  # its weight, as ZeRO-3 gathers a module that is called at every call
        rows = [
            token_measures(functional.linear(student[part], head), functional.linear(base[part], head), next_ids[part])
            for part in torch.arange(len(next_ids), device=loss_mask.device).split(ROWS)
        ]
        return torch.cat(rows) if rows else torch.empty(0, 4, device=loss_mask.device)
