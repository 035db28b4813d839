"""One K and V for a group of layers, against what they are to achieve: scores under RoPE, and least squares."""

import pytest
import torch

from swiftkv_train.shared_projections import (
    compensated_queries,
    complex_halves,
    fast_frequencies,
    mean_values,
    shared_keys,
    shared_values,
)

MEMBERS, INPUTS, HEADS, GROUPS, SIZE = 3, 20, 6, 2, 8


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(seed=1):
    mixed = randn(50, INPUTS, seed=seed) * torch.linspace(0.1, 3, INPUTS, dtype=torch.float64)
    return mixed.T @ mixed / 50


def real_halves(tensor):
    return torch.cat([tensor.real, tensor.imag], dim=-1)


def test_weights_are_turned_where_the_factors_are():
    turns = torch.ones(GROUPS, SIZE, SIZE, dtype=torch.float64, device="meta")
    for shape in ((HEADS * SIZE, INPUTS), (HEADS * SIZE,)):
        assert compensated_queries(randn(*shape), turns).device == turns.device


def test_fast_frequencies_turn_a_sequence_by_more_than_a_radian():
    frequencies = torch.tensor([1.0, 0.1, 0.011, 0.009, 0.001])
    assert [fast_frequencies(frequencies, length) for length in (100, 1, 2000)] == [3, 0, 5]


