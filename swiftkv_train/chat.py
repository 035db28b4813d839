"""Talk to a checkpoint in the terminal: one answer, or a conversation that keeps its K/V between turns."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from swiftkv_models import SharedPrefix, SinkWindowCache, use_exact_positions
from swiftkv_models.shared_prefix import beginning_of_chat
from swiftkv_train.data.tokenize import check_vocabulary
from swiftkv_train.errors import UserError
from swiftkv_train.generation_settings import decoding_config
from swiftkv_train.kept_caches import (
    SINKS,
    KeptCaches,
    KeptPrefixes,
    KeptStreams,
    generate,
    new_stream,
    shared_length,
)
from swiftkv_train.loading import Model, Tokenizer, load_config, load_for_inference, load_tokenizer, one_line


def chat(
    path: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    window: int | None = None,
    dtype: str = "auto",
) -> None:
    """Answer `prompt`, or read messages from the terminal until its end; answers stream to standard output.

    With `window` the cache keeps the system message, or else the first tokens, and that many last tokens: the
    conversation may go on for ever, and what drops out of the window is forgotten. In a conversation Ctrl-C ends the
    answer that is being written, and a terminal is told of messages that do not fit any more.

    Raises:
        UserError: no such model, no chat template or one that refuses the messages, an empty prompt or one that is not
            UTF-8, a window longer than the model's context; outside a terminal a conversation that fills the context.
    """
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty; leave it out to talk in the terminal")
    for option, text in (("--prompt", prompt), ("--system", system)):
        _check_text(text or "", option)
    if not math.isfinite(temperature):
        raise UserError(f"--temperature is {temperature}; give a number, 0 or more")
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template:
        raise UserError(f"{path} has no chat template; it is not a chat model")
    check_vocabulary(tokenizer, config.vocab_size, path)
    model: Any = load_for_inference(path, dtype=dtype)
    limit = model.config.max_position_embeddings
    if window is not None and window > limit:
        raise UserError(f"--window {window} is longer than the context of {path}, {limit}")
    talk = _Conversation(
        model, tokenizer, path, system=system, max_new_tokens=max_new_tokens, temperature=temperature, window=window
    )
    if prompt is not None:
        talk.answer(prompt, whole=True)
        return
    while (message := _read()) is not None:
        if not message.strip():
            continue
        _check_text(message, "the message")
        try:
            talk.answer(message)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)


class _Conversation:
    """The messages so far and the K/V of them. For the options see `chat`."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        path: str,
        *,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        window: int | None,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._path = path
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._limit = None if window is not None else model.config.max_position_embeddings
        self._streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._caches: Any
        if window is None:
            self._caches = KeptCaches(model.config, model.config.max_position_embeddings, max_entries=1)
        else:
            self._caches = KeptStreams(max_entries=1)
            self._new_stream = self._window_cache(window)

    def answer(self, message: str, whole: bool = False) -> None:
        """Write the answer to `message` to standard output; it is shorter where the context ends, unless `whole`.

        Raises:
            UserError: the template refuses the message or the context has no room for it. It is then forgotten.
        """
        self._messages.append({"role": "user", "content": message})
        try:
            ids = _prompt_ids(self._tokenizer, self._messages, self._path)
            room = self._room(len(ids), whole)
        except UserError:
            del self._messages[-1]
            raise
        config = decoding_config(
            self._model.generation_config, self._tokenizer, max_new_tokens=room, temperature=self._temperature
        )
        cache = self._caches.take(ids)
        if cache is None:
            cache = self._new_stream(ids)
        with contextlib.nullcontext(lambda: False) if whole else _interruptible() as stopped:
            output = generate(
                self._model,
                ids,
                cache,
                stopped=stopped,
                generation_config=config,
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhen(stopped)]),
            )
            self._caches.keep(output, cache)
            interrupted = stopped()
        new = output[len(ids) :]
        if interrupted:
            _tell("interrupted")
        elif len(new) == room and new[-1] not in (config.eos_token_id or []):
            _tell(f"cut after {room} tokens; {self._way_on(room)}")
        if not new:  # interrupted before its first token: as if nothing had been asked
            del self._messages[-1]
            return
        text = str(self._tokenizer.decode(new, skip_special_tokens=True))
        self._messages.append({"role": "assistant", "content": text})

    def _room(self, prompt_tokens: int, whole: bool) -> int:
        """How many tokens the answer may have."""
        asked = self._max_new_tokens
        if self._limit is None or prompt_tokens + asked <= self._limit:
            return asked
        if whole or prompt_tokens >= self._limit:
            new = f"{asked} new ones" if whole else "an answer"
            raise UserError(
                f"{prompt_tokens} tokens of conversation and {new} exceed the context of {self._limit}; "
                "--window lets it go on"
            )
        return self._limit - prompt_tokens

    def _way_on(self, room: int) -> str:
        return "--max-new-tokens allows more" if room == self._max_new_tokens else "--window lets it go on"

    def _window_cache(self, window: int) -> Callable[[Sequence[int]], SinkWindowCache]:
        """What makes a cache for a prompt: with the system message, or else the first tokens, kept for ever.

        Raises:
            UserError: the template has no prefix for the system message, or it leaves no room for the window.
        """
        model, messages, limit = self._model, self._messages, self._model.config.max_position_embeddings
        use_exact_positions(model)
        beginning: list[int] = []
        if messages:
            # A template's errors as one line.
            _prompt_ids(self._tokenizer, [*messages, {"role": "user", "content": "0"}], self._path)
            try:
                beginning = beginning_of_chat(self._tokenizer, messages)
            except ValueError as error:
                raise UserError(f"{self._path}: --system cannot go with --window: {one_line(error)}") from None
            if len(beginning) + window > limit:
                raise UserError(
                    f"--system has {len(beginning)} tokens, which with --window {window} is longer than the context of "
                    f"{self._path}, {limit}"
                )
        prefixes = KeptPrefixes(limit, max_entries=1)

        def new(ids: Sequence[int]) -> SinkWindowCache:
            system = ids[: shared_length(beginning, ids)]
            prefix = None
            if SINKS <= len(system) < len(ids):
                prefix = prefixes.take(system)
                if prefix is None:
                    prefix = SharedPrefix.from_ids(model, system)
                    prefixes.keep(prefix)
            return new_stream(model.config, window, ids, prefix)

        return new


class _StopWhen(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self._stopped = stopped

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stopped(), dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is only noted; gives what says whether it came. A second one interrupts as ever."""
    came = False

    def note(_number: int, _frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if threading.current_thread() is not threading.main_thread():  # signals are not for others
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def _prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, str]], path: str) -> list[int]:
    """The conversation, open for the model's turn."""
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program, which may fail in any way
        raise UserError(f"{path}: its chat template refuses the conversation: {one_line(error)}") from None
    if not ids:
        raise UserError(f"{path}: its chat template makes nothing of the conversation")
    return ids


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that Python keeps as surrogates
        raise _not_utf8(what) from None


def _tell(text: str) -> None:
    """Something about an answer, for people: in a terminal only."""
    if sys.stderr.isatty():
        print(f"({text})", file=sys.stderr, flush=True)


def _read() -> str | None:
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401  (lines can then be edited and recalled)
    try:
        return input("> " if terminal else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise _not_utf8("the message") from None


def _not_utf8(what: str) -> UserError:
    return UserError(f"{what} is not UTF-8 text; write it in the terminal's encoding, or set that to UTF-8")
