"""Streaming with attention sinks and shared prefixes, against the rule written a second time and plain attention.

Models are fp64. transformers keeps RoPE's frequencies in fp32 (2e-8 off at these positions), which bounds the agreement
of logits of size 10 with the naive code: 1e-5. Between two ways through our own code nothing but rounding differs.
"""

import copy
from unittest.mock import Mock

import pytest
import torch
from naive_streaming import naive_streaming_logits
from transformers import DynamicCache

from swiftkv_models import (
    SharedPrefix,
    SinkWindowCache,
    rewrite,
    segment_cache,
    segment_layer,
    shared_prefix,
    use_exact_positions,
)
from tiny import random_ids, randomise_tail, tiny_llama

CLOSE = {"rtol": 0, "atol": 1e-5}
SAME = {"rtol": 0, "atol": 1e-9}


def base_model(family="smollm2", **changes):
    model = tiny_llama(family, **changes)
    use_exact_positions(model)
    return model


def swiftkv_model(family="smollm2", first=3, group=1, groups=None, **changes):
    form = {"num_key_value_layers": first, "key_value_group_size": group, "key_value_groups": groups}
    return randomise_tail(rewrite(tiny_llama(family, **changes), **form))


MODELS = {
    "base": base_model,
    "base-mha": lambda: base_model("llama2"),
    "base-llama3-rope": lambda: base_model("llama3.1"),
    "swiftkv": swiftkv_model,
    "swiftkv-g2-bias": lambda: swiftkv_model("bias", group=2),
    "swiftkv-g3-llama3-rope": lambda: swiftkv_model("llama3.2", group=3),
    "swiftkv-groups": lambda: swiftkv_model(groups=[[3], [4, 5]]),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def feed(model, ids, cache, chunks, **kwargs):
    """Logits of all positions of ids [B, T], fed in chunks of these sizes."""
    parts = ids.split(chunks, dim=1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True, **kwargs).logits for part in parts], dim=1)


@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (5, 4), (7, 0), (1, 1), (64, 4)])
def test_one_by_one_it_is_the_papers_rule(model, window, sinks):
    ids = random_ids(1, 30)  # four times around the ring of 6
    cache = SinkWindowCache(model.config, window=window, attention_sinks=sinks)
    found = feed(model, ids, cache, [1] * 30)
    torch.testing.assert_close(found[0], naive_streaming_logits(model, ids[0], window, sinks), **CLOSE)


@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (9, 4), (7, 0), (18, 4), (30, 1)])
def test_chunks_see_what_single_tokens_see(model, window, sinks):
    ids, more = random_ids(2, 22), random_ids(2, 3, seed=9)
    single = SinkWindowCache(model.config, window=window, attention_sinks=sinks)
    one_by_one = feed(model, ids, single, [1] * 22)
    after = feed(model, more, single, [1] * 3)
    for chunks in ([22], [2, 20], [7, 1, 9, 5], [3, 3, 3, 13], [1, 21]):
        cache = SinkWindowCache(model.config, window=window, attention_sinks=sinks)
        torch.testing.assert_close(feed(model, ids, cache, chunks), one_by_one, **SAME)
        # and leaves the cache as they do
        torch.testing.assert_close(feed(model, more, cache, [1, 2]), after, **SAME)


@torch.no_grad()
def test_a_skipping_prefill_leaves_the_same_cache(model):
    """`logits_to_keep=1` runs the tail for the last position only, and writes its K/V in one product."""
    ids, more = random_ids(2, 21), random_ids(2, 4, seed=5)
    found = []
    for keep in (0, 1):
        cache = SinkWindowCache(model.config, window=8, attention_sinks=3)
        last = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[:, -1:]
        found.append(torch.cat([last, feed(model, more, cache, [1] * 4)], dim=1))
    torch.testing.assert_close(found[0], found[1], **SAME)


