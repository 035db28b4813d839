"""`optimize_for_cpu`: the same model by other operators. In fp64, where nothing is packed, they differ by rounding."""

import copy

import pytest
import torch
from transformers import DynamicCache

from swiftkv_kernels.packed_linear import packed_linear_backend
from swiftkv_models import GROUPED, PackedLinear, SinkWindowCache, cpu, optimize_for_cpu, rewrite
from tiny import random_ids, randomise_tail, tiny_llama

SAME = {"rtol": 0, "atol": 1e-9}
MODELS = {
    "base": tiny_llama,
    "base-mha": lambda: tiny_llama("llama2"),
    "swiftkv": lambda: randomise_tail(rewrite(tiny_llama(), num_key_value_layers=3, key_value_group_size=2)),
}
PADDING = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])


@pytest.fixture(params=MODELS)
def pair(request):
    """A model and the same, optimised."""
    model = MODELS[request.param]()
    optimized = optimize_for_cpu(copy.deepcopy(model))
    assert optimized.config._attn_implementation == GROUPED
    return model, optimized


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("parts", [[20], [7, 13], [3, 5, *[1] * 12], [1] * 20], ids=str)
def test_logits_with_a_growing_cache(pair, mask, parts):
    ids, found = random_ids(2, 20), []
    for model in pair:
        cache, logits, seen = DynamicCache(config=model.config), [], 0
        for part in ids.split(parts, dim=1):
            seen += part.shape[1]
            its_mask = None if mask is None else mask[:, :seen]
            positions = None if mask is None else (its_mask.cumsum(1) - 1).clamp_min(0)[:, -part.shape[1] :]
            inputs = {"attention_mask": its_mask, "position_ids": positions, "past_key_values": cache}
            logits.append(model(part, use_cache=True, **inputs).logits)
        found.append(torch.cat(logits, dim=1))
    real = torch.ones(2, 20, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[1][real], found[0][real], **SAME)


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 2, 19])
def test_the_last_positions_alone(pair, kept):
    model, optimized = pair
    ids = random_ids(1, 20)
    wanted = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(optimized(ids, logits_to_keep=kept).logits, wanted, **SAME)


@torch.no_grad()
def test_with_a_cache_of_ours(pair):
    found = []
    for model in pair:
        cache = SinkWindowCache(model.config, window=8, attention_sinks=2)
        found.append([model(part, past_key_values=cache).logits for part in random_ids(1, 20).split([9, *[1] * 11], 1)])
    torch.testing.assert_close(torch.cat(found[1], dim=1), torch.cat(found[0], dim=1), **SAME)


def test_generate(pair):
    model, optimized = pair
    options = {"attention_mask": PADDING, "max_new_tokens": 8, "do_sample": False}
    ids = random_ids(2, 20)
    assert torch.equal(optimized.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.skipif(packed_linear_backend("cpu", torch.float32) != "onednn", reason="this torch does not pack fp32")
def test_the_method_of_a_checkpoint_packs_too():
    model = rewrite(tiny_llama(dtype=torch.float32), num_key_value_layers=3)
    assert model.optimize_for_cpu() is model
    assert any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_dtype_that_this_cpu_is_slow_with_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(cpu.logger, "warning_once", said.append)
    optimize_for_cpu(tiny_llama(dtype=torch.float32))
    assert not said
    monkeypatch.setattr(cpu, "multiplies_natively", lambda dtype, device: False)
    optimize_for_cpu(tiny_llama(dtype=torch.bfloat16))
    assert len(said) == 1
    assert "computes in bfloat16" in said[0]


def test_another_attention_is_left_alone():
    model = tiny_llama(attn_implementation="eager")
    model.set_attn_implementation("eager")
    assert optimize_for_cpu(model).config._attn_implementation == "eager"


def test_another_device_is_left_alone():
    model = tiny_llama().to("meta")
    assert optimize_for_cpu(model).config._attn_implementation == "sdpa"
