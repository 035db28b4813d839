"""Per-token measures and their means against fp64 formulas."""

import math

import numpy as np
import pytest
import torch

from swiftkv_train.errors import RunError
from swiftkv_train.quality import check_finite_quality, summarise, token_measures


def expected_rows(student, base, next_ids):
    rows = []
    for s, b, token in zip(student.astype(np.float64), base.astype(np.float64), next_ids, strict=True):
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (b, s))
        rows.append([(p * np.log(p / q)).sum(), float(p.argmax() == q.argmax()), -np.log(p[token]), -np.log(q[token])])
    return np.array(rows)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_rows_and_means_agree_with_fp64(spread):
    made = np.random.default_rng(0)
    base = (spread * made.standard_normal((40, 61))).astype(np.float32)
    student = (base + 0.2 * spread * made.standard_normal(base.shape)).astype(np.float32)
    next_ids = made.integers(0, 61, 40)
    expected = expected_rows(student, base, next_ids)
    rows = token_measures(torch.tensor(student), torch.tensor(base), torch.tensor(next_ids))
    # fp32 log-probabilities are good to 1e-6 here; the KL is a sum of 61 of their differences.
    np.testing.assert_allclose(rows.numpy(), expected, atol=5e-6)
    quality = summarise(rows)
    assert quality.tokens == 40
    assert quality.kl == pytest.approx(expected[:, 0].mean(), abs=5e-6)
    assert quality.agreement == pytest.approx(expected[:, 1].mean())
    assert quality.base_perplexity == pytest.approx(np.exp(expected[:, 2].mean()), rel=1e-5)
    assert quality.student_perplexity == pytest.approx(np.exp(expected[:, 3].mean()), rel=1e-5)
    assert quality.perplexity_ratio == pytest.approx(np.exp((expected[:, 3] - expected[:, 2]).mean()), rel=1e-5)
    assert quality.to_dict()["perplexity_ratio"] == quality.perplexity_ratio


def test_half_precision_logits_are_reduced_in_fp32():
    made = np.random.default_rng(1)
    base, student = (torch.tensor(made.standard_normal((20, 61))).bfloat16() for _ in range(2))
    next_ids = made.integers(0, 61, 20)
    expected = expected_rows(student.double().numpy(), base.double().numpy(), next_ids)
    rows = token_measures(student, base, torch.tensor(next_ids))
    assert rows.dtype == torch.float32
    np.testing.assert_allclose(rows.numpy(), expected, atol=5e-6)


def test_equal_logits_are_no_distance():
    logits = torch.randn(5, 61, generator=torch.Generator().manual_seed(0))
    rows = token_measures(logits, logits, torch.arange(5))
    assert torch.equal(rows[:, 0], torch.zeros(5))
    assert torch.equal(rows[:, 1], torch.ones(5))
    assert summarise(rows).perplexity_ratio == 1


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [(0, math.nan, "mine"), (2, math.nan, "base"), (2, 800.0, "base"), (3, math.inf, "mine"), (None, 0.0, None)],
)
def test_the_model_whose_figures_are_not_finite_is_named(column, value, named):
    measures = torch.ones(3, 4)
    if column is None:
        check_finite_quality({"prose": summarise(measures)}, "base", "mine")
        return
    measures[:, column] = value
    with pytest.raises(RunError, match=f"model {named}: what it predicts on 'prose' is not finite"):
        check_finite_quality({"chats": summarise(torch.ones(3, 4)), "prose": summarise(measures)}, "base", "mine")
