"""One K and V for a group of layers, against what they are to achieve: scores under RoPE, and least squares."""

import pytest
import torch

from swiftkv_train.shared_projections import (
    compensated_queries,
    complex_halves,
    real_halves,
    shared_keys,
    shared_values,
)

MEMBERS, INPUTS, HEADS, GROUPS, SIZE = 3, 20, 6, 2, 8


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(seed=1):
    mixed = randn(50, INPUTS, seed=seed) * torch.linspace(0.1, 3, INPUTS, dtype=torch.float64)
    return mixed.T @ mixed / 50


def test_weights_are_turned_where_the_factors_are():
    factors = torch.ones(GROUPS, SIZE // 2, dtype=torch.complex128, device="meta")
    for shape in ((HEADS * SIZE, INPUTS), (HEADS * SIZE,)):
        assert compensated_queries(randn(*shape), factors).device == factors.device


def turn(vectors, positions):
    """RoPE [N, heads, C] with the half-split layout, written as complex multiplication."""
    frequencies = 100.0 ** -(torch.arange(SIZE // 2, dtype=torch.float64) / (SIZE // 2))
    turned = complex_halves(vectors) * torch.exp(1j * positions[:, None, None] * frequencies)
    return real_halves(turned)


def scores(queries, keys, query_positions, key_positions):
    """[N, H] of every token's query and key, H / G query heads to a K/V head."""
    queries, keys = turn(queries, query_positions), turn(keys, key_positions)
    return (queries * keys.repeat_interleave(HEADS // GROUPS, dim=1)).sum(-1)


def test_members_that_differ_by_what_commutes_with_rope_share_one_key_exactly():
    one = randn(INPUTS, GROUPS, SIZE)
    factors = torch.complex(randn(MEMBERS, GROUPS, SIZE // 2, seed=2), randn(MEMBERS, GROUPS, SIZE // 2, seed=3))
    keys = real_halves(factors.unsqueeze(1) * complex_halves(one))
    rms = randn(MEMBERS, GROUPS, SIZE // 2, seed=4).abs() + 0.1
    shared, found = shared_keys(keys, covariance(), rms)
    assert found.abs().mean(0).allclose(torch.ones(GROUPS, SIZE // 2, dtype=torch.float64))
    x, positions = randn(9, INPUTS, seed=5), torch.arange(9, dtype=torch.float64)
    for member in range(MEMBERS):
        weight = randn(HEADS * SIZE, INPUTS, seed=10 + member)
        expected = scores(
            (x @ weight.T).view(9, HEADS, SIZE), torch.einsum("nd,dgc->ngc", x, keys[member]), 3 * positions, positions
        )
        compensated = compensated_queries(weight, found[member])
        got = scores(
            (x @ compensated.T).view(9, HEADS, SIZE), torch.einsum("nd,dgc->ngc", x, shared), 3 * positions, positions
        )
        torch.testing.assert_close(got, expected)
        bias = randn(HEADS * SIZE, seed=20)  # turned as the rows of the weight are
        column = compensated_queries(bias[:, None], found[member])[:, 0]
        torch.testing.assert_close(compensated_queries(bias, found[member]), column)


def test_the_shared_key_is_the_best_of_rank_one():
    """Of every head and frequency the weighted error is what the singular values beyond the first leave over."""
    keys, inputs = randn(MEMBERS, INPUTS, GROUPS, SIZE), covariance()
    rms = randn(MEMBERS, GROUPS, SIZE // 2, seed=4).abs() + 0.1
    shared, factors = shared_keys(keys, inputs, rms)
    root = torch.linalg.cholesky(inputs).to(torch.complex128)
    for group in range(GROUPS):
        for frequency in range(SIZE // 2):
            rows = complex_halves(keys)[:, :, group, frequency] * rms[:, group, frequency, None]
            best = torch.linalg.svdvals(rows @ root)[1:].square().sum()
            row = complex_halves(shared)[:, group, frequency]
            fitted = (rms * factors)[:, group, frequency, None] * row
            assert (((rows - fitted) @ root).abs().square().sum()).item() == pytest.approx(best.item())


def test_the_shared_value_is_least_squares_through_o_proj():
    values, outputs = randn(MEMBERS, INPUTS, GROUPS, SIZE), randn(MEMBERS, 30, HEADS, SIZE, seed=6)
    shared = shared_values(values, outputs)
    for group in range(GROUPS):
        heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        stacked = torch.cat([outputs[member, :, head] for member in range(MEMBERS) for head in heads])
        wanted = torch.cat(
            [outputs[member, :, head] @ values[member, :, group].T for member in range(MEMBERS) for head in heads]
        )
        expected = torch.linalg.lstsq(stacked, wanted).solution.T
        torch.testing.assert_close(shared[:, group], expected, rtol=1e-4, atol=1e-4)  # the solver's 1e-6 of ridge
