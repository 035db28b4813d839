"""One layer of a `SinkWindowCache`: its slots, and attention over them in place of transformers' own.

transformers hands what `Cache.update` returns to the attention function untouched. So it returns `KeyValues` here, and
the attention implementation named `segments_...` attends by way of it; with other caches it is the implementation whose
name follows.

    B rows   T new tokens   K queries, the last of them   G K/V heads   C head size   S sinks   N = S + window slots
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from swiftkv_kernels.causal_attention import causal_attention
from swiftkv_kernels.kv_quantize import kv_dequantize, kv_quantize
from swiftkv_kernels.segment_attention import PrefixSegment, segment_attention
from swiftkv_kernels.segment_attention_torch import attend_all, attend_shared
from swiftkv_models.rope import rotate
from swiftkv_models.shared_prefix import stack_prefixes

if TYPE_CHECKING:
    from swiftkv_models.segment_cache import SinkWindowCache, Step

PREFIX = "segments_"
OF_ANOTHER_MODEL = "this cache is another model's; make it with model.config of the one that uses it"
# K, V [B, G, slots, C], and where they are quantised their scales [B, G, slots]
Held: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class InPlaceOfKeys:
    """What a cache gives the `segments_...` attention for K and V: by its `attend` they are attended to."""

    @property
    def shape(self) -> torch.Size:
        """Raises ValueError: an attention function that asks knows no such thing."""
        raise ValueError(OF_ANOTHER_MODEL)


@dataclass
class KeyValues(InPlaceOfKeys):
    """What attention takes for a layer's keys and values: the layer, and K and V [B, G, T, C] of the new tokens.

    None where they are in the layer's slots already. Layers that share them, as in AcrossKV, share this object.
    """

    layer: SegmentLayer
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    written: bool = False
    slots_and_chunk: Held | None = None  # of a chunk: the slots as they were before, and the chunk behind them

    @property
    def tokens(self) -> int:
        return 1 if self.keys is None else self.keys.shape[2]

    def attend(
        self,
        query: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Output [B, H, K, C] for the query [B, H, K, C] of a step's last K tokens."""
        if self.values is not None:
            query = query.to(self.values.dtype)  # under autocast RoPE leaves it in another
        step = self.layer.cache.plan(position_ids, self.tokens, attention_mask, query.dtype)
        return self.layer.attend(query, self, step, query.shape[-1] ** -0.5 if scaling is None else scaling)

    def behind_prefix(self, query: torch.Tensor, position_ids: torch.Tensor | None) -> BehindPrefix | None:
        """What the query [B, H, 1, C] of a step of one token attends to, which is then written; or None, where that is
        more than all slots and all of a prefix."""
        if self.tokens > 1:
            return None
        step = self.layer.cache.plan(position_ids, 1, None, query.dtype)
        return self.layer.behind_prefix(query, self, step)


class BehindPrefix(NamedTuple):
    """A step of one token whose query sees all of its rows' own K and V, and all of a prefix that they share."""

    prefix_query: torch.Tensor | None  # [B, H, 1, C], if another one than the query meets the prefix
    keys: torch.Tensor  # [B, G, N, C]
    values: torch.Tensor
    prefix_keys: torch.Tensor  # [1, G, P, C]
    prefix_values: torch.Tensor


class MasklessLayer(CacheLayerMixin):
    """A cache's layer whose attention knows what is visible, without end."""

    is_sliding = False
    is_compileable = False

    def get_max_length(self) -> int:
        return -1  # a stream has no end

    def get_max_cache_shape(self) -> int:  # its name before transformers 5.20 or so
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0, 0  # no mask is made


