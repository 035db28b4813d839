"""Talk to a checkpoint in the terminal: one answer, or a conversation that keeps its K/V between turns."""

from __future__ import annotations

import sys
from typing import Any

import torch

from swiftkv_models import SharedPrefix, SinkWindowCache, use_exact_positions
from swiftkv_train.errors import UserError
from swiftkv_train.loading import load_for_inference, load_tokenizer, one_line, pad_token_id

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
        UserError: no such model, no chat template or one that refuses the messages, an empty prompt, or a conversation
            longer than the model's context.
    """
    from jinja2 import TemplateError
    from transformers import DynamicCache, TextStreamer

    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty; leave it out to talk in the terminal")
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template:
        raise UserError(f"{path} has no chat template; it is not a chat model")
    model: Any = load_for_inference(path)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    if window is not None and model.config.model_type == "llama":
        use_exact_positions(model)  # which SwiftKV models have of themselves
    prefix = None
    if window is not None and system:
        prefix = SharedPrefix.from_messages(model, tokenizer, messages)

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
            messages.append({"role": "user", "content": message})
            inputs: Any
            try:
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except TemplateError as error:
                raise UserError(f"{path}: its chat template refuses the conversation: {one_line(error)}") from None
            ids = inputs["input_ids"]
            limit = model.config.max_position_embeddings
            if window is None and ids.shape[1] + max_new_tokens > limit:
                raise UserError(
                    f"{ids.shape[1]} tokens of conversation and {max_new_tokens} new ones exceed the context of "
                    f"{limit}; --window lets it go on"
                )
            # What the cache holds is kept only as far as the new prompt starts with it.
            if cache is None or len(known) > ids.shape[1] or not torch.equal(ids[0, : len(known)], known):
                cache, known = new_cache(ids), known[:0]
            sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
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


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
