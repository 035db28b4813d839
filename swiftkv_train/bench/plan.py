"""`swiftkv bench plan`: the bytes that `swiftkv plan` predicts for a step against those that a step really takes.

Compared is what a plan has to estimate: all that a step holds beside the weights and the optimizer's moments, whose
bytes are certain. Bases are random models of real shapes, made on the spot: what weights say does not matter here.
"""

from __future__ import annotations

import gc
import math
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from swiftkv_train.bench.memory import most_allocated
from swiftkv_train.bench.turns import this_device
from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.fetch import fetch
from swiftkv_train.machine import environment
from swiftkv_train.plan import model_on_meta
from swiftkv_train.plan.memory import training_memory
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import parse_recipe

# What differs from the debug model, which is whole and has a tokenizer.
SHAPES: dict[str, dict[str, int]] = {
    "debug": {},
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
FITTING = {"cpu": ["debug", "135m"], "cuda": ["135m", "1b"]}  # its libraries' workspaces dwarf a GPU's debug model


def _sized(rows: int, length: int) -> str:
    return f"data.sequence_length={length} training.batch_size={rows} training.micro_batch_size={rows}"


# model -> overrides of its recipe, one step of each of which is measured
SETTINGS: dict[str, list[str]] = {
    "debug": [
        "",
        "training.micro_batch_size=2",
        "model.dtype=bfloat16 rewrite.key_value_group_size=2 loss.hidden_mse=0.1",
        "model.dtype=bfloat16 model.attention=eager",
        "model.dtype=bfloat16 training.gradient_checkpointing=true",
        "model.dtype=bfloat16 training.trainable=lora",
        "rewrite.num_key_value_layers=5",
    ],
    "135m": [
        _sized(2, 512),
        _sized(4, 512),
        _sized(1, 1024),
        f"{_sized(2, 512)} training.gradient_checkpointing=true",
        f"{_sized(2, 512)} training.micro_batch_size=1 training.trainable=lora rewrite.key_value_group_size=3",
    ],
    "1b": [_sized(4, 2048), f"{_sized(4, 2048)} training.gradient_checkpointing=true"],
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step beside weights and moments."""

    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def step_memory(recipe: Recipe) -> StepMemory:
    """Trains two steps of a recipe on this device and compares the second, which has moments, with its plan."""
    distillation = Distillation(recipe, quiet=True)
    distillation.prepare()
    distillation.train_step()
    moments = distillation.strategy.optimizer_tensors()
    held = [*distillation.strategy.model.parameters(), *(moments[name] for name in moments if "exp_avg" in name)]
    device = distillation.accelerator.device
    measured = most_allocated(distillation.train_step, device)
    memory = training_memory(model_on_meta(recipe, device.type), recipe, device=device.type)
    certain = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return StepMemory(memory.step - certain, measured)


def recipe_for(model: str, settings: str, scratch: Path) -> Recipe:
    """The recipe of one measurement; base, data and run are made below `scratch`, the first two once.

    It is of prose alone, which has a loss on every token, as a plan assumes; of a chat only a part has one. Sequences
    are long enough for what a plan leaves out (indices, norms of gradients) to be small.
    """
    debug, data, base = scratch / "debug", scratch / "data", scratch / model
    if not debug.exists():
        fetch("debug", debug, data_dir=data, report=lambda text: None)
    if not base.exists():
        _save_random_base(debug, SHAPES[model], base)
    layers = SHAPES[model].get("num_hidden_layers", 6)
    content = {
        "model": {"base": str(base), "dtype": "bfloat16" if SHAPES[model] else "float32"},
        "rewrite": {"num_key_value_layers": layers // 2, "init": "copy"},
        "data": {
            "sequence_length": 256,
            "train": [{"name": "prose", "path": str(data / "prose.train.jsonl")}],
            "cache_dir": str(scratch / "cache"),
        },
        "training": {
            "output_dir": tempfile.mkdtemp(prefix="run-", dir=scratch),
            "steps": 2,
            "batch_size": 8,
            "micro_batch_size": 8,
        },
    }
    return parse_recipe(yaml.safe_dump(content), model, settings.split())


def _save_random_base(debug: Path, shape: dict[str, int], to: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shutil.copytree(debug, to, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=8192, **shape)  # type: ignore[arg-type]
    with this_device():  # a CPU draws 1B numbers in half a minute
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(to)


def measure(models: str | None) -> dict[str, Any]:
    """Every setting of the models named (separated by commas), by default of those whose size suits the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = FITTING[device] if models is None else models.split(",")
    for name in names:
        if name not in SHAPES:
            raise UserError(f"--models {models!r}: {name!r} is not known; use {', '.join(SHAPES)}")
    rows = []
    cases = [(name, settings) for name in names for settings in SETTINGS[name]]
    with (
        redirect_stdout(sys.stderr),  # DeepSpeed, where it is installed, introduces itself on standard output
        tempfile.TemporaryDirectory() as scratch,
        Reporter().bar("plan", len(cases), "settings") as advance,
    ):
        for name, settings in cases:
            rows.append(_row(name, settings, Path(scratch)))
            advance(1)
            gc.collect()  # a model of the last row that dies during the next step would count against it
    measured = [row for row in rows if "failed" not in row]
    worst = max(measured, key=lambda row: abs(math.log(row["ratio"])), default=None)
    facts = environment(torch.empty(0, device=device))
    del facts["dtype"]  # each row has its own
    return {
        "benchmark": "planned against measured bytes of a training step, beside weights and optimizer",
        "command": "swiftkv bench plan" + (f" --models {models}" if models else ""),
        "environment": facts,
        "rows": rows,
        "worst_ratio": worst and worst["ratio"],
        "summary": [*map(_line, rows), f"worst        x {worst['ratio']:.3f}" if worst else "nothing was measured"],
    }


def _row(model: str, settings: str, scratch: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "settings": settings}
    try:
        found = step_memory(recipe_for(model, settings, scratch))
    except UserError as error:  # an extra that is not installed
        return {**row, "failed": str(error)}
    return {**row, "predicted_bytes": found.predicted, "measured_bytes": found.measured, "ratio": found.ratio}


def _line(row: dict[str, Any]) -> str:
    name = f"{row['model']:<6} {row['settings'] or 'as it is'}"
    if "failed" in row:
        return f"{name}: not measured, {row['failed']}"
    planned, found = (f"{row[f'{kind}_bytes'] / 2**20:,.1f} MiB" for kind in ("predicted", "measured"))
    return f"{name}: planned {planned}, measured {found}: x {row['ratio']:.3f}"
