"""A checkpoint against its base on whole sources."""

import copy

import pytest
import torch

from swiftkv_models import pack_linears, rewrite
from swiftkv_train.data import Batch
from swiftkv_train.evaluate.quality import source_quality
from swiftkv_train.export import without_base_projections
from swiftkv_train.pair import first_difference
from swiftkv_train.quality import summarise, token_measures
from tiny import random_ids, randomise_tail, tiny_llama


def packed_batch(lengths: list[int], rows: int) -> Batch:
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1).contiguous()
    ends = position_ids.roll(-1, dims=1) == 0
    input_ids = random_ids(*position_ids.shape)
    return Batch(input_ids, position_ids, ~ends, torch.ones_like(ends), torch.zeros(rows, dtype=torch.long))


def exported(base, **form):
    return without_base_projections(rewrite(copy.deepcopy(base), num_key_value_layers=3, **form))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["smollm2", "bias", "llama3.1"])
def test_nothing_differs_from_the_base_itself(family, packed):
    base = tiny_llama(family, dtype=torch.float32)
    student = randomise_tail(exported(base, key_value_group_size=2))
    if packed:
        student, base = pack_linears(student), pack_linears(base)
    assert first_difference(student, base) is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.4.self_attn.o_proj.weight",
        "model.layers.5.mlp.down_proj.weight",
        "model.layers.5.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_another_base_is_noticed_by_any_tensor_that_a_rewrite_leaves(name, packed):
    base = tiny_llama("llama2", dtype=torch.float32)
    student = exported(base)
    base.get_parameter(name).data.view(-1)[0] += 1e-3
    if packed:
        student, base = pack_linears(student), pack_linears(base)
    assert first_difference(student, base) == name


@pytest.mark.parametrize(("name", "value"), [("rms_norm_eps", 1e-3), ("num_hidden_layers", 7), ("hidden_act", "gelu")])
def test_another_base_is_noticed_by_its_settings(name, value):
    base = tiny_llama()
    student = exported(base)
    setattr(base.config, name, value)
    assert first_difference(student, base) == name


def test_figures_are_those_of_two_separate_models():
    base = tiny_llama()
    student = randomise_tail(rewrite(copy.deepcopy(base), num_key_value_layers=3, key_value_group_size=2))
    batch = packed_batch([20, 7, 13], 3)
    documents = [slice(0, 20), slice(20, 27), slice(27, 40)]
    rows = []
    with torch.no_grad():
        for ids in batch.input_ids:
            for part in documents:
                logits = [model(ids[None, part]).logits[0, :-1] for model in (student, base)]
                rows.append(token_measures(*logits, ids[part][1:]))
    found = source_quality(student, base, [batch], lambda amount: None)
    torch.testing.assert_close(found.measures, torch.cat(rows), rtol=1e-5, atol=1e-6)
    assert found.overall == summarise(found.measures)
    assert [quality.tokens for quality in found.by_position.values()] == [3 * (16 + 6 + 12), 3 * 3]
