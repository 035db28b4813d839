"""DeepSpeed's settings out of a recipe, sequences in parts, and what cannot be trained together."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from swiftkv_train.deepspeed_settings import deepspeed_config
from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.loading import compute_device
from swiftkv_train.sequence_parallel import check_heads, sequence_group, whole_mask
from swiftkv_train.strategies import _step_of, _step_tensor, make_strategy


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_settings_come_from_the_recipe(make_recipe, stage):
    recipe = make_recipe(
        distributed__strategy=f"zero{stage}", training__micro_batch_size=3, training__max_grad_norm=0.25
    )
    config = deepspeed_config(recipe)
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == 0.25
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & config.keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage is 3, .* distributed\.strategy zero2"),
        ({"train_batch_size": 64}, r"train_batch_size is 64, .* training\.batch_size 8"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            r"train_micro_batch_size_per_gpu is 2, .* training\.micro_batch_size 4",
        ),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps is 4, .* training\.batch_size and"),
        ({"gradient_clipping": 0.1}, r"gradient_clipping is 0\.1, .* training\.max_grad_norm 1\.0"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled is true, .* model\.dtype float32"),
        ({"optimizer": {"type": "Adam"}}, r'optimizer is \{"type": "Adam"\}, .* the training section'),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is .* the training section"),
    ],
)
def test_a_contradiction_names_both_places(make_recipe, tmp_path, settings, says):
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    recipe = make_recipe(distributed__strategy="zero2", distributed__deepspeed_config="ds.json")
    with pytest.raises(UserError, match=rf"ds\.json: {says}.*; remove it there"):
        deepspeed_config(recipe)


def test_other_settings_are_taken_and_auto_is_filled_in(make_recipe, tmp_path):
    settings = {
        "zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "cpu"}},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    config = deepspeed_config(make_recipe(distributed__strategy="zero3", distributed__deepspeed_config="ds.json"))
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert config["gradient_clipping"] == 1.0
    assert config["wall_clock_breakdown"] is True
    assert not {"train_batch_size", "bf16"} & config.keys()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_file_of_settings_that_is_none(make_recipe, tmp_path, content, says):
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    recipe = make_recipe(distributed__strategy="zero2", distributed__deepspeed_config="ds.json")
    with pytest.raises(UserError, match=f"ds.json {says}"):
        deepspeed_config(recipe)


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "scheduler"])
def test_a_section_of_settings_that_is_none(make_recipe, tmp_path, section):
    (tmp_path / "ds.json").write_text(json.dumps({section: True}))
    recipe = make_recipe(distributed__strategy="zero2", distributed__deepspeed_config="ds.json")
    with pytest.raises(UserError, match=f"ds.json: {section} is true; it must be a JSON object"):
        deepspeed_config(recipe)


def test_settings_go_with_zero(make_recipe):
    with pytest.raises(UserError, match="`deepspeed_config` goes with `strategy: zero1`"):
        make_recipe(distributed__deepspeed_config="ds.json")


def test_one_process_refuses_settings_that_it_would_not_use(make_recipe):
    recipe = make_recipe(distributed__strategy="zero3", distributed__deepspeed_config="nonexistent.json")
    with pytest.raises(UserError, match=r"nonexistent\.json is for several processes: start them with"):
        make_strategy(recipe)


@pytest.mark.parametrize(("settings", "forced"), [({}, False), ({"zero_force_ds_cpu_optimizer": True}, True)])
def test_an_offloaded_optimizer_is_the_recipes_own_unless_the_user_says_so(make_recipe, tmp_path, settings, forced):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": None, **settings}))
    config = deepspeed_config(make_recipe(distributed__strategy="zero2", distributed__deepspeed_config="ds.json"))
    assert config["zero_force_ds_cpu_optimizer"] is forced
    assert config["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(("there", "taken"), [("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")])
def test_a_gpu_without_fp64_is_not_trained_on(monkeypatch, there, taken):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there and torch.device(there))
    assert compute_device().type == taken


def test_a_step_is_stored_alike_and_given_back_as_the_optimizer_keeps_it():
    weights = [torch.zeros(1, requires_grad=True)]
    for step in (7, torch.tensor(7.0)):
        stored = _step_tensor(step)
        assert stored.dtype == torch.float32
        assert stored is not step
        assert _step_of(torch.optim.AdamW(weights), stored) is stored
        other = _step_of(torch.optim.SGD(weights), stored)  # stands for DeepSpeedCPUAdam, which counts in an int
        assert (other, type(other)) == (7, int)


@pytest.mark.parametrize(("variable", "launcher"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")])
def test_the_launcher_may_not_contradict_the_recipe(make_recipe, monkeypatch, variable, launcher):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UserError, match=f"launched with {launcher}, the recipe says distributed.strategy ddp"):
        make_strategy(make_recipe())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__dtype": "float16"}, "model.dtype float16 .* not fsdp2; use bfloat16"),
        ({"training__optimizer": "adamw_8bit"}, "training.optimizer adamw_8bit .* not fsdp2; use adamw"),
    ],
)
def test_what_trains_under_ddp_only(make_recipe, changes, says):
    with pytest.raises(UserError, match=says):
        make_strategy(make_recipe(distributed__strategy="fsdp2", **changes))


def test_what_cannot_be_parted(make_recipe):
    recipe = make_recipe(distributed__sequence_parallel=2)
    with pytest.raises(UserError, match="sequence_parallel 2 does not divide the number of processes, 1"):
        Distillation(recipe, quiet=True)
    pair = SimpleNamespace(num_processes=2)
    odd = make_recipe(distributed__sequence_parallel=2, data__sequence_length=63)
    with pytest.raises(UserError, match=r"sequence_parallel 2 does not divide data\.sequence_length 63"):
        sequence_group(odd, pair)
    with pytest.raises(UserError, match=r"sequence_parallel 2 needs model\.attention sdpa, not eager"):
        sequence_group(make_recipe(distributed__sequence_parallel=2, model__attention="eager"), pair)


@pytest.mark.parametrize(("heads", "says"), [((8, 2), "8 does not divide the model's 2 K/V heads"), ((8, 8), None)])
def test_heads_that_cannot_be_shared_out(make_recipe, heads, says):
    config = LlamaConfig(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    recipe = make_recipe(distributed__sequence_parallel=8)
    with pytest.raises(UserError, match=says) if says else nullcontext():
        check_heads(recipe, config)


def test_the_mask_of_whole_sequences_is_transformers_own():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    hidden = torch.zeros(2, 7, 8)
    config = LlamaConfig(attn_implementation="sdpa")
    expected = create_causal_mask(config, hidden, None, past_key_values=None, position_ids=position_ids)
    assert torch.equal(whole_mask(position_ids), expected)
