"""A batch whose rows have a cache of their own each: steps of decoding for requests that come and go.

The linear layers run for all rows at once, so that the weights are read once. Attention runs row by row, over what that
row's cache holds; on CPU a prefix that caches share (`SharedPrefix`) is read once for all of them. Between two steps
any row may leave or join, and nothing is copied for it.

    B rows   H query heads   G K/V heads   C head size   n tokens of a row so far
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from swiftkv_kernels.segment_attention_torch import attend_all, attend_each_shared
from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_models.segment_layer import BehindPrefix, InPlaceOfKeys, MasklessLayer, use_segment_attention
from swiftkv_models.shared_prefix import num_cached_layers


class RowCaches(Cache):
    """For one forward of one new token a row, its `position_ids` [B, 1] given.

        logits = model(ids, position_ids=positions, past_key_values=RowCaches(model.config, caches)).logits

    `caches`: B of batch size 1, which then hold that token too: GrowingCaches, SinkWindowCaches or DynamicCaches,
    filled by the model of `config`. As a SinkWindowCache does, it makes the model's attention know it.
    """

    def __init__(self, config: PretrainedConfig, caches: Sequence[Cache]):
        self.caches = list(caches)
        super().__init__(layers=[_RowsLayer(self, index) for index in range(num_cached_layers(config))])
        self.streams = any(isinstance(cache, SinkWindowCache) for cache in self.caches)
        use_segment_attention(config)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """In place of K and V [B, G, 1, C]: what the attention of `SinkWindowCache`s takes for them."""
        if key_states.shape[0] != len(self.caches) or key_states.shape[2] != 1:
            raise ValueError(
                f"this is a step of one token for {len(self.caches)} rows, not of {key_states.shape[2]} for "
                f"{key_states.shape[0]}"
            )
        rows = zip(self.caches, key_states.split(1), value_states.split(1), strict=True)
        found = _RowKeyValues(self.layers[layer_idx], [cache.update(*row, layer_idx) for cache, *row in rows])
        return found, found

    def check_model(self, config: PretrainedConfig) -> None:
        for cache in self.caches:
            if isinstance(cache, SinkWindowCache):
                cache.check_model(config)


class _RowKeyValues(InPlaceOfKeys):
    def __init__(self, layer: Any, rows: Sequence[tuple[Any, Any]]):
        # Of each row K and V [1, G, n, C], or twice what attends to them
        self.layer, self.rows = layer, rows

    def attend(
        self,
        query: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Output [B, H, 1, C] for the query [B, H, 1, C]."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        outputs: list[Any] = [None] * len(query)
        sharing: dict[tuple[int, int], list[tuple[int, BehindPrefix]]] = {}  # rows, by their prefix in memory
        for index, (row, (keys, values)) in enumerate(zip(query.split(1), self.rows, strict=True)):
            if isinstance(keys, torch.Tensor):
                outputs[index] = attend_all(row, keys, values, scaling)
                continue
            its_position = None if position_ids is None else position_ids[index : index + 1]
            seen = keys.behind_prefix(row, its_position)
            if seen is None:
                outputs[index] = keys.attend(row, its_position, None, scaling)
            else:
                prefix = seen.prefix_keys.data_ptr(), seen.prefix_keys.shape[2]
                sharing.setdefault(prefix, []).append((index, seen))
        for members in sharing.values():
            indices, behind = zip(*members, strict=True)
            for index, output in zip(indices, _attend_shared(query[list(indices)], behind, scaling), strict=True):
                outputs[index] = output
        return torch.cat(outputs)


def _attend_shared(query: torch.Tensor, rows: Sequence[BehindPrefix], scaling: float) -> Sequence[torch.Tensor]:
    """Outputs [1, H, 1, C] of `rows` behind one prefix, whose queries are [rows, H, 1, C]."""
    prefix_query = None
    if any(row.prefix_query is not None for row in rows):
        met = zip(query.split(1), rows, strict=True)
        prefix_query = torch.cat([own if row.prefix_query is None else row.prefix_query for own, row in met])
    own = [(row.keys, row.values) for row in rows]
    prefix = rows[0].prefix_keys, rows[0].prefix_values
    return attend_each_shared(query, prefix_query, own, *prefix, scaling).split(1)


class _RowsLayer(MasklessLayer):
    """A row sees all of its own."""

    def __init__(self, cache: RowCaches, index: int):
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the rows' caches have layers of their own."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.cache.update(key_states, value_states, self.index)

    def get_seq_length(self) -> int:
        return max(cache.get_seq_length() for cache in self.cache.caches)
