"""Rows of a batch with a cache of their own each: what each of them says alone."""

import pytest
import torch
from transformers import DynamicCache

from swiftkv_models import SharedPrefix, SinkWindowCache, optimize_for_cpu, rewrite, row_caches
from swiftkv_models.growing_cache import GrowingCache
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
@pytest.mark.parametrize("optimized", [False, True])
def test_rows_behind_one_prefix_read_it_together(model, optimized, monkeypatch):
    """Streams past their window among them, and beginnings of a kept cache; each says what it says alone."""
    if optimized:
        optimize_for_cpu(model)
    attended = []

    def watched(query, *arguments):
        attended.append(len(query))
        return row_caches_attend(query, *arguments)

    row_caches_attend = row_caches.attend_each_shared
    monkeypatch.setattr(row_caches, "attend_each_shared", watched)
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(0, model.config.vocab_size, (1, count), generator=generator)

    one, other, long = ids(20), ids(9), ids(400)
    prefixes = [SharedPrefix.from_ids(model, each) for each in (one, other)]
    kept = GrowingCache(model.config)
    model(long, past_key_values=kept, use_cache=True)

    def stream(beginning, prefix, window):
        options = {"prefixes": prefix, "input_ids": torch.cat([beginning, ids(1)], dim=1), "share": True}
        return SinkWindowCache(model.config, window=window, attention_sinks=4, **options)

    kinds = [
        lambda: GrowingCache(model.config, prefixes[0]),
        lambda: GrowingCache(model.config, prefixes[1]),
        lambda: stream(one, prefixes[0], 6),
        lambda: GrowingCache(model.config),
        lambda: stream(one, prefixes[0], 64),
        lambda: kept.beginning(long[0].tolist(), 300),
        lambda: GrowingCache(model.config, prefixes[0]),
        lambda: kept.beginning(long[0].tolist(), 300),
    ]
    prompts = [ids(length) for length in (5, 3, 11, 7, 4, 2, 1, 6)]
    alone, together = filled(model, kinds, prompts), filled(model, kinds, prompts)
    for _ in range(6):
        last = torch.cat([ids(1) for _ in kinds])
        wanted = [
            model(token[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for token, cache in zip(last, alone, strict=True)
        ]
        positions = torch.tensor([[cache.get_seq_length()] for cache in together])
        attended.clear()
        cache = RowCaches(model.config, together)
        found = model(last, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=0)  # as above
        assert attended == [4, 1, 2] * model.config.num_hidden_layers


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