class SegmentLayer(MasklessLayer):
    """Slots [B, G, N + 1, C] of K and V, with fp32 scales [B, G, N + 1] where they are quantised.

    The last slot takes what is dropped. The first S hold sinks, the others the window, in no order. What is visible
    follows from positions.
    """

    def __init__(self, cache: SinkWindowCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self.keys: Any = None
        self.values: Any = None
        self.key_scale: Any = None
        self.value_scale: Any = None
        self.prefix: PrefixSegment | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the slots, for K and V like these [B, G, T, C]."""
        batch, heads, _, size = key_states.shape
        self.cache.allocate_layers(key_states, heads, size)
        if self.keys.device != key_states.device:  # a model in parts
            if self.cache.storage is not None:
                self.cache.storage = None
                for layer in self.cache.segments[: self.index]:
                    layer.separate()
            self.adopt(*self.cache.allocate((batch, heads), size, key_states.dtype, key_states.device))

    @torch.inference_mode(False)
    def separate(self) -> None:
        """Hold slots of one's own, and no more the room of all layers."""
        self.keys, self.values, self.key_scale, self.value_scale = (
            None if part is None else part.clone()
            for part in (self.keys, self.values, self.key_scale, self.value_scale)
        )

    def adopt(
        self,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        key_scale: torch.Tensor | None,
        value_scale: torch.Tensor | None,
    ) -> None:
        """These are the slots from now on."""
        assert keys is not None
        self.keys, self.values, self.key_scale, self.value_scale = keys, values, key_scale, value_scale
        self.device = keys.device
        self.prefix = self._prefix()
        self.is_initialized = True
        self._copy_prefixes()

    def _copy_prefixes(self) -> None:
        """Into the sinks' slots, where rows do not share them."""
        cache = self.cache
        if cache.shares or cache.prefix_groups is None:
            return
        groups = cache.prefix_groups.to(self.device)[:, None]
        for index, prefix in enumerate(cache.prefixes):
            slots = torch.arange(len(prefix), device=self.device).expand(len(self.keys), -1)
            keys, values = (
                tensors[self.index].to(self.device).expand(len(self.keys), -1, -1, -1)
                for tensors in (prefix.keys, prefix.values)
            )
            self._write(keys, values, torch.where(groups == index, slots, -1))

    def _prefix(self) -> PrefixSegment | None:
        cache = self.cache
        if not cache.shares:
            return None
        keys, values = (tensor.to(self.device) for tensor in stack_prefixes(cache.prefixes, self.index))
        key_scale = value_scale = None
        if cache.quantized_dtype is not None:
            (keys, key_scale), (values, value_scale) = (
                kv_quantize(tensor, cache.quantized_dtype) for tensor in (keys, values)
            )
        else:
            keys, values = keys.to(self.keys.dtype), values.to(self.keys.dtype)  # of a model that was cast since
        lengths, groups = cache.prefix_lengths.to(self.device), cache.prefix_groups.to(self.device)
        return PrefixSegment(keys, values, lengths, groups, key_scale, value_scale)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.keys, self.values, self.key_scale, self.value_scale) if tensor is not None]

    def own_prefix(self) -> list[torch.Tensor]:
        """What the cache holds of shared prefixes beside them: several in one tensor, quantised ones."""
        if self.prefix is None or (len(self.cache.prefixes) == 1 and self.cache.quantized_dtype is None):
            return []
        parts = (self.prefix.key, self.prefix.value, self.prefix.key_scale, self.prefix.value_scale)
        return [part for part in parts if part is not None]

    def attend(self, query: torch.Tensor, new: KeyValues, step: Step, scaling: float) -> torch.Tensor:
        """Output [B, H, K, C] of the step's last K queries; K and V of its tokens are written, if they are not yet."""
        if new.keys is None or new.values is None:
            self._is_filled()
            return self._attend_slots(query, new, step, scaling)
        if not self.is_initialized or self.device != new.keys.device:
            self.lazy_initialization(new.keys, new.values)
        if self.key_scale is None and self.keys.dtype != query.dtype:
            raise ValueError(
                f"the cache holds {self.keys.dtype}, the model computes in {query.dtype} now: make a new one"
            )
        queries = query.shape[2]
        plain = step.plain and queries == new.tokens
        # The window of the last query is what the slots hold after the step; earlier ones see what it pushes out.
        if queries > 1 and not plain and new.slots_and_chunk is None:
            new.slots_and_chunk = self._slots_and_chunk(new.keys, new.values, step)
        self._take(new, step)
        if queries == 1:
            return self._attend_slots(query, new, step, scaling)
        if new.slots_and_chunk is None:
            return causal_attention(query, self._as_kept(new.keys), self._as_kept(new.values), scaling=scaling)
        return self._attend(query, new.slots_and_chunk, step.chunk_key_positions, step, scaling)

    def behind_prefix(self, query: torch.Tensor, new: KeyValues, step: Step) -> BehindPrefix | None:
        """See `KeyValues.behind_prefix`."""
        if self.prefix is None or self.key_scale is not None or not (step.all_visible and step.prefix_visible):
            return None
        if self.keys.dtype != query.dtype:  # which `attend` refuses
            return None
        self._take(new, step)
        used = self.cache.used_slots
        own = self.keys[:, :, :used], self.values[:, :, :used]
        return BehindPrefix(_query_in_cache(query, step), *own, self.prefix.key, self.prefix.value)

    def _take(self, new: KeyValues, step: Step) -> None:
        """Write a step's K and V, if they are not yet."""
        if new.keys is not None and new.values is not None and not new.written:
            if step.slot is not None and self.key_scale is None:
                self.keys[:, :, step.slot] = new.keys[:, :, 0]
                self.values[:, :, step.slot] = new.values[:, :, 0]
            else:
                self._write(new.keys, new.values, step.slots)
            new.written = True
        self._is_filled()

    def _is_filled(self) -> None:
        if self.index == len(self.cache.segments) - 1:
            self.cache.unfinished = False

    def _attend_slots(self, query: torch.Tensor, new: KeyValues, step: Step, scaling: float) -> torch.Tensor:
        seen = self.behind_prefix(query, new, step)
        if seen is not None:
            return attend_shared(query, *seen, scaling)
        used = self.cache.used_slots
        held = (
            self.keys[:, :, :used],
            self.values[:, :, :used],
            None if self.key_scale is None else self.key_scale[:, :, :used],
            None if self.value_scale is None else self.value_scale[:, :, :used],
        )
        if step.all_visible and self.key_scale is None and self.prefix is None and step.rotation is None:
            return attend_all(query, held[0], held[1], scaling)
        positions = None if step.all_visible else self.cache.positions[:, :used]
        return self._attend(query, held, positions, step, scaling)

    def _slots_and_chunk(self, keys: torch.Tensor, values: torch.Tensor, step: Step) -> Held:
        """K, V and their scales of the slots as they were before a chunk, and of the chunk."""
        sinks = self.cache.attention_sinks
        if step.brings_sinks:
            self._write(keys, values, torch.where(step.slots < sinks, step.slots, -1))
        kept = sinks if step.first else self.cache.num_slots

        def join(states: torch.Tensor, slots: torch.Tensor, slot_scales: torch.Tensor) -> tuple[torch.Tensor, Any]:
            packed, scale = self._pack(states)
            joined = torch.cat([_bits(slots[:, :, :kept]), _bits(packed)], dim=2).view(slots.dtype)
            return joined, None if scale is None else torch.cat([slot_scales[:, :, :kept], scale], dim=2)

        joined_keys, key_scale = join(keys, self.keys, self.key_scale)
        joined_values, value_scale = join(values, self.values, self.value_scale)
        return joined_keys, joined_values, key_scale, value_scale

    def _attend(
        self, query: torch.Tensor, held: Held, key_positions: torch.Tensor | None, step: Step, scaling: float
    ) -> torch.Tensor:
        keys, values, key_scale, value_scale = held
        return segment_attention(
            query,
            keys,
            values,
            None if key_positions is None else key_positions.to(query.device),
            step.positions[:, -query.shape[2] :].to(query.device),
            window=self.cache.window,
            pinned=self.cache.attention_sinks,
            pinned_query=_query_in_cache(query, step),
            prefix=self.prefix,
            key_scale=key_scale,
            value_scale=value_scale,
            scaling=scaling,
        )

    def _write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        rows, slots = self.cache.row_indices[:, None].to(self.device), slots.to(self.device)
        for states, kept, scales in ((keys, self.keys, self.key_scale), (values, self.values, self.value_scale)):
            packed, scale = self._pack(states)
            _bits(kept)[rows, :, slots] = _bits(packed).transpose(1, 2)
            if scale is not None:
                scales[rows, :, slots] = scale.transpose(1, 2)

    def _pack(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = self.cache.quantized_dtype
        return (states.to(self.keys.dtype), None) if dtype is None else kv_quantize(states, dtype)

    def _as_kept(self, states: torch.Tensor) -> torch.Tensor:
        """As later queries will see them."""
        packed, scale = self._pack(states)
        return packed if scale is None else kv_dequantize(packed, scale, states.dtype)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.key_values(key_states, value_states),) * 2

    def key_values(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValues:
        if torch.is_grad_enabled() and value_states.requires_grad:
            raise ValueError("a SinkWindowCache carries no gradient: call the model under torch.no_grad()")
        return KeyValues(self, key_states.to(value_states.dtype), value_states)  # autocast leaves rotated K in another

    def get_seq_length(self) -> int:
        return self.cache.columns

    def reset(self) -> None:
        """Empty the slots, but for copies of prefixes: what is no number would come through a weight of 0."""
        for tensor in self.tensors():
            _bits(tensor).zero_()
        if self.is_initialized:
            self._copy_prefixes()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for tensor in self.tensors():
            _bits(tensor).copy_(_bits(tensor).index_select(0, beam_idx.to(tensor.device)))


def _query_in_cache(query: torch.Tensor, step: Step) -> torch.Tensor | None:
    """The last queries of a step [B, H, K, C] at their positions in the cache; None where those are theirs anyway."""
    if step.rotation is None:
        return None
    cos, sin = (table[:, -query.shape[2] :].to(query.device) for table in step.rotation)
    return rotate(query.to(cos.dtype), cos, sin).to(query.dtype)


def use_segment_attention(config: PretrainedConfig) -> None:
    """Let the model of this config (its own, not a copy) know `KeyValues`; with other caches it attends as before."""
    if knows_segments(config):
        return
    inner = config._attn_implementation
    AttentionInterface.register(PREFIX + inner, partial(_attention, inner))
    AttentionMaskInterface.register(PREFIX + inner, partial(_mask, inner))
    config._attn_implementation = PREFIX + inner


def refuse_sliding_window(config: PretrainedConfig, cache: str) -> None:
    """Raises ValueError for a model with a window of its own, in whose place a cache of that name would be."""
    layer_types = getattr(config, "layer_types", None) or ()
    if getattr(config, "sliding_window", None) is not None or "sliding_attention" in layer_types:
        raise ValueError(f"{cache} would take the place of the model's own sliding window")


def knows_segments(config: PretrainedConfig) -> bool:
    if config._attn_implementation is None:
        raise ValueError("this configuration is no model's; give a SinkWindowCache its model's own, model.config")
    return config._attn_implementation.startswith(PREFIX)


def plain_implementation(config: PretrainedConfig) -> str:
    """The attention implementation that a model uses with ordinary caches."""
    return config._attn_implementation.removeprefix(PREFIX)


def _attention(
    inner: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | KeyValues,
    value: torch.Tensor | KeyValues,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' calling convention; output [B, K, H, C]."""
    if isinstance(key, torch.Tensor):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager_attention_forward)
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    # Perhaps of another copy of this code: every checkpoint brings one, and all register the same names.
    if hasattr(key.layer.cache, "check_model"):  # which early ones lack
        key.layer.cache.check_model(module.config)
    output = key.attend(query, kwargs.get("position_ids"), attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


def _mask(inner: str, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """For a `SinkWindowCache`, whose keys have no length, the padding mask [B, columns] as it is."""
    if kwargs.get("kv_length") == 0:
        return attention_mask
    make = ALL_MASK_ATTENTION_FUNCTIONS[inner]
    return make(*args, attention_mask=attention_mask, **kwargs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor for operators that know no 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
