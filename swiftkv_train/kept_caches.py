"""K/V kept from one answer for the next: of a prompt that begins as an earlier one did only the rest is run.

The answers are the same but for rounding, which depends on the pieces that a prompt runs in. What requests begin with
alike, a system message or an earlier prompt, is in memory once for all of them, and on a CPU read once where they are
answered together (`GrowingCache`, `RowCaches`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from swiftkv_models import SharedPrefix, SinkWindowCache
from swiftkv_models.growing_cache import GrowingCache

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
        self._entries: list[tuple[list[int], GrowingCache]] = []  # tokens and their K/V, the last used at the end

    @property
    def lengths(self) -> list[int]:
        """The tokens of each entry, the last used at the end."""
        return [len(tokens) for tokens, _ in self._entries]

    def take(self, token_ids: Sequence[int]) -> GrowingCache:
        """A cache of as many of the prompt's first tokens as are kept, but not of its last one, which has to run.

        What the prompt goes on from as a whole is kept no longer: give it back by `keep`.
        """
        shared = [shared_length(tokens, token_ids) for tokens, _ in self._entries]
        length = min(max(shared, default=0), len(token_ids) - 1)
        if length <= 0:
            return GrowingCache(self._config)
        tokens, cache = self._entries.pop(max(range(len(shared)), key=lambda n: (shared[n], n)))
        if length == len(tokens):
            return cache
        self._entries.append((tokens, cache))
        return cache.beginning(tokens, length)

    def keep(self, token_ids: Sequence[int], cache: GrowingCache) -> None:
        """Keep the K/V of those of `token_ids` that the cache holds, in place of entries that they begin with."""
        tokens = list(token_ids[: cache.get_seq_length()])
        if not 0 < len(tokens) <= self._max_tokens:
            return
        shared = [shared_length(kept, tokens) for kept, _ in self._entries]
        if len(tokens) in shared:
            return
        self._entries = [entry for entry, n in zip(self._entries, shared, strict=True) if n < len(entry[0])]
        self._entries.append((tokens, cache))
        while len(self._entries) > self._max_entries or self._held() > self._max_tokens:
            del self._entries[0]

    def _held(self) -> int:
        """Tokens in memory: what entries share counts once."""
        held: dict[int, int] = {}  # by place
        for _, cache in self._entries:
            parts = [(cache.growing[0].keys, cache.get_seq_length() - cache.shared_tokens)]
            if cache.prefix is not None:
                parts.append((cache.prefix.keys[0], len(cache.prefix)))
            for keys, tokens in parts:
                if keys is not None:
                    held[keys.data_ptr()] = max(held.get(keys.data_ptr(), 0), tokens)
        return sum(held.values())

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
    """What a model makes of system messages: the last used, at most `max_entries` and of `max_tokens` together."""

    def __init__(self, max_tokens: int, max_entries: int = MAX_ENTRIES):
        self._max_tokens = max_tokens
        self._max_entries = max_entries
        self._entries: dict[tuple[int, ...], SharedPrefix] = {}  # the last used at the end

    def take(self, token_ids: Sequence[int]) -> SharedPrefix | None:
        """The prefix of just these tokens, if it is kept."""
        found = self._entries.pop(tuple(token_ids), None)
        if found is not None:
            self.keep(found)
        return found

    def keep(self, prefix: SharedPrefix) -> None:
        if len(prefix) > self._max_tokens:
            return
        self._entries[prefix.token_ids] = prefix
        while len(self._entries) > self._max_entries or sum(map(len, self._entries)) > self._max_tokens:
            del self._entries[next(iter(self._entries))]

    def clear(self) -> None:
        self._entries.clear()


def new_stream(
    config: Any, window: int, token_ids: Sequence[int], prefix: SharedPrefix | None, share: bool | None = None
) -> SinkWindowCache:
    """A cache for a prompt that begins with `prefix`, which stays for ever; without one, its first SINKS do."""
    options: dict[str, Any] = {}
    if prefix is not None:
        options = {"prefixes": prefix, "input_ids": torch.tensor([list(token_ids)]), "share": share}
    return SinkWindowCache(config, window=window, attention_sinks=SINKS, **options)


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
