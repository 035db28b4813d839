"""What goes wrong around a SinkWindowCache, and what must not: copies of the code, forwards that break off, wrong
positions, other modes of torch.

fp64 models, unless a test says otherwise: two ways through our own code differ by rounding only.
"""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, PhiConfig

from swiftkv_models import (
    SharedPrefix,
    SinkWindowCache,
    optimize_for_cpu,
    rewrite,
    segment_layer,
    use_exact_positions,
)
from swiftkv_models.attention import GROUPED
from swiftkv_models.rope import ExactRotaryEmbedding
from tiny import random_ids, randomise_tail, tiny_llama

SAME = {"rtol": 0, "atol": 1e-9}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def swiftkv_model(**changes):
    return randomise_tail(rewrite(tiny_llama(**changes), num_key_value_layers=3))


def new_cache(model, **options):
    return SinkWindowCache(model.config, **{"window": 6, "attention_sinks": 2, **options})


@torch.no_grad()
def logits(model, ids, cache, **kwargs):
    return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


@pytest.fixture
def another_copy():
    """The package a second time, as a checkpoint brings it."""
    mine = {name: module for name, module in sys.modules.items() if name.startswith("swiftkv_models")}
    for name in mine:
        del sys.modules[name]
    try:
        yield importlib.import_module("swiftkv_models")
    finally:
        for name in [name for name in sys.modules if name.startswith("swiftkv_models")]:
            del sys.modules[name]
        sys.modules.update(mine)
        importlib.reload(mine["swiftkv_models"])  # registers its classes again


def test_copies_of_the_code_live_side_by_side(another_copy):
    mine, ids = swiftkv_model(), random_ids(1, 20)
    other = randomise_tail(another_copy.rewrite(tiny_llama(), num_key_value_layers=3))
    other.load_state_dict(mine.state_dict())
    expected = logits(mine, ids, new_cache(mine))
    assert another_copy.SinkWindowCache is not SinkWindowCache
    for model, cache_class in (
        (other, another_copy.SinkWindowCache),  # registers the names anew
        (mine, SinkWindowCache),
        (other, SinkWindowCache),
        (mine, another_copy.SinkWindowCache),
    ):
        cache = cache_class(model.config, window=6, attention_sinks=2)
        parts = [logits(model, part, cache) for part in (ids[:, :18], ids[:, 18:19], ids[:, 19:])]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, **SAME)


def test_a_forward_that_broke_off_is_not_gone_on_from():
    model, ids = swiftkv_model(), random_ids(1, 12)
    cache = new_cache(model)

    def fails(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[4].register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids, cache)
    handle.remove()
    with pytest.raises(ValueError, match=r"broken off .* reset\(\) it"):
        logits(model, ids, cache)
    cache.reset()
    torch.testing.assert_close(logits(model, ids, cache), logits(model, ids, new_cache(model)), **SAME)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("start", [0, 9, 13])
def test_positions_that_do_not_go_on_are_refused(tokens, start):
    model = swiftkv_model()
    cache = new_cache(model)
    logits(model, random_ids(1, 12), cache)
    positions = torch.arange(start, start + tokens)[None]
    with pytest.raises(ValueError, match="row 0: positions must go on from the 12 tokens"):
        logits(model, random_ids(1, tokens, seed=3), cache, position_ids=positions)
    # and nothing was done
    more = random_ids(1, 5, seed=4)
    found = logits(model, more, cache, position_ids=torch.arange(12, 17)[None])
    fresh = new_cache(model)
    logits(model, random_ids(1, 12), fresh)
    torch.testing.assert_close(found, logits(model, more, fresh), **SAME)