def test_within_the_window_it_is_an_ordinary_cache(model):
    ids = random_ids(2, 24)
    plain = feed(model, ids, DynamicCache(config=model.config), [10, 1, 1, 12])
    cache = SinkWindowCache(model.config, window=20, attention_sinks=4)
    torch.testing.assert_close(feed(model, ids, cache, [10, 1, 1, 12]), plain, **CLOSE)
    # A model that has met such a cache still takes others.
    torch.testing.assert_close(feed(model, ids, DynamicCache(config=model.config), [24]), plain, **CLOSE)
    tail = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=5).logits
    torch.testing.assert_close(tail, plain[:, -5:], **CLOSE)


def padded(rows, side_value=2):
    """Rows of different lengths, padded on the left; ids [B, T] and mask [B, T]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), side_value)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def test_padded_batches_generate_what_single_rows_do(model):
    rows = [random_ids(length, seed=length) for length in (3, 17, 9, 1)]
    ids, mask = padded(rows)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    cache = SinkWindowCache(model.config, window=7, attention_sinks=2)
    batch = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for index, row in enumerate(rows):
        whole = torch.cat([row, batch.sequences[index, -14:]])
        expected = naive_streaming_logits(model, whole[:-1], 7, 2)[-14:]
        torch.testing.assert_close(torch.stack(batch.logits)[:, index].double(), expected, **CLOSE)


def test_a_second_turn_goes_on_with_padding_of_its_own(model):
    first = [random_ids(length, seed=length) for length in (5, 12)]
    second = [random_ids(length, seed=30 + length) for length in (9, 2)]
    cache = SinkWindowCache(model.config, window=8, attention_sinks=3)
    ids, mask = padded(first)
    options = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
    answered = model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
    more, more_mask = padded(second)
    ids = torch.cat([answered, more], dim=1)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype), more_mask], dim=1)
    done = model.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
    for index in range(2):
        whole = torch.cat([first[index], answered[index, -6:], second[index], done[index, -5:]])
        logits = naive_streaming_logits(model, whole[:-1], 8, 3)
        assert torch.equal(logits[-5:].argmax(-1), done[index, -5:])


def test_memory_is_allocated_once(model):
    cache = SinkWindowCache(model.config, window=8, attention_sinks=2)
    feed(model, random_ids(2, 3), cache, [3])
    held = [tensor for layer in cache.layers for tensor in layer.tensors()] + [cache.positions, cache.sinks]
    before = [tensor.data_ptr() for tensor in held]
    size = cache.nbytes
    config = model.config
    per_slot = 2 * config.num_key_value_heads * config.head_dim * 8
    layers = getattr(config, "num_cached_layers", config.num_hidden_layers)
    assert size == 2 * (8 + 2 + 1) * (layers * per_slot + 4) + 2 * 2 * layers * per_slot // 2  # and the sinks' keys
    for chunks in ([17, 1, 22], [1] * 40):
        feed(model, random_ids(2, 40), cache, chunks)
        held = [tensor for layer in cache.layers for tensor in layer.tensors()] + [cache.positions, cache.sinks]
        assert [tensor.data_ptr() for tensor in held] == before
        assert cache.nbytes == size


def test_reset_forgets(model):
    cache = SinkWindowCache(model.config, window=6, attention_sinks=2)
    ids = random_ids(1, 20)
    expected = feed(model, ids, cache, [20])
    cache.reset()
    torch.testing.assert_close(feed(model, ids, cache, [5, 15]), expected, **SAME)


@pytest.mark.parametrize("how", ["turned sinks", "turned queries", "chunks", "shared prefix"])
@pytest.mark.parametrize("far", [1000, 4_000_000])
def test_a_stream_may_be_of_any_length(monkeypatch, far, how):
    """After a jump of millions of positions the window holds only tokens beyond it: the same logits as without."""
    monkeypatch.setattr(segment_cache, "sharing_pays", lambda *_: True)
    if how == "turned queries":  # as on a GPU
        monkeypatch.setattr(SinkWindowCache, "_turns_sinks", lambda _: False)
    model, ids = swiftkv_model(dtype=torch.float32, rms_norm_eps=1e-5), random_ids(1, 40)
    found = []
    for jump in (100, far):
        prefixes = SharedPrefix.from_ids(model, ids[0, :4]) if how == "shared prefix" else ()
        cache = SinkWindowCache(model.config, window=10, attention_sinks=4, prefixes=prefixes, input_ids=ids)
        feed(model, ids[:, cache.columns : 14], cache, [14 - cache.columns])
        cache.lengths += jump
        cache.columns += jump
        found.append(feed(model, ids[:, 14:], cache, [13, 13] if how == "chunks" else [1] * 26))
    # fp32 sums; with angles in fp32 as well the difference at four million is 1e-2 (the next test).
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4)


def test_a_base_model_needs_exact_positions_for_that():
    ids = random_ids(1, 40)
    found = {}
    for exact in (True, False):
        model = tiny_llama(dtype=torch.float32)
        if exact:
            use_exact_positions(model)
        for jump in (100, 4_000_000):
            cache = SinkWindowCache(model.config, window=10, attention_sinks=4)
            feed(model, ids[:, :14], cache, [14])
            cache.lengths += jump
            cache.columns += jump
            found[exact, jump] = feed(model, ids[:, 14:], cache, [1] * 26)
    torch.testing.assert_close(found[True, 100], found[True, 4_000_000], rtol=0, atol=2e-4)
    assert (found[False, 100] - found[False, 4_000_000]).abs().max() > 1e-2


@pytest.fixture(params=["shared", "copied"])
def sharing(request, monkeypatch):
    """Both ways to use prefixes, whatever would pay."""
    monkeypatch.setattr(segment_cache, "sharing_pays", lambda *_: request.param == "shared")
    return request.param == "shared"


def prefix_of(model, length, seed=50):
    return SharedPrefix.from_ids(model, random_ids(length, seed=seed))


def test_a_shared_prefix_is_the_concatenated_prompt(model, sharing):
    """Several prefixes and rows without one, in a padded batch of any order, and queries for all positions."""
    short, long = prefix_of(model, 6), prefix_of(model, 11, seed=51)
    tails = [random_ids(length, seed=length) for length in (4, 1, 9, 5, 3)]
    heads = [long.token_ids, short.token_ids, (), long.token_ids, short.token_ids]
    rows = [torch.cat([torch.tensor(head, dtype=torch.long), tail]) for head, tail in zip(heads, tails, strict=True)]
    ids, mask = padded(rows)
    cache = SinkWindowCache(
        model.config, window=40, attention_sinks=4, prefixes=[short, long], input_ids=ids, attention_mask=mask
    )
    assert cache.shared_rows == (4 if sharing else 0)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


def test_a_prefix_of_all_rows_is_not_run_again(model, sharing):
    prefix = prefix_of(model, 12)
    ids = torch.cat([torch.tensor([prefix.token_ids] * 3), random_ids(3, 7)], dim=1)
    cache = SinkWindowCache(model.config, window=32, prefixes=prefix, input_ids=ids)
    assert cache.get_seq_length() == 12
    assert cache.shared_rows == (3 if sharing else 0)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    found = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=None)
    handle.remove()
    assert seen == [7, 1, 1]
    assert torch.equal(found, model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None))
    cache = SinkWindowCache(model.config, window=32, prefixes=prefix, input_ids=ids)
    suffix = feed(model, ids[:, 12:], cache, [7])  # of all positions too
    torch.testing.assert_close(suffix, model(ids).logits[:, 12:], **CLOSE)


@pytest.mark.parametrize("chunks", [[25], [1] * 25, [4, 21]], ids=["whole", "single", "chunks"])
def test_prefix_and_stream_together_are_that_many_sinks(monkeypatch, model, chunks, sharing):
    steps = Mock(wraps=segment_layer.attend_shared)
    monkeypatch.setattr(segment_layer, "attend_shared", steps)
    prefix = prefix_of(model, 9)
    ids = torch.cat([torch.tensor([prefix.token_ids] * 2), random_ids(2, 25)], dim=1)
    cache = SinkWindowCache(model.config, window=6, attention_sinks=4, prefixes=prefix, input_ids=ids)
    found = feed(model, ids[:, 9:], cache, chunks)
    for row in range(2):
        expected = naive_streaming_logits(model, ids[row], 6, 9)[9:]
        torch.testing.assert_close(found[row], expected, **CLOSE)
    assert bool(steps.called) == (sharing and chunks[0] == 1)


def test_rows_with_a_prefix_beside_rows_without_sinks(model, sharing):
    """The prefix is met at its places in the cache, though nothing else is pinned."""
    prefix = prefix_of(model, 9)
    ids = torch.stack([torch.cat([torch.tensor(prefix.token_ids), random_ids(25)]), random_ids(34, seed=3)])
    cache = SinkWindowCache(model.config, window=6, attention_sinks=0, prefixes=prefix, input_ids=ids)
    assert cache.shared_rows == sharing
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "output_logits": True}
    found = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options)
    for row, sinks in enumerate((9, 0)):
        expected = naive_streaming_logits(model, found.sequences[row, :-1], 6, sinks)[-3:]
        torch.testing.assert_close(torch.stack(found.logits)[:, row].double(), expected, **CLOSE)


def test_a_prefix_is_copied_where_sharing_does_not_pay(model):
    prefix = prefix_of(model, 12)
    ids = torch.cat([torch.tensor([prefix.token_ids] * 2), random_ids(2, 7)], dim=1)
    assert SinkWindowCache(model.config, window=8, prefixes=prefix, input_ids=ids).shared_rows == 0  # some kilobytes
    for device, groups, lengths, pays in (
        ("cuda", [0], [100], False),
        ("cuda", [0], [10**4], True),
        ("cuda", [0] * 2, [1], True),
        ("cuda", [0, 1], [100, 100], False),
        ("cpu", [0] * 16, [4096], True),
        ("cpu", [0] * 2, [4096], True),
        ("cpu", [0] * 2, [512], False),
        ("cpu", [0] * 4, [256], False),
        ("cpu", [0] * 8, [256], True),
        ("cpu", [0, 0, 1, 1, 2, 2, 3, 3], [4096] * 4, False),
        ("cpu", [0] * 16, [64], False),
        ("cpu", [0] * 10**6, [64], False),
        ("cpu", [0, -1], [64], False),
        ("cpu", [0, 1, 2, 3], [256] * 4, False),  # nothing is read less often
        ("cpu", [0, 1] * 8, [1024] * 2, True),
        ("cpu", [0, 1] * 4, [1024] * 2, False),  # would be worth one part more, not two
    ):
        found = shared_prefix.sharing_pays(groups, lengths, 3 * 64, torch.device(device))
        assert found == pays, (device, len(groups), lengths)


def test_a_stream_of_rows_that_differ_in_length_keeps_late_sinks(model):
    """One row has drifted from its sinks when another still gets its own."""
    rows = [random_ids(length, seed=length) for length in (30, 1)]
    ids, mask = padded(rows)
    cache = SinkWindowCache(model.config, window=8, attention_sinks=4)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "output_logits": True}
    batch = model.generate(ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options)
    for index, row in enumerate(rows):
        whole = torch.cat([row, batch.sequences[index, -16:]])
        expected = naive_streaming_logits(model, whole[:-1], 8, 4)[-16:]
        torch.testing.assert_close(torch.stack(batch.logits)[:, index].double(), expected, **CLOSE)


def test_prefixes_are_compared_by_token_ids(model, monkeypatch):
    monkeypatch.setattr(segment_cache, "sharing_pays", lambda *_: True)
    prefix = prefix_of(model, 5)
    other = list(prefix.token_ids)
    other[-1] = (other[-1] + 1) % 97
    ids = torch.tensor([[*prefix.token_ids, 7], [*other, 7]])
    cache = SinkWindowCache(model.config, window=8, prefixes=prefix, input_ids=ids)
    assert cache.prefix_groups.tolist() == [0, -1]
    exact = SinkWindowCache(model.config, window=8, prefixes=prefix, input_ids=ids[:1, :5])  # leaves no token to run
    assert exact.shared_rows == 0


def test_beams_are_reordered(model, sharing):
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cache = SinkWindowCache(model.config, window=30)
    found = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(ids, **options))
    prefix = SharedPrefix.from_ids(model, ids[0, :5])
    ids = torch.cat([ids[:1], torch.cat([ids[:1, :5], ids[1:, 5:]], dim=1)])
    cache = SinkWindowCache(model.config, window=30, prefixes=prefix, input_ids=ids)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.05), ("fp8", 0.3)])
def test_quantised_slots_change_little_and_chunks_nothing(model, quantization, tolerance):
    """int8 rounds to 1/254 of a vector's largest number, fp8 to 1/16 of each; six layers add up to a few times that."""
    ids = random_ids(2, 24)
    exact = feed(model, ids, SinkWindowCache(model.config, window=8, attention_sinks=2), [24])
    caches = [SinkWindowCache(model.config, window=8, attention_sinks=2, quantization=quantization) for _ in range(3)]
    ways = [feed(model, ids, cache, chunks) for cache, chunks in zip(caches, ([1] * 24, [24], [5, 1, 18]), strict=True)]
    error = (ways[0] - exact).norm() / exact.norm()
    assert 1e-4 < error < tolerance, error
    for other in ways[1:]:
        torch.testing.assert_close(other, ways[0], rtol=0, atol=1e-5)  # scales are fp32
    within = feed(model, ids[:, :9], SinkWindowCache(model.config, window=8, quantization=quantization), [9])
    single = feed(model, ids[:, :9], SinkWindowCache(model.config, window=8, quantization=quantization), [1] * 9)
    torch.testing.assert_close(within, single, rtol=0, atol=1e-5)
    config = model.config
    layers = getattr(config, "num_cached_layers", config.num_hidden_layers)
    heads = config.num_key_value_heads
    assert caches[0].nbytes == 2 * 11 * (layers * 2 * heads * (config.head_dim + 4) + 4)


