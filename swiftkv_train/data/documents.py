"""Rows to documents: finds the text, the chat or the token ids in one row, or says why the row is of no use.

Columns looked for when the source names none, in this order: `messages` ({role, content}), `conversations` (ShareGPT's
{from, value}), `prompt` + `response` | `completion`, `instruction` (+ `input`) + `output`, `text`, `input_ids`
(+ `loss_mask`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from swiftkv_train.recipe import Source

Messages: TypeAlias = "list[dict[str, str]]"

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
KNOWN_COLUMNS = frozenset(
    ["messages", "conversations", "text", "input_ids", "loss_mask", "input", *(name for pair in PAIRS for name in pair)]
)


class BadRow(Exception):
    """This row cannot be used; the message is the reason. The row is counted and skipped."""


@dataclass(frozen=True)
class TextDocument:
    location: str
    text: str


@dataclass(frozen=True)
class ChatDocument:
    location: str
    messages: Messages


@dataclass(frozen=True)
class TokenDocument:
    """Already tokenised. `targets[t]`: token t is one the model is taught to predict (not shifted)."""

    location: str
    input_ids: list[int]
    targets: list[bool]


Document: TypeAlias = "TextDocument | ChatDocument | TokenDocument"


def document_from_row(row: Any, location: str, source: Source) -> Document:
    """The document in one row.

    Raises:
        BadRow: the row is not a mapping, has no usable column, or what is in the column has the wrong form.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object with named columns, not {_kind_of(row)}")
    if source.field is not None:
        return _from_named_column(row, source.field, location, source.kind)
    if source.kind != "text":
        messages = _find_chat(row)
        if messages is not None:
            return ChatDocument(location, messages)
    if source.kind != "chat" and row.get("text") is not None:
        return TextDocument(location, _checked_text(row["text"], "text"))
    if row.get("input_ids") is not None:
        return _from_input_ids(row, "input_ids", location, source.kind)
    wanted = {"text": "`text`", "chat": "`messages`, `conversations`, `prompt` + `response`"}
    expected = wanted.get(source.kind, "`messages`, `conversations`, `prompt` + `response`, `text` or `input_ids`")
    raise BadRow(f"none of {expected} among the columns {', '.join(sorted(map(str, row))) or '(none)'}")


def _from_named_column(row: dict[str, Any], field: str, location: str, kind: str) -> Document:
    value = row.get(field)
    if value is None:
        raise BadRow(f"column {field!r} is missing")
    if isinstance(value, str):
        if kind == "chat":
            raise BadRow(f"column {field!r} holds text, not a chat")
        return TextDocument(location, _checked_text(value, field))
    if isinstance(value, list) and value and _is_id(value[0]):
        return _from_input_ids(row, field, location, kind)
    if kind == "text":
        raise BadRow(f"column {field!r} must be text, not {_kind_of(value)}")
    return ChatDocument(location, _checked_messages(value, field))


def _find_chat(row: dict[str, Any]) -> Messages | None:
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return _checked_messages(row[column], column)
    for prompt, response in PAIRS:
        if row.get(prompt) is not None and row.get(response) is not None:
            question = _checked_text(row[prompt], prompt)
            context = row.get("input") if prompt == "instruction" else None
            if context:  # Alpaca's rows: the instruction is incomplete without its input.
                question = f"{question}\n\n{_checked_text(context, 'input')}"
            answer = _checked_text(row[response], response)
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return None


def _checked_messages(value: Any, column: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column!r} must be a list of messages, not {_kind_of(value)}")
    messages = []
    for position, message in enumerate(value):
        where = f"{column}[{position}]"
        if not isinstance(message, dict):
            raise BadRow(f"{where} must be an object with a role and a content, not {_kind_of(message)}")
        speaker = message["role"] if message.get("role") is not None else message.get("from")
        content = message["content"] if message.get("content") is not None else message.get("value")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadRow(f"{where} has the unknown role {speaker!r}; known are {', '.join(ROLES)}")
        messages.append({"role": ROLES[speaker], "content": _checked_text(content, f"{where}.content")})
    if messages[0]["role"] == "assistant":
        raise BadRow(f"{column!r} begins with an assistant message: there is nothing it answers")
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow(f"{column!r} has no assistant message")
    return messages


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} must be text, not {_kind_of(value)}")
    if not value.strip():
        raise BadRow(f"{where} is empty")
    try:
        value.encode("utf-8")  # JSON can spell half a surrogate pair, which no tokenizer takes.
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} holds half a surrogate pair at character {error.start}") from None
    return value


def _from_input_ids(row: dict[str, Any], column: str, location: str, kind: str) -> TokenDocument:
    ids = row[column]
    if not isinstance(ids, list) or not ids or not all(map(_is_id, ids)):
        raise BadRow(f"{column!r} must be a list of whole numbers with at least one in it")
    mask = row.get("loss_mask")
    if mask is None and kind == "chat":
        raise BadRow(f"a chat given as {column!r} needs a `loss_mask` that marks the assistant's tokens")
    if mask is None or kind == "text":
        return TokenDocument(location, ids, [True] * len(ids))
    if not isinstance(mask, list) or not all(isinstance(flag, int) and flag in (0, 1) for flag in mask):
        raise BadRow("`loss_mask` must be a list of 0 and 1")
    if len(mask) != len(ids):
        raise BadRow(f"`loss_mask` has {len(mask)} entries for {len(ids)} tokens")
    if not any(mask):
        raise BadRow("`loss_mask` marks no token")
    return TokenDocument(location, ids, [bool(flag) for flag in mask])


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind_of(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
