"""A K/V cache of fixed size for streams without end and for shared prompts: pinned prefix + ring window.

Of every row it keeps the first tokens, the *attention sinks* (StreamingLLM, arXiv 2309.17453), and the last `window`
ones. A prefix that rows share (a system prompt, `SharedPrefix`) is kept once, outside of it, in the sinks' place.

Positions are positions in the cache, as there: at most sinks + window - 1. A key is nevertheless rotated once, at its
absolute position, and lies in a ring: its slot is used again `window` tokens later, and nothing is ever moved. For
attention does not mind the order of the keys, and RoPE minds differences of positions only. So the query at absolute
position t meets the window as it is, and sinks and prefix, from which t has drifted away, after a second rotation by
min(t, sinks + window - 1) - t. Exact, and nothing is done per key of the window (`swiftkv_kernels.segment_attention`);
on CPU the few sinks' keys are turned instead, all layers' at once.

A prompt, or a chunk of one, is attended to as if its tokens had been fed one by one. Padding is not kept. Memory is
allocated once, by the first tokens. What drops out of the window is forgotten: streaming does not extend the context.

    B rows   T new tokens   G K/V heads   C head size   S sinks   W window   N = S + W slots   M prefixes
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from swiftkv_models.rope import inverse_frequencies, rotate, rotation
from swiftkv_models.segment_layer import (
    OF_ANOTHER_MODEL,
    Held,
    SegmentLayer,
    knows_segments,
    refuse_sliding_window,
    use_segment_attention,
)
from swiftkv_models.shared_prefix import (
    SharedPrefix,
    assign_prefixes,
    check_form,
    form_of,
    num_cached_layers,
    sharing_pays,
)

MAX_TURNED_SINKS = 64
MAX_TOKENS = 2**31 - 1  # positions are int32
QUANTIZATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass
class Step:
    """What one forward of T tokens does to the cache, the same in every layer."""

    positions: torch.Tensor  # [B, T] int32, absolute; -1: not kept (padding, or in the shared prefix already)
    slots: torch.Tensor  # [B, T] int64; -1: not kept, or pushed out of the window before the step ends
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin [B, T, C] from absolute to cache positions
    # Of steps of one token, and on CPU only, where looking is free:
    all_visible: bool = False  # the query sees all that the used slots hold
    prefix_visible: bool = False  # all rows share one prefix, and the query sees all of it
    slot: int | None = None  # where the token goes, if it is the same in all rows
    # Of steps of several tokens only:
    first: bool = False  # nothing was cached before
    plain: bool = False  # causal attention among the step's own tokens is all there is to it
    brings_sinks: bool = False
    chunk_key_positions: Any = None  # [B, S or N, + T] int32: slots before the step (sinks after it), then its tokens


class SinkWindowCache(Cache):
    """A cache of `attention_sinks` + `window` tokens a row, for `generate` of SwiftKV and of base Llama models.

        cache = SinkWindowCache(model.config, window=1020, attention_sinks=4)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=...)  # again, with all so far: it goes on

    It makes the model's attention know it (`config._attn_implementation`); other caches do not notice. A base model
    that was cast after loading, which rounds its rotary frequencies, needs `use_exact_positions` first.

    Args:
        config: the model's own, `model.config`.
        window: W, tokens kept beside the sinks.
        attention_sinks: S, first tokens that are kept for ever; 0 shows why they are there.
        prefixes: shared prompts. Rows of `input_ids` [B, T] that begin with one, by token ids, use it; others have
            sinks of their own. `attention_mask` [B, T] tells left padding. Where sharing would not pay (as many
            prefixes as rows; on CPU also few rows, or short prefixes: `sharing_pays`) the prefixes are copied into the
            rows instead; `shared_rows` is then 0. What the cache is used for must begin with these `input_ids`.
        share: True or False decides that instead; True for rows that `RowCaches` will put beside others.
        quantization: 'int8' or 'fp8' (e4m3): K and V in 8 bits, with a scale per token and head.

    Raises:
        ValueError: sizes out of range, a model with a sliding window of its own, of another kind than Llama, or with
            frequencies that depend on the length (dynamic NTK), an unknown quantization, a prefix shorter than the
            sinks, of another form of model, or without `input_ids`.
    """

    streams = True  # by which models know it, if it comes from another copy of this code

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        window: int,
        attention_sinks: int = 4,
        prefixes: SharedPrefix | Sequence[SharedPrefix] = (),
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        share: bool | None = None,
        quantization: str | None = None,
    ):
        if not isinstance(config, PretrainedConfig):
            raise ValueError(f"give the model's configuration, model.config, not a {type(config).__name__}")
        try:
            sizes = operator.index(window), operator.index(attention_sinks)
        except TypeError:
            sizes = 0, 0
        if sizes[0] < 1 or sizes[1] < 0:
            raise ValueError(
                "window must be a whole number of at least 1 and attention_sinks of at least 0, not "
                f"{window!r} and {attention_sinks!r}"
            )
        window, attention_sinks = sizes
        if quantization is not None and quantization not in list(QUANTIZATIONS):
            raise ValueError(f"quantization {quantization!r} is not known; use {' or '.join(QUANTIZATIONS)}")
        refuse_sliding_window(config, type(self).__name__)
        self.window, self.attention_sinks = window, attention_sinks
        self.quantized_dtype = None if quantization is None else QUANTIZATIONS[quantization]
        self.inverse_frequencies = inverse_frequencies(config, type(self).__name__)
        self.segments = [SegmentLayer(self, index) for index in range(num_cached_layers(config))]
        super().__init__(layers=list(self.segments))

        self.config, self.known_config = config, config
        self.unfinished = False  # while a step's tokens are not in the slots of all layers yet
        self.columns = self.first_column = 0  # of input_ids that are done: what `generate` calls the length
        self.step: Step | None = None
        # Made by the first tokens:
        self.lengths: Any = None  # [B] int64, tokens of every row so far, a prefix among them
        self.pinned: Any = None  # [B] int64, how many first tokens stay: the sinks, or the prefix
        self.positions: Any = None  # [B, N + 1] int32, of every slot; -1: empty. The last slot takes what is dropped
        self.row_indices: Any = None  # [B] int64
        # K, V [L, B, G, N + 1, C] and scales of all L layers, whose own are views; None if they are on several devices
        self.storage: Held | None = None
        # [L, B, G, S, C], of what is turned in its slots: the sinks' keys as they came, while `are_turned`
        self.sinks: torch.Tensor | None = None
        self.are_turned = False

        # Perhaps of another copy of this code.
        given: Any = [prefixes] if hasattr(prefixes, "token_ids") else prefixes or ()
        self.prefixes: list[SharedPrefix] = list(given)
        if not all(hasattr(prefix, "token_ids") for prefix in self.prefixes):
            raise ValueError("prefixes must be SharedPrefixes; see SharedPrefix.from_text")
        self.prefix_groups: Any = None  # [B] int32, the prefix that a row begins with; -1: none
        self.own_columns: Any = None  # [B] int64, of the input_ids, at which tokens of the row's own begin
        self.prefix_lengths: Any = None  # [M] int32
        self.shares = False  # whether rows read prefixes where they are; else each has a copy in its sinks' slots
        self.own_sinks = attention_sinks  # of a row that begins with no prefix
        self.min_pinned = attention_sinks
        if self.prefixes:
            self._assign_prefixes(input_ids, attention_mask, share)
        use_segment_attention(config)

    def _assign_prefixes(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, share: bool | None
    ) -> None:
        groups, own_columns = assign_prefixes(self.prefixes, input_ids, attention_mask)
        form = form_of(self.config)
        for prefix in self.prefixes:
            check_form(prefix, form, len(self.segments))
            if len(prefix) < self.attention_sinks:
                raise ValueError(
                    f"a prefix of {len(prefix)} tokens cannot stand for {self.attention_sinks} attention_sinks"
                )
        used, groups = groups.unique(return_inverse=True)  # others need not be held
        groups = (groups - int((used < 0).any())).int()
        self.prefixes = [self.prefixes[index] for index in used.tolist() if index >= 0]
        if not self.prefixes:
            return
        self.columns = self.first_column = int(own_columns.min())  # what lies in padding or prefixes in every row
        self.prefix_groups, self.own_columns = groups, own_columns
        lengths = [len(prefix) for prefix in self.prefixes]
        self.prefix_lengths = torch.tensor(lengths, dtype=torch.int32)
        keys = self.prefixes[0].keys[0]
        if share is None:
            share = sharing_pays(groups.tolist(), lengths, keys.shape[0] * keys.shape[-1], keys.device)
        self.shares = share
        everywhere = bool((groups >= 0).all())
        if everywhere:
            self.min_pinned = min(lengths)
        if not self.shares:
            self.attention_sinks = max(lengths)
        elif everywhere:
            self.attention_sinks = 0  # no row needs slots for its own

    @property
    def num_slots(self) -> int:
        return self.attention_sinks + self.window

    @property
    def shared_rows(self) -> int:
        """How many rows read a shared prefix; 0 where relay attention is not at work."""
        return int((self.prefix_groups >= 0).sum()) if self.shares else 0

    @property
    def used_slots(self) -> int:
        """The first slots of the N, beyond which all are empty: N, once a window has gone by."""
        # Without prefixes the first of a row's own tokens lie in the sinks' slots.
        in_window = self.columns - self.first_column - (0 if self.prefixes else self.attention_sinks)
        return min(self.num_slots, self.attention_sinks + max(0, in_window))

    @property
    def nbytes(self) -> int:
        """Bytes allocated: slots, and what is made of shared prefixes (`SharedPrefix.nbytes`) that are several or have
        to be quantised; a single one is read where it is."""
        tensors = [tensor for layer in self.segments for tensor in (*layer.tensors(), *layer.own_prefix())]
        tensors += [tensor for tensor in (self.positions, self.sinks) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.inference_mode(False)  # else what goes on outside of it could not write
    def allocate(self, leading: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device) -> Held:
        """Slots of K and V [*leading, N + 1, size], and their scales."""
        shape = (*leading, self.num_slots + 1)
        keys, values = (torch.zeros(*shape, size, dtype=self.quantized_dtype or dtype, device=device) for _ in range(2))
        if self.quantized_dtype is None:
            return keys, values, None, None
        key_scale, value_scale = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        return keys, values, key_scale, value_scale

    def allocate_layers(self, states: torch.Tensor, heads: int, size: int) -> None:
        """The slots of all layers in one tensor, for K and V of G `heads` of `size` C, in states' [B, ...] dtype."""
        if self.storage is not None or self.segments[0].is_initialized:
            return
        leading = (len(self.segments), len(states), heads)
        storage = self.allocate(leading, size, states.dtype, states.device)
        try:
            for index, layer in enumerate(self.segments):
                layer.adopt(*_of_layer(storage, index))
        except BaseException:  # no memory for a prefix's copy, Ctrl-C: all of them or none
            for layer in self.segments:
                layer.is_initialized = False
            raise
        self.storage = storage
        if self._turns_sinks():
            with torch.inference_mode(False):
                self.sinks = torch.zeros_like(self._sink_keys())

    def start(self, batch: int, device: torch.device) -> None:
        """A forward of `batch` rows begins.

        Raises ValueError where the cache holds another number of them, where one before it was broken off, and where
        the model has been given another attention implementation.
        """
        if self.unfinished:
            raise ValueError("a forward was broken off before it had filled this cache: reset() it, or make a new one")
        if not knows_segments(self.config):
            raise ValueError(
                f"the model's attention implementation has been set to {self.config._attn_implementation!r} since this "
                "cache was made: make a new one"
            )
        self.step = None
        if self.lengths is None:
            self._begin(batch, device)
        elif len(self.lengths) != batch:
            raise ValueError(f"the cache holds {len(self.lengths)} rows, not {batch}; make a new one")

    @torch.inference_mode(False)
    def _begin(self, batch: int, device: torch.device) -> None:
        if self.prefix_groups is not None and batch % len(self.prefix_groups):
            raise ValueError(f"the cache was made for {len(self.prefix_groups)} rows of input_ids, not {batch}")
        self.inverse_frequencies = self.inverse_frequencies.to(device)
        self.row_indices = torch.arange(batch, device=device)
        self.positions = torch.empty(batch, self.num_slots + 1, dtype=torch.int32, device=device)
        self.lengths, self.pinned = (torch.empty(batch, dtype=torch.int64, device=device) for _ in range(2))
        if self.prefix_groups is not None:
            copies = batch // len(self.prefix_groups)  # beams, or several answers to a prompt
            groups = self.prefix_groups.repeat_interleave(copies)
            self.prefix_groups, self.prefix_lengths = groups.to(device), self.prefix_lengths.to(device)
            self.own_columns = self.own_columns.repeat_interleave(copies).to(device)
        self._forget()

    def _forget(self) -> None:
        self.positions.fill_(-1)
        self.lengths.zero_()
        self.pinned.fill_(self.own_sinks)
        if self.prefix_groups is None:
            return
        has_one = self.prefix_groups >= 0
        prefix = self.prefix_lengths[self.prefix_groups.clamp_min(0)].long()
        self.lengths.copy_(torch.where(has_one, prefix, self.lengths))
        self.pinned.copy_(torch.where(has_one, prefix, self.pinned))
        if not self.shares:
            slots = torch.arange(self.attention_sinks, dtype=torch.int32, device=self.positions.device)
            self.positions[:, : self.attention_sinks] = torch.where(slots < self.lengths[:, None], slots, -1)

    def plan(
        self,
        position_ids: torch.Tensor | None,
        tokens: int,
        attention_mask: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Step:
        """The step of the forward that is under way: the first layer's call makes it, and moves the book-keeping on.

        `dtype` is that of queries. Raises ValueError where positions do not go on from what is cached.
        """
        if self.step is not None:
            return self.step
        first = self.columns == self.first_column
        positions = self._kept_positions(position_ids, tokens, attention_mask)
        if self.columns + tokens >= MAX_TOKENS:
            raise ValueError(f"a stream ends after {MAX_TOKENS:,} tokens: reset() the cache")
        self.unfinished = True
        last = positions.amax(1)
        slots = self._slots(positions, last)
        self.columns += tokens
        step = Step(positions.int(), slots)
        drift = self._drift(positions, dtype)
        if drift is not None and tokens == 1 and self._can_turn_sinks():
            self._turn_sinks(*drift)
        else:
            self._turn_sinks_back()
            step.rotation = drift
        if tokens > 1:
            sinks = self.attention_sinks
            step.first, step.brings_sinks = first, bool(((slots >= 0) & (slots < sinks)).any())
            step.plain = first and not self.prefixes and tokens <= self.num_slots and bool((positions >= 0).all())
            before = self.positions[:, sinks : self.num_slots].clone()
        self.positions.scatter_(1, torch.where(slots < 0, self.num_slots, slots), step.positions)
        self.lengths.copy_(torch.where(last < 0, self.lengths, last + 1))
        if tokens == 1 and readable_for_free(self.positions):
            of_sinks, of_window = self.positions[:, : self.used_slots].tensor_split([self.attention_sinks], dim=1)
            oldest = (last - self.window).clamp_min(-1)[:, None]
            step.all_visible = bool((of_sinks >= 0).all()) and bool((of_window > oldest).all())
            if self.shares and len(self.prefixes) == 1:
                sees = (self.prefix_groups == 0) & (last >= self.prefix_lengths[0] - 1)
                step.prefix_visible = bool(sees.all())
            first_slot, last_slot = (int(slot) for slot in slots.aminmax())
            step.slot = first_slot if first_slot == last_slot else None
        if tokens > 1:
            # A sink of the chunk is met as a sink, in its slot, by all queries.
            chunk = torch.where((slots >= 0) & (slots < sinks), -1, step.positions)
            parts = [self.positions[:, :sinks], *([] if first else [before]), chunk.int()]
            step.chunk_key_positions = torch.cat(parts, dim=1)
        self.step = step
        return step

    def _kept_positions(
        self, position_ids: torch.Tensor | None, tokens: int, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, T] int64, -1: padding, or in the shared prefix already. Raises ValueError unless they go on.

        Of a single token that is looked at on CPU only: elsewhere it would wait for the device.
        """
        device, rows = self.lengths.device, len(self.lengths)
        if position_ids is None:
            return self.lengths[:, None] + torch.arange(tokens, device=device)
        positions, lengths = position_ids.to(device, torch.int64).expand(rows, -1), self.lengths[:, None]
        kept = torch.ones_like(positions, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.ndim != 2 or len(attention_mask) != rows or attention_mask.shape[1] < tokens:
                raise ValueError(
                    f"attention_mask must be [{rows}, {tokens} or more], not {tuple(attention_mask.shape)}"
                )
            kept = attention_mask[:, -tokens:].to(device).bool()
        if self.prefix_groups is not None:  # rows that have no tokens of their own yet may bring some of the prefix's
            begins = (lengths == self.pinned[:, None]) & (self.prefix_groups >= 0)[:, None]
            of_prefix = begins & (positions < lengths)
            if tokens > 1 or readable_for_free(self.lengths):
                columns = self.columns + torch.arange(tokens, device=device)
                wrong = (of_prefix & kept & (columns >= self.own_columns[:, None])).any(1)
                if wrong.any():
                    row = int(wrong.nonzero()[0])
                    raise ValueError(
                        f"row {row}: the prompt must be the input_ids that this cache was made for, which go on behind "
                        f"a prefix of {int(self.lengths[row])} tokens"
                    )
            kept = kept & ~of_prefix
        if tokens == 1 and not readable_for_free(self.lengths):
            return torch.where(kept, positions, -1)
        goes_on = (positions == lengths + kept.cumsum(1) - 1) | ~kept
        if not bool(goes_on.all()):
            row = int((~goes_on.all(1)).nonzero()[0])
            raise ValueError(
                f"row {row}: positions must go on from the {int(self.lengths[row])} tokens that the cache holds; to "
                "begin again, reset() it; where there is padding, give attention_mask, and position_ids that do not "
                "count it (as `generate` does)"
            )
        return torch.where(kept, positions, -1)

    def _slots(self, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Where tokens at these positions [B, T] go; -1: nowhere."""
        pinned = self.pinned[:, None]
        slots = self.attention_sinks + (positions - pinned) % self.window
        is_pinned = positions < pinned  # of rows with a shared prefix no new token is
        slots = torch.where(is_pinned, positions, slots)
        outlived = ~is_pinned & (positions <= last[:, None] - self.window)
        return torch.where((positions < 0) | outlived, -1, slots)

    def _drift(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos, sin of the rotation of queries at absolute positions [B, T] to where they stand in the cache.

        In fp32 at least. None where they are the same, or nothing is pinned.
        """
        nothing_pinned = self.attention_sinks == 0 and not self.shares
        if nothing_pinned or self.columns <= self.min_pinned + self.window:
            return None
        in_cache = torch.minimum(positions, self.pinned[:, None] + (self.window - 1))
        cos, sin = rotation(self.inverse_frequencies, in_cache - positions)
        dtype = torch.promote_types(dtype, torch.float32)
        return cos.to(dtype), sin.to(dtype)

    def _can_turn_sinks(self) -> bool:
        """Whether to turn the few sink keys of all layers towards one query, rather than every layer's queries to them.

        A second rotation of queries is a second set of scores. On CPU, that costs more than it computes.
        """
        # Else one is still to come, into its slot.
        return self.storage is not None and self.sinks is not None and bool((self.lengths >= self.pinned).all())

    def _turns_sinks(self) -> bool:
        """Whether this cache ever does."""
        return (
            self.storage is not None
            and readable_for_free(self.storage[0])
            and self.quantized_dtype is None
            and not self.shares
            and 0 < self.attention_sinks <= MAX_TURNED_SINKS
        )

    def _sink_keys(self) -> torch.Tensor:
        assert self.storage is not None
        return self.storage[0][:, :, :, : self.attention_sinks]

    def _turn_sinks(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Put the sinks' keys where a query at its absolute position [B, 1, C] meets them as in the cache."""
        assert self.sinks is not None
        slots = self._sink_keys()
        if not self.are_turned:
            self.sinks.copy_(slots)
            self.are_turned = True
        keys = self.sinks.flatten(0, 1).to(cos.dtype)  # [L B, G, S, C]; the opposite of the query's rotation
        turned = rotate(keys, cos.repeat(len(slots), 1, 1), -sin.repeat(len(slots), 1, 1))
        slots.copy_(turned.view(slots.shape))

    def _turn_sinks_back(self) -> None:
        if self.are_turned and self.sinks is not None:
            self._sink_keys().copy_(self.sinks)
            self.are_turned = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """In place of the keys and values that attention reads: what `segments_...` attention takes for them."""
        if layer_idx == 0:
            self.start(key_states.shape[0], key_states.device)
        if layer_idx >= len(self.segments):
            raise ValueError(f"{OF_ANOTHER_MODEL}: it caches {len(self.segments)} layers")
        return (self.segments[layer_idx].key_values(key_states, value_states),) * 2

    def check_model(self, config: PretrainedConfig) -> None:
        """Raises ValueError unless a model of this config can use the cache, as that whose own it was made with can."""
        if config is self.config or config is self.known_config:
            return
        mine, other = form_of(self.config), form_of(config)
        for name, value in mine.items():
            if other[name] != value:
                raise ValueError(f"{OF_ANOTHER_MODEL}: of one with {name} {value}, not {other[name]}")
        self.known_config = config

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After pickling, which parts views, the layers' slots are the storage's again."""
        self.__dict__.update(state)
        if self.storage is not None:
            for index, layer in enumerate(self.segments):
                layer.keys, layer.values, layer.key_scale, layer.value_scale = _of_layer(self.storage, index)

    def reset(self) -> None:
        """Forget everything but the shared prefixes. What was allocated stays."""
        self.columns, self.step, self.unfinished = self.first_column, None, False
        self._turn_sinks_back()
        for layer in self.segments:
            layer.reset()
        if self.lengths is not None:
            self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._turn_sinks_back()
        super().reorder_cache(beam_idx)
        for tensor in (self.positions, self.lengths, self.pinned, self.prefix_groups, self.own_columns):
            if tensor is not None:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, *_: Any, **__: Any) -> None:
        """Raises ValueError: what a token pushed out of the window does not come back."""
        raise ValueError("a SinkWindowCache cannot take tokens back; use another cache for assisted generation")

    def batch_repeat_interleave(self, *_: Any, **__: Any) -> None:
        """Raises ValueError, as does `batch_select_indices`: a stream's rows are those it began with."""
        raise ValueError("the rows of a SinkWindowCache do not change; make one for as many rows as there will be")

    batch_select_indices = batch_repeat_interleave


def _of_layer(storage: Held, index: int) -> Held:
    """A layer's slots and scales, views of those of all layers."""
    keys, values, key_scale, value_scale = storage
    if key_scale is None or value_scale is None:
        return keys[index], values[index], None, None
    return keys[index], values[index], key_scale[index], value_scale[index]


def readable_for_free(tensor: torch.Tensor) -> bool:
    """Whether its numbers may be looked at for nothing. Elsewhere that would wait for the device."""
    return tensor.device.type == "cpu"
