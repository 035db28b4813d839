"""Ways to the same loss and gradient, for `swiftkv bench loss` to compare.

All of them form T^2 KL(teacher || student), the mean over N rows, and its gradient with respect to the student's final
hidden states [N, d], from the same tensors and a frozen head [V, d]:

    ours           swiftkv_kernels.distillation_kl
    plain          both logits whole, fp32 from the model's dtype on, log_softmax and kl_div by autograd
    reference      tiles of 1 GiB in the model's dtype, as ArcticTraining (see reference.py)
    liger chunked  Liger-Kernel's chunked_loss, compiled as it is by default: any device
    liger fused    Liger-Kernel's Triton kernel: GPUs

Liger-Kernel's losses are its generalised JSD with beta 0, which is this KL; the chunked one also forms the gradient of
the head, which nobody asks for here.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from swiftkv_kernels.distillation_kl import distillation_kl
from swiftkv_train.bench.reference import tiled_logits_gradient

TEMPERATURE = 2.0
LOGIT_DEVIATION = 4.0  # of the teacher's logits: an entropy of 3 to 4 nats, near that of prose
STUDENTS = {"converged": 1e-3, "far": 1.0}  # intended KL in nats at T = 1; what it comes to is measured


@dataclass(frozen=True)
class Setting:
    vocabulary: int
    hidden_size: int
    rows: int
    dtype: str

    def tensors(self, student: str) -> tuple[Tensor, Tensor, Tensor]:
        """Student and teacher [N, d], head [V, d]: random, the student at its distance."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        teacher, step, head = (
            torch.randn(size, self.hidden_size, generator=generator, device=device)
            for size in (self.rows, self.rows, self.vocabulary)
        )
        head *= LOGIT_DEVIATION / math.sqrt(self.hidden_size)
        # KL is half the variance of what the step changes the logits by.
        step *= math.sqrt(2 * STUDENTS[student]) / LOGIT_DEVIATION
        dtype = getattr(torch, self.dtype)
        return (teacher + step).to(dtype), teacher.to(dtype), head.to(dtype)


def _ours(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return distillation_kl(student, teacher, head, temperature=TEMPERATURE) / len(student)


def _plain(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    with torch.no_grad():
        log_teacher = functional.log_softmax(functional.linear(teacher, head).float() / TEMPERATURE, dim=-1)
    log_student = functional.log_softmax(functional.linear(student, head).float() / TEMPERATURE, dim=-1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2


def _liger_chunked(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE)
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)  # what the hard loss would read
    return loss(student, head, teacher, head, labels) * TEMPERATURE**2


def _liger_fused(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    return loss(student, head, teacher, head, None) * TEMPERATURE**2


OURS = "ours"
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    OURS: _ours,
    "plain": _plain,
    "liger chunked": _liger_chunked,
    "liger fused": _liger_fused,
}
CONTENDERS = [OURS, "plain", "reference", "liger chunked", "liger fused"]


def gradient(name: str, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Gradient [N, d] of the mean loss with respect to the student, the way that `name` takes."""
    if name == "reference":
        mask = torch.ones(1, len(student), dtype=torch.bool, device=student.device)
        return tiled_logits_gradient(student[None], teacher[None], head, mask, TEMPERATURE)[0]
    leaf = student.detach().requires_grad_()
    return torch.autograd.grad(LOSSES[name](leaf, teacher, head), leaf)[0]


def liger_version() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None
