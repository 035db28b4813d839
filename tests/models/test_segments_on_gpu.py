"""The cache as it works on a GPU: through the Triton kernels, and without a look at what the device holds.

On CPU the kernels are interpreted, in a child process, and the cache is made to look away; on a GPU all is native.
Models are fp32 there, which is some 1e-5 off fp64 where logits are near 10.
"""

import copy

import pytest
import torch
from naive_streaming import naive_streaming_logits

from swiftkv_kernels import backends
from swiftkv_models import SharedPrefix, SinkWindowCache, growing_cache, rewrite, segment_cache, use_exact_positions
from swiftkv_models.growing_cache import GrowingCache
from swiftkv_models.row_caches import RowCaches
from tiny import random_ids, randomise_tail, tiny_llama

CLOSE = {"rtol": 0, "atol": 1e-3}


@pytest.fixture(params=["base", "swiftkv"])
def models(request, place, monkeypatch):
    """The same in fp64 on CPU and in fp32 on the place's device."""
    if place.backend != "cpu":
        monkeypatch.setattr(backends, "device_backend", lambda _: place.backend)
        monkeypatch.setattr(segment_cache, "readable_for_free", lambda _: False)
        monkeypatch.setattr(growing_cache._NewestToken, "behind_prefix", lambda *_: None)
    monkeypatch.setattr(segment_cache, "sharing_pays", lambda *_: True)
    exact = tiny_llama("wide-heads", layers=3, rms_norm_eps=1e-5)
    if request.param == "base":
        use_exact_positions(exact)
    else:
        exact = randomise_tail(rewrite(exact, num_key_value_layers=1))
    return exact, copy.deepcopy(exact).to(place.device, torch.float32)


@torch.no_grad()
def feed(model, ids, cache, chunks):
    parts = ids.to(model.device).split(chunks, dim=1)
    return (
        torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1).cpu().double()
    )


def test_a_stream(models, place):
    exact, model = models
    ids = random_ids(2, 14)
    cache = SinkWindowCache(model.config, window=4, attention_sinks=2)
    found = feed(model, ids, cache, [5, 1, 1, 5, 1, 1])
    for row in range(2):
        torch.testing.assert_close(found[row], naive_streaming_logits(exact, ids[row], 4, 2), **CLOSE)


def test_shared_prefixes_in_a_stream(models, place):
    """Two prefixes and a row without one; a prefix is that many sinks."""
    exact, model = models
    heads = [random_ids(length, seed=length) for length in (9, 6)]
    prefixes = [SharedPrefix.from_ids(model, head) for head in heads]
    rows = [torch.cat([heads[0], random_ids(4, seed=1)]), torch.cat([heads[1], random_ids(7, seed=2)]), random_ids(13)]
    ids = torch.stack(rows).to(place.device)
    cache = SinkWindowCache(model.config, window=4, attention_sinks=3, prefixes=prefixes, input_ids=ids)
    assert cache.shared_rows == 2
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "output_logits": True}
    found = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options)
    for row, sinks in enumerate((9, 6, 3)):
        expected = naive_streaming_logits(exact, found.sequences[row, :-1].cpu(), 4, sinks)[-3:]
        torch.testing.assert_close(torch.stack(found.logits)[:, row].cpu().double(), expected, **CLOSE)


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.05), ("fp8", 0.3)])
def test_quantised(models, place, quantization, tolerance):
    """Rounding as in test_sink_window_cache.py."""
    exact, model = models
    ids = random_ids(1, 9)
    cache = SinkWindowCache(model.config, window=4, attention_sinks=2, quantization=quantization)
    expected = naive_streaming_logits(exact, ids[0], 4, 2)
    error = (feed(model, ids, cache, [7, 1, 1])[0] - expected).norm() / expected.norm()
    assert 1e-4 < error < tolerance, error


@torch.no_grad()
def test_rows_with_a_cache_of_their_own(models, place):
    """A dense one, one behind a prefix and streams, of different length, step by step in one forward."""
    exact, model = models
    rows = [random_ids(length, seed=length) for length in (9, 12, 13, 11)]
    prefixes = [SharedPrefix.from_ids(model, ids[:5]) for ids in rows]
    shared = {"prefixes": prefixes[3], "input_ids": rows[3][None], "share": True}
    caches = [
        GrowingCache(model.config),
        SinkWindowCache(model.config, window=4, attention_sinks=2),
        GrowingCache(model.config, prefixes[2]),
        SinkWindowCache(model.config, window=4, attention_sinks=2, **shared),
    ]
    for ids, cache in zip(rows, caches, strict=True):
        feed(model, ids[None, cache.get_seq_length() : -3], cache, len(ids))
    found = []
    for step in (-3, -2, -1):
        last = torch.stack([ids[step] for ids in rows])[:, None].to(place.device)
        positions = torch.tensor([[cache.get_seq_length()] for cache in caches], device=place.device)
        together = RowCaches(model.config, caches)
        found.append(model(last, position_ids=positions, past_key_values=together, use_cache=True).logits[:, 0])
    found = torch.stack(found, dim=1).cpu().double()
    for index in (0, 2):
        torch.testing.assert_close(found[index], exact(rows[index][None], use_cache=False).logits[0, -3:], **CLOSE)
    for index, sinks in ((1, 2), (3, 5)):
        torch.testing.assert_close(found[index], naive_streaming_logits(exact, rows[index], 4, sinks)[-3:], **CLOSE)


def test_through_triton_in_a_child_process(run_interpreted):
    assert run_interpreted(__file__) == 10
