"""`GenerateEngine`: one request at a time through `model.generate`; and loading the model for it."""

import asyncio
import copy
import logging
import secrets
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from swiftkv_models import use_exact_positions
from swiftkv_train.data.tokenize import check_vocabulary
from swiftkv_train.errors import UserError
from swiftkv_train.generation_settings import decoding_config, default_temperature, end_token_ids
from swiftkv_train.kept_caches import MAX_ENTRIES, KeptCaches, KeptPrefixes, KeptStreams, generate, new_stream
from swiftkv_train.loading import load_config, load_for_inference, load_tokenizer
from swiftkv_train.serve.contract import (
    EngineStats,
    EngineStoppingError,
    FinishReason,
    GenerationError,
    GenerationRequest,
    ModelInfo,
    QueueFullError,
    TokenEvent,
    TokenStream,
)
from swiftkv_train.serve.one_thread import OneThread
from swiftkv_train.serve.text import IncrementalDecoder, StopScanner

logger = logging.getLogger(__name__)

THREAD = "swiftkv-generate"


def load_model_and_tokenizer(model_dir: str | Path, dtype: str = "auto") -> tuple[Any, Any]:
    """The model in evaluation mode, on the GPU if there is one, and its tokenizer.

    Only safetensors are read and no code of the checkpoint runs: SwiftKV model types are known from this installation.
    Raises UserError for anything that is wrong with the directory.
    """
    directory = Path(model_dir)
    try:
        if not directory.is_dir():
            raise UserError(
                f"{directory}: no such directory; give that of an exported checkpoint, or of a base model, which "
                "`swiftkv fetch ORG/NAME --to DIR` gets from the hub"
            )
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory}: has no config.json; give the directory of an exported checkpoint")
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise UserError(f"{directory}: has no tokenizer.json; copy the base model's tokenizer files there")
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    config = load_config(str(directory))
    tokenizer = load_tokenizer(str(directory))
    check_vocabulary(tokenizer, config.vocab_size, str(directory))
    return load_for_inference(str(directory), dtype=dtype), tokenizer