def test_a_quantised_prefix(model, sharing):
    prefix = prefix_of(model, 12)
    ids = torch.cat([torch.tensor([prefix.token_ids]), random_ids(1, 10)], dim=1)
    cache = SinkWindowCache(model.config, window=32, prefixes=prefix, input_ids=ids, quantization="int8")
    with torch.no_grad():
        found, exact = model(ids[:, 12:], past_key_values=cache).logits, model(ids).logits[:, 12:]
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_everything_at_once(model, sharing, quantization):
    """A padded batch behind a prefix, past its window, over two turns, in 8 bits: what each row gets by itself."""
    prefix = prefix_of(model, 9)
    head = torch.tensor(prefix.token_ids)
    ids, mask = padded([torch.cat([head, random_ids(length, seed=length)]) for length in (4, 17, 11)])
    settings = {"window": 6, "prefixes": prefix, "quantization": quantization}
    cache = SinkWindowCache(model.config, input_ids=ids, attention_mask=mask, **settings)
    options = {"past_key_values": cache, "do_sample": False, "eos_token_id": None}
    answered = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    ids = torch.cat([answered, random_ids(3, 5)], dim=1)
    mask = torch.cat([mask, torch.ones(3, 13, dtype=mask.dtype)], dim=1)
    options |= {"output_logits": True, "return_dict_in_generate": True}
    done = model.generate(ids, attention_mask=mask, max_new_tokens=4, **options)
    for index, padding in enumerate((mask == 0).sum(1)):
        row = done.sequences[index, padding:-1]
        if quantization is None:
            expected = naive_streaming_logits(model, row, 6, 9)[-4:]
        else:
            alone = SinkWindowCache(model.config, input_ids=row[None], **settings)
            expected = feed(model, row[None, 9:], alone, [1] * (len(row) - 9))[0, -4:]
        torch.testing.assert_close(torch.stack(done.logits)[:, index].double(), expected.double(), **CLOSE)