def test_a_step_of_padded_rows_needs_their_positions():
    model, ids = swiftkv_model(), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as `generate` does
    cache = new_cache(model)
    logits(model, ids, cache, attention_mask=mask, position_ids=positions)
    step, longer = random_ids(2, 1, seed=2), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="row 0: positions must go on from the 5 tokens"):
        logits(model, step, cache, attention_mask=longer)
    found = logits(model, step, cache, attention_mask=longer, position_ids=torch.tensor([[5], [9]]))
    alone = new_cache(model)
    logits(model, ids[:1, 4:], alone)
    torch.testing.assert_close(found[:1], logits(model, step[:1], alone), **SAME)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_rows_come_to_the_end_of_their_prefixes_at_different_columns(chunk, monkeypatch):
    """The row with less padding is within the shared prefix still, when the first column is run."""
    monkeypatch.setattr("swiftkv_models.segment_cache.sharing_pays", lambda *_: True)
    model = swiftkv_model()
    prefix = SharedPrefix.from_ids(model, random_ids(1, 8, seed=7)[0])
    begin = torch.tensor(prefix.token_ids)
    short, long = random_ids(1, 3, seed=8)[0], random_ids(1, 6, seed=9)[0]
    ids = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), begin, short]), torch.cat([begin, long])])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = new_cache(model, window=20, prefixes=prefix, input_ids=ids, attention_mask=mask)
    assert cache.shared_rows == 2
    assert cache.first_column == 8
    positions, found = mask.cumsum(1) - 1, None
    for start in range(cache.first_column, 14, chunk):
        part = slice(start, min(start + chunk, 14))
        its_positions = positions[:, part].clamp_min(0)
        found = logits(model, ids[:, part], cache, attention_mask=mask[:, : part.stop], position_ids=its_positions)
    for row, tokens in enumerate((torch.cat([begin, short]), torch.cat([begin, long]))):
        alone = model(tokens[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[row, -1], alone, rtol=0, atol=1e-5)  # frequencies in fp32 there


def test_streaming_in_inference_mode_leaves_the_model_trainable():
    model, ids = swiftkv_model(), random_ids(1, 9)
    model.requires_grad_(True)
    cache = new_cache(model)
    with torch.inference_mode():
        for part in (ids, ids[:, :1]):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits(model, ids[:, 1:2], cache)  # goes on outside of it
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[3].self_attn.v_proj_swiftkv.weight.grad.abs().sum() > 0


def test_another_attention_implementation_needs_another_cache():
    model, ids = swiftkv_model(), random_ids(1, 9)
    cache = new_cache(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set to 'eager' since this cache was made"):
        logits(model, ids, cache)
    found = logits(model, ids, new_cache(model, window=30))
    torch.testing.assert_close(found, logits(model, ids, None), rtol=0, atol=1e-5)


def test_a_cache_outlives_optimize_for_cpu():
    model, ids = swiftkv_model(), random_ids(1, 20)
    expected, cache = logits(model, ids, new_cache(model)), new_cache(model)
    optimize_for_cpu(model)
    assert GROUPED in model.config._attn_implementation
    torch.testing.assert_close(logits(model, ids, cache), expected, **SAME)


@pytest.mark.parametrize("swiftkv", [False, True])
def test_frequencies_outlive_a_change_of_dtype(swiftkv):
    """fp32 frequencies rounded to bf16 would be off by 0.1 rad at a thousand tokens."""
    model = swiftkv_model() if swiftkv else tiny_llama()
    before = model.model.rotary_emb
    use_exact_positions(model)  # which SwiftKV models have
    assert (model.model.rotary_emb is before) == swiftkv
    embedding = model.model.rotary_emb
    expected = embedding.inv_freq.float()
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
    assert swiftkv or isinstance(embedding, ExactRotaryEmbedding)


def test_a_base_that_was_cast_is_rewritten_with_its_frequencies_whole():
    base = tiny_llama().to(torch.bfloat16)
    assert base.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    model = rewrite(base, num_key_value_layers=3)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq.float())


def test_a_reset_heals_what_is_no_number():
    """Slots of sinks that are still empty are read, for a weight of 0."""
    model, ids = swiftkv_model(), random_ids(1, 9)
    cache = new_cache(model, window=6, attention_sinks=4)
    logits(model, ids, cache)
    for layer in cache.segments:
        layer.values.fill_(float("nan"))
    cache.reset()
    torch.testing.assert_close(logits(model, ids[:, :1], cache), logits(model, ids[:, :1], None), rtol=0, atol=1e-5)


def test_a_cache_that_could_not_be_allocated_may_be_reset(monkeypatch):
    model, ids = swiftkv_model(), random_ids(1, 9)
    cache, taken = new_cache(model), []
    adopt = segment_layer.SegmentLayer.adopt

    def fails(layer, *parts):
        taken.append(layer)
        if len(taken) == 3:
            raise MemoryError
        adopt(layer, *parts)

    monkeypatch.setattr(segment_layer.SegmentLayer, "adopt", fails)
    with pytest.raises(MemoryError):
        logits(model, ids, cache)
    cache.reset()
    torch.testing.assert_close(logits(model, ids, cache), logits(model, ids, new_cache(model)), **SAME)


@pytest.mark.parametrize("swiftkv", [False, True])
def test_autocast(swiftkv):
    """fp32 weights under bf16 autocast, where RoPE leaves keys in fp32: as with transformers' own cache.

    A bf16 number near 10 is good to 0.03; six layers of them.
    """
    model = swiftkv_model(dtype=torch.float32) if swiftkv else tiny_llama(dtype=torch.float32)
    ids = random_ids(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, ids, None)
        cache = new_cache(model, window=18)
        parts = [logits(model, part, cache) for part in (ids[:, :12], ids[:, 12:13], ids[:, 13:])]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=0.3)
        packed = optimize_for_cpu(model)
        torch.testing.assert_close(logits(packed, ids, None).bfloat16(), expected, rtol=0, atol=0.3)


