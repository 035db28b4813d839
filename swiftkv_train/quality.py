"""How far a student's next-token distributions are from its base's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Quality:
    """Means over predicted tokens: KL(base || student) in nats at T=1, top-1 agreement, and both perplexities."""

    tokens: int
    kl: float
    agreement: float
    base_perplexity: float
    student_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.student_perplexity / self.base_perplexity

    def to_dict(self) -> dict[str, float | int]:
        return {
            "tokens": self.tokens,
            "kl": self.kl,
            "agreement": self.agreement,
            "base_perplexity": self.base_perplexity,
            "student_perplexity": self.student_perplexity,
            "perplexity_ratio": self.perplexity_ratio,
        }


def token_measures(student_logits: torch.Tensor, base_logits: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """Per token [N, 4]: KL(base || student), 1 where the most likely token agrees, base's and student's -log p(next).

    Args: logits [N, V] of any float dtype (reduced in fp32), next_ids [N].
    """
    base = torch.log_softmax(base_logits.float(), dim=-1)
    student = torch.log_softmax(student_logits.float(), dim=-1)
    kl = (base.exp() * (base - student)).sum(-1)
    agreement = (base.argmax(-1) == student.argmax(-1)).float()
    chosen = next_ids.unsqueeze(-1)
    return torch.stack([kl, agreement, -base.gather(-1, chosen)[:, 0], -student.gather(-1, chosen)[:, 0]], dim=-1)


def summarise(measures: torch.Tensor) -> Quality:
    """The means of `token_measures` rows [N, 4], N > 0."""
    kl, agreement, base_nll, student_nll = measures.double().mean(0).tolist()
    return Quality(len(measures), kl, agreement, math.exp(base_nll), math.exp(student_nll))