class _Job:
    """One admitted request: what the worker thread writes to and the event loop reads from."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.cancelled = False
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


class _JobStream:
    def __init__(self, engine: "GenerateEngine", job: _Job):
        self._engine = engine
        self._job = job
        self._ended = False

    def __aiter__(self) -> "_JobStream":
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
        self._engine._cancel(self._job)


class _TokenSink(StoppingCriteria):
    """Sends each new token of `generate` on its way and says when to stop.

    One object does what a streamer and a stopping criterion would do together: `generate` calls the two in an order
    that differs between transformers' versions, and the criterion alone sees the token already.
    """

    def __init__(self, job: _Job, tokenizer: Any, end_token_ids: set[int]):
        self._job = job
        self._end_token_ids = end_token_ids
        self._decoder = IncrementalDecoder(tokenizer, job.request.prompt_token_ids)
        self._scanner = StopScanner(job.request.stop)
        self.tokens = 0
        self.cached_tokens = 0
        self.finish_reason: FinishReason | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        if not (self.finish_reason or self._job.cancelled):
            self._take(int(input_ids[0, -1]))
        done = self.finish_reason is not None or self._job.cancelled
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    def _take(self, token_id: int) -> None:
        self.tokens += 1
        at_end_token = token_id in self._end_token_ids
        text = "" if at_end_token else self._scanner.push(self._decoder.push(token_id))
        if at_end_token or self._scanner.found or self.tokens >= self._job.request.max_tokens:
            text += self._scanner.push(self._decoder.flush())
            text += self._scanner.flush()
            self.finish_reason = "stop" if at_end_token or self._scanner.found else "length"
        self._job.emit(TokenEvent(token_id, text, self.finish_reason, self.cached_tokens))


class GenerateEngine:
    """Runs admitted requests one after another through `model.generate`, in one thread: `thread`, which should have
    loaded the model, or one of its own.

    At most `max_queue` requests wait beside the one that runs. Sampling settings that a request leaves out come from
    the checkpoint's generation_config.json. `context_length` may make the model's own shorter. With `reuse` the K/V of
    up to that many tokens are kept for later requests that begin alike. With a `window` every request has a cache of
    the last `window` tokens and the system's messages, or the first SINKS tokens where there are none, or more of them
    than `window` or than it leaves of the model's context: there is no context length then but the one that is given,
    and with `reuse` a few such caches are kept for prompts that go on from all of one, and K/V of a few systems'
    messages for new ones. A cancelled request stops at its next token, or before the next piece of its prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "swiftkv",
        max_queue: int = 64,
        context_length: int | None = None,
        reuse: bool = True,
        window: int | None = None,
        thread: OneThread | None = None,
    ):
        if max_queue < 0:
            raise UserError(f"max_queue is {max_queue}; it must be 0 or more")
        own = _own_context_length(model)
        if window is None and not 1 <= (own if context_length is None else context_length) <= own:
            raise UserError(f"context_length is {context_length}; this model allows 1 to {own}")
        if window is not None and not 1 <= window <= own:
            raise UserError(f"window is {window}; this model allows 1 to {own}")
        self._model = model
        self._defaults = model.generation_config
        self._info = ModelInfo(
            name=name,
            context_length=own if window is None and context_length is None else context_length,
            vocab_size=int(model.get_input_embeddings().num_embeddings),
            default_temperature=default_temperature(self._defaults),
            default_top_p=1.0 if self._defaults.top_p is None else float(self._defaults.top_p),
            streams=window is not None,
        )
        self._kept: KeptCaches | KeptStreams
        if window is None:
            self._kept = KeptCaches(model.config, (context_length or own) if reuse else 0)
        else:
            use_exact_positions(model)
            self._kept = KeptStreams(MAX_ENTRIES if reuse else 0)
        self._window = window or 0
        self._most_pinned = min(self._window, own - self._window)  # of a system's messages: memory has an end
        self._prefixes = KeptPrefixes(model, MAX_ENTRIES if reuse else 0)
        self._tokenizer = tokenizer
        # A fast tokenizer must not encode and decode in two threads.
        self._decoding_tokenizer = copy.deepcopy(tokenizer)
        self._max_queue = max_queue
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._draining = self._closed = False
        self._stats = EngineStats()
        self._changed = threading.Condition()
        self._thread = OneThread(THREAD) if thread is None else thread
        self._thread.finish_with(self._work)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def accepting(self) -> bool:
        return not self._draining and self._thread.is_alive()

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Admit a request. Raises QueueFullError, EngineStoppingError."""
        job = _Job(request)
        with self._changed:
            if not self.accepting:
                raise EngineStoppingError
            if len(self._waiting) + (self._running is not None) > self._max_queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify_all()
        return _JobStream(self, job)

    def stats(self) -> EngineStats:
        with self._changed:
            return replace(self._stats, running=int(self._running is not None), waiting=len(self._waiting))

    def begin_drain(self) -> None:
        with self._changed:
            self._draining = True

    def wait_idle(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._running is None, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """End every request with EngineStoppingError and wait up to `timeout` seconds for the thread."""
        with self._changed:
            self._draining = self._closed = True
            unfinished = [*self._waiting, *([self._running] if self._running else [])]
            self._count(cancelled=len(self._waiting))
            self._waiting.clear()
            for job in unfinished:
                job.cancelled = True
                job.emit(EngineStoppingError())
            self._changed.notify_all()
        self._thread.join(timeout)

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._count(cancelled=1)
                self._changed.notify_all()

    def _count(self, **more: int) -> None:
        """Add to the counters; the caller holds the lock."""
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                self._count(prompt_tokens=len(job.request.prompt_token_ids))
            sink, failed = None, 0
            try:
                sink = _TokenSink(job, self._decoding_tokenizer, self._end_token_ids(job.request))
                self._generate(job, sink)
                if sink.finish_reason is None and not job.cancelled:
                    raise RuntimeError("generate ended before the request did")
            except Exception:
                logger.exception("generation failed")
                self._kept.clear()  # whose memory the next one may need
                self._prefixes.clear()
                failed = 1
            with self._changed:
                self._running = None
                finished = int(sink is not None and sink.finish_reason is not None and not failed)
                if sink is not None:
                    self._count(generated_tokens=sink.tokens, cached_tokens=sink.cached_tokens)
                self._count(finished=finished, failed=failed, cancelled=1 - finished - failed)
                self._changed.notify_all()
            if failed:
                job.emit(GenerationError())

    def _end_token_ids(self, request: GenerationRequest) -> set[int]:
        """The model's own end tokens and the stop strings that name a special token, which never shows in the text."""
        added = self._decoding_tokenizer.added_tokens_decoder
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        ends = end_token_ids(self._defaults, self._decoding_tokenizer)
        return ends | {special[stop] for stop in request.stop if stop in special}

    def _generate(self, job: _Job, sink: _TokenSink) -> None:
        request, device = job.request, self._model.device
        if job.cancelled:
            return
        cache: Any = self._kept.take(request.prompt_token_ids)
        if cache is None:
            system_tokens = request.system_tokens if request.system_tokens <= self._most_pinned else 0
            cache, sink.cached_tokens = new_stream(
                self._model, request.prompt_token_ids, self._window, system_tokens, self._prefixes
            )
        else:
            sink.cached_tokens = cache.get_seq_length()
        config = decoding_config(
            self._defaults,
            self._decoding_tokenizer,
            max_new_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
        )
        # generate takes no generator, but it draws in this thread only: fork the global one for each request.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
            tokens = generate(
                self._model,
                request.prompt_token_ids,
                cache,
                stopped=lambda: job.cancelled,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([sink]),
            )
        self._kept.keep(tokens, cache)


def _own_context_length(model: Any) -> int:
    """Raises UserError if the model states none."""
    own = getattr(model.config, "max_position_embeddings", None)
    if not own:
        raise UserError("the model's config.json has no max_position_embeddings, so its context length is unknown")
    return int(own)