def test_a_replaced_weight_is_seen():
    model, ids = swiftkv_model(), random_ids(1, 9)
    logits(model, ids, new_cache(model), logits_to_keep=1)  # stacks the projections
    attention = model.model.layers[4].self_attn
    attention.v_proj_swiftkv.weight = torch.nn.Parameter(attention.v_proj_swiftkv.weight.detach() * 3, False)
    found = logits(model, ids, new_cache(model, window=30), logits_to_keep=1)
    torch.testing.assert_close(found, logits(model, ids, None)[:, -1:], rtol=0, atol=1e-5)


def test_prefixes_that_no_row_uses_are_not_held(monkeypatch):
    monkeypatch.setattr("swiftkv_models.segment_cache.sharing_pays", lambda *_: True)
    model = swiftkv_model()
    prefixes = [SharedPrefix.from_ids(model, random_ids(1, size, seed=size)[0]) for size in (20, 150, 30)]
    rows = torch.stack([torch.cat([torch.tensor(prefixes[0].token_ids), random_ids(1, 4, seed=s)[0]]) for s in (1, 2)])
    sizes = []
    for held in (prefixes[:1], prefixes):
        cache = new_cache(model, prefixes=held, input_ids=rows)
        logits(model, rows[:, 20:], cache)
        assert cache.shared_rows == 2
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]
    quantised = new_cache(model, prefixes=prefixes, input_ids=rows, quantization="int8")
    logits(model, rows[:, 20:], quantised)
    keys = prefixes[0].keys[0]
    layers, tokens = len(prefixes[0].keys), keys.shape[0] * 20
    assert quantised.nbytes >= 2 * layers * tokens * (keys.shape[-1] + 4)  # its own copy of the prefix counts


@pytest.mark.parametrize("name", ["batch_repeat_interleave", "batch_select_indices", "crop"])
def test_rows_do_not_change(name):
    with pytest.raises(ValueError, match="SinkWindowCache"):
        getattr(new_cache(swiftkv_model()), name)(2)


def test_a_models_own_window_is_not_replaced():
    with pytest.raises(ValueError, match="sliding window"):
        SinkWindowCache(MistralConfig(sliding_window=16), window=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [[1, 2, 3]]}, "input_ids must be a tensor"),
        ({"input_ids": torch.tensor([1, 2, 3])}, "input_ids must be a tensor"),
        ({"input_ids": torch.ones(1, 9), "attention_mask": torch.ones(1, 4)}, r"attention_mask must be \(1, 9\)"),
    ],
)
def test_prompts_of_the_wrong_form(given, message):
    model = swiftkv_model()
    prefix = SharedPrefix.from_ids(model, random_ids(1, 4)[0])
    with pytest.raises(ValueError, match=message):
        new_cache(model, prefixes=prefix, **given)


