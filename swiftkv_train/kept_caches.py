"""K/V kept from one answer for the next: of a prompt that begins as an earlier one did only the rest is run.

The answers are the same but for rounding, which depends on the pieces that a prompt runs in.
A cache's tensors are never written to, only replaced by longer ones. So the beginning of a kept cache is taken as views
of it, and the kept one stays for a conversation that began with the same tokens and went on otherwise.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from swiftkv_models import SharedPrefix, SinkWindowCache

MAX_ENTRIES = 8
SINKS = 4  # first tokens that a stream keeps for ever
PIECE = 1024  # tokens of a prompt that run at once; between them it can be stopped


class KeptCaches:
    """Caches of batch size 1 for the model of `config`, at most `max_entries` and of `max_tokens` tokens together.

    Who is used least recently goes first. With `max_tokens` 0 nothing is kept.
    """

    def __init__(self, config: Any, max_tokens: int, max_entries: int = MAX_ENTRIES):
        self._config = config
        self._max_tokens = max_tokens
        self._max_entries = max_entries
        self._entries: list[tuple[list[int], DynamicCache]] = []  # tokens and their K/V, the last used at the end

    @property
    def lengths(self) -> list[int]:
        """The tokens of each entry, the last used at the end."""
        return [len(tokens) for tokens, _ in self._entries]

    def take(self, token_ids: Sequence[int]) -> DynamicCache:
        """A cache of as many of the prompt's first tokens as are kept, but not of its last one, which has to run.

        What the prompt goes on from as a whole is kept no longer: give it back by `keep`.
        """
        shared = [shared_length(tokens, token_ids) for tokens, _ in self._entries]
        length = min(max(shared, default=0), len(token_ids) - 1)
        if length <= 0:
            return DynamicCache(config=self._config)
        tokens, cache = self._entries.pop(max(range(len(shared)), key=lambda n: (shared[n], n)))
        if length == len(tokens):
            return cache
        self._entries.append((tokens, cache))
        return _beginning(cache, length)

    def keep(self, token_ids: Sequence[int], cache: DynamicCache) -> None:
        """Keep the K/V of those of `token_ids` that the cache holds, in place of entries that they begin with."""
        tokens = list(token_ids[: cache.get_seq_length()])
        if not 0 < len(tokens) <= self._max_tokens:
            return
        shared = [shared_length(kept, tokens) for kept, _ in self._entries]
        if len(tokens) in shared:
            return
        self._entries = [entry for entry, n in zip(self._entries, shared, strict=True) if n < len(entry[0])]
        self._entries.append((tokens, cache))
        while len(self._entries) > self._max_entries or sum(self.lengths) > self._max_tokens:
            del self._entries[0]

    def clear(self) -> None:
        self._entries.clear()


class KeptStreams:
    """As `KeptCaches`, for caches that cannot be cut, `SinkWindowCache`s: a prompt goes on from all of one. None grows,
    so there is no limit but their number.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES):
        self._max_entries = max_entries
        self._entries: list[tuple[list[int], Any]] = []  # tokens that went in, the last used at the end

    def take(self, token_ids: Sequence[int]) -> Any:
        """The cache of as many of the prompt's first tokens as there is one of, but not of all; kept no longer.

        None where there is none.
        """
        lengths = [
            len(tokens) if shared_length(tokens, token_ids) == len(tokens) < len(token_ids) else 0
            for tokens, _ in self._entries
        ]
        longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if longest is None or not lengths[longest]:
            return None
        return self._entries.pop(longest)[1]

    def keep(self, token_ids: Sequence[int], cache: Any) -> None:
        """Keep what holds the first of `token_ids`, as many as its length says, unless those are a prefix alone."""
        if cache.columns > cache.first_column:
            tokens = list(token_ids[: cache.columns])
            self._entries = [*self._entries, (tokens, cache)][-self._max_entries :] if self._max_entries else []

    def clear(self) -> None:
        self._entries.clear()


class KeptPrefixes:
    """What `model` makes of system messages, each run once: the last used `max_entries` of them."""

    def __init__(self, model: Any, max_entries: int = MAX_ENTRIES):
        self._model = model
        self._max_entries = max_entries
        self._entries: dict[tuple[int, ...], SharedPrefix] = {}  # the last used at the end

    def get(self, token_ids: Sequence[int]) -> tuple[SharedPrefix, bool]:
        """The prefix of these tokens, and whether it was there."""
        found = self._entries.pop(tuple(token_ids), None)
        prefix = SharedPrefix.from_ids(self._model, token_ids) if found is None else found
        if self._max_entries:
            self._entries[prefix.token_ids] = prefix
            while len(self._entries) > self._max_entries:
                del self._entries[next(iter(self._entries))]
        return prefix, found is not None

    def clear(self) -> None:
        self._entries.clear()


def new_stream(
    model: Any, token_ids: Sequence[int], window: int, system_tokens: int, prefixes: KeptPrefixes
) -> tuple[SinkWindowCache, int]:
    """A cache for a prompt whose first `system_tokens` stay for ever, or its first SINKS if those are more.

    And how many of its tokens were run before.
    """
    options: dict[str, Any] = {}
    was_there = False
    if SINKS <= system_tokens < len(token_ids):
        prefix, was_there = prefixes.get(token_ids[:system_tokens])
        options = {"prefixes": prefix, "input_ids": torch.tensor([list(token_ids)])}
    cache = SinkWindowCache(model.config, window=window, attention_sinks=SINKS, **options)
    return cache, system_tokens * was_there


def generate(
    model: Any, token_ids: Sequence[int], cache: Any, *, stopped: Callable[[], bool], **arguments: Any
) -> list[int]:
    """Prompt and answer: `model.generate` from a cache that holds a beginning of the prompt, but not all of it.

    A long prompt runs in pieces, and when `stopped` says so before one, there is no answer. The cache then holds K/V of
    the first of the tokens returned, as many as its length says.
    """
    input_ids = torch.tensor([list(token_ids)], device=model.device)
    with torch.no_grad():
        while (begin := cache.get_seq_length()) < len(token_ids) - PIECE and not stopped():
            piece = input_ids[:, begin : begin + PIECE]
            model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if stopped():
        return list(token_ids)
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **arguments)[0].tolist()


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _beginning(cache: DynamicCache, length: int) -> DynamicCache:
    """Views of the K/V of the first `length` tokens, of which there are more."""
    start = copy.copy(cache)
    start.layers = [copy.copy(layer) for layer in cache.layers]
    start.crop(length - cache.get_seq_length())  # negative: so many less
    return start
