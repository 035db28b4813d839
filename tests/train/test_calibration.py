"""The closed-form start against least squares on explicitly collected X and Y."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed import packed_batch

from swiftkv_models import rewrite
from swiftkv_train import moments as sums
from swiftkv_train.calibrate import solve
from swiftkv_train.moments import accumulate_moments, accumulate_sensitivities
from swiftkv_train.shared_projections import (
    compensated_queries,
    complex_halves,
    fast_frequencies,
    shared_keys,
    shared_values,
)
from tiny import random_ids, tiny_llama

FIRST = 2


@pytest.fixture(scope="module")
def batches():
    return [packed_batch(4, 33, seed, padding) for seed, padding in ((0, 0), (1, 7), (2, 20))]


def inputs_targets_and_attention(base, batches):
    """X [N, D], per tail layer Y [N, 2, G, C] (K and V) and the attention [N, G] that the real tokens get.

    As the base's own code records them.
    """
    layers, config = base.model.layers, base.config
    base.set_attn_implementation("eager")  # the only one that shows its weights
    inputs, targets, attention = [], [[] for _ in layers[FIRST:]], [[] for _ in layers[FIRST:]]
    with torch.no_grad():
        for batch in batches:
            out = base.model(
                batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                output_hidden_states=True,
                output_attentions=True,
            )
            states = out.hidden_states
            inputs.append(layers[FIRST].input_layernorm(states[FIRST])[batch.token_mask])
            for offset, index in enumerate(range(FIRST, len(layers))):
                normed = layers[index].input_layernorm(states[index])[batch.token_mask]
                own = layers[index].self_attn
                both = torch.stack([own.k_proj(normed), own.v_proj(normed)], dim=1)
                targets[offset].append(both.unflatten(2, (-1, config.head_dim)))
                received = out.attentions[index].sum(2).unflatten(1, (config.num_key_value_heads, -1)).mean(2)
                attention[offset].append(received.transpose(1, 2)[batch.token_mask])
    return (
        torch.cat(inputs).numpy(),
        [torch.cat(part).numpy() for part in targets],
        [torch.cat(part).numpy() for part in attention],
    )


def ridge_by_least_squares(inputs, targets, weights, ridge, bias):
    """argmin |M^1/2 (X W - Y)|^2 + r |W|^2, r = ridge x mean diagonal of X'MX, as one stacked lstsq; a bias is free."""
    width, root = inputs.shape[1], np.sqrt(weights)[:, None]
    penalty = np.sqrt(ridge * ((root * inputs) ** 2).sum(0).mean()) * np.eye(width)
    if bias:
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        penalty = np.hstack([penalty, np.zeros((width, 1))])
    stacked = np.vstack([root * inputs, penalty])
    solution, *_ = np.linalg.lstsq(
        stacked, np.vstack([root * targets, np.zeros((width, targets.shape[1]))]), rcond=None
    )
    residual = targets - inputs @ solution
    mean = (weights[:, None] * targets).sum(0) / weights.sum()
    return solution, (weights[:, None] * residual**2).sum(), (weights[:, None] * (targets - mean) ** 2).sum()


def expected_solutions(base, batches, weighting, ridge, bias):
    """Per tail layer K and V [D, G, C] and their R^2, head by head."""
    inputs, targets, attention = inputs_targets_and_attention(base, batches)
    found = []
    for of_layer, received in zip(targets, attention, strict=True):
        if weighting != "head":
            received = np.repeat(received.mean(1, keepdims=True), received.shape[1], axis=1)
        if weighting == "none":
            received = np.ones_like(received)
        solutions, r2 = [], []
        for kind in (0, 1):
            heads = [
                ridge_by_least_squares(inputs, of_layer[:, kind, head], received[:, head], ridge, bias)
                for head in range(received.shape[1])
            ]
            solutions.append(np.stack([solution for solution, _, _ in heads], axis=1))
            r2.append(1 - sum(left for _, left, _ in heads) / sum(total for _, _, total in heads))
        found.append((*solutions, *r2))
    return found, len(inputs)


