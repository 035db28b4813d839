"""Turn a run into a checkpoint that stands alone: `swiftkv export RUN --to DIR`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.export.bundle import bundle
from swiftkv_train.export.card import model_card
from swiftkv_train.export.check import check_in_clean_process, check_stored
from swiftkv_train.loading import load_tokenizer
from swiftkv_train.origin import adapter_changes, base_changes, listed
from swiftkv_train.results import check_writable
from swiftkv_train.run_directory import RunDirectory
from swiftkv_train.run_state import CALIBRATION
from swiftkv_train.staging import staged
from swiftkv_train.student import build_model, load_trained, merge_adapters

if TYPE_CHECKING:
    from collections.abc import Callable

MODULE = "modeling_llama_swiftkv"
PROVENANCE = "swiftkv.json"


def export(run_path: str | Path, to: str | Path, *, format: str = "hf", report: Callable[[str], None] = print) -> Path:
    """Write the last checkpoint of a run as a checkpoint of format `hf` or `arctic`.

    `hf`: safetensors without the tail's unused base projections, the modelling code, tokenizer, chat template,
    generation config and a model card. `arctic`: the layout that ArcticInference's plugin loads; it keeps the tail's
    own q/k/v_proj and repeats a group leader's K/V in every member, and brings no code.

    Raises:
        UserError: no run or checkpoint there, the base has changed since, or `to` already exists or cannot be written.
        RunError: the disk is full, or what was written does not work by itself. In either case nothing is left there.
    """
    run = RunDirectory.open(run_path)
    final = Path(to)
    if os.path.lexists(final):
        raise UserError(f"{final} already exists; choose another directory or remove it")
    check_writable("--to", final)
    checkpoint = run.last_checkpoint(report)
    recipe = run.recipe()
    report(f"run         {run.path}, step {checkpoint.step} of {recipe.training.steps}")
    model = build_model(recipe, recipe.model.dtype)
    if changes := base_changes(checkpoint.progress["content"], recipe.model):
        raise UserError(f"{checkpoint.path} was trained on another base: {listed(changes)}; restore that")
    if changes := adapter_changes(checkpoint.progress["recipe"], recipe):
        raise UserError(
            f"{checkpoint.path} was trained before {run.recipe_path} changed: {listed(changes)}; restore that"
        )
    load_trained(model, merge_adapters(checkpoint.weights(), recipe.training.lora), str(checkpoint.path))
    tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    provenance = {
        "base": recipe.model.base,
        "step": checkpoint.step,
        "recipe": recipe.model_dump(mode="json"),
        "calibration": run.read_json(CALIBRATION),
        "held_out": held_out_at(run, checkpoint.step),
    }
    exported = model if format == "arctic" else without_base_projections(model)
    with staged(final.absolute()) as stage:
        if format == "arctic":
            _write_arctic(exported, stage)
        else:
            _write_hf(exported, stage)
        tokenizer.save_pretrained(stage)
        (stage / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        (stage / "README.md").write_text(model_card(exported.config, provenance, format), encoding="utf-8")
        if format == "hf":
            report("check       loading the checkpoint by itself in a clean process")
            difference = check_in_clean_process(stage, exported)
            report(f"check       logits agree (largest difference {difference:.1g} of their spread)")
        else:
            check_stored(stage, arctic_tensors(exported))
            report("check       the tensors read back are those of the run")
    size = sum(file.stat().st_size for file in final.rglob("*") if file.is_file())
    report(f"exported    {final} ({size / 2**20:.0f} MiB)")
    return final


def without_base_projections(model: LlamaSwiftKVForCausalLM) -> LlamaSwiftKVForCausalLM:
    """The same model without the tail's own q/k/v_proj, sharing all other tensors."""
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    config = type(model.config).from_dict({**fields, "base_projections": False})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        stripped = type(model)(config)
    kept = stripped.state_dict().keys()
    weights = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in kept}
    stripped.load_state_dict(weights, strict=True, assign=True)
    stripped.model.rotary_emb = model.model.rotary_emb
    stripped.tie_weights()
    stripped.generation_config = model.generation_config
    return stripped.eval()


def _write_hf(model: LlamaSwiftKVForCausalLM, directory: Path) -> None:
    model.config.auto_map = {
        "AutoConfig": f"{MODULE}.LlamaSwiftKVConfig",
        "AutoModelForCausalLM": f"{MODULE}.LlamaSwiftKVForCausalLM",
    }
    model.save_pretrained(directory)
    _share(directory)
    for name, source in bundle("swiftkv_models.llama", MODULE).items():
        (directory / name).write_text(source, encoding="utf-8")


def arctic_tensors(model: LlamaSwiftKVForCausalLM) -> dict[str, torch.Tensor]:
    """What ArcticInference's layout stores: every member of a group has its leader's K/V, a tied head is left out."""
    config = model.config
    weights = model.state_dict()
    for leader, *others in config.tail_groups:
        shared = [n for n in weights if re.match(rf"model\.layers\.{leader}\.self_attn\.[kv]_proj_swiftkv\.", n)]
        for layer in others:
            for name in shared:
                weights[name.replace(f"layers.{leader}.", f"layers.{layer}.", 1)] = weights[name].clone()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def _write_arctic(model: LlamaSwiftKVForCausalLM, directory: Path) -> None:
    model.save_pretrained(directory, state_dict=arctic_tensors(model))
    _share(directory)


def _share(directory: Path) -> None:
    """Give weight files the mode that other new files get: safetensors leaves them readable by their owner only."""
    probe = directory / "config.json"
    for file in directory.glob("*.safetensors"):
        file.chmod(probe.stat().st_mode)


def held_out_at(run: RunDirectory, step: int) -> dict[str, Any] | None:
    """The held-out figures that a run logged at `step`, if it did: source name -> figures."""
    return next((row["held_out"] for row in run.metrics.rows() if "held_out" in row and row["step"] == step), None)


__all__ = ["RunError", "export"]