@torch.no_grad()
def test_what_is_refused(model):
    config, ids = model.config, random_ids(1, 5)
    with pytest.raises(ValueError, match="window must be a whole number of at least 1"):
        SinkWindowCache(config, window=0)
    with pytest.raises(ValueError, match="quantization 'int4' is not known; use int8 or fp8"):
        SinkWindowCache(config, window=4, quantization="int4")
    prefix = prefix_of(model, 3)
    with pytest.raises(ValueError, match="prefixes go with input_ids"):
        SinkWindowCache(config, window=4, prefixes=prefix)
    with pytest.raises(ValueError, match="a prefix of 3 tokens cannot stand for 4 attention_sinks"):
        SinkWindowCache(config, window=4, prefixes=prefix, input_ids=random_ids(1, 5))
    deeper = prefix_of(tiny_llama(layers=8), 6)
    with pytest.raises(ValueError, match=r"a prefix holds K/V of 8 layers, this model caches \d; make it with this"):
        SinkWindowCache(config, window=4, prefixes=deeper, input_ids=random_ids(1, 9))
    with pytest.raises(ValueError, match="at least one token"):
        SharedPrefix.from_ids(model, [])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="padding on the left alone"):
        SinkWindowCache(config, window=4, attention_sinks=2, prefixes=prefix, input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"give a SinkWindowCache its model's own, model\.config"):
        SinkWindowCache(type(config)(), window=4)
    with (
        torch.enable_grad(),
        pytest.raises(ValueError, match=r"carries no gradient: .* under torch\.no_grad"),
    ):
        model(ids, past_key_values=SinkWindowCache(config, window=4))
    cache = SinkWindowCache(config, window=4)
    feed(model, random_ids(2, 3), cache, [3])
    with pytest.raises(ValueError, match="the cache holds 2 rows, not 3"):
        feed(model, random_ids(3, 1), cache, [1])
    with pytest.raises(ValueError, match="row 0: positions must go on from the 3 tokens"):
        model(random_ids(2, 4), past_key_values=cache, position_ids=torch.arange(7, 11)[None])
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)


