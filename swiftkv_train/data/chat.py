"""Chats to tokens with exact assistant masks.

The reply of message i is what the chat template adds between "messages[:i] + generation prompt" and "messages[:i + 1]".
It is found by where it stands, never by searching for its text, so a reply repeated elsewhere cannot be mis-masked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from swiftkv_train.data.documents import BadRow, ChatDocument, Messages
from swiftkv_train.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Some templates (Llama 3.2) print today's date, so the tokens would change every day; they honour `date_string`.
DATE_STRING = "26 Jul 2024"

Span = tuple[int, int]


def check_can_chat(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises UserError when the tokenizer has no chat template, or cannot say where its tokens stand in the text."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"{where} is a chat, but the tokenizer has no chat template; "
            "use an instruction-tuned model's tokenizer or put a chat_template.jinja beside it"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{where} is a chat, which needs a tokenizer with offsets (a tokenizer.json beside the model)")


def render_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[Span]]:
    """The text of a chat and the character spans of its replies.

    A span holds the reply and its end-of-turn token, but not the whitespace the template puts after it.

    Raises:
        BadRow: the template refuses this chat.
        UserError: the template rewrites earlier turns, so that a reply's place cannot be told.
    """
    text = _render(messages, tokenizer, generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, generation_prompt=True)
        after = text if i + 1 == len(messages) else _render(messages[: i + 1], tokenizer, generation_prompt=False)
        if not after.startswith(before) or not text.startswith(after):
            raise UserError(
                f"{where}: the tokenizer's chat template rewrites earlier turns (message {i} does not continue the "
                "prompt it answers), so assistant tokens cannot be told apart; use a template that only appends"
            )
        reply = after[len(before) :]
        # Whitespace at the end is the template's, unless it is still part of what the message says.
        said = len(message["content"]) if reply.startswith(message["content"]) else 0
        end = len(before) + max(len(reply.rstrip()), said)
        spans.append((len(before), end))
    return text, spans


def tokenize_chats(
    chats: list[ChatDocument], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]] | BadRow]:
    """For each chat its token ids [n] and which of them are the assistant's [n], or why it cannot be used.

    Raises:
        UserError: no chat template, or one that rewrites earlier turns.
    """
    if not chats:
        return []
    check_can_chat(tokenizer, chats[0].location)
    rendered: list[tuple[str, list[Span]] | BadRow] = []
    for chat in chats:
        try:
            rendered.append(render_chat(chat.messages, tokenizer, chat.location))
        except BadRow as reason:
            rendered.append(reason)
    texts = [item[0] for item in rendered if not isinstance(item, BadRow)]
    if not texts:
        return [item for item in rendered if isinstance(item, BadRow)]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,  # The template has written them.
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encodings = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    results: list[tuple[NDArray[np.int64], NDArray[np.bool_]] | BadRow] = []
    for item in rendered:
        if isinstance(item, BadRow):
            results.append(item)
            continue
        ids, offsets = next(encodings)
        targets = tokens_in_spans(np.asarray(offsets, dtype=np.int64).reshape(-1, 2), item[1])
        results.append(
            (np.asarray(ids, dtype=np.int64), targets)
            if targets.any()
            else BadRow("the chat template renders no assistant text")
        )
    return results


def tokens_in_spans(offsets: NDArray[np.int64], spans: list[Span]) -> NDArray[np.bool_]:
    """Which tokens overlap one of the character spans: offsets [n, 2] to bool [n]."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    # With `trim_offsets` (Llama 3) a token of whitespace is reported as empty, at its end: it stands before that place.
    starts = np.where(starts == ends, ends - 1, starts)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=DATE_STRING
        )
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    assert isinstance(text, str)
    return text
