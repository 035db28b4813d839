"""Training over a base held in 8 or 4 bits."""

import sys

import pytest
import torch
from torch.nn import functional

from swiftkv_models import rewrite
from swiftkv_train.checkpointing import RunDirectory
from swiftkv_train.distill import Distillation, distill
from swiftkv_train.errors import UserError
from swiftkv_train.export import export
from swiftkv_train.loading import load_model
from swiftkv_train.plan import model_on_meta
from swiftkv_train.plan.memory import training_memory
from swiftkv_train.quantized_base import BYTES, quantizable_layers, quantize_base
from tiny import random_ids, randomise_tail, tiny_llama

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = ["int8", "nf4"]
# Of the weights' own root mean square: a row's 127 steps; 16 levels for normally distributed values (QLoRA: ~0.09).
ERRORS = {"int8": 0.02, "nf4": 0.12}


def small_swiftkv(dtype=torch.float32, **changes):
    base = tiny_llama("bias", dtype=dtype, hidden_size=64, intermediate_size=128, **changes)
    return randomise_tail(rewrite(base, num_key_value_layers=3))


def packed_weights(layer):
    """What the layer multiplies by, found by multiplying the unit vectors."""
    with torch.no_grad():
        units = layer(torch.eye(layer.in_features))
    return (units - (layer.bias if layer.bias is not None else 0)).T


@pytest.mark.parametrize("kind", KINDS)
def test_only_frozen_layers_of_the_decoder_are_packed_and_keep_their_values(kind):
    model = small_swiftkv()
    before = {name: layer.weight.detach().clone() for name, layer in quantizable_layers(model).items()}
    others = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(name == f"model.layers.{layer}.weight" for layer in before)
    }
    assert len(before) == 6 * 7  # q, k, v, o, gate, up and down of every layer
    quantize_base(model, kind, torch.device("cpu"))
    for name, weight in before.items():
        layer = model.model.layers.get_submodule(name)
        assert layer.weight.dtype == {"int8": torch.int8, "nf4": torch.uint8}[kind]
        error = (packed_weights(layer) - weight).square().mean().sqrt() / weight.square().mean().sqrt()
        assert 0 < error < ERRORS[kind], (name, error)
    after = model.state_dict()
    for name, tensor in others.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_unpacked_weights(kind):
    """Of a second model whose plain layers hold the values that the packed ones multiply by."""
    packed, plain = small_swiftkv(), small_swiftkv()
    quantize_base(packed, kind, torch.device("cpu"))
    with torch.no_grad():
        for name, layer in quantizable_layers(plain).items():
            layer.weight.copy_(packed_weights(packed.model.layers.get_submodule(name)))
    ids = random_ids(2, 24)
    found = []
    for model in (packed, plain):
        model.requires_grad_(False)
        tail = {name: parameter for name, parameter in model.named_parameters() if "_swiftkv" in name}
        for parameter in tail.values():
            parameter.requires_grad_(True)
        base = model.model.run_tail(model.model.run_trunk(ids), base=True).last_hidden_state
        student = model.model.run_tail(model.model.run_trunk(ids)).last_hidden_state
        functional.mse_loss(student, base.detach()).backward()
        found.append(torch.cat([student.detach().flatten(), *(tail[name].grad.flatten() for name in sorted(tail))]))
    # int8 quantises the inputs too, which unit vectors do not show: about 1% an input, of six layers one after another.
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < (0.1 if kind == "int8" else 1e-4), error


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_resumes_and_exports_the_exact_base(make_recipe, kind):
    recipe = make_recipe(model__quantization=kind, training__output_dir="run")
    assert distill(recipe, quiet=True) == 0
    rows = RunDirectory("run").metrics.rows()
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    again = make_recipe(model__quantization=kind, training__output_dir="again", training__steps=4)
    first = Distillation(again, quiet=True)
    first.prepare()
    assert first.train_step()["loss"] == losses[0]  # deterministic
    exact = make_recipe(training__output_dir="exact")
    reference = Distillation(exact, quiet=True)
    reference.prepare()
    # The start is calibrated on exact weights; what differs is the quantised trunk that both models run on.
    assert losses[0] == pytest.approx(reference.train_step()["loss"], rel=0.5)
    assert losses[0] != reference.train_step()["loss"]
    export("run", "checkpoint", report=lambda text: None)
    exported, base = load_model("checkpoint", families=("llama_swiftkv",)), load_model("models/debug")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.5.mlp.down_proj.weight"):
        assert torch.equal(exported.state_dict()[name], base.state_dict()[name])


def test_the_plan_counts_packed_weights(make_recipe):
    plain, packed = make_recipe(), make_recipe(model__quantization="nf4")
    model = model_on_meta(plain, "cpu")
    sizes = [layer.weight.numel() for layer in quantizable_layers(model).values()]
    saved = training_memory(model, plain).weights - training_memory(model, packed).weights
    assert saved == pytest.approx(sum(sizes) * (4 - BYTES["nf4"]) - max(sizes) * 4, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes_are_what_the_plan_takes_them_for(kind):
    model = small_swiftkv(torch.bfloat16, head_dim=64)
    layers = quantizable_layers(model)
    elements = sum(layer.weight.numel() for layer in layers.values())
    quantize_base(model, kind, torch.device("cpu"))
    found = 0
    for name in layers:
        weight = model.model.layers.get_submodule(name).weight
        found += weight.numel() * weight.element_size()
        if kind == "nf4":
            state = weight.quant_state
            found += state.absmax.numel() * state.absmax.element_size()
            found += state.state2.absmax.numel() * 4 if state.nested else 0
    assert found == pytest.approx(elements * BYTES[kind], rel=0.02)


def test_it_says_what_to_install(make_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    distillation = Distillation(make_recipe(model__quantization="nf4"), quiet=True)
    with pytest.raises(UserError, match=r"model\.quantization nf4 needs bitsandbytes: pip install"):
        distillation.prepare()
