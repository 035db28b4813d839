"""A cache that grows in place, behind a beginning that others share: what a DynamicCache says of the same tokens."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from swiftkv_models import SharedPrefix, optimize_for_cpu, rewrite
from swiftkv_models.growing_cache import LEAST_SHARED, MORE, GrowingCache
from tiny import tiny_llama

TOLERANCE = {"atol": 1e-4, "rtol": 0}  # fp32 logits of some units, whose attention is merged of two parts


@pytest.fixture(params=["base", "swiftkv", "groups"])
def model(request):
    base = tiny_llama(dtype=torch.float32, max_position_embeddings=2048)
    if request.param == "base":
        return base
    return rewrite(base, num_key_value_layers=3, key_value_group_size=1 if request.param == "swiftkv" else 2)


def drawn(model, count, seed=0):
    return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def fed(model, cache, ids, pieces):
    """Logits of the last position of every piece of ids [1, T]."""
    return [
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for piece in ids.split(pieces, dim=1)
    ]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "optimized"])
@pytest.mark.parametrize("prefix", [0, 1, 40])
def test_it_says_what_a_dynamic_cache_says(model, attention, prefix):
    """Pieces of several tokens and single ones in any order, past the room that is made at once."""
    if attention == "optimized":
        optimize_for_cpu(model)
    else:
        model.set_attn_implementation(attention)
    pieces = [30, 1, 1, 7, MORE - 38, 1, 1, 1, 60, 1]
    before, ids = drawn(model, prefix), drawn(model, sum(pieces), seed=1)
    dense = DynamicCache(config=model.config)
    if prefix:
        model(before, past_key_values=dense, use_cache=True)
    wanted = fed(model, dense, ids, pieces)
    cache = GrowingCache(model.config, SharedPrefix.from_ids(model, before) if prefix else None)
    assert (cache.get_seq_length(), cache.shared_tokens) == (prefix, prefix)
    found = fed(model, cache, ids, pieces)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert cache.get_seq_length() == dense.get_seq_length()
    cache.reset()
    torch.testing.assert_close(fed(model, cache, ids, pieces), wanted, **TOLERANCE)


@torch.no_grad()
def test_generate_goes_on_from_it(model):
    ids = drawn(model, 50)
    mask = torch.ones_like(ids)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    cache = GrowingCache(model.config, SharedPrefix.from_ids(model, ids[:, :20]))
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert found.tolist() == wanted.tolist()


@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 3])
def test_what_attends_behind_a_prefix_elsewhere(model, hidden, monkeypatch):
    """As on devices with a kernel for it, and where a mask hides something."""
    ids = drawn(model, 30)
    dense, cache = DynamicCache(config=model.config), GrowingCache(model.config, SharedPrefix.from_ids(model, ids))
    model(ids, past_key_values=dense, use_cache=True)
    mask = torch.ones(1, 31, dtype=torch.long)
    if hidden is not None:
        mask[0, hidden] = 0
    monkeypatch.setattr("swiftkv_models.growing_cache._NewestToken.behind_prefix", lambda *_: None)
    wanted, found = (
        model(ids[:, :1], attention_mask=mask, past_key_values=each, use_cache=True).logits for each in (dense, cache)
    )
    torch.testing.assert_close(found, wanted, **TOLERANCE)


LONG = LEAST_SHARED


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "held", "length", "shared"),
    [
        (0, 40, 25, 0),  # few are copied
        (0, LONG + 40, LONG + 20, LONG + 20),  # more are shared
        (LONG, 40, LONG + 25, LONG),  # a prefix is shared, what goes on from it is copied
        (LONG, 40, LONG, LONG),
        (LONG, 40, LONG - 28, LONG - 28),  # of a prefix, a part
        (20, 40, 45, 20),
        (20, 40, 15, 15),
    ],
)
def test_a_beginning_of_it(model, prefix, held, length, shared):
    ids, others = drawn(model, prefix + held), drawn(model, 12, seed=1)
    cache = GrowingCache(model.config, SharedPrefix.from_ids(model, ids[:, :prefix]) if prefix else None)
    fed(model, cache, ids[:, prefix:], [held])
    kept = [tensor.clone() for layer in cache.growing for tensor in layer.held(prefix + held)]

    start = cache.beginning(ids[0].tolist(), length)
    assert (start.get_seq_length(), start.shared_tokens) == (length, shared)
    if shared:
        assert start.prefix.token_ids == tuple(ids[0, :shared].tolist())
        mine = (cache.prefix or cache.as_prefix(ids[0].tolist(), shared)).keys
        assert [a.data_ptr() for a in start.prefix.keys] == [b.data_ptr() for b in mine]
    dense = DynamicCache(config=model.config)
    model(ids[:, :length], past_key_values=dense, use_cache=True)
    pieces = [5, *[1] * 7]
    torch.testing.assert_close(fed(model, start, others, pieces), fed(model, dense, others, pieces), **TOLERANCE)

    fed(model, cache, others, [1] * 12)  # goes on otherwise, and takes nothing from what went before
    after = [tensor for layer in cache.growing for tensor in layer.held(prefix + held)]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


@torch.no_grad()
def test_a_prefix_of_what_it_holds(model):
    """Made in pieces, it is that of a single run; the one that goes on does not change it."""
    ids = drawn(model, 60)
    cache = GrowingCache(model.config)
    fed(model, cache, ids, [20, 25, 15])
    prefix, whole = cache.as_prefix(ids[0].tolist(), 50), SharedPrefix.from_ids(model, ids[:, :50])
    fed(model, cache, ids, [60])
    assert prefix.token_ids == whole.token_ids
    assert prefix.form == whole.form
    for one, other in zip([*prefix.keys, *prefix.values], [*whole.keys, *whole.values], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_short_beginning_does_not_hold_a_long_one(model):
    ids = drawn(model, 3 * LONG)
    cache = GrowingCache(model.config)
    fed(model, cache, ids, [3 * LONG])
    start = cache.beginning(ids[0].tolist(), LONG)
    assert start.shared_tokens == LONG
    for mine, kept in zip(start.prefix.keys, cache.growing, strict=True):
        assert mine.untyped_storage().nbytes() == mine.numel() * mine.element_size()
        assert torch.equal(mine, kept.held(LONG)[0][0])


@torch.no_grad()
def test_another_dtype(model):
    """Under autocast queries and keys come in fp32, values in bf16; and a prefix may be of before a cast."""
    ids = drawn(model, 30)
    prefix = SharedPrefix.from_ids(model, ids[:, :20])
    wanted = model(ids, use_cache=False).logits[:, -1]
    with torch.autocast("cpu", torch.bfloat16):
        under = fed(model, GrowingCache(model.config, SharedPrefix.from_ids(model, ids[:, :20])), ids[:, 20:], 1)[-1]
    cast = fed(model.bfloat16(), GrowingCache(model.config, prefix), ids[:, 20:], 1)[-1]
    for found in (under, cast):
        error = (found[:, -1].float() - wanted).norm() / wanted.norm()
        assert 1e-4 < error < 0.05  # bf16, and a model of a few layers


def test_what_it_refuses(model):
    other = tiny_llama(layers=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="make it with this model"):
        GrowingCache(model.config, SharedPrefix.from_ids(other, [1, 2, 3]))
    with pytest.raises(ValueError, match="carries no gradient"):
        model(drawn(model, 4), past_key_values=GrowingCache(model.config), use_cache=True)
    with pytest.raises(ValueError, match="GrowingCache would take the place of the model's own sliding window"):
        GrowingCache(MistralConfig(sliding_window=8))
    cache = GrowingCache(model.config, SharedPrefix.from_ids(model, [1, 2, 3]))
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(2)
    with torch.no_grad():
        with pytest.raises(ValueError, match="of one row, not of 2"):
            model(drawn(model, 8).view(2, 4), past_key_values=GrowingCache(model.config), use_cache=True)
        model.set_attn_implementation("sdpa")  # which does not know it
        with pytest.raises(ValueError, match=r"make it with model\.config of the one that uses it"):
            model(drawn(model, 1), past_key_values=cache, use_cache=True)
