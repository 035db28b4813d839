"""Talk to a checkpoint in the terminal: one answer, or a conversation that keeps its K/V between turns."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from swiftkv_models import SharedPrefix, SinkWindowCache, use_exact_positions
from swiftkv_train.data.tokenize import check_vocabulary
from swiftkv_train.errors import UserError
from swiftkv_train.generation_settings import GREEDY_BELOW
from swiftkv_train.loading import (
    Tokenizer,
    load_config,
    load_for_inference,
    load_tokenizer,
    one_line,
    pad_token_id,
)

SINKS = 4


def chat(
    path: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    window: int | None = None,
) -> None:
    """Answer `prompt`, or read messages from the terminal until its end; answers stream to standard output.

    With `window` the cache keeps the system message, or else the first tokens, and that many last tokens: the
    conversation may go on for ever, and what drops out of the window is forgotten.

    Raises:
        UserError: no such model, no chat template or one that refuses the messages, an empty prompt or one that is not
            UTF-8, a conversation or a window longer than the model's context.
    """
    from transformers import DynamicCache, TextStreamer

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
    model: Any = load_for_inference(path)
    limit = model.config.max_position_embeddings
    if window is not None and window > limit:
        raise UserError(f"--window {window} is longer than the context of {path}, {limit}")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    if window is not None and model.config.model_type == "llama":
        use_exact_positions(model)  # which SwiftKV models have of themselves
    prefix = None
    if window is not None and system:
        _prompt_ids(tokenizer, [*messages, {"role": "user", "content": "0"}], path)  # a template's errors as one line
        try:
            prefix = SharedPrefix.from_messages(model, tokenizer, messages)
        except ValueError as error:
            raise UserError(f"{path}: --system cannot go with --window: {one_line(error)}") from None

    def new_cache(ids: torch.Tensor) -> Any:
        if window is None:
            return DynamicCache(config=model.config)
        pinned: Any = {"prefixes": prefix, "input_ids": ids} if prefix is not None and len(prefix) >= SINKS else {}
        return SinkWindowCache(model.config, window=window, attention_sinks=SINKS, **pinned)

    cache: Any = None
    known = torch.empty(0, dtype=torch.long)
    while True:
        message = prompt if prompt is not None else _read()
        if message is None:
            return
        if message.strip():
            _check_text(message, "the message")
            messages.append({"role": "user", "content": message})
            ids = _prompt_ids(tokenizer, messages, path)
            if window is None and ids.shape[1] + max_new_tokens > limit:
                raise UserError(
                    f"{ids.shape[1]} tokens of conversation and {max_new_tokens} new ones exceed the context of "
                    f"{limit}; --window lets it go on"
                )
            # What the cache holds is kept only as far as the new prompt starts with it.
            if cache is None or len(known) > ids.shape[1] or not torch.equal(ids[0, : len(known)], known):
                cache, known = new_cache(ids), known[:0]
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature >= GREEDY_BELOW:
                sampling = {"do_sample": True, "temperature": temperature}
            output = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=pad_token_id(tokenizer),
                **sampling,
            )
            known = output[0, : cache.get_seq_length()].cpu()
            reply = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
            messages.append({"role": "assistant", "content": reply})
        if prompt is not None:
            return


def _prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, str]], path: str) -> torch.Tensor:
    """The conversation [1, T], open for the model's turn."""
    try:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program, which may fail in any way
        raise UserError(f"{path}: its chat template refuses the conversation: {one_line(error)}") from None
    if not inputs["input_ids"].numel():
        raise UserError(f"{path}: its chat template makes nothing of the conversation")
    return inputs["input_ids"]


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that Python keeps as surrogates
        raise _not_utf8(what) from None


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise _not_utf8("the message") from None


def _not_utf8(what: str) -> UserError:
    return UserError(f"{what} is not UTF-8 text; write it in the terminal's encoding, or set that to UTF-8")
