"""A K/V cache of one row that grows in place, behind a beginning that other rows may share.

Where many requests begin alike (a system prompt, a document), K/V of the beginning lie in memory once, and on CPU a
batch of `RowCaches` reads them once for all its rows: relay attention (arXiv 2402.14808).

    G K/V heads   C head size   P tokens of the shared beginning   n the row's own
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from swiftkv_kernels.segment_attention import PrefixSegment, segment_attention
from swiftkv_kernels.segment_attention_torch import attend_all, attend_shared
from swiftkv_models.segment_layer import (
    BehindPrefix,
    InPlaceOfKeys,
    MasklessLayer,
    refuse_sliding_window,
    use_segment_attention,
)
from swiftkv_models.shared_prefix import SharedPrefix, check_form, form_of, num_cached_layers

MORE = 256  # tokens at least for which room is made at once
# Tokens. On CPU, 8 rows take as long with 128 that they share as with copies of them, and with 512 0.93 times as long;
# one row takes 1.03 to 1.1 times as long.
LEAST_SHARED = 256
NO_WINDOW = 2**31 - 1


class GrowingCache(Cache):
    """For a model of `config`, base or SwiftKV, and one row, without padding.

    As a `DynamicCache`, but a token is written, not appended to a copy of all others; and K/V of a `prefix` are read
    where they are. The row's tokens must go on from the prefix's: `get_seq_length` counts these. What has been written
    is never written again, so views of it stay right. With a prefix it makes the model's attention know it, as a
    SinkWindowCache does.

    Raises ValueError where the prefix is another model's, of a model with a sliding window of its own, and where it is
    given more rows, or what carries a gradient.
    """

    def __init__(self, config: PretrainedConfig, prefix: SharedPrefix | None = None):
        refuse_sliding_window(config, type(self).__name__)
        count = num_cached_layers(config)
        if prefix is not None:
            check_form(prefix, form_of(config), count)
            use_segment_attention(config)
        self.config, self.prefix = config, prefix
        self.growing = [_GrowingLayer(self, index) for index in range(count)]
        super().__init__(layers=list(self.growing))

    @property
    def shared_tokens(self) -> int:
        """P, tokens of the prefix."""
        return 0 if self.prefix is None else len(self.prefix)

    def beginning(self, token_ids: Any, length: int) -> GrowingCache:
        """Another one that holds the first `length` of its tokens, whose ids begin `token_ids`; this one stays.

        A prefix is shared as it is. Without one, or of a part of it, what is long enough becomes the other's prefix,
        and what is not is copied.
        """
        prefix, copied = self.prefix, length - self.shared_tokens
        if copied < 0 or (prefix is None and length >= LEAST_SHARED):
            prefix, copied = self.as_prefix(token_ids, length), 0
        start = GrowingCache(self.config, prefix)
        if copied:
            for layer, mine in zip(start.growing, self.growing, strict=True):
                layer.update(mine.keys[:, :, :copied], mine.values[:, :, :copied])
        return start

    def as_prefix(self, token_ids: Any, length: int) -> SharedPrefix:
        """The first `length` of its tokens, whose ids begin `token_ids`, for others: views, unless that would keep more
        than twice their memory."""
        held = [layer.held(length) for layer in self.growing]
        keys, values = ([_worth_holding(pair[part][0]) for pair in held] for part in (0, 1))
        return SharedPrefix(token_ids[:length], keys, values, form_of(self.config))

    def crop(self, *_: Any, **__: Any) -> None:
        """Raises ValueError: of what would be written again, others may hold views."""
        raise ValueError("a GrowingCache cannot take tokens back; use another cache for assisted generation")


class _GrowingLayer(MasklessLayer):
    def __init__(self, cache: GrowingCache, index: int):
        super().__init__()
        self.cache, self.index, self.length = cache, index, 0  # n
        self.keys: Any = None  # [1, G, n or more, C]
        self.values: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.device, self.is_initialized = key_states.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """K and V [1, G, T, C] of new tokens; returns those of all, or of one behind a prefix what attends to them."""
        if len(key_states) != 1:
            raise ValueError(f"a GrowingCache is of one row, not of {len(key_states)}")
        if torch.is_grad_enabled() and value_states.requires_grad:
            raise ValueError("a GrowingCache carries no gradient: call the model under torch.no_grad()")
        key_states = key_states.to(value_states.dtype)  # autocast leaves rotated K in another
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        end = self.length + tokens
        self.keys, self.values = _with_room(self.keys, end), _with_room(self.values, end)
        self.keys.narrow(2, self.length, tokens).copy_(key_states)
        self.values.narrow(2, self.length, tokens).copy_(value_states)
        self.length = end
        if self.cache.prefix is None:
            return self.own()
        return (_NewestToken(self),) * 2 if tokens == 1 else self.held(self.get_seq_length())

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [1, G, P, C]."""
        assert self.cache.prefix is not None
        keys, values = self.cache.prefix.keys[self.index][None], self.cache.prefix.values[self.index][None]
        if self.keys is None:
            return keys, values
        return keys.to(self.keys.dtype), values.to(self.keys.dtype)  # of a model that was cast since

    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [1, G, n, C]."""
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def held(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [1, G, length, C] of the first tokens; views, unless they are the prefix and more."""
        shared = self.cache.shared_tokens
        parts = [self.prefix()] if shared else []
        if length > shared:
            parts.append(self.own())
        keys, values = parts[0] if len(parts) == 1 else (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        return keys[:, :, :length], values[:, :, :length]

    def get_seq_length(self) -> int:
        return self.cache.shared_tokens + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget all but the prefix, in new memory: of the old there may be views."""
        self.length, self.is_initialized = 0, False


class _NewestToken(InPlaceOfKeys):
    """What attention takes for K and V of a layer whose newest token is behind a prefix."""

    def __init__(self, layer: _GrowingLayer):
        self.layer = layer

    def behind_prefix(self, query: torch.Tensor, position_ids: torch.Tensor | None) -> BehindPrefix | None:
        """See `KeyValues.behind_prefix`. None on other devices, whose kernel is `segment_attention`."""
        if query.device.type != "cpu":
            return None
        return BehindPrefix(None, *self.layer.own(), *self.layer.prefix())

    def attend(
        self,
        query: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Output [1, H, 1, C] for the newest token's query [1, H, 1, C]."""
        query = query.to(self.layer.values.dtype)  # under autocast RoPE leaves it in another
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if attention_mask is not None:
            return attend_all(query, *self.layer.held(self.layer.get_seq_length()), scaling, attention_mask)
        seen = self.behind_prefix(query, position_ids)
        if seen is not None:
            return attend_shared(query, *seen, scaling)
        keys, values = self.layer.prefix()
        length = torch.full((1,), keys.shape[2], dtype=torch.int32, device=query.device)
        segment = PrefixSegment(keys, values, length, torch.zeros_like(length))
        position = torch.full((1, 1), self.layer.get_seq_length() - 1, dtype=torch.int32, device=query.device)
        return segment_attention(
            query, *self.layer.own(), None, position, window=NO_WINDOW, pinned=0, prefix=segment, scaling=scaling
        )


def _with_room(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """`tensor` [1, G, n, C], or a larger one that begins with it, and has room for so many tokens."""
    room = tensor.shape[2]
    if tokens <= room:
        return tensor
    with torch.inference_mode(False):  # else what goes on outside of it could not write
        larger = tensor.new_empty(*tensor.shape[:2], max(tokens, room + max(MORE, room // 4)), tensor.shape[3])
    larger[:, :, :room] = tensor
    return larger


def _worth_holding(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it where it is less than half of what is in memory with it."""
    whole = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor if 2 * tensor.numel() >= whole else tensor.clone(memory_format=torch.contiguous_format)
