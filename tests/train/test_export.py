"""What of a run goes into its checkpoint, and what an export without code is checked for."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftkv_models import rewrite
from swiftkv_train.distill import distill
from swiftkv_train.errors import RunError
from swiftkv_train.export import arctic_tensors, export, held_out_at
from swiftkv_train.export.card import model_card
from swiftkv_train.export.check import check_stored
from swiftkv_train.loading import load_model, load_tokenizer
from swiftkv_train.run_directory import RunDirectory
from tiny import randomise_tail, tiny_llama


def test_held_out_figures_are_those_of_the_step_that_is_exported(tmp_path):
    run = RunDirectory(tmp_path)
    for row in ({"step": 0, "held_out": {"a": 1}}, {"step": 20, "held_out": {"a": 2}}, {"step": 26, "loss": 3.0}):
        run.metrics.append(row)
    assert held_out_at(run, 20) == {"a": 2}
    assert held_out_at(run, 26) is None


def test_held_out_figures_that_are_no_numbers_are_not_on_the_card():
    config = rewrite(tiny_llama(), num_key_value_layers=2).config
    figures = {"kl": 0.125, "agreement": 0.5, "base_perplexity": 10.0, "student_perplexity": 11.0}
    held_out = {"prose": figures, "chats": {**figures, "kl": None}}
    card = model_card(config, {"base": "models/x", "step": 3, "held_out": held_out}, "hf")
    assert "| prose | 0.125 |" in card
    assert "chats" not in card


@pytest.mark.parametrize(("asked", "exported"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_that_is_exported_is_the_bases_own_unless_the_recipe_says_one(
    make_recipe, debug_files, monkeypatch, asked, exported
):
    monkeypatch.setattr("swiftkv_kernels.backends.multiplies_natively", lambda dtype, device: dtype == torch.float32)
    load_model(str(debug_files / "models/debug")).to(torch.bfloat16).save_pretrained("stored")
    load_tokenizer(str(debug_files / "models/debug")).save_pretrained("stored")
    recipe = make_recipe(model__base="stored", model__dtype=asked, training__output_dir="run")
    assert distill(recipe, calibrate_only=True, quiet=True) == 0
    export("run", "checkpoint", format="arctic", report=lambda text: None)
    assert {tensor.dtype for tensor in load_file("checkpoint/model.safetensors").values()} == {exported}


@pytest.mark.parametrize("damage", ["value", "missing", "odd"])
def test_an_arctic_checkpoint_that_is_not_the_runs_is_noticed(tmp_path, damage):
    model = randomise_tail(rewrite(tiny_llama(), num_key_value_layers=2, key_value_group_size=2))
    tensors = arctic_tensors(model)
    keys = [tensors[f"model.layers.{layer}.self_attn.k_proj_swiftkv.weight"] for layer in range(2, 6)]
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[2], keys[3])
    assert not torch.equal(keys[1], keys[2])
    save_file(tensors, tmp_path / "model.safetensors")
    check_stored(tmp_path, tensors)
    name = "model.layers.5.self_attn.v_proj_swiftkv.weight"
    if damage == "value":
        tensors[name][0, 0] += 1
    elif damage == "missing":
        del tensors[name]
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="lm_head" if damage == "odd" else name):
        check_stored(tmp_path, arctic_tensors(model))
