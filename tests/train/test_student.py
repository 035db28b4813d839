"""What is trained, and how: adapters on the tail, and its layers run again in the backward pass."""

import pytest
import torch

from swiftkv_models import PACKED_CAUSAL, rewrite
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.errors import UserError
from swiftkv_train.export import without_base_projections
from swiftkv_train.loading import load_model
from swiftkv_train.recipe import LoraSection, LossSection
from swiftkv_train.student import (
    add_adapters,
    checkpoint_tail,
    layer_by_layer,
    load_exported_tail,
    load_trained,
    merge_adapters,
    rewritten,
    tail_parameters,
    trainable_parameters,
    use_training_attention,
)
from tiny import random_ids, randomise_tail, tiny_llama


def student(group=1, family="smollm2"):
    model = randomise_tail(rewrite(tiny_llama(family), num_key_value_layers=2, key_value_group_size=group))
    return model.requires_grad_(False)


def loss_inputs(length=23):
    ids = random_ids(2, length)
    return ids, torch.arange(length).expand(2, -1).contiguous(), torch.ones(2, length, dtype=torch.bool)


def loss_module(model, checkpointed=False, **loss):
    module = DistillationModule(model, LossSection(**loss)).eval()
    if checkpointed:
        checkpoint_tail(model)
    return module


def gradients(model, checkpointed=False):
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss, _ = loss_module(model, checkpointed, hidden_mse=0.5)(*loss_inputs())
    loss.backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("group", [1, 2, 4])
def test_checkpointed_layers_give_the_same_gradients(group):
    expected = gradients(student(group))
    model = student(group)
    for name, gradient in gradients(model, checkpointed=True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)
    assert not any(module.training for layer in model.model.layers for module in layer.modules() if module is not layer)


@pytest.mark.parametrize(("device", "attention"), [(None, PACKED_CAUSAL), ("cpu", PACKED_CAUSAL), ("cuda", "sdpa")])
def test_attention_is_that_of_the_device_which_the_model_will_run_on(device, attention):
    model = student()
    model.set_attn_implementation("sdpa")
    use_training_attention(model, device and torch.device(device))
    assert model.config._attn_implementation == attention


def test_only_the_tails_layers_run_again():
    model = student()
    runs = [0] * 6
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    gradients(model, checkpointed=True)
    assert runs == [1, 1, 3, 3, 3, 3]  # base and student, and the student's once more


def numbers_kept(checkpointed):
    """How many numbers the forward pass keeps for the backward pass."""
    module = loss_module(student(), checkpointed)
    for parameter in trainable_parameters(module.model).values():
        parameter.requires_grad_(True)
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*loss_inputs(200))
    return sum(tensor.numel() for tensor in found.values())


def test_less_is_kept_for_the_backward_pass():
    assert numbers_kept(checkpointed=True) < 0.3 * numbers_kept(checkpointed=False)


@pytest.mark.parametrize("family", ["smollm2", "bias"])
def test_adapters_start_as_nothing_and_merge_into_what_they_do(family):
    lora = LoraSection(rank=3, alpha=5)
    model, ids = student(2, family), random_ids(2, 17)
    before = {name: tensor.clone() for name, tensor in tail_parameters(model).items()}
    with torch.no_grad():
        plain = model(ids).logits
        add_adapters(model, lora)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-12)
        trained = trainable_parameters(model)
        assert trained
        assert all(".lora_" in name for name in trained)
        for index, parameter in enumerate(trained.values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        adapted = model(ids).logits
    assert (adapted - plain).abs().max() > 0.1
    merged = merge_adapters({name: tensor.detach() for name, tensor in tail_parameters(model).items()}, lora)
    assert merged.keys() == before.keys()
    again = student(2, family)
    load_trained(again, merged, "test")
    with torch.no_grad():
        # The sum is formed in fp32: 1e-7 of weights and logits of order 1 to 10.
        torch.testing.assert_close(again(ids).logits, adapted, rtol=1e-5, atol=1e-5)
    for name, tensor in merged.items():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(tensor, before[name])


def test_without_adapters_there_is_nothing_to_merge():
    weights = {"a": torch.ones(2)}
    assert merge_adapters(weights, None) == weights


def test_a_model_runs_on_a_device_part_by_part_and_comes_back_unchanged():
    model, (ids, *_) = student(2), loss_inputs()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        device = torch.device("cpu:0")  # another name of the only device there is for sure
        moved, to = [], torch.Tensor.to
        with pytest.MonkeyPatch.context() as patch, layer_by_layer(device, model):

            def copying(tensor, *args, **kwargs):  # as a move to another device is
                if args != (device,):
                    return to(tensor, *args, **kwargs)
                moved.append(tensor)
                return tensor.clone()

            patch.setattr(torch.Tensor, "to", copying)
            assert torch.equal(model.model(ids).last_hidden_state, expected)
    assert len(moved) == sum(1 for name in before if name != "lm_head.weight") + 2  # and RoPE's two buffers
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_base_whose_streams_would_be_refused_is_refused(make_recipe, debug_files):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = tiny_llama(rope_parameters=rope)
    with pytest.raises(UserError, match=r"^model models/debug: .* do not depend on the length; rope_type is 'dynamic'"):
        rewritten(base, make_recipe())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tail_goes_on_with_its_own_base_only(make_recipe, dtype):
    """Rounded as it may be."""
    base = load_model("models/debug")
    exported = randomise_tail(rewrite(base, num_key_value_layers=3))
    without_base_projections(exported).to(torch.bfloat16).save_pretrained("exported")
    same = rewrite(load_model("models/debug", dtype=dtype), num_key_value_layers=3)
    load_exported_tail(same, "exported")
    wanted = exported.model.layers[4].self_attn.k_proj_swiftkv.weight.to(torch.bfloat16)
    assert torch.equal(same.model.layers[4].self_attn.k_proj_swiftkv.weight.to(torch.bfloat16), wanted)
    other = load_model("models/debug", dtype=dtype)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    with pytest.raises(UserError, match=r"exported was made from another base: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_exported_tail(rewrite(other, num_key_value_layers=3), "exported")
