"""A checkpoint against its base on whole sources."""

import copy

import pytest
import torch

from swiftkv_models import pack_linears, rewrite
from swiftkv_train.data import Batch
from swiftkv_train.evaluate.quality import same_trunk, source_quality
from swiftkv_train.quality import summarise, token_measures
from tiny import random_ids, randomise_tail, tiny_llama


def packed_batch(lengths: list[int], rows: int) -> Batch:
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1).contiguous()
    ends = position_ids.roll(-1, dims=1) == 0
    input_ids = random_ids(*position_ids.shape)
    return Batch(input_ids, position_ids, ~ends, torch.ones_like(ends), torch.zeros(rows, dtype=torch.long))


@pytest.mark.parametrize("changed", [None, "self_attn.k_proj", "mlp.down_proj"])
def test_another_trunk_is_noticed_in_packed_models_too(changed):
    base = tiny_llama(dtype=torch.float32)
    student = rewrite(copy.deepcopy(base), num_key_value_layers=3)
    if changed:
        student.model.layers[2].get_submodule(changed).weight.data[0, 0] += 1.0
    assert same_trunk(pack_linears(student), pack_linears(base)) == (changed is None)


@pytest.mark.parametrize("trunk", ["shared", "another"])
def test_figures_are_those_of_two_separate_models(trunk):
    base = tiny_llama()
    student = randomise_tail(rewrite(copy.deepcopy(base), num_key_value_layers=3, key_value_group_size=2))
    assert same_trunk(student, base)
    if trunk == "another":
        with torch.no_grad():
            student.model.layers[2].mlp.down_proj.weight[0, 0] += 1.0
        assert not same_trunk(student, base)
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
