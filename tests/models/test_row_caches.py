"""Rows of a batch with a cache of their own each: what each of them says alone."""

import pytest
import torch
from transformers import DynamicCache

from swiftkv_models import SinkWindowCache, optimize_for_cpu, rewrite
from swiftkv_models.row_caches import RowCaches
from tiny import tiny_llama

LENGTHS = (5, 9, 17, 3)


@pytest.fixture(params=["base", "swiftkv", "groups"])
def model(request):
    base = tiny_llama(dtype=torch.float32)
    if request.param == "base":
        return base
    return rewrite(base, num_key_value_layers=3, key_value_group_size=1 if request.param == "swiftkv" else 2)


def filled(model, kinds, prompts):
    caches = [kind() for kind in kinds]
    for cache, prompt in zip(caches, prompts, strict=True):
        model(prompt, past_key_values=cache, use_cache=True)
    return caches


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True])
def test_every_row_goes_on_as_if_alone(model, optimized):
    """Beyond the windows, of caches of either kind; one row leaves, another comes."""
    if optimized:
        optimize_for_cpu(model)
    generator = torch.Generator().manual_seed(0)

    def ids(*shape):
        return torch.randint(0, model.config.vocab_size, shape, generator=generator)

    kinds = [
        lambda: DynamicCache(config=model.config),
        lambda: SinkWindowCache(model.config, window=6, attention_sinks=2),
        lambda: SinkWindowCache(model.config, window=8, attention_sinks=4, quantization="int8"),
        lambda: DynamicCache(config=model.config),
    ]
    prompts = [ids(1, length) for length in LENGTHS]
    alone, together = filled(model, kinds, prompts), filled(model, kinds, prompts)
    rows = [0, 1, 2]
    for step in range(10):
        if step == 5:
            rows = [3, 1, 2]
        last = ids(len(rows), 1)
        wanted = [
            model(token[None], past_key_values=alone[row], use_cache=True, logits_to_keep=1).logits
            for row, token in zip(rows, last, strict=True)
        ]
        positions = torch.tensor([[together[row].get_seq_length()] for row in rows])
        cache = RowCaches(model.config, [together[row] for row in rows])
        assert cache.get_seq_length() == positions.max()
        found = model(last, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        # fp32 logits of some units; rows of a product may be summed in another order when they are more.
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=0)
        assert [together[row].get_seq_length() for row in rows] == [alone[row].get_seq_length() for row in rows]


@torch.no_grad()
def test_it_is_for_one_token_a_row(model):
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for shape in ((2, 3), (3, 1)):
        with pytest.raises(ValueError, match="a step of one token for 2 rows"):
            model(torch.zeros(shape, dtype=torch.long), past_key_values=RowCaches(model.config, caches))


@torch.no_grad()
def test_a_row_of_another_model(model):
    other = tiny_llama(layers=8, dtype=torch.float32)
    caches = filled(other, [lambda: SinkWindowCache(other.config, window=8)] * 2, [torch.ones(1, 4).long()] * 2)
    with pytest.raises(ValueError, match="this cache is another model's"):
        model(
            torch.ones(2, 1).long(), position_ids=torch.full((2, 1), 4), past_key_values=RowCaches(model.config, caches)
        )
