"""The SwiftKV forward against transformers' Llama, where the rewrite is exact, and against a second implementation."""

import pytest
import torch
from naive_swiftkv import naive_logits
from transformers import DynamicCache

from swiftkv_models import rewrite
from tiny import FAMILIES, random_ids, randomise_tail, tiny_llama

# fp64 throughout. transformers computes the RoPE angles and norms in fp32, which bounds agreement with an fp64 oracle.
EXACT, FP32_ANGLES = 1e-12, 2e-4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [5, 6])
def test_rewriting_at_most_the_last_layer_changes_nothing(family, first):
    base = tiny_llama(family)
    model = rewrite(base, num_key_value_layers=first)
    ids = random_ids(2, 19)
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "group"), [(1, 1), (1, 2), (1, 4), (2, 4), (3, 1), (3, 3), (4, 2), (1, 5)])
def test_exact_where_the_tail_leaves_the_stream_alone_until_its_last_layer(family, first, group):
    # All tail layers but the last add nothing, and all share norms and K/V: so h_l is every tail layer's input, one K/V
    # serves them all, and the copied start is exact although the last layer really attends.
    base = tiny_llama(family)
    tail = base.model.layers[first:]
    for layer in tail:
        layer.input_layernorm.load_state_dict(tail[0].input_layernorm.state_dict())
        layer.self_attn.k_proj.load_state_dict(tail[0].self_attn.k_proj.state_dict())
        layer.self_attn.v_proj.load_state_dict(tail[0].self_attn.v_proj.state_dict())
    for layer in tail[:-1]:
        for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
            parameter.zero_()
    model = rewrite(base, num_key_value_layers=first, key_value_group_size=group)
    ids = random_ids(2, 19)
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "group"), [(1, 1), (1, 2), (1, 4), (2, 2), (3, 1), (5, 1)])
def test_agrees_with_a_second_implementation(family, first, group):
    model = randomise_tail(rewrite(tiny_llama(family), num_key_value_layers=first, key_value_group_size=group))
    ids = random_ids(13)
    logits, expected = model(ids[None]).logits[0], naive_logits(model, ids)
    assert torch.allclose(logits, expected, atol=FP32_ANGLES * float(expected.std()), rtol=0)


@pytest.mark.parametrize("groups", [[[2], [3], [4, 5]], [[2, 3, 4], [5]], [[2], [3, 4], [5]], [[2, 3, 4, 5]]])
def test_groups_of_any_size_agree_with_a_second_implementation(groups):
    model = randomise_tail(rewrite(tiny_llama("bias"), num_key_value_layers=2, key_value_groups=groups))
    assert model.config.num_cached_layers == 2 + len(groups)
    ids = random_ids(13)
    expected = naive_logits(model, ids)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, atol=FP32_ANGLES * float(expected.std()), rtol=0)
    cache = DynamicCache(config=model.config)
    stepped = [model(ids[None, at : at + 1], past_key_values=cache).logits[0] for at in range(13)]
    torch.testing.assert_close(torch.cat(stepped), model(ids[None]).logits[0], atol=EXACT, rtol=0)
    assert sum(getattr(layer, "keys", None) is not None for layer in cache.layers) == 2 + len(groups)


def test_the_second_implementation_notices_a_wrong_group():
    model = randomise_tail(rewrite(tiny_llama(), num_key_value_layers=2, key_value_group_size=2))
    ids = random_ids(13)
    right = naive_logits(model, ids)
    model.config.key_value_group_size = 1
    attention = model.model.layers[2].self_attn
    for layer in (3, 5):
        model.model.layers[layer].self_attn.k_proj_swiftkv = attention.k_proj_swiftkv
        model.model.layers[layer].self_attn.v_proj_swiftkv = attention.v_proj_swiftkv
    assert not torch.allclose(naive_logits(model, ids), right, atol=0.1)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_base_tail_of_the_same_module_is_the_base(group):
    base = tiny_llama("bias")
    model = randomise_tail(rewrite(base, num_key_value_layers=2, key_value_group_size=group))
    ids = random_ids(2, 19)
    trunk = model.model.run_trunk(ids)
    states = model.model.run_tail(trunk, base=True)
    expected = base.model(ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(states.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(states.last_layer_input, expected.hidden_states[-2])


def test_packed_documents_do_not_see_each_other():
    model = randomise_tail(rewrite(tiny_llama(), num_key_value_layers=3, key_value_group_size=2))
    ids = random_ids(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids[:, :8], use_cache=False).logits, model(ids[:, 8:], use_cache=False).logits], dim=1)
    assert torch.allclose(packed, apart, atol=EXACT, rtol=0)
