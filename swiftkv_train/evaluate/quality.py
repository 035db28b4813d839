"""Distributions of a checkpoint against its base's, on held-out documents, by source and by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from swiftkv_train.data import Batch
from swiftkv_train.loading import Model
from swiftkv_train.quality import ROWS, Quality, summarise, token_measures

SMALLEST_BUCKET = 16


@dataclass
class SourceQuality:
    overall: Quality
    by_position: dict[str, Quality]  # "64-127" -> figures of the tokens at these positions of their document
    measures: torch.Tensor  # [N, 4], see token_measures

    def to_dict(self) -> dict[str, Any]:
        by_position = {name: quality.to_dict() for name, quality in self.by_position.items()}
        return {**self.overall.to_dict(), "by_position": by_position}


@torch.no_grad()
def source_quality(student: Model, base: Model, batches: list[Batch], advance: Callable[[int], None]) -> SourceQuality:
    """Compare a model with the base it was made from over the loss positions of `batches` (at least one)."""
    measures, positions = [], []
    for batch in batches:
        batch = batch.to(student.device)
        states = _last_hidden_states(student, base, batch)
        next_ids = batch.input_ids.roll(-1, dims=1)[batch.loss_mask]
        picked = [state[batch.loss_mask].split(ROWS) for state in states]
        for student_rows, base_rows, ids in zip(*picked, next_ids.split(ROWS), strict=True):
            measures.append(token_measures(student.lm_head(student_rows), base.lm_head(base_rows), ids).cpu())
        positions.append(batch.position_ids[batch.loss_mask].cpu())
        advance(batch.input_ids.numel())
    rows, position = torch.cat(measures), torch.cat(positions)
    buckets = {}
    low, high = 0, SMALLEST_BUCKET
    while low <= int(position.max()):
        chosen = (position >= low) & (position < high)
        if chosen.any():
            buckets[f"{low}-{high - 1}"] = summarise(rows[chosen])
        low, high = high, high * 2
    return SourceQuality(summarise(rows), buckets, rows)


def _last_hidden_states(student: Model, base: Model, batch: Batch) -> list[torch.Tensor]:
    """Of both [B, T, D], the layers in common run once."""
    trunk = student.model.run_trunk(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    states = trunk.hidden_states
    for layer in base.model.layers[student.config.num_key_value_layers :]:
        states = layer(
            states,
            attention_mask=trunk.attention_mask,
            position_ids=trunk.position_ids,
            position_embeddings=trunk.position_embeddings,
        )
    return [student.model.run_tail(trunk).last_hidden_state, base.model.norm(states)]
