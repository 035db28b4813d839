"""How far a student's next-token distributions are from its base's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from swiftkv_train.errors import RunError

ROWS = 256  # tokens whose logits [ROWS, vocabulary] exist at a time
TRAINED_ON, OTHER_KINDS, ALL = "all kinds trained on", "other kinds", "all together"


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
    return Quality(len(measures), kl, agreement, _perplexity(base_nll), _perplexity(student_nll))


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def check_finite_quality(found: Mapping[str, Quality], base: str, student: str) -> None:
    """Raises RunError, which names the model and the text, where figures (by source) are not finite."""
    for source, quality in found.items():
        figures = ((base, quality.base_perplexity), (student, quality.student_perplexity), (student, quality.kl))
        for model, figure in figures:
            if not math.isfinite(figure):
                raise RunError(
                    f"model {model}: what it predicts on {source!r} is not finite (nan or infinity in its weights, or "
                    "an overflow in its dtype); nothing can be measured with it"
                )


def pooled(parts: Sequence[Quality]) -> Quality:
    """The means over the tokens of all parts."""
    total = sum(part.tokens for part in parts)

    def mean(figure: Callable[[Quality], float]) -> float:
        return sum(part.tokens * figure(part) for part in parts) / total

    return Quality(
        tokens=total,
        kl=mean(lambda part: part.kl),
        agreement=mean(lambda part: part.agreement),
        base_perplexity=math.exp(mean(lambda part: math.log(part.base_perplexity))),
        student_perplexity=math.exp(mean(lambda part: math.log(part.student_perplexity))),
    )


def by_kind(found: Mapping[str, Quality], trained: set[str]) -> dict[str, Quality]:
    """Sources pooled: those whose name is among the `trained` ones, the others, and all; where there are any."""
    groups = {
        TRAINED_ON: [quality for name, quality in found.items() if name in trained],
        OTHER_KINDS: [quality for name, quality in found.items() if name not in trained],
        ALL: list(found.values()),
    }
    return {group: pooled(parts) for group, parts in groups.items() if parts}
