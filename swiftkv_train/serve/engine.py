"""`GenerateEngine`: several requests at a time, a token of each in one forward; and loading the model for it."""

import contextlib
import copy
import logging
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from swiftkv_models import SharedPrefix, use_exact_positions
from swiftkv_models.growing_cache import LEAST_SHARED, GrowingCache
from swiftkv_models.row_caches import RowCaches
from swiftkv_train.data.tokenize import check_vocabulary
from swiftkv_train.errors import UserError
from swiftkv_train.generation_settings import default_temperature
from swiftkv_train.kept_caches import MAX_ENTRIES, PIECE, SINKS, KeptCaches, KeptPrefixes, KeptStreams, new_stream
from swiftkv_train.loading import load_config, load_for_inference, load_tokenizer
from swiftkv_train.serve.contract import (
    EngineStats,
    EngineStoppingError,
    GenerationError,
    GenerationRequest,
    ModelInfo,
    QueueFullError,
    TokenStream,
)
from swiftkv_train.serve.jobs import Answer, Job, JobStream
from swiftkv_train.serve.one_thread import OneThread

logger = logging.getLogger(__name__)

THREAD = "swiftkv-generate"
SHORT_PIECE = 256  # tokens of a prompt that run at once while others wait for their next token


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


class GenerateEngine:
    """Answers up to `max_batch` requests at once, in one thread: `thread`, which should have loaded the model, or one
    of its own.

    Prompts run one after another, in pieces; with every piece all answers under way get a token, in one forward
    (continuous batching). At most `max_queue` more requests wait for a place. Sampling settings that a request leaves
    out come from the checkpoint's generation_config.json. `context_length` may make the model's own shorter.

    With `reuse` requests that begin alike, at once or one after another, run that beginning once: the K/V of up to the
    context length's tokens are kept, and as many of systems' messages, which are in memory once for all who have them.
    With a `window` every request has a cache of the last `window` tokens and the system's messages, or the first SINKS
    tokens where there are none, or more of them than `window` or than it leaves of the model's context: there is no
    context length then but the one that is given, and with `reuse` a few such caches are kept for prompts that go on
    from all of one.

    A cancelled request stops at its next token, or before the next piece of its prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "swiftkv",
        max_batch: int = 8,
        max_queue: int = 64,
        context_length: int | None = None,
        reuse: bool = True,
        window: int | None = None,
        thread: OneThread | None = None,
    ):
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; it must be 1 or more")
        if max_queue < 0:
            raise UserError(f"max_queue is {max_queue}; it must be 0 or more")
        own = _own_context_length(model)
        if window is None and not 1 <= (own if context_length is None else context_length) <= own:
            raise UserError(f"context_length is {context_length}; this model allows 1 to {own}")
        if window is not None and not 1 <= window <= own:
            raise UserError(f"window is {window}; this model allows 1 to {own}")
        self._model = model
        self._info = ModelInfo(
            name=name,
            context_length=own if window is None and context_length is None else context_length,
            vocab_size=int(model.get_input_embeddings().num_embeddings),
            default_temperature=default_temperature(model.generation_config),
            default_top_p=1.0 if model.generation_config.top_p is None else float(model.generation_config.top_p),
        )
        self._kept: KeptCaches | KeptStreams
        # How many tokens of a system's messages are a prefix. A stream keeps them for ever, and memory has an end.
        self._shared_system: range
        if window is None:
            self._kept = KeptCaches(model.config, (context_length or own) if reuse else 0)
            self._shared_system = range(LEAST_SHARED, own) if reuse else range(0)
        else:
            use_exact_positions(model)
            self._kept = KeptStreams(MAX_ENTRIES if reuse else 0)
            self._shared_system = range(SINKS, min(window, own - window) + 1)
        self._window = window or 0
        self._shares_beginnings = reuse and window is None
        self._prefixes = KeptPrefixes((context_length or own) if reuse else 0)
        self._tokenizer = tokenizer
        # A fast tokenizer must not encode and decode in two threads.
        self._decoding_tokenizer = copy.deepcopy(tokenizer)
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
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
        job = Job(request)
        with self._changed:
            if not self.accepting:
                raise EngineStoppingError
            if len(self._waiting) + len(self._running) >= self._max_batch + self._max_queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify_all()
        return JobStream(job, self._cancel)

    def stats(self) -> EngineStats:
        with self._changed:
            return replace(self._stats, running=len(self._running), waiting=len(self._waiting))

    def begin_drain(self) -> None:
        with self._changed:
            self._draining = True

    def wait_idle(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._running, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """End every request with EngineStoppingError and wait up to `timeout` seconds for the thread."""
        with self._changed:
            self._draining = self._closed = True
            unfinished = [*self._waiting, *self._running]
            self._count(cancelled=len(self._waiting))
            self._waiting.clear()
            for job in unfinished:
                job.cancelled = True
                job.emit(EngineStoppingError())
            self._changed.notify_all()
        self._thread.join(timeout)

    def _cancel(self, job: Job) -> None:
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
        answers: dict[Job, Answer] = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed:
                    return
                places = self._max_batch - len(self._running)
                new = [self._waiting.popleft() for _ in range(min(places, len(self._waiting)))]
                self._running += new
                self._count(prompt_tokens=sum(len(job.request.prompt_token_ids) for job in new))
            speaking = [job for job, answer in answers.items() if answer.generated and not answer.done]
            unread = [
                job for job in self._running if not (job.cancelled or (job in answers and answers[job].generated))
            ]
            logits: dict[Job, torch.Tensor] = {}
            with self._failing(unread[:1]):
                for job in unread[:1]:
                    if job not in answers:  # what is kept by now may be the one's before it
                        answers[job] = self._begin(job, answers.values())
                    logits |= self._read(job, answers[job], SHORT_PIECE if speaking else PIECE)
            with self._failing(speaking):
                logits |= self._step({job: answers[job] for job in speaking})
            for job, its_logits in logits.items():
                with self._failing([job]):
                    answers[job].take(its_logits)
            for job in list(self._running):
                self._end(job, answers)

    @contextlib.contextmanager
    def _failing(self, jobs: Sequence[Job]) -> Iterator[None]:
        """What goes wrong in it is the end of these jobs, and of nothing else."""
        try:
            yield
        except Exception:
            logger.exception("generation failed")
            self._kept.clear()  # whose memory the next one may need
            self._prefixes.clear()
            for job in jobs:
                job.failed = True

    def _begin(self, job: Job, others: Collection[Answer]) -> Answer:
        """From what is kept, or from what the `others`, which are under way, have in common with it."""
        prompt, system_tokens = job.request.prompt_token_ids, job.request.system_tokens
        if system_tokens not in self._shared_system or system_tokens >= len(prompt):
            system_tokens = 0
        cache: Any = self._kept.take(prompt)
        known = 0 if cache is None else cache.get_seq_length()
        if self._shares_beginnings and others:
            length, nearest = max(((other.shared_tokens(prompt), other) for other in others), key=itemgetter(0))
            if length > known:
                cache, known = nearest.cache.beginning(prompt, length), length
        if cache is not None and known >= system_tokens:
            return Answer(job, self._model, self._decoding_tokenizer, cache, known)
        prefix = self._prefixes.take(prompt[:system_tokens]) if system_tokens else None
        if prefix is not None or not system_tokens:
            cache = self._new_cache(prompt, prefix)
            return Answer(job, self._model, self._decoding_tokenizer, cache, system_tokens)
        if not isinstance(cache, GrowingCache):  # a stream, which cannot become a prefix
            cache, known = GrowingCache(self._model.config), 0
        return Answer(job, self._model, self._decoding_tokenizer, cache, known, unread_prefix=system_tokens)

    def _new_cache(self, prompt: Sequence[int], prefix: SharedPrefix | None) -> Any:
        """For a prompt that begins with `prefix`."""
        if not self._window:
            return GrowingCache(self._model.config, prefix)
        share = True if prefix is not None and len(prefix) >= LEAST_SHARED else None
        return new_stream(self._model.config, self._window, prompt, prefix, share)

    @torch.no_grad()
    def _read(self, job: Job, answer: Answer, size: int) -> dict[Job, torch.Tensor]:
        """Run the next `size` tokens of a prompt; the logits [1, V] behind its last one."""
        begin, last = answer.cache.get_seq_length(), answer.tokens.shape[1]
        end = min(begin + size, answer.unread_prefix or last)
        piece = answer.tokens[:, begin:end]
        logits = self._model(input_ids=piece, past_key_values=answer.cache, use_cache=True, logits_to_keep=1).logits
        if end == answer.unread_prefix:
            prompt = job.request.prompt_token_ids
            prefix = answer.cache.as_prefix(prompt, end)
            self._prefixes.keep(prefix)
            answer.cache, answer.unread_prefix = self._new_cache(prompt, prefix), 0
        return {job: logits[:, -1]} if end == last else {}

    @torch.no_grad()
    def _step(self, answers: dict[Job, Answer]) -> dict[Job, torch.Tensor]:
        """The logits [1, V] behind each answer's last token."""
        if not answers:
            return {}
        caches = [answer.cache for answer in answers.values()]
        last = torch.cat([answer.tokens[:, -1:] for answer in answers.values()])
        options: dict[str, Any] = {"past_key_values": caches[0]}
        if len(caches) > 1:
            positions = torch.tensor([[cache.get_seq_length()] for cache in caches], device=self._model.device)
            options = {"past_key_values": RowCaches(self._model.config, caches), "position_ids": positions}
        logits = self._model(input_ids=last, use_cache=True, logits_to_keep=1, **options).logits
        return dict(zip(answers, logits[:, -1].split(1), strict=True))

    def _end(self, job: Job, answers: dict[Job, Answer]) -> None:
        """Give the place of a job that is done to the next one."""
        answer = answers.get(job)
        if not (job.failed or job.cancelled or (answer is not None and answer.done)):
            return
        answers.pop(job, None)
        if answer is not None and not (job.failed or answer.unread_prefix):
            self._kept.keep(answer.tokens[0].tolist(), answer.cache)
        finished = int(answer is not None and answer.finish_reason is not None and not job.failed)
        with self._changed:
            self._running.remove(job)
            if answer is not None:
                self._count(generated_tokens=answer.generated, cached_tokens=answer.cached_tokens)
            self._count(finished=finished, failed=int(job.failed), cancelled=int(not (finished or job.failed)))
            self._changed.notify_all()
        if job.failed:
            job.emit(GenerationError())


def _own_context_length(model: Any) -> int:
    """Raises UserError if the model states none."""
    own = getattr(model.config, "max_position_embeddings", None)
    if not own:
        raise UserError("the model's config.json has no max_position_embeddings, so its context length is unknown")
    return int(own)