@pytest.mark.parametrize("family", ["smollm2", "bias", "wide-heads"])
@pytest.mark.parametrize("weighting", ["head", "layer", "none"])
def test_equals_least_squares_on_the_real_tokens(family, weighting, batches):
    base = tiny_llama(family)
    expected, tokens = expected_solutions(copy.deepcopy(base), batches, weighting, 1e-2, family == "bias")
    model = rewrite(base, num_key_value_layers=FIRST)
    moments = accumulate_moments(model, batches, "cpu", weighting=weighting)
    assert int(moments.tokens) == tokens == 4 * (33 + 26 + 13)
    fits = solve(model, moments, 1e-2)
    width = base.config.hidden_size
    for fit, (keys, values, r2_keys, r2_values) in zip(fits, expected, strict=True):
        # Attention is summed in fp32 here and normalised in fp32 there: 1e-7, and the condition of the system above it.
        assert fit.r2_keys == pytest.approx(r2_keys, abs=1e-5)
        assert fit.r2_values == pytest.approx(r2_values, abs=1e-5)
        assert 0 < r2_keys < 1
        attention = model.model.layers[fit.layer].self_attn
        for projection, part in ((attention.k_proj_swiftkv, keys), (attention.v_proj_swiftkv, values)):
            rows = part.reshape(len(part), -1)
            np.testing.assert_allclose(projection.weight.detach().numpy().T, rows[:width], atol=1e-5)
            if family == "bias":
                np.testing.assert_allclose(projection.bias.detach().numpy(), rows[width], atol=1e-5)


