"""`swiftkv bench prefill`: time to first token of a checkpoint over its base's."""

from __future__ import annotations

from typing import Any

import torch

from swiftkv_train.bench import whole_numbers
from swiftkv_train.errors import UserError
from swiftkv_train.evaluate.speed import time_to_first_token
from swiftkv_train.machine import environment
from swiftkv_train.pair import load_pair


def measure(checkpoint: str, base: str, lengths: str, repeats: int) -> dict[str, Any]:
    """Both through `generate` with one new token, taking turns, in the checkpoint's dtype, on random tokens."""
    wanted = whole_numbers("--lengths", lengths, "512,2048")
    student, teacher = load_pair(checkpoint, base)
    longest = student.config.max_position_embeddings - 1
    if min(wanted) < 1 or max(wanted) > longest:
        raise UserError(f"--lengths {lengths!r}: every length must be from 1 to {longest}")
    prompt = torch.randint(0, student.config.vocab_size, (max(wanted),), generator=torch.Generator().manual_seed(0))
    rows = time_to_first_token(student, teacher, prompt, wanted, repeats)
    config = student.config
    return {
        "benchmark": "time to first token, SwiftKV over base",
        "command": f"swiftkv bench prefill {checkpoint} --base {base} --lengths {lengths} --repeats {repeats}",
        "environment": environment(student),
        "num_key_value_layers": config.num_key_value_layers,
        "num_hidden_layers": config.num_hidden_layers,
        "key_value_group_size": config.key_value_group_size,
        "rows": rows,
        "summary": [
            f"{row['prompt_tokens']:>6} tokens  {row['student_seconds'] * 1e3:7.0f} ms against "
            f"{row['base_seconds'] * 1e3:7.0f} ms: x {row['ratio']:.3f}"
            for row in rows
        ],
    }
