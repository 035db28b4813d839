"""An admitted request, from the queue to its last token: `Job`, and `Answer` while it is being answered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch

from swiftkv_train.generation_settings import decoding_config, end_token_ids, logits_processors
from swiftkv_train.kept_caches import shared_length
from swiftkv_train.serve.contract import FinishReason, GenerationRequest, TokenEvent
from swiftkv_train.serve.text import IncrementalDecoder, StopScanner


class Job:
    """One admitted request: what the worker thread writes to and the event loop reads from."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.cancelled = self.failed = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()

    def emit(self, event: TokenEvent | Exception) -> None:
        """From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the event loop is closed: nobody reads any more
            self.cancelled = True

    async def next_event(self) -> TokenEvent | Exception:
        return await self._events.get()


class JobStream:
    """A TokenStream; `cancel` is told the job that is left."""

    def __init__(self, job: Job, cancel: Callable[[Job], None]):
        self._job = job
        self._cancel = cancel
        self._ended = False

    def __aiter__(self) -> JobStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._job.next_event()
        if isinstance(event, Exception):
            self._ended = True
            raise event
        self._ended = event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        self._ended = True
        self._cancel(self._job)


class Answer:
    """A request while it is answered: its tokens so far, what K/V there is of them, and how the next one is chosen.

    `unread_prefix`: if not 0, so many first tokens go into `cache` to become a prefix, before another cache is made.
    """

    def __init__(self, job: Job, model: Any, tokenizer: Any, cache: Any, cached_tokens: int, unread_prefix: int = 0):
        request, settings = job.request, model.generation_config
        decoding = decoding_config(
            settings,
            tokenizer,
            max_new_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
        )
        self.job, self.cache, self.cached_tokens, self.unread_prefix = job, cache, cached_tokens, unread_prefix
        self.tokens = torch.tensor([list(request.prompt_token_ids)], device=model.device)  # [1, prompt + answer]
        self.generated = 0
        self.finish_reason: FinishReason | None = None
        self._processors, self._samples = logits_processors(decoding, settings), decoding.do_sample
        self._random = torch.Generator(model.device)
        self._random.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        self._end_token_ids = _end_token_ids(request, settings, tokenizer)
        self._decoder = IncrementalDecoder(tokenizer, request.prompt_token_ids)
        self._scanner = StopScanner(request.stop)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.job.cancelled

    def shared_tokens(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's first tokens, but for its last one, which has to run, the cache holds."""
        held = self.tokens[0, : self.cache.get_seq_length()].tolist()
        return min(shared_length(held, prompt), len(prompt) - 1)

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token by logits [1, V], and send it on its way."""
        scores = self._processors(self.tokens, logits.float())
        if self._samples:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        self.tokens = torch.cat([self.tokens, chosen], dim=1)
        self.generated += 1
        token_id = int(chosen)
        at_end_token = token_id in self._end_token_ids
        text = "" if at_end_token else self._scanner.push(self._decoder.push(token_id))
        if at_end_token or self._scanner.found or self.generated >= self.job.request.max_tokens:
            text += self._scanner.push(self._decoder.flush())
            text += self._scanner.flush()
            self.finish_reason = "stop" if at_end_token or self._scanner.found else "length"
        self.job.emit(TokenEvent(token_id, text, self.finish_reason, self.cached_tokens))


def _end_token_ids(request: GenerationRequest, settings: Any, tokenizer: Any) -> set[int]:
    """The model's own end tokens, and stop strings that name a special token, which never shows in the text."""
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = set() if request.ignore_eos else end_token_ids(settings, tokenizer)
    return own | {special[stop] for stop in request.stop if stop in special}
