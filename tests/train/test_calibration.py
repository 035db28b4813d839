"""The closed-form start against least squares on explicitly collected X and Y."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from swiftkv_models import rewrite
from swiftkv_train.calibrate import accumulate_moments, solve
from swiftkv_train.data import Batch
from tiny import random_ids, tiny_llama

FIRST, PAD = 2, 0


def packed_batch(rows, length, seed, padding):
    """Two documents a row and `padding` positions of padding at its end."""
    real = length - padding
    positions = torch.cat([torch.arange(5), torch.arange(real - 5), torch.arange(padding)]).expand(rows, length)
    token_mask = (torch.arange(length) < real).expand(rows, length)
    ids = random_ids(rows, length, seed=seed).masked_fill(~token_mask, PAD)
    return Batch(ids, positions.contiguous(), token_mask.clone(), token_mask, torch.zeros(rows, dtype=torch.long))


@pytest.fixture(scope="module")
def batches():
    return [packed_batch(4, 33, seed, padding) for seed, padding in ((0, 0), (1, 7), (2, 20))]


def inputs_and_targets(base, batches):
    """X [N, D] and per tail layer Y [N, 2 G C] of the real tokens, from the base's recorded hidden states."""
    layers = base.model.layers
    inputs, targets = [], [[] for _ in layers[FIRST:]]
    with torch.no_grad():
        for batch in batches:
            states = base.model(
                batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
            ).hidden_states
            inputs.append(layers[FIRST].input_layernorm(states[FIRST])[batch.token_mask])
            for found, index in zip(targets, range(FIRST, len(layers)), strict=True):
                normed = layers[index].input_layernorm(states[index])[batch.token_mask]
                attention = layers[index].self_attn
                found.append(torch.cat([attention.k_proj(normed), attention.v_proj(normed)], dim=-1))
    return torch.cat(inputs).numpy(), [torch.cat(found).numpy() for found in targets]


def ridge_by_least_squares(inputs, targets, ridge, bias):
    """argmin |X W - Y|^2 + r |W|^2 with r = ridge x mean of the diagonal of X'X, as one stacked lstsq; bias is free."""
    width = inputs.shape[1]
    strength = ridge * (inputs**2).sum(0).mean()
    penalty = np.sqrt(strength) * np.eye(width)
    if bias:
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        penalty = np.hstack([penalty, np.zeros((width, 1))])
    stacked = np.vstack([inputs, penalty])
    solution, *_ = np.linalg.lstsq(stacked, np.vstack([targets, np.zeros((width, targets.shape[1]))]), rcond=None)
    residual = targets - inputs @ solution
    half = targets.shape[1] // 2
    r2 = [
        1 - (residual[:, part] ** 2).sum() / ((targets[:, part] - targets[:, part].mean(0)) ** 2).sum()
        for part in (slice(0, half), slice(half, None))
    ]
    return solution, r2


@pytest.mark.parametrize("family", ["smollm2", "bias", "wide-heads"])
@pytest.mark.parametrize("group", [1, 2])
def test_equals_least_squares_on_the_real_tokens(family, group, batches):
    base = tiny_llama(family)
    inputs, targets = inputs_and_targets(base, batches)
    expected = [ridge_by_least_squares(inputs, target, 1e-2, family == "bias") for target in targets]
    model = rewrite(copy.deepcopy(base), num_key_value_layers=FIRST, key_value_group_size=group)
    moments = accumulate_moments(model, batches, "cpu")
    assert int(moments.tokens) == len(inputs) == 4 * (33 + 26 + 13)
    fits = solve(model, moments, 1e-2)
    # fp64 normal equations of a system with ridge 1e-2, whose condition number is below 1e4: 1e-12 x 1e4.
    for fit, (_, (keys, values)) in zip(fits, expected, strict=True):
        assert fit.r2_keys == pytest.approx(keys, abs=1e-8)
        assert fit.r2_values == pytest.approx(values, abs=1e-8)
        assert 0 < keys < 1
    for leader in range(FIRST, 6, group):
        shared = np.mean([expected[index - FIRST][0] for index in range(leader, leader + group)], axis=0)
        attention = model.model.layers[leader].self_attn
        width, half = base.config.hidden_size, shared.shape[1] // 2
        for projection, part in (
            (attention.k_proj_swiftkv, shared[:, :half]),
            (attention.v_proj_swiftkv, shared[:, half:]),
        ):
            np.testing.assert_allclose(projection.weight.detach().numpy().T, part[:width], atol=1e-8)
            if family == "bias":
                np.testing.assert_allclose(projection.bias.detach().numpy(), part[width], atol=1e-8)


@pytest.mark.parametrize("family", ["smollm2", "bias"])
def test_recovers_an_exactly_linear_tail_and_with_it_the_base(family, batches):
    # Tail layers that add nothing leave h_l as every layer's input, so each K and V is linear in norm_swiftkv(h_l): the
    # layer's own projection times the ratio of the two norms' weights. Only the last layer's output differs from h_l.
    base = tiny_llama(family)
    with torch.no_grad():
        for layer in base.model.layers[FIRST:-1]:
            for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
                parameter.zero_()
    model = rewrite(copy.deepcopy(base), num_key_value_layers=FIRST)
    ids = random_ids(2, 19, seed=5)
    with torch.no_grad():
        wrong = float((model(ids).logits - base(ids).logits).abs().max())
        fits = solve(model, accumulate_moments(model, batches, "cpu"), 1e-14)
        assert all(fit.r2_keys > 1 - 1e-9 and fit.r2_values > 1 - 1e-9 for fit in fits)
        weights = base.model.layers
        for index in range(FIRST, 6):
            scale = weights[index].input_layernorm.weight / weights[FIRST].input_layernorm.weight
            found = model.model.layers[index].self_attn.k_proj_swiftkv.weight
            # transformers' norm rounds to fp32, so X and Y hold 1e-7 of noise.
            torch.testing.assert_close(found, weights[index].self_attn.k_proj.weight * scale, atol=2e-5, rtol=0)
        torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=0)
    assert wrong > 0.1  # the copied start is not exact here


def test_what_stands_in_the_padding_does_not_matter(batches):
    model = rewrite(tiny_llama(), num_key_value_layers=FIRST)
    others = [replace(batch, input_ids=batch.input_ids.masked_fill(~batch.token_mask, 41)) for batch in batches]
    plain, changed = accumulate_moments(model, batches, "cpu"), accumulate_moments(model, others, "cpu")
    for one, other in zip(plain.tensors(), changed.tensors(), strict=True):
        assert torch.equal(one, other)


def test_only_key_and_value_projections_of_leaders_are_set(batches):
    model = rewrite(tiny_llama(), num_key_value_layers=FIRST, key_value_group_size=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    solve(model, accumulate_moments(model, batches, "cpu"), 1e-3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    attention = "model.layers.{}.self_attn.{}_proj_swiftkv.weight"
    assert changed == {attention.format(layer, kind) for layer in (2, 4) for kind in "kv"}


def test_too_few_tokens_without_ridge_are_noticed(batches):
    model = rewrite(tiny_llama(), num_key_value_layers=FIRST)
    moments = accumulate_moments(model, [packed_batch(1, 9, 0, 0)], "cpu")
    with pytest.raises(torch.linalg.LinAlgError):
        solve(model, moments, 0.0)
