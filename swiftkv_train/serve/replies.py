"""What a client gets: whole answers and stream chunks of both routes, in OpenAI's shapes."""

import time
import uuid
from typing import Any, Protocol

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer


class PromptTokensDetails(BaseModel):
    cached_tokens: int  # that did not run again


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int  # every generated token, the one that ends the turn included
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class _WithoutAbsent(BaseModel):
    """Leaves out fields that were never set, and keeps those set to null, as the clients expect."""

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class ChatDelta(_WithoutAbsent):
    role: str = "assistant"
    content: str = ""


class ChatChunkChoice(BaseModel):
    index: int = 0
    delta: ChatDelta
    logprobs: None = None
    finish_reason: str | None = None


class ChatChunk(_WithoutAbsent):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ChatReplyMessage(BaseModel):
    role: str = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: ChatReplyMessage
    logprobs: None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: str | None = None


class Completion(_WithoutAbsent):
    """Also a chunk of a streamed completion."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Reply(Protocol):
    """Words one answer of one route; all its parts carry the same id."""

    def opening(self) -> list[BaseModel]: ...

    def piece(self, text: str, finish_reason: str | None) -> BaseModel: ...

    def closing_usage(self, usage: Usage) -> BaseModel: ...

    def whole(self, text: str, finish_reason: str, usage: Usage) -> BaseModel: ...


class ChatReply:
    def __init__(self, model: str):
        self._head: dict[str, Any] = _head("chatcmpl", model)

    def opening(self) -> list[BaseModel]:
        return [self._chunk([ChatChunkChoice(delta=ChatDelta(role="assistant", content=""))])]

    def piece(self, text: str, finish_reason: str | None) -> BaseModel:
        delta = ChatDelta(content=text) if text else ChatDelta()
        return self._chunk([ChatChunkChoice(delta=delta, finish_reason=finish_reason)])

    def closing_usage(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage=usage)

    def whole(self, text: str, finish_reason: str, usage: Usage) -> BaseModel:
        choice = ChatChoice(message=ChatReplyMessage(content=text), finish_reason=finish_reason)
        return ChatCompletion(object="chat.completion", choices=[choice], usage=usage, **self._head)

    def _chunk(self, choices: list[ChatChunkChoice], **usage: Any) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", choices=choices, **self._head, **usage)


class CompletionReply:
    def __init__(self, model: str):
        self._head: dict[str, Any] = _head("cmpl", model)

    def opening(self) -> list[BaseModel]:
        return []

    def piece(self, text: str, finish_reason: str | None) -> BaseModel:
        return self._completion([CompletionChoice(text=text, finish_reason=finish_reason)])

    def closing_usage(self, usage: Usage) -> BaseModel:
        return self._completion([], usage=usage)

    def whole(self, text: str, finish_reason: str, usage: Usage) -> BaseModel:
        return self._completion([CompletionChoice(text=text, finish_reason=finish_reason)], usage=usage)

    def _completion(self, choices: list[CompletionChoice], **usage: Any) -> Completion:
        return Completion(object="text_completion", choices=choices, **self._head, **usage)


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
