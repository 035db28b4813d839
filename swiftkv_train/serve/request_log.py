"""A line about every request that was answered, for the terminal that the server runs in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from swiftkv_train.serve.contract import TokenEvent

MAX_PATH = 100  # characters of a path that is shown
POLLED = ("/health", "/metrics")


@dataclass
class Served:
    """What was given out for one request so far."""

    began: float = field(default_factory=time.perf_counter)
    prompt_tokens: int | None = None  # None: it came to no answer
    cached_tokens: int = 0
    new_tokens: int = 0
    first: float = 0.0  # when the first and the last token came
    last: float = 0.0
    finish_reason: str | None = None
    error: str | None = None  # the code of a refusal or failure

    def add(self, event: TokenEvent) -> None:
        self.last = time.perf_counter()
        if not self.new_tokens:
            self.first = self.last
        self.new_tokens += 1
        self.cached_tokens = event.cached_tokens
        self.finish_reason = event.finish_reason or self.finish_reason

    def words(self) -> str:
        """For instance: 812 prompt tokens (790 reused), 64 new in 3.2 s (the first after 0.4 s), 22.5 tokens/s."""
        if self.prompt_tokens is None:
            return self.error or f"in {time.perf_counter() - self.began:.1f} s"
        reused = f" ({self.cached_tokens} reused)" if self.cached_tokens else ""
        words = f"{self.prompt_tokens} prompt tokens{reused}, {self.new_tokens} new"
        words += f" in {time.perf_counter() - self.began:.1f} s"
        if self.new_tokens:
            words += f" (the first after {self.first - self.began:.1f} s)"
        if self.new_tokens > 1 and self.last > self.first:
            words += f", {(self.new_tokens - 1) / (self.last - self.first):.1f} tokens/s"
        ended = self.error or (None if self.finish_reason else "the client left")
        return f"{words}; {ended}" if ended else words


def served(scope: Any) -> Served:
    """The one record of an ASGI request."""
    return scope.setdefault("swiftkv.served", Served())


class RequestLog:
    """ASGI middleware that gives `write` a line when a request is done; polls and preflights that succeed get none."""

    def __init__(self, app: Any, write: Callable[[str], None]):
        self._app = app
        self._write = write

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, status = served(scope), 500

        async def send_and_look(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except Exception:
            record.error = "internal_error"  # which it becomes further out
            raise
        finally:
            path = quote(scope["path"])[:MAX_PATH]
            if status >= 400 or not (path in POLLED or scope["method"] == "OPTIONS"):
                self._write(f"{scope['method']} {path} {status}: {record.words()}")
