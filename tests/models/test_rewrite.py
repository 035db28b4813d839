"""The conversion of weights, and what it refuses."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from swiftkv_models import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM, RewriteError, rewrite
from tiny import FAMILIES, random_ids, randomise_tail, tiny_llama


def test_copied_start_is_the_mean_of_the_group():
    base = tiny_llama("bias")
    model = rewrite(base, num_key_value_layers=1, key_value_group_size=2)
    layers = base.model.layers
    attention = model.model.layers[3].self_attn  # leads layers 3 and 4
    for kind in ("weight", "bias"):
        expected = (getattr(layers[3].self_attn.k_proj, kind) + getattr(layers[4].self_attn.k_proj, kind)) / 2
        assert torch.allclose(getattr(attention.k_proj_swiftkv, kind), expected)
    assert torch.equal(attention.q_proj_swiftkv.weight, layers[3].self_attn.q_proj.weight)
    assert torch.equal(model.model.norm_swiftkv.weight, layers[1].input_layernorm.weight)
    assert not hasattr(model.model.layers[4].self_attn, "k_proj_swiftkv")
    # The last group has one layer only.
    assert torch.allclose(model.model.layers[5].self_attn.v_proj_swiftkv.weight, layers[5].self_attn.v_proj.weight)


def test_base_tensors_are_shared_and_new_ones_are_not():
    base = tiny_llama()
    model = rewrite(base, num_key_value_layers=3)
    assert model.model.layers[4].mlp.up_proj.weight is base.model.layers[4].mlp.up_proj.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    new = model.model.layers[4].self_attn.q_proj_swiftkv.weight
    assert new.data_ptr() != base.model.layers[4].self_attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize(
    ("first", "group", "says"),
    [
        (0, 1, "num_key_value_layers is 0"),
        (7, 1, "num_key_value_layers is 7"),
        (-1, 1, "num_key_value_layers is -1"),
        (3, 0, "key_value_group_size is 0"),
        (3, 4, "key_value_group_size is 4"),
        (6, 2, "key_value_group_size is 2"),
    ],
)
def test_out_of_range_numbers_are_refused(first, group, says):
    with pytest.raises(RewriteError, match=says) as error:
        rewrite(tiny_llama(), num_key_value_layers=first, key_value_group_size=group)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([[3], [4]], "key_value_groups must be lists of neighbouring layers, all of 3 to 5 in their order"),
        ([[3, 4, 5], []], "key_value_groups must be lists"),
        ([[4, 3], [5]], "key_value_groups must be lists"),
        ([[2, 3], [4, 5]], "key_value_groups must be lists"),
        ([], "key_value_groups must be lists"),
        ("3", "key_value_groups"),
    ],
)
def test_groups_that_are_not_the_tail_are_refused(groups, says):
    with pytest.raises(RewriteError, match=says) as error:
        rewrite(tiny_llama(), num_key_value_layers=3, key_value_groups=groups)
    assert "\n" not in str(error.value)


def test_two_ways_of_grouping_are_refused():
    with pytest.raises(RewriteError, match="do not go together"):
        rewrite(tiny_llama(), num_key_value_layers=3, key_value_groups=[[3, 4], [5]], key_value_group_size=2)


def test_groups_of_any_size_are_saved_and_loaded(tmp_path):
    groups = [[2], [3, 4, 5]]
    model = randomise_tail(rewrite(tiny_llama(), num_key_value_layers=2, key_value_groups=groups))
    leaders = [layer for layer in range(2, 6) if hasattr(model.model.layers[layer].self_attn, "k_proj_swiftkv")]
    assert leaders == [2, 3]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.key_value_groups == groups
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-12, rtol=0)
    assert rewrite(loaded, num_key_value_layers=2, key_value_groups=groups) is loaded
    with pytest.raises(RewriteError, match=r"already rewritten with .*key_value_groups"):
        rewrite(loaded, num_key_value_layers=2)


def test_a_model_in_parts_is_refused():
    model = tiny_llama()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(RewriteError, match="in parts on several devices"):
        rewrite(model, num_key_value_layers=3)


def test_an_unknown_family_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(RewriteError, match="'gpt2' is not known; known: llama"):
        rewrite(model, num_key_value_layers=1)


def test_a_missing_or_unexpected_tensor_is_refused():
    base = tiny_llama()
    del base.model.layers[2].mlp.up_proj
    with pytest.raises(RewriteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        rewrite(base, num_key_value_layers=3)
    base = tiny_llama()
    base.model.layers[2].mlp.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(RewriteError, match=r"adapter\.bias is unexpected"):
        rewrite(base, num_key_value_layers=3)


def test_a_rewritten_model_is_continued_with_its_weights():
    model = randomise_tail(rewrite(tiny_llama(), num_key_value_layers=3))
    before = model.model.layers[4].self_attn.k_proj_swiftkv.weight.clone()
    again = rewrite(model, num_key_value_layers=3)
    assert torch.equal(again.model.layers[4].self_attn.k_proj_swiftkv.weight, before)
    with pytest.raises(RewriteError, match="already rewritten with num_key_value_layers=3"):
        rewrite(model, num_key_value_layers=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_through_the_auto_classes(family, tmp_path):
    model = randomise_tail(rewrite(tiny_llama(family), num_key_value_layers=3, key_value_group_size=2))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlamaSwiftKVConfig)
    assert (config.num_key_value_layers, config.key_value_group_size) == (3, 2)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert isinstance(loaded, LlamaSwiftKVForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_tail_only(checkpointing):
    model = randomise_tail(rewrite(tiny_llama(), num_key_value_layers=2, key_value_group_size=2))
    model.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if "_swiftkv" in name}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    ids = random_ids(2, 9)

    def gradients(train):
        model.train(train)
        model(ids, use_cache=False).logits.square().mean().backward()
        found = {name: parameter.grad.clone() for name, parameter in trained.items()}
        model.zero_grad()
        return found

    plain = gradients(train=False)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # its newer name is not in transformers 5.17
        for name, gradient in gradients(train=True).items():
            assert torch.allclose(gradient, plain[name], atol=1e-12)
