"""Models with packed linear layers: the same model, for inference.

fp32 on both sides, so only the order of sums differs: logits of size 10 agree to 1e-4.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from swiftkv_kernels.packed_linear import PackedWeight, packed_linear_backend
from swiftkv_models import PackedLinear, SinkWindowCache, num_parameters, pack_linears, rewrite
from tiny import random_ids, randomise_tail, tiny_llama

CLOSE = {"rtol": 0, "atol": 1e-4}
needs_packing = pytest.mark.skipif(
    packed_linear_backend("cpu", torch.float32) != "onednn", reason="this torch does not pack fp32"
)


def swiftkv_model(family="smollm2", group=1):
    base = tiny_llama(family, dtype=torch.float32)
    return randomise_tail(rewrite(base, num_key_value_layers=3, key_value_group_size=group))


MODELS = {
    "base": lambda: tiny_llama(dtype=torch.float32),
    "swiftkv": swiftkv_model,
    "swiftkv-g2-bias": lambda: swiftkv_model("bias", group=2),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """A model and the same packed."""
    model = MODELS[request.param]()
    return model, pack_linears(copy.deepcopy(model))


@needs_packing
@torch.no_grad()
def test_logits_are_the_same(pair):
    model, packed = pair
    ids = random_ids(2, 20)
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, **CLOSE)


@needs_packing
def test_every_linear_layer_is_packed_and_held_once(pair):
    model, packed = pair
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert names == [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert not any(name.endswith("proj.weight") for name, _ in packed.named_parameters())


@needs_packing
@pytest.mark.parametrize("family", ["smollm2", "bias"])  # head tied to the embeddings, and not
def test_parameters_are_counted_as_before(family):
    model = tiny_llama(family, dtype=torch.float32)
    before = model.num_parameters()
    assert num_parameters(model) == before
    assert num_parameters(pack_linears(model)) == before


@needs_packing
@torch.no_grad()
def test_streams_are_the_same(pair):
    """Through prefill in parts and single tokens, for which SwiftKV stacks the tail's projections."""
    model, packed = pair
    ids, found = random_ids(2, 30), {}
    for way in (model, packed):
        cache = SinkWindowCache(way.config, window=8, attention_sinks=2)
        parts = ids.split([7, 5, *[1] * 18], dim=1)
        found[way] = torch.cat([way(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)
    torch.testing.assert_close(found[packed], found[model], **CLOSE)


@needs_packing
@torch.no_grad()
def test_the_tails_projections_are_stacked_anew_once_packed():
    model = swiftkv_model()
    for packed in (False, True):
        if packed:
            pack_linears(model)
        cache = SinkWindowCache(model.config, window=8, attention_sinks=2)
        for token in random_ids(1, 3).split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
        assert isinstance(model.model._tail_projection.weight, PackedWeight) == packed


@needs_packing
def test_it_can_still_be_saved(pair, tmp_path):
    model, packed = pair
    packed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    found, wanted = again.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@needs_packing
def test_it_stays_where_it_was_packed(pair):
    _, packed = pair
    packed.to("cpu", torch.float32)
    with pytest.raises(ValueError, match="load the model again, and pack it after `to`"):
        packed.to(torch.bfloat16)
    with pytest.raises(ValueError, match="meta"):
        packed.to("meta")


def test_what_cannot_be_packed_stays_as_it_is():
    class Adapted(torch.nn.Linear):
        pass

    model = tiny_llama()  # fp64
    wanted = [type(module) for module in model.modules()]
    assert [type(module) for module in pack_linears(model).modules()] == wanted
    layers = torch.nn.Sequential(Adapted(2, 2), torch.nn.Linear(2, 2, device="meta"))
    pack_linears(layers)
    assert [type(layer) for layer in layers] == [Adapted, torch.nn.Linear]


@needs_packing
@torch.no_grad()
def test_weights_are_loaded_as_into_any_model(pair):
    model, packed = pair
    ids = random_ids(2, 20)
    packed(ids, past_key_values=SinkWindowCache(packed.config, window=8), logits_to_keep=1)  # stacks the tail's
    for parameter in model.parameters():
        parameter.mul_(1.1)
    packed.load_state_dict(model.state_dict())
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, **CLOSE)

    def streamed(one):
        return one(ids, past_key_values=SinkWindowCache(one.config, window=8), logits_to_keep=1).logits

    torch.testing.assert_close(streamed(packed), streamed(model), **CLOSE)


@needs_packing
def test_weights_that_do_not_fit_are_refused(pair):
    model, packed = pair
    name = "model.layers.0.mlp.up_proj.weight"
    weights = model.state_dict()
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        packed.load_state_dict({**weights, name: weights[name][1:]})
    del weights[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict(weights)


@needs_packing
@torch.no_grad()
def test_weights_can_be_tied_and_written_again(pair):
    """As `tie_weights` does, which lm-evaluation-harness calls on every model."""
    model, packed = pair
    ids = random_ids(2, 20)
    packed.tie_weights()
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, **CLOSE)
    for way in (model, packed):
        projection = way.model.layers[0].mlp.down_proj
        projection.weight = torch.nn.Parameter(projection.weight * 2)
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, **CLOSE)
    with pytest.raises(ValueError, match="the weight of this layer is"):
        packed.lm_head.weight = torch.nn.Parameter(torch.zeros(2, 2))
