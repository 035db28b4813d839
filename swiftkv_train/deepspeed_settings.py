"""DeepSpeed's settings: what a recipe decides, on top of a file of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swiftkv_train.errors import UserError
from swiftkv_train.loading import one_line
from swiftkv_train.recipe import Recipe


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings out of a recipe, on top of the user's own file where there is one.

    Raises UserError naming both places where the two disagree.
    """
    training, path = recipe.training, recipe.distributed.deepspeed_config
    stage = int(recipe.distributed.strategy.removeprefix("zero"))
    config = _read_json(path) if path else {}
    for section in ("zero_optimization", "bf16", "fp16", "torch_autocast", "optimizer", "scheduler"):
        if not (config.get(section) in (None, "auto") or isinstance(config[section], dict)):
            raise UserError(f"{path}: {section} is {json.dumps(config[section])}; it must be a JSON object")
    decided = {
        "zero_optimization.stage": (stage, f"distributed.strategy {recipe.distributed.strategy}"),
        "sequence_parallel_size": (None, "distributed.sequence_parallel"),
        "train_batch_size": (training.batch_size, f"training.batch_size {training.batch_size}"),
        "train_micro_batch_size_per_gpu": (
            training.micro_batch_size,
            f"training.micro_batch_size {training.micro_batch_size}",
        ),
        "gradient_clipping": (training.max_grad_norm, f"training.max_grad_norm {training.max_grad_norm}"),
        "bf16.enabled": (False, f"model.dtype {recipe.model.dtype}, which autocast follows"),
        "fp16.enabled": (False, f"model.dtype {recipe.model.dtype}, which autocast follows"),
        "torch_autocast.enabled": (False, f"model.dtype {recipe.model.dtype}, which autocast follows"),
        "optimizer": (None, "the training section"),
        "scheduler": (None, "the training section"),
        "gradient_accumulation_steps": (None, "training.batch_size and training.micro_batch_size"),
    }
    for key, (value, origin) in decided.items():
        found = _look_up(config, key)
        if found not in (None, "auto", value):
            raise UserError(f"{path}: {key} is {json.dumps(found)}, the recipe decides it by {origin}; remove it there")
    for key in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(key, None)
    for section in ("bf16", "fp16", "torch_autocast"):
        config.pop(section, None)
    # Micro-batches are counted, and their losses scaled, by the training loop.
    config |= {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": {**(config.get("zero_optimization") or {}), "stage": stage},
    }
    config.setdefault("steps_per_print", 2**31)
    # Where moments are offloaded accelerate would otherwise take DeepSpeed's Adam and forget training.betas.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _look_up(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"distributed.deepspeed_config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"distributed.deepspeed_config {path} is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"distributed.deepspeed_config {path} must hold a JSON object")
    return content