@pytest.mark.parametrize("weighting", ["head", "layer", "none"])
@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("family", ["smollm2", "bias"])
def test_groups_share_what_shared_projections_make_of_their_solutions(family, sensitive, weighting, batches):
    """That these are right is test_shared_projections.py's matter; here, that they are given the right tensors."""
    base = tiny_llama(family)
    bias, width, size = family == "bias", base.config.hidden_size, base.config.head_dim
    expected, _ = expected_solutions(copy.deepcopy(base), batches, weighting, 1e-2, bias)
    inputs, _, attention = inputs_targets_and_attention(copy.deepcopy(base), batches)
    x = torch.from_numpy(np.hstack([inputs, np.ones((len(inputs), 1))]) if bias else inputs)
    queries = queries_of(copy.deepcopy(base), batches)
    seen = attended_and_slopes(copy.deepcopy(base), batches, bias)
    model = rewrite(base, num_key_value_layers=FIRST, key_value_group_size=2)
    moments = accumulate_moments(model, batches, "cpu", weighting=weighting)
    if sensitive:
        accumulate_sensitivities(moments, model, batches, "cpu")
    solve(model, moments, 1e-2)
    for leader in range(FIRST, 6, 2):
        layers = (leader, leader + 1)
        members = [model.model.layers[index].self_attn for index in layers]
        keys, values = (torch.stack([torch.from_numpy(expected[i - FIRST][kind]) for i in layers]) for kind in (0, 1))
        groups = keys.shape[2]
        received = [torch.from_numpy(attention[index - FIRST]) for index in layers]
        if weighting != "head":
            received = [part.mean(1, keepdim=True).expand(-1, groups) for part in received]
        if weighting == "none":
            received = [torch.ones_like(part) for part in received]

        metrics, normals, products = [], [], []
        for index, own, weights, member in zip(layers, values, received, members, strict=True):
            z, y, g = seen[index - FIRST]  # [N, G, R, D], [N, G, R, C] twice
            heads = member.o_proj.weight.detach().unflatten(1, (groups, -1, size))
            metrics.append(
                torch.einsum("ngrc,ngre->gce", g, g) if sensitive else torch.einsum("dgrc,dgre->gce", heads, heads)
            )
            if weighting == "none":
                normal = torch.einsum("ng,nd,ne->gde", weights, x, x)[:1] / weights.sum(0)[0]
            else:
                normal = torch.einsum("ngrd,ngre->gde", z, z) / len(z)
                normal = normal if weighting == "head" else normal.sum(0, keepdim=True)
            ridge = 1e-2 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            normals.append(normal + ridge * torch.eye(x.shape[1]))
            if weighting == "head":
                products.append(torch.einsum("ngrd,ngrc->dgc", z, y) / len(z) + ridge.view(1, -1, 1) * own)
            else:
                products.append(torch.einsum("de,egc->dgc", normals[-1][0], own))
        shared = shared_values(*(torch.stack(part) for part in (normals, products, metrics))).flatten(1)
        # Attention is fp32 here and there: 1e-7, and the condition of the systems above it.
        torch.testing.assert_close(members[0].v_proj_swiftkv.weight.T, shared[:width], atol=2e-4, rtol=2e-4)

        weights = [part.sum(1, keepdim=True) for part in received]
        metric = sum((x * weight).T @ x / weight.sum() for weight in weights) / 2
        squares = torch.stack([queries[i - FIRST].square().mean(0).view(groups, -1, size).mean(1) for i in layers])
        rms = (squares[..., : size // 2] + squares[..., size // 2 :]).sqrt()
        fast = fast_frequencies(model.model.rotary_emb.inv_freq, base.config.max_position_embeddings)
        assert 0 < fast < size // 2
        wanted, turns = shared_keys(keys, metric, rms, fast)
        projection = members[0].k_proj_swiftkv
        columns = [projection.weight.T, *([projection.bias[None]] if bias else [])]
        found = torch.cat(columns).detach().unflatten(1, (groups, size))
        slow = [*range(fast, size // 2), *range(size // 2 + fast, size)]

        def products_of(key, weight, groups=groups, slow=slow, fast=fast):
            """What no phase of an eigenvector changes: keys times the conjugate of each query they meet."""
            rows = weight.T.unflatten(1, (groups, -1, size))  # [D, G, R, C]
            query, turned = complex_halves(rows)[..., :fast], complex_halves(key)[..., :fast]
            return torch.einsum("dgf,egrf->degrf", turned, query.conj()), torch.einsum(
                "dgc,egrc->degr", key[..., slow], rows[..., slow]
            )

        for attention_of, turn in zip(members, turns, strict=True):
            compensated = compensated_queries(attention_of.q_proj.weight, turn)
            for one, other in zip(
                products_of(found, attention_of.q_proj_swiftkv.weight.detach()),
                products_of(wanted, compensated.detach()),
                strict=True,
            ):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def attended_and_slopes(base, batches, bias):
    """Per tail layer, of the real tokens: what the base's attention makes of X [N, G, R, D], what it puts out, and the
    gradient there of the log-likelihood of the next tokens of the loss [N, G, R, C]. From the base's own code."""
    layers, config = base.model.layers, base.config
    base.set_attn_implementation("eager")
    groups = config.num_key_value_heads
    seen = [[] for _ in layers[FIRST:]]
    for batch in batches:
        taken = {}
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _module, inputs, index=index, taken=taken: taken.update({index: inputs[0]})
            )
            for index, layer in enumerate(layers)
        ]
        out = base(
            batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
        for handle in handles:
            handle.remove()
        log_p = torch.log_softmax(out.logits, -1).gather(2, batch.input_ids.roll(-1, 1).unsqueeze(2))[..., 0]
        slopes = torch.autograd.grad(
            log_p[batch.loss_mask].sum(), [taken[index] for index in range(FIRST, len(layers))]
        )
        x = layers[FIRST].input_layernorm(out.hidden_states[FIRST]).detach()
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1) if bias else x
        for offset, slope in enumerate(slopes):
            attended = torch.einsum("bhts,bsd->bthd", out.attentions[FIRST + offset].detach().to(x.dtype), x)
            seen[offset].append(
                [
                    part[batch.token_mask].unflatten(1, (groups, -1))
                    for part in (
                        attended,
                        taken[FIRST + offset].detach().unflatten(2, (-1, config.head_dim)),
                        slope.unflatten(2, (-1, config.head_dim)),
                    )
                ]
            )
    return [[torch.cat(parts) for parts in zip(*of_layer, strict=True)] for of_layer in seen]


def queries_of(base, batches):
    """Per tail layer the base's queries [N, H C] of the real tokens."""
    found = [[] for _ in base.model.layers[FIRST:]]
    with torch.no_grad():
        for batch in batches:
            states = base.model(
                batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
            ).hidden_states
            for offset, layer in enumerate(base.model.layers[FIRST:]):
                normed = layer.input_layernorm(states[FIRST + offset])[batch.token_mask]
                found[offset].append(layer.self_attn.q_proj(normed))
    return [torch.cat(part) for part in found]


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


@pytest.mark.parametrize("group", [1, 2])
def test_only_what_is_to_be_calibrated_is_set(batches, group):
    model = rewrite(tiny_llama(), num_key_value_layers=FIRST, key_value_group_size=group)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    solve(model, accumulate_moments(model, batches, "cpu"), 1e-3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    attention = "model.layers.{}.self_attn.{}_proj_swiftkv.weight"
    wanted = {attention.format(layer, kind) for layer in range(FIRST, 6, group) for kind in "kv"}
    if group > 1:
        wanted |= {attention.format(layer, "q") for layer in range(FIRST, 6)}
    assert changed == wanted


def test_attention_received_in_blocks_is_that_of_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 37, 8, generator=generator) for heads in (6, 2))
    documents = (torch.arange(37) // 15).expand(2, 37)
    monkeypatch.setattr(sums, "CPU_SCORE_BYTES", 4 * 2 * 6 * 37 * 5)  # five rows at a time
    found = sums.attention_received(query, key, documents)
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 8**-0.5
    visible = torch.ones(37, 37, dtype=torch.bool).tril() & (documents[0, :, None] == documents[0, None])
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
    torch.testing.assert_close(found, weights.sum(2).view(2, 2, 3, 37).mean(2).transpose(1, 2))
    torch.testing.assert_close(found.mean(1), torch.ones(2, 2))


def test_too_few_tokens_without_ridge_are_noticed(batches):
    model = rewrite(tiny_llama(), num_key_value_layers=FIRST)
    moments = accumulate_moments(model, [packed_batch(1, 9, 0, 0)], "cpu")
    with pytest.raises(torch.linalg.LinAlgError):
        solve(model, moments, 0.0)
