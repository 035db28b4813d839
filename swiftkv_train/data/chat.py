"""Chats to tokens with exact assistant masks.

The reply of message i is what the chat template adds between "messages[:i] + generation prompt" and "messages[:i + 1]".
It is found by where it stands, never by searching for its text, so a reply repeated elsewhere cannot be mis-masked.
"""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate, chain
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from swiftkv_train.data.documents import BadRow, ChatDocument, Messages
from swiftkv_train.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Some templates (Llama 3.2) print today's date, so the tokens would change every day; they honour `date_string`.
DATE_STRING = "26 Jul 2024"

PLACEHOLDER = "\ue000"  # for private use: no template writes it or strips it
MAX_LAYOUTS = 4096

Rendered: TypeAlias = "tuple[str, list[tuple[int, int]]]"
"""A chat as text, and where its replies stand in it."""


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


class ChatRenderer:
    """Chats as text with the character spans of their replies, by one rendering a chat.

    Where replies stand takes two renderings a reply to find. That depends on the roles alone, as a rule, so it is found
    once for every sequence of roles, on contents that are all `PLACEHOLDER`, and moved to what a chat says. A chat that
    the template lays out in another way (because of what it says) is rendered piece by piece itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._layouts: dict[tuple[str, ...], Rendered | None] = {}

    def render(self, messages: Messages, where: str) -> Rendered:
        """The text of a chat and the character spans of its replies.

        A span holds the reply and its end-of-turn token, but not the whitespace the template puts after it.

        Raises:
            BadRow: the template refuses this chat.
            UserError: the template rewrites earlier turns, so that a reply's place cannot be told.
        """
        layout = self._layout(tuple(message["role"] for message in messages))
        if layout is not None:
            text = render(messages, self.tokenizer, generation_prompt=False)
            contents = [message["content"] for message in messages]
            for said in (contents, [content.strip() for content in contents]):  # some templates strip
                filled = _fill(layout, said)
                if filled[0] == text:
                    return filled
        return _render_piece_by_piece(messages, self.tokenizer, where)

    def _layout(self, roles: tuple[str, ...]) -> Rendered | None:
        """A chat of placeholders with these roles; None where the template does not only append to it."""
        if roles in self._layouts:
            return self._layouts[roles]
        if len(self._layouts) >= MAX_LAYOUTS:
            self._layouts.clear()
        messages = [{"role": role, "content": PLACEHOLDER} for role in roles]
        longer = next((item for known, item in self._layouts.items() if item and known[: len(roles)] == roles), None)
        found: Rendered | None
        try:
            text = render(messages, self.tokenizer, generation_prompt=False)
            if longer is not None and longer[0].startswith(text):
                found = text, longer[1][: roles.count("assistant")]
            else:
                found = _render_piece_by_piece(messages, self.tokenizer, "")
        except (BadRow, UserError):
            found = None
        self._layouts[roles] = found
        return found


def _fill(layout: Rendered, contents: list[str]) -> Rendered:
    """A rendering of placeholders with `contents` in their places; ("", []) where it has not as many places."""
    text, spans = layout
    literals = text.split(PLACEHOLDER)
    if len(literals) != len(contents) + 1:
        return "", []
    filled = "".join(chain.from_iterable(zip(literals, [*contents, ""], strict=True)))
    ends = list(accumulate(len(literal) + len(PLACEHOLDER) for literal in literals[:-1]))  # of placeholders in `text`
    shifts = list(accumulate((len(content) - len(PLACEHOLDER) for content in contents), initial=0))  # of what follows
    return filled, [(start + shifts[bisect(ends, start)], end + shifts[bisect(ends, end)]) for start, end in spans]


def _render_piece_by_piece(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    text = render(messages, tokenizer, generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:i], tokenizer, generation_prompt=True)
        after = text if i + 1 == len(messages) else render(messages[: i + 1], tokenizer, generation_prompt=False)
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
    chats: list[ChatDocument], renderer: ChatRenderer
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]] | BadRow]:
    """For each chat its token ids [n] and which of them are the assistant's [n], or why it cannot be used.

    Raises:
        UserError: no chat template, or one that rewrites earlier turns.
    """
    if not chats:
        return []
    tokenizer = renderer.tokenizer
    check_can_chat(tokenizer, chats[0].location)
    rendered: list[Rendered | BadRow] = []
    for chat in chats:
        try:
            rendered.append(renderer.render(chat.messages, chat.location))
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


def tokens_in_spans(offsets: NDArray[np.int64], spans: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens overlap one of the character spans: offsets [n, 2] to bool [n]."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    # With `trim_offsets` (Llama 3) a token of whitespace is reported as empty, at its end: it stands before that place.
    starts = np.where(starts == ends, ends - 1, starts)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool) -> str:
    """Messages through the chat template. Raises BadRow when the template refuses them."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=DATE_STRING
        )
    except Exception as error:  # a template is a program, which may fail in any way
        raise BadRow(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    assert isinstance(text, str)
    return text