FREQUENCIES = 100.0 ** -(torch.arange(SIZE // 2, dtype=torch.float64) / (SIZE // 2))


def turn(vectors, positions, frequencies):
    """RoPE [N, heads, C] with the half-split layout, written as complex multiplication."""
    return real_halves(complex_halves(vectors) * torch.exp(1j * positions[:, None, None] * frequencies))


def scores(queries, keys, query_positions, key_positions, frequencies):
    """[N, H] of every token's query and key, H / G query heads to a K/V head."""
    queries, keys = turn(queries, query_positions, frequencies), turn(keys, key_positions, frequencies)
    return (queries * keys.repeat_interleave(HEADS // GROUPS, dim=1)).sum(-1)


@pytest.mark.parametrize("fast", [0, 1, 3, SIZE // 2])
def test_members_that_differ_by_what_commutes_with_rope_share_one_key_exactly(fast):
    """Slow frequencies that do not turn at all: the members' halves of them are any matrices of one."""
    frequencies = torch.where(torch.arange(SIZE // 2) < fast, FREQUENCIES, 0.0)
    one = randn(INPUTS, GROUPS, SIZE)
    factors = torch.complex(randn(MEMBERS, GROUPS, SIZE // 2, seed=2), randn(MEMBERS, GROUPS, SIZE // 2, seed=3))
    keys = real_halves(factors.unsqueeze(1) * complex_halves(one))
    slow = [*range(fast, SIZE // 2), *range(SIZE // 2 + fast, SIZE)]
    mixed = randn(MEMBERS, GROUPS, len(slow), len(slow), seed=7)
    keys[..., slow] = torch.einsum("jgce,dge->jdgc", mixed, one[..., slow])
    rms = randn(MEMBERS, GROUPS, SIZE // 2, seed=4).abs() + 0.1
    shared, found = shared_keys(keys, covariance(), rms, fast)
    x, positions = randn(9, INPUTS, seed=5), torch.arange(9, dtype=torch.float64)
    for member in range(MEMBERS):
        weight = randn(HEADS * SIZE, INPUTS, seed=10 + member)
        places = (3 * positions, positions, frequencies)
        expected = scores((x @ weight.T).view(9, HEADS, SIZE), torch.einsum("nd,dgc->ngc", x, keys[member]), *places)
        compensated = compensated_queries(weight, found[member])
        got = scores((x @ compensated.T).view(9, HEADS, SIZE), torch.einsum("nd,dgc->ngc", x, shared), *places)
        torch.testing.assert_close(got, expected)
        bias = randn(HEADS * SIZE, seed=20)  # turned as the rows of the weight are
        column = compensated_queries(bias[:, None], found[member])[:, 0]
        torch.testing.assert_close(compensated_queries(bias, found[member]), column)


@pytest.mark.parametrize("fast", [0, 2, SIZE // 2])
def test_the_shared_key_is_the_best_of_its_rank(fast):
    """Of every head, of every fast frequency and of the slow ones together, the weighted error is what the singular
    values beyond the kept ones leave over. K and queries share the size of T."""
    keys, inputs = randn(MEMBERS, INPUTS, GROUPS, SIZE), covariance()
    rms = randn(MEMBERS, GROUPS, SIZE // 2, seed=4).abs() + 0.1
    shared, turns = shared_keys(keys, inputs, rms, fast)
    fitted = torch.einsum("jgce,dge->jdgc", turns, shared)
    root = torch.linalg.cholesky(inputs)
    half = SIZE // 2
    for group in range(GROUPS):
        for frequency in range(fast):
            left, wanted = (
                complex_halves(part)[:, :, group, frequency] * rms[:, group, frequency, None]
                for part in (keys - fitted, keys)
            )
            best = torch.linalg.svdvals(wanted @ root.to(wanted.dtype))[1:].square().sum()
            assert (left @ root.to(left.dtype)).abs().square().sum().item() == pytest.approx(best.item())
        slow = [*range(fast, half), *range(half + fast, SIZE)]
        if slow:
            weights = rms[:, group, fast:].repeat(1, 2)[:, None]  # [g, 1, s]
            left, wanted = (
                (part[:, :, group, slow] * weights).permute(0, 2, 1).flatten(0, 1) for part in (keys - fitted, keys)
            )
            best = torch.linalg.svdvals(wanted @ root)[len(slow) :].square().sum()
            assert (left @ root).square().sum().item() == pytest.approx(best.item())
    size = turns.square().sum(-1).mean(-1).sqrt()  # [g, G]
    assert size.mean().item() == pytest.approx(1.0, abs=0.3)
    for one in range(MEMBERS):  # nothing of a fast frequency meets anything of another
        pairs = turns[one].abs().sum(0)
        for frequency in range(fast):
            pairs[
                [frequency, frequency + half, frequency, frequency + half],
                [frequency, frequency, frequency + half, frequency + half],
            ] = 0
        assert pairs[:fast].sum() == pairs[half : half + fast].sum() == 0


def spd(*shape, seed):
    """Positive definite [..., n, n] of condition 100 or so."""
    n = shape[-1]
    mixed = randn(*shape, 3 * n, seed=seed) * torch.linspace(0.3, 3, n, dtype=torch.float64)[:, None]
    return mixed @ mixed.mT / (3 * n)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("heads", [1, GROUPS])
def test_the_shared_value_solves_its_equation(heads, alike):
    """Written as one linear system; with one Z for all members, conjugate gradients need a step."""
    inputs, metrics = spd(MEMBERS, heads, INPUTS, seed=1), spd(MEMBERS, GROUPS, SIZE, seed=2)
    if alike:
        inputs = inputs[:1].expand(MEMBERS, -1, -1, -1)
    products = randn(MEMBERS, INPUTS, GROUPS, SIZE, seed=3)
    found = shared_values(inputs, products, metrics)
    for group in range(GROUPS):
        system = sum(torch.kron(inputs[j, group % heads], metrics[j, group]) for j in range(MEMBERS))
        wanted = sum(products[j, :, group] @ metrics[j, group] for j in range(MEMBERS))
        expected = torch.linalg.solve(system, wanted.flatten()).view(INPUTS, SIZE)
        torch.testing.assert_close(found[:, group], expected, rtol=1e-3, atol=1e-3)  # its 1e-6 of ridge on M


def test_members_that_want_the_same_value_get_it():
    """Whatever their inputs and metrics are, and where a metric does not see a direction."""
    inputs, metrics = spd(MEMBERS, GROUPS, INPUTS, seed=1), spd(MEMBERS, GROUPS, SIZE, seed=2)
    metrics[0, 0, 0] = metrics[0, 0, :, 0] = 0
    wanted = randn(INPUTS, GROUPS, SIZE, seed=3)
    found = shared_values(inputs, torch.einsum("jgde,egc->jdgc", inputs, wanted), metrics)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_shared_value_is_least_squares_through_o_proj():
    """With one X for all and o_proj's own metric."""
    values, outputs = randn(MEMBERS, INPUTS, GROUPS, SIZE), randn(MEMBERS, 30, HEADS, SIZE, seed=6)
    inputs = covariance().expand(MEMBERS, 1, -1, -1)
    heads = outputs.unflatten(2, (GROUPS, -1))
    metrics = torch.einsum("jdgrc,jdgre->jgce", heads, heads)
    shared = shared_values(inputs, torch.einsum("de,jegc->jdgc", inputs[0, 0], values), metrics)
    torch.testing.assert_close(mean_values(values, metrics), shared, rtol=1e-6, atol=1e-6)
    for group in range(GROUPS):
        heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        stacked = torch.cat([outputs[member, :, head] for member in range(MEMBERS) for head in heads])
        wanted = torch.cat(
            [outputs[member, :, head] @ values[member, :, group].T for member in range(MEMBERS) for head in heads]
        )
        expected = torch.linalg.lstsq(stacked, wanted).solution.T
        torch.testing.assert_close(shared[:, group], expected, rtol=1e-4, atol=1e-4)  # the solver's 1e-6 of ridge