def test_a_cache_takes_its_rows_after_others_were_refused(monkeypatch):
    monkeypatch.setattr("swiftkv_models.segment_cache.sharing_pays", lambda *_: True)
    model = swiftkv_model()
    prefix = SharedPrefix.from_ids(model, random_ids(1, 20)[0])
    rows = torch.stack([torch.cat([torch.tensor(prefix.token_ids), random_ids(1, 4, seed=s)[0]]) for s in (1, 2, 3)])
    cache = new_cache(model, prefixes=prefix, input_ids=rows)
    with pytest.raises(ValueError, match="made for 3 rows of input_ids, not 2"):
        logits(model, rows[:2, 20:], cache)
    found = logits(model, rows[:, 20:], cache)
    cache.reset()
    torch.testing.assert_close(logits(model, rows[:, 20:], cache), found)


def test_a_prefix_of_another_model():
    """One of other sizes ended the process in torch's kernel; one of the base, whose sizes fit, gave wrong logits."""
    model = swiftkv_model()
    others = {
        "a prefix has K/V of 1 heads of 8, this model of 2 of 8": swiftkv_model(num_key_value_heads=1),
        "a prefix has K/V of 2 heads of 16, this model of 2 of 8": swiftkv_model(head_dim=16),
        "a prefix was made by a model with model_type llama, this one has llama_swiftkv": tiny_llama(),
    }
    for message, other in others.items():
        prefix = SharedPrefix.from_ids(other, random_ids(1, 4)[0])
        rows = torch.tensor([[*prefix.token_ids, 5, 6]] * 2)
        with pytest.raises(ValueError, match=f"{message}; make it with this model"):
            new_cache(model, prefixes=prefix, input_ids=rows)


@pytest.mark.parametrize("pays", [True, False], ids=["shared", "copied"])
def test_a_prefix_of_a_model_that_was_cast_since(pays, monkeypatch):
    monkeypatch.setattr("swiftkv_models.segment_cache.sharing_pays", lambda *_: pays)
    model = swiftkv_model()
    prefix = SharedPrefix.from_ids(model, random_ids(1, 9)[0])
    rows = torch.tensor([[*prefix.token_ids, 5, 6]] * 2)
    expected = model(rows).logits[:, -1]
    model.float()
    for tokens in ([rows[:, 9:]], [rows[:, 9:10], rows[:, 10:]]):
        cache = new_cache(model, window=20, prefixes=prefix, input_ids=rows)
        for part in tokens:
            found = logits(model, part, cache)
        torch.testing.assert_close(found[:, -1].double(), expected, rtol=0, atol=1e-4)


def test_a_cache_of_another_model():
    model, ids = swiftkv_model(), random_ids(1, 8)
    for other in (
        tiny_llama(),  # which does not know such caches yet
        swiftkv_model(num_key_value_heads=1),
        swiftkv_model(layers=5),
        swiftkv_model(layers=8),
    ):
        for _ in range(2):  # also where both have caches of their own
            with pytest.raises(ValueError, match=r"this cache is another model's; make it with model\.config"):
                logits(other, ids, new_cache(model))
            logits(other, ids, new_cache(other))


def test_a_model_in_another_dtype_than_its_cache():
    model, ids = swiftkv_model(), random_ids(1, 8)
    cache = new_cache(model)
    logits(model, ids, cache)
    with pytest.raises(ValueError, match=r"the cache holds torch.float64, the model computes in torch.float32 now"):
        logits(model.float(), ids[:, :1], cache)


@pytest.mark.parametrize(
    "config",
    [GPT2Config(), GPTNeoXConfig(), PhiConfig(), LlamaConfig(rope_parameters={**ROPE, "partial_rotary_factor": 0.5})],
    ids=lambda config: config.model_type,
)
def test_models_whose_positions_are_not_llamas(config):
    with pytest.raises(ValueError, match="SinkWindowCache needs rotary positions as Llama has them, of whole heads"):
        SinkWindowCache(config, window=4)


