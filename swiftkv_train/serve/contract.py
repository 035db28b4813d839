"""The narrow line between the routes and whatever generates: an `Engine` and what passes to and from it.

`Engine.submit` admits or refuses a request at once and returns an asynchronous iterator of `TokenEvent`; closing the
iterator cancels the request. Everything about slots, batches and caches stays behind this line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]


class QueueFullError(Exception):
    """As many requests wait as may wait; try again later."""


class EngineStoppingError(Exception):
    """The engine takes no new requests, or stopped before this one was done."""


class GenerationError(Exception):
    """Generating failed; the reason is in the log and not for the client."""


@dataclass(frozen=True)
class GenerationRequest:
    prompt_token_ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int | None = None  # None, here and below: the checkpoint's own; 0: all tokens
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False  # go on behind the model's end tokens
    seed: int | None = None  # None: a fresh one
    system_tokens: int = 0  # of the prompt's first ones, what the system's messages make: run once for all requests


@dataclass(frozen=True)
class TokenEvent:
    token_id: int
    text: str  # what became final with this token, often empty
    finish_reason: FinishReason | None = None  # set on the last event
    cached_tokens: int = 0  # of the prompt, that did not run again; the same on every event


@dataclass(frozen=True)
class EngineStats:
    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # of requests that began to run
    cached_tokens: int = 0  # of these, whose K/V an earlier request had left
    generated_tokens: int = 0


@dataclass(frozen=True)
class ModelInfo:
    name: str
    context_length: int | None  # None: no end
    vocab_size: int
    default_temperature: float = 1.0
    default_top_p: float = 1.0


class TokenStream(Protocol):
    """Ends after the event with a finish reason. Raises EngineStoppingError, GenerationError."""

    def __aiter__(self) -> "TokenStream": ...

    async def __anext__(self) -> TokenEvent: ...

    async def aclose(self) -> None:
        """Cancel the request if it is not done. Returns at once; harmless when repeated."""


class Engine(Protocol):
    """All methods return at once, except that `wait_idle` and `close` block their thread."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Any:
        """For prompts. Used by one thread at a time."""

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken at all, a full queue aside."""

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Called in the event loop that will read the stream. Raises QueueFullError, EngineStoppingError."""

    def stats(self) -> EngineStats: ...

    def begin_drain(self) -> None:
        """Take no new requests; those admitted go on."""

    def wait_idle(self, timeout: float) -> bool:
        """Whether nothing was running or waiting any more within `timeout` seconds."""

    def close(self, timeout: float = 10.0) -> None:
        """End what is left with EngineStoppingError and stop."""