@torch.no_grad()
def test_padding_that_positions_count_is_refused(model):
    cache = SinkWindowCache(model.config, window=4)
    mask = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="where there is padding, give attention_mask, and position_ids"):
        model(random_ids(1, 4), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="where there is padding, give attention_mask, and position_ids"):
        model(random_ids(1, 4), position_ids=torch.tensor([[0, 0, 1, 2]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 4 or more\], not \(3, 4\)"):
        model(random_ids(1, 4), attention_mask=torch.ones(3, 4), past_key_values=cache)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}
    model = tiny_llama(rope_parameters=rope)
    with pytest.raises(ValueError, match=rf"SinkWindowCache needs rotary frequencies .* rope_type is '{kind}'"):
        SinkWindowCache(model.config, window=4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention_of_transformers_will_do(attention):
    model = base_model()
    model.set_attn_implementation(attention)
    ids = random_ids(1, 20)
    expected = naive_streaming_logits(model, ids[0], 6, 2)
    found = feed(model, ids, SinkWindowCache(model.config, window=6, attention_sinks=2), [11, 9])
    torch.testing.assert_close(found[0], expected, **CLOSE)
    ordinary = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    fresh = base_model()
    fresh.set_attn_implementation(attention)
    assert torch.equal(ordinary, fresh.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None))


def test_a_model_that_has_streamed_is_saved_copied_and_cast(tmp_path):
    """Its tail's projections are views of one matrix then, which nothing else may notice."""
    model, ids = swiftkv_model(dtype=torch.float32), random_ids(1, 9)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    def stream(of):
        return of.generate(ids, past_key_values=SinkWindowCache(of.config, window=4, attention_sinks=2), **options)

    answer = stream(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(stream(copy.deepcopy(model)), answer)
    assert torch.equal(stream(model.to(torch.float64)), answer)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_layers_of_a_model_in_parts_hold_no_more_than_their_own(quantization):
    """`meta` for another device: half of the layers find out, as they come to it, that they are there."""
    config = base_model().config
    cache = SinkWindowCache(config, window=6, attention_sinks=2, quantization=quantization)
    states = torch.ones(1, config.num_key_value_heads, 1, config.head_dim)
    half = config.num_hidden_layers // 2
    for index, layer in enumerate(cache.segments):
        here = states if index < half else states.to("meta")
        if not layer.is_initialized or layer.device != here.device:
            layer.lazy_initialization(here, here)
        if index == 0:
            layer.keys[:, :, 3] = 1
    assert [layer.device.type for layer in cache.segments] == ["cpu"] * half + ["meta"] * (len(cache.segments) - half)
    for layer in cache.segments:
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in layer.tensors())
    assert (cache.segments[0].keys[:, :, 3] == 1).all()
