"""A reference-style distillation step, to measure against: what Snowflake's ArcticTraining does, on any device.

Its step (projects/swiftkv/train.py): the teacher is a full forward of all layers that keeps every hidden state; the
student is another full forward with gradient checkpointing on that keeps every hidden state; the loss is the mean over
all positions of KL x T^2 with softmax, log and log_softmax on logits of the model's dtype, tiled so that a tile's fp32
logits would fill 1 GiB, each tile backpropagated as it is formed; plus the MSE of the states that enter the last layer.
Inputs are not made to require gradients, so nothing is backpropagated through the frozen trunk there either.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from swiftkv_models import LlamaSwiftKVForCausalLM

TILE_BYTES = 2**30


class ReferenceStep:
    """Teacher and student share their frozen tensors, as in the reference, where one module is both."""

    def __init__(self, teacher: LlamaForCausalLM, student: LlamaSwiftKVForCausalLM, temperature: float):
        self.teacher, self.student, self.temperature = teacher.eval(), student.train(), temperature
        student.gradient_checkpointing_enable({"use_reentrant": False})

    def backward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor) -> None:
        """Add the gradients of one batch [B, T] to the student's trainable parameters."""
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "use_cache": False,
            "output_hidden_states": True,
        }
        with torch.no_grad():
            teacher_states = self.teacher.model(**inputs).hidden_states
        student_states = self.student.model(**inputs).hidden_states
        logits_gradient = tiled_logits_gradient(
            student_states[-1], teacher_states[-1], self.student.lm_head.weight, loss_mask, self.temperature
        )
        hidden_loss = functional.mse_loss(student_states[-2], teacher_states[-2])
        torch.autograd.backward([student_states[-1], hidden_loss], [logits_gradient, None])


def tiled_logits_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head_weight: torch.Tensor,
    loss_mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Gradient of the mean loss with respect to the student's final states [B, T, d], one tile of positions at a time.

    teacher [B, T, d], frozen head_weight [V, d], loss_mask [B, T].
    """
    positions = loss_mask.numel()
    tiles = math.ceil(positions * len(head_weight) * 4 / TILE_BYTES)
    gradients = []
    for student_tile, teacher_tile, mask in zip(
        student.detach().flatten(0, 1).chunk(tiles),
        teacher.flatten(0, 1).chunk(tiles),
        loss_mask.flatten().chunk(tiles),
        strict=True,
    ):
        leaf = student_tile.requires_grad_()
        student_logits = functional.linear(leaf, head_weight)
        teacher_logits = functional.linear(teacher_tile, head_weight)
        targets = functional.softmax(teacher_logits / temperature, dim=-1)
        log_student = functional.log_softmax(student_logits / temperature, dim=-1)
        kl = torch.sum(targets * (targets.log() - log_student), dim=-1) * mask
        (kl.sum() * temperature**2 / positions).backward()
        gradients.append(leaf.grad)
    return torch.cat([gradient for gradient in gradients if gradient is not None]).view_as(student)
