"""Ways to decode a stream token by token, for `swiftkv bench stream` and `decode` to compare.

    ours                   SinkWindowCache
    ours graphed           the same, its step replayed as a CUDA graph
    dense                  transformers' DynamicCache: every token so far
    recompute              the last W tokens anew, as a prompt, for every token (sliding window with re-computation)
    re-rotate              StreamingLLM's own rule, which rotates all keys anew for every token (rerotate.py)
    re-rotate published    the same with the operations of its authors' code

All run the same weights. The others are given what they lack in transformers: `grouped_sdpa`, without which GQA in bf16
takes several times as long on a CPU.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from swiftkv_models import GROUPED
from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_models.segment_layer import KeyValues
from swiftkv_models.shared_prefix import num_cached_layers
from swiftkv_train.bench.memory import most_allocated
from swiftkv_train.loading import Model

BLOCK = 256  # tokens of random K/V that are drawn; longer ones repeat them


def sharing_weights(model: Model) -> Model:
    """A model of its own, to change, with the same weights. It attends with GROUPED."""
    known: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    known[id(getattr(model.model, "_tail_projection", None))] = None  # for `ours` alone; of weights that it stacked
    twin = copy.deepcopy(model, known)
    twin.config._attn_implementation = GROUPED
    return twin


def random_key_values(model: Model, batch: int, tokens: int) -> Tensor:
    """[B, G, tokens, C] in the model's dtype: for speed it does not matter what a cache holds."""
    config = model.config
    shape = (batch, config.num_key_value_heads, min(tokens, BLOCK), config.head_dim)
    drawn = torch.randn(shape, dtype=model.dtype, device=model.device)
    return drawn.repeat(1, 1, -(-tokens // BLOCK), 1)[:, :, :tokens]


class Stream(ABC):
    """One of the ways above, over B rows."""

    name = ""
    cache: Any

    def __init__(self, model: Model, *, window: int, attention_sinks: int, batch: int = 1):
        self.model, self.window, self.sinks, self.batch = sharing_weights(model), window, attention_sinks, batch

    @abstractmethod
    def feed(self, input_ids: Tensor) -> Tensor:
        """Logits [B, 1, V] behind T >= 1 more tokens [B, T]."""

    @abstractmethod
    def reach(self, tokens: int, chunk: int = 256) -> None:
        """Be where `tokens` tokens have been fed, by feeding chunks or, where speed does not mind, by a short cut."""

    def held(self) -> Iterable[Tensor]:
        """What is kept from token to token."""
        return cache_tensors(self.cache)

    @property
    def held_bytes(self) -> int:
        return allocated_bytes(self.held())

    def peak_bytes(self, input_ids: Tensor) -> int:
        """Most bytes while `feed` runs: what is held and what comes and goes."""
        return self.held_bytes + most_allocated(lambda: self.feed(input_ids), self.model.device)

    def _run(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        return self.model(input_ids, use_cache=True, logits_to_keep=1, **arguments).logits


def cache_tensors(cache: Any) -> list[Tensor]:
    """What a cache of transformers or ours holds, shared prefixes among it."""
    if not isinstance(cache, SinkWindowCache):
        layers = [layer for layer in cache.layers if layer.is_initialized]
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    ours: Any = cache
    own = [tensor for layer in ours.layers for tensor in layer.tensors()]
    shared = [tensor for prefix in ours.prefixes for tensor in (*prefix.keys, *prefix.values)]
    books = [tensor for tensor in (ours.positions, ours.lengths, ours.pinned, ours.sinks) if tensor is not None]
    return [*own, *shared, *books]


def allocated_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece counted once, whatever part of it they show."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


class Ours(Stream):
    name = "ours"

    def __init__(self, model: Model, *, window: int, attention_sinks: int, batch: int = 1):
        self.model, self.window, self.sinks, self.batch = model, window, attention_sinks, batch  # the model as it is
        self.cache = SinkWindowCache(model.config, window=window, attention_sinks=attention_sinks)

    def feed(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids, past_key_values=self.cache)

    def reach(self, tokens: int, chunk: int = 256) -> None:
        generator = torch.Generator().manual_seed(tokens)
        while self.cache.columns < tokens:
            shape = (self.batch, min(chunk, tokens - self.cache.columns))
            ids = torch.randint(0, self.model.config.vocab_size, shape, generator=generator)
            self.feed(ids.to(self.model.device))

    def fill(self, tokens: int) -> None:
        """Be where `tokens` (at least sinks + W) tokens have been fed, with random K/V."""
        cache, device = self.cache, self.model.device
        if cache.positions is None:
            self.feed(torch.zeros(self.batch, 1, dtype=torch.long, device=device))  # allocates
        cache.columns, cache.step = tokens, None
        cache.lengths.fill_(tokens)
        cache.positions[:, : self.sinks] = torch.arange(self.sinks, device=device)
        kept = torch.arange(tokens - self.window, tokens, device=device)
        cache.positions[:, self.sinks + (kept - self.sinks) % self.window] = kept.int()
        states = random_key_values(self.model, self.batch, cache.num_slots + 1)
        for layer in cache.layers:
            layer.keys.copy_(states)
            layer.values.copy_(states)

    def attend(self, query: Tensor, states: Tensor) -> None:
        """Attention alone of one more token, query [B, H, 1, C], K and V [B, G, 1, C], in all layers that cache."""
        scaling = query.shape[-1] ** -0.5
        for layer in self.cache.layers:
            layer.attend(query, KeyValues(layer, states, states), self.cache.step, scaling)


class OursGraphed(Ours):
    """Once the window is full, a step depends on tensors of fixed size alone, which a CUDA graph replays."""

    name = "ours graphed"

    def __init__(self, model: Model, **options: Any):
        super().__init__(model, **options)
        self.graph: torch.cuda.CUDAGraph | None = None
        device = model.device
        self.ids, self.positions = (torch.zeros(self.batch, 1, dtype=torch.long, device=device) for _ in range(2))
        self.logits: Any = None

    def feed(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > 1 or self.cache.columns <= self.cache.num_slots:
            return super().feed(input_ids)
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.ids.copy_(input_ids)
        self.positions.fill_(self.cache.columns)
        self.cache.columns += 1
        self.graph.replay()
        return self.logits

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and makes what is made once
                self.positions.fill_(self.cache.columns)
                self._run(self.ids, past_key_values=self.cache, position_ids=self.positions)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._run(self.ids, past_key_values=self.cache, position_ids=self.positions)
        self.cache.columns -= 1  # nothing has run
        self.graph = graph


class Growing(Stream):
    """One whose layers get new keys and values at every step, and let go of the old ones."""

    def peak_bytes(self, input_ids: Tensor) -> int:
        if input_ids.device.type == "cpu":
            most_allocated(self._renew, input_ids.device)  # a block is seen to go only where it was seen to come
        return super().peak_bytes(input_ids)

    def _renew(self) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


class Dense(Growing):
    name = "dense"

    def __init__(self, model: Model, *, window: int = 0, attention_sinks: int = 0, batch: int = 1):
        super().__init__(model, window=window, attention_sinks=attention_sinks, batch=batch)
        self.cache = DynamicCache(config=model.config)

    def feed(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids, past_key_values=self.cache)

    def reach(self, tokens: int, chunk: int = 256) -> None:
        states = random_key_values(self.model, self.batch, tokens - self.cache.get_seq_length())
        for layer in range(num_cached_layers(self.model.config)):
            self.cache.update(states, states, layer)


class Recompute(Stream):
    name = "recompute"

    def __init__(self, model: Model, *, window: int, attention_sinks: int = 0, batch: int = 1):
        super().__init__(model, window=window, attention_sinks=attention_sinks, batch=batch)
        self.tokens = torch.empty(batch, 0, dtype=torch.long, device=model.device)

    def feed(self, input_ids: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, input_ids], dim=1)[:, -self.window :]
        return self.model(self.tokens, use_cache=False, logits_to_keep=1).logits

    def reach(self, tokens: int, chunk: int = 256) -> None:
        shape = (self.batch, min(tokens, self.window))
        self.tokens = torch.randint(0, self.model.config.vocab_size, shape, device=self.model.device)

    def held(self) -> Iterable[Tensor]:
        return [self.tokens]
