"""Skipping prefill, caches and `generate`."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from swiftkv_models import rewrite
from swiftkv_models.attention import GROUPED
from tiny import FAMILIES, random_ids, randomise_tail, tiny_llama

EXACT = 1e-12  # fp64; only the order of sums may differ


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def swiftkv(family="smollm2", first=2, group=2, attention="sdpa", dtype=torch.float64):
    base = tiny_llama(family, dtype=dtype, attn_implementation=attention)
    return randomise_tail(rewrite(base, num_key_value_layers=first, key_value_group_size=group))


def greedy(model, ids, mask, steps):
    """Greedy continuation without any cache or skipping, positions counted from each row's first real token."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def left_padded(ids, padding):
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 2), mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 7, 18, 19, 40])
def test_kept_positions_equal_the_full_forward(attention, padded, keep):
    # transformers' eager masks overflow in fp64 (its softmax is fp32), so eager is held to fp32's own precision.
    dtype, tolerance = (torch.float32, 2e-5) if attention == "eager" else (torch.float64, EXACT)
    model = swiftkv(attention=attention, dtype=dtype)
    ids, mask = left_padded(random_ids(3, 19), [4, 0, 9] if padded else [0, 0, 0])
    arguments = {"attention_mask": mask} if padded else {}
    full = model(ids, use_cache=False, **arguments).logits
    for use_cache in (False, True):
        kept = model(ids, logits_to_keep=keep, use_cache=use_cache, **arguments).logits
        real = mask[:, -keep:].bool()
        assert kept.shape[1] == min(keep, 19)
        assert torch.allclose(kept[real], full[:, -keep:][real], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("keep", "pick"),
    [
        (torch.tensor([3, 11]), lambda full: full[:, [3, 11]]),
        (torch.tensor([-1, 4]), lambda full: full[:, [-1, 4]]),
        (torch.tensor([[3, 11], [5, 6]]), lambda full: torch.stack([full[0, [3, 11]], full[1, [5, 6]]])),
        (torch.arange(19).expand(2, 19) % 5 == 4, lambda full: full[torch.arange(19).expand(2, 19) % 5 == 4]),
    ],
)
def test_positions_may_be_given_as_a_tensor(keep, pick):
    model, ids = swiftkv(), random_ids(2, 19)
    kept = model(ids, logits_to_keep=keep, use_cache=False).logits
    assert torch.allclose(kept, pick(model(ids, use_cache=False).logits), atol=EXACT, rtol=0)


def test_the_tail_runs_for_the_kept_positions_only():
    model, seen = swiftkv(), {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _module, inputs, _output, index=index: seen.setdefault(index, []).append(inputs[0].shape[1])
        )
    model.generate(random_ids(2, 19), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen[0] == seen[1] == [19, 1, 1]  # the trunk sees the prompt
    assert all(seen[index] == [1, 1, 1] for index in range(2, 6))  # the tail never does


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "group"), [(1, 1), (1, 4), (3, 2), (5, 1), (6, 1)])
def test_cached_generation_equals_uncached(family, first, group):
    model = swiftkv(family, first, group)
    ids, mask = left_padded(random_ids(3, 12), [0, 5, 11])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = greedy(model, ids, mask, 8)
    # min_new_tokens forbids the end token, which the naive loop may pick: compare up to there.
    stop = (expected[:, 12:] == 2).int().cumsum(-1) == 0
    assert stop[:, 0].any()
    assert torch.equal(generated[:, 12:][stop], expected[:, 12:][stop])


@pytest.mark.parametrize("attention", ["sdpa", GROUPED])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_a_conversation_continues_from_its_cache(cache_kind, keep, attention):
    """What a static cache has not been filled with yet is no key."""
    model, ids = swiftkv(), random_ids(2, 24)
    model.set_attn_implementation(attention)
    cache = DynamicCache(config=model.config)
    if cache_kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=32)
    turns = [ids[:, :7], ids[:, 7:8], ids[:, 8:20], ids[:, 20:]]
    full, at = model(ids, use_cache=False).logits, 0
    for turn in turns:
        logits = model(turn, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        at += turn.shape[1]
        assert torch.allclose(logits, full[:, at - logits.shape[1] : at], atol=EXACT, rtol=0)


def test_prefill_in_chunks_equals_prefill_at_once():
    model, ids = swiftkv(), random_ids(2, 23)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, prefill_chunk_size=6, **arguments), model.generate(ids, **arguments))


def test_beam_search_and_sampling_equal_their_uncached_selves():
    model, ids = swiftkv(), random_ids(2, 11)
    for arguments in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            results.append(model.generate(ids, max_new_tokens=6, use_cache=use_cache, **arguments))
        assert torch.equal(*results)


@pytest.mark.parametrize(("first", "group"), [(1, 1), (3, 1), (2, 2), (2, 3), (2, 4), (1, 5), (6, 1)])
def test_the_cache_holds_one_pair_per_group(first, group):
    model, ids = swiftkv(first=first, group=group), random_ids(3, 17)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    config = model.config
    dense = 2 * config.num_hidden_layers * ids.numel() * config.num_key_value_heads * config.head_dim * 8
    paper = (first + -((first - 6) // group)) / 6  # (l + ceil((L - l) / g)) / L
    assert held == pytest.approx(dense * paper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lower_precision_stays_close(dtype, attention):
    model = swiftkv(attention=attention)
    ids = random_ids(2, 17)
    exact = model(ids, use_cache=False).logits
    logits = model.to(dtype)(ids, logits_to_keep=3).logits.double()
    # A few roundings per layer of the dtype's relative step, on values of the logits' spread.
    tolerance = 40 * torch.finfo(dtype).eps * float(exact.std())
    assert float((logits - exact[:, -3:]).abs().max()) < max(tolerance, 1e-4)


def test_hidden_states_can_be_recorded():
    model, ids = swiftkv(), random_ids(1, 9)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == 7
    assert all(state.shape == (1, 9, 32) for state in states)
    kept = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
    assert torch.allclose(kept[-1], states[-1][:, -1:], atol=EXACT, rtol=0)


def test_layers_may_be_offloaded(tmp_path):
    model, ids = swiftkv(), random_ids(2, 9)
    expected = model(ids, logits_to_keep=1).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.norm_swiftkv": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"} | {f"model.layers.{i}": "disk" if i >= 2 else "cpu" for i in range(6)}
    offloaded = type(model).from_pretrained(
        tmp_path / "model", dtype=torch.float64, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.allclose(offloaded(ids, logits_to_keep=1).logits, expected, atol=EXACT, rtol=0)