@pytest.mark.parametrize("sizes", [{"window": "6"}, {"window": 6.0}, {"window": 6, "attention_sinks": None}])
def test_sizes_are_whole_numbers(sizes):
    with pytest.raises(ValueError, match="window must be a whole number of at least 1 and attention_sinks of at least"):
        SinkWindowCache(swiftkv_model().config, **sizes)


@torch.no_grad()
def test_a_prompt_that_is_not_longer_than_its_prefix():
    swiftkv = swiftkv_model()
    prefix = SharedPrefix.from_ids(swiftkv, random_ids(20))
    ids = torch.cat([torch.tensor(prefix.token_ids), random_ids(9, seed=1)])[None]
    for pays in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("swiftkv_models.segment_cache.sharing_pays", lambda *_, pays=pays: pays)
            for length in (15, 20):
                cache = SinkWindowCache(swiftkv.config, window=16, prefixes=prefix, input_ids=ids)
                with pytest.raises(ValueError, match="row 0: the prompt must be the input_ids"):
                    swiftkv.generate(ids[:, :length], past_key_values=cache, max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_copy_goes_on_as_the_cache_does(copied, quantization):
    """Beyond the window, where sinks are turned in the room of all layers."""
    swiftkv = swiftkv_model()
    ids = random_ids(1, 24)
    cache = SinkWindowCache(swiftkv.config, window=6, attention_sinks=2, quantization=quantization)
    for part in ids[:, :20].split(5, dim=1):
        swiftkv(part, past_key_values=cache, use_cache=True)
    other = copied(cache)
    for token in ids[:, 20:].split(1, dim=1):
        wanted, found = (swiftkv(token, past_key_values=one, use_cache=True).logits for one in (cache, other))
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_what_is_no_prefix_and_no_configuration():
    swiftkv = swiftkv_model()
    with pytest.raises(ValueError, match="of one row of tokens, not \\(2, 10\\)"):
        SharedPrefix.from_ids(swiftkv, random_ids(2, 10))
    for wrong in ("hi", [[1, 2, 3]]):
        with pytest.raises(ValueError, match="prefixes must be SharedPrefixes"):
            SinkWindowCache(swiftkv.config, window=4, prefixes=wrong, input_ids=random_ids(1, 4))
    with pytest.raises(ValueError, match=r"model\.config, not a LlamaSwiftKVForCausalLM"):
        SinkWindowCache(swiftkv, window=4)
    with pytest.raises(ValueError, match="is not known; use int8 or fp8"):
        SinkWindowCache(swiftkv.config, window=4, quantization=["int8"])


def test_a_stream_ends_where_positions_do():
    model, ids = swiftkv_model(), random_ids(1, 8)
    cache = new_cache(model)
    logits(model, ids, cache)
    cache.lengths += 2**31 - 20
    cache.columns += 2**31 - 20
    logits(model, ids, cache)
    with pytest.raises(ValueError, match=r"a stream ends after 2,147,483,647 tokens: reset\(\) the cache"):
        logits(model, ids, cache)
    cache.reset()
    logits(model, ids, cache)


def test_prefixes_copied_beside_rows_without_one_survive_a_reset():
    """The others' slots are emptied: NaN that came into them would come through a weight of 0."""
    model = swiftkv_model()
    prefix = SharedPrefix.from_ids(model, random_ids(1, 9)[0])
    ids = torch.stack([torch.tensor([*prefix.token_ids, 5, 6, 7]), random_ids(1, 12, seed=3)[0]])
    cache = new_cache(model, prefixes=prefix, input_ids=ids)
    assert not cache.shares
    found = logits(model, ids, cache)
    for layer in cache.segments:
        for tensor in layer.tensors():
            tensor.fill_(float("nan"))
    cache.reset()
    torch.testing.assert_close(logits(model, ids, cache), found, rtol=0, atol=0)
