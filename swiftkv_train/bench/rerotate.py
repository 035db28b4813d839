"""StreamingLLM's own rule on transformers' Llama classes, as baselines: `re-rotate` and `re-rotate published`.

Source: mit-han-lab/streaming-llm, kv_cache.py (`StartRecentKVCache`) and pos_shift/modify_llama.py. Keys are cached
before RoPE; a cache that is full is cut to its first and its last tokens; at every step all its keys are rotated anew,
each at its place in the cache, and the query at the last place. Prompts longer than the cache are not for it.

`re-rotate published` does this with the operations of its authors: one torch.cat cuts, another appends, a table of
rotations is indexed by position ids in every layer, K and V are repeated for the query heads, all scores are formed.
`re-rotate` is as fast as the rule allows: one torch.cat, slices of the table, torch's fused attention, heads folded.

    B rows   T new tokens   G K/V heads   N cached tokens   C head size
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from swiftkv_kernels.segment_attention_torch import attend_all
from swiftkv_models.rope import inverse_frequencies, rotate, rotation
from swiftkv_models.shared_prefix import num_cached_layers
from swiftkv_train.bench.baselines import Growing, random_key_values
from swiftkv_train.loading import Model


class StartRecentLayer(CacheLayerMixin):
    """Un-rotated K, and V, [B, G, N, C]; attention is given K rotated."""

    keys: Any
    values: Any

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: StartRecentCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._appended(self.keys, key_states), self._appended(self.values, value_states)
        return rotate(self.keys, *self.cache.places(self.keys.shape[2])), self.values

    def _appended(self, held: Tensor, new: Tensor) -> Tensor:
        drop = held.shape[2] - self.cache.kept
        if drop <= 0:
            return torch.cat([held, new], dim=2)
        kept = [held[:, :, : self.cache.sinks], held[:, :, self.cache.sinks + drop :]]
        if self.cache.published:
            return torch.cat([torch.cat(kept, dim=2), new], dim=2)
        return torch.cat([*kept, new], dim=2)

    def get_seq_length(self) -> int:
        return self.cache.kept

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name before transformers 5.20 or so
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.kept + query_length, 0


class StartRecentCache(Cache):
    """For a model of `unrotated_keys`. `kept`: of the tokens held, those that stay when the next ones come."""

    def __init__(self, model: Model, window: int, sinks: int, published: bool):
        self.size, self.sinks, self.kept, self.published = sinks + window, sinks, 0, published
        super().__init__(layers=[StartRecentLayer(self) for _ in range(num_cached_layers(model.config))])
        positions = torch.arange(self.size, device=model.device)
        cos, sin = rotation(inverse_frequencies(model.config, type(self).__name__), positions)
        self.rotations = cos[None].to(model.dtype), sin[None].to(model.dtype)

    def places(self, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1, N, C] of the first places."""
        cos, sin = self.rotations
        if self.published:
            positions = torch.arange(tokens, device=cos.device)
            return cos[:, positions], sin[:, positions]
        return cos[:, :tokens], sin[:, :tokens]

    def make_room(self, tokens: int) -> int:
        """For that many new tokens; their first one's position in the cache."""
        layer: Any = self.layers[0]
        self.kept = min(layer.keys.shape[2], self.size - tokens) if layer.is_initialized else 0
        return self.kept


def unrotated_keys(model: Model) -> Model:
    """`model`, changed to give its cache keys as they come from their projection."""
    for layer in model.model.layers:
        attention = layer.self_attn
        if hasattr(attention, "project_key_values"):
            attention.project_key_values = MethodType(_tail_key_values, attention)
        else:
            attention.forward = MethodType(_attention_forward, attention)
    return model


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """LlamaAttention's, but for the rotation of keys."""
    query, key, value = (
        projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    query = rotate(query, *position_embeddings)
    output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
    return self.o_proj(output.flatten(2)), weights


def _tail_key_values(self: Any, swiftkv_states: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return self._heads(self.k_proj_swiftkv(swiftkv_states)), self._heads(self.v_proj_swiftkv(swiftkv_states))


class ReRotate(Growing):
    name = "re-rotate"
    published = False

    def __init__(self, model: Model, *, window: int, attention_sinks: int, batch: int = 1):
        super().__init__(model, window=window, attention_sinks=attention_sinks, batch=batch)
        unrotated_keys(self.model)
        self.cache = StartRecentCache(self.model, window, attention_sinks, self.published)

    def feed(self, input_ids: Tensor) -> Tensor:
        """A prompt must fit into the cache."""
        first, tokens = self.cache.make_room(input_ids.shape[1]), input_ids.shape[1]
        positions = torch.arange(first, first + tokens, device=input_ids.device).unsqueeze(0)
        return self._run(input_ids, past_key_values=self.cache, position_ids=positions)

    def reach(self, tokens: int, chunk: int = 256) -> None:
        """Which position in the text it is at, the cache does not know."""
        states = random_key_values(self.model, self.batch, min(tokens, self.cache.size))
        for layer in self.cache.layers:
            layer.lazy_initialization(states, states)
            layer.keys, layer.values = states.clone(), states.clone()

    def attend(self, query: Tensor, states: Tensor) -> None:
        """As `Ours.attend`."""
        self.cache.make_room(1)
        for layer in self.cache.layers:
            keys, values = layer.update(states, states)
            if query.device.type == "cpu":
                attend_all(query, keys, values)
            else:
                scaled_dot_product_attention(query, keys, values, enable_gqa=True)


class ReRotatePublished(ReRotate):
    name = "re-rotate published"
    published = True

    def __init__(self, model: Model, **options: Any):
        super().__init__(model, **options)
        self.model.config._attn_implementation = "eager"
