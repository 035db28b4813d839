"""What a client may ask: the OpenAI chat completions and completions, as far as they are supported.

A parameter that would change the answer and is not supported is refused by name; its neutral value is accepted, as is
any value of those that cannot change it.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from swiftkv_train.serve.api_error import ApiError

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1024
# What other servers call it, where that is not near enough in spelling.
OTHER_NAMES = {"n_predict": "max_tokens", "num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}


def only(*neutral: Any, because: str = "it is not supported") -> AfterValidator:
    """Accept null and the values that ask for nothing; refuse any other."""

    def check(value: Any) -> Any:
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in (None, *neutral)):
            return value
        raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": f"{because}; leave it out"})

    return AfterValidator(check)


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _absent_if_minus_one(value: Any) -> Any:
    """A limit of -1 is how some clients say that there is none."""
    return None if type(value) is int and value == -1 else value


def _joined_text(value: Any) -> Any:
    """A message's content as one string; text parts are joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise PydanticCustomError(
                "unsupported_parameter", "only text parts are supported, not {kind}", {"kind": repr(kind)[:40]}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_part", "a text part needs a 'text' that is a string")
    return "\n".join(part["text"] for part in value)


def _text_or_token_ids(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return value
    raise PydanticCustomError("prompt_type", "must be one prompt: a string or a non-empty list of token ids")


def _system_if_developer(value: Any) -> Any:
    return "system" if value == "developer" else value


MaxTokens = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_absent_if_minus_one)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class Message(_Request):
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_system_if_developer)]
    content: Annotated[str, BeforeValidator(_joined_text)]
    # What an assistant message got from a server may carry when it is sent back; its reasoning is not shown again.
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    # No part of a prompt.
    name: Any = None
    cache_control: Any = None


class GenerationParameters(_Request):
    """What both routes take."""

    model: str | None = None
    max_tokens: MaxTokens = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)  # -1 and 0: all tokens
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # beyond, logits overflow
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            BeforeValidator(_stop_list),
            Field(max_length=MAX_STOP_STRINGS),
        ]
        | None
    ) = None
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # What cannot change an answer.
    user: Any = None
    safety_identifier: Any = None
    metadata: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    n: Annotated[Any, only(1, because="one completion per request is what is supported")] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None
    prompt_logprobs: Annotated[Any, only()] = None
    min_tokens: Annotated[Any, only(0)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    options: Annotated[Any, only({})] = None


class ChatCompletionRequest(GenerationParameters):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: MaxTokens = None

    logprobs: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only()] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Any = None  # there are no tools
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    response_format: Annotated[Any, only({"type": "text"}, because="only text is supported")] = None
    modalities: Annotated[Any, only(["text"], because="only text is supported")] = None
    audio: Annotated[Any, only()] = None
    prediction: Any = None  # it would only make the answer come sooner
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    store: Annotated[Any, only(False)] = None


class CompletionRequest(GenerationParameters):
    prompt: Annotated[str | list[int], BeforeValidator(_text_or_token_ids)]

    logprobs: Annotated[Any, only()] = None
    echo: Annotated[Any, only(False)] = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only()] = None


def refusal(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """The first thing that is wrong with a body, as the answer to it."""
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message = detail["type"], detail["msg"]
    if kind == "json_invalid":
        return ApiError(
            400, f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if not detail["loc"]:
        return ApiError(400, "The body must be a JSON object", code="invalid_type")
    param = str(detail["loc"][0]) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"][1:]
    )
    if kind == "extra_forbidden":
        near = _nearest(detail["loc"], schema)
        hint = f"; did you mean '{near}'?" if near else ""
        return ApiError(400, f"Unknown parameter '{param}'{hint}", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(400, f"Missing parameter '{param}'", code="missing_required_parameter", param=param)
    code = kind if kind == "unsupported_parameter" else "invalid_value"
    return ApiError(400, f"Parameter '{param}': {message}", code=code, param=param)


def _nearest(path: tuple[int | str, ...], schema: type[BaseModel]) -> str | None:
    """The known name that is most like the last one of `path`, among those of its own place."""
    name = str(path[-1])
    if len(path) == 1 and name in OTHER_NAMES:
        return OTHER_NAMES[name]
    inner: dict[int | str, type[BaseModel]] = {"messages": Message, "stream_options": StreamOptions}
    known = (schema if len(path) == 1 else inner.get(path[0], schema)).model_fields
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
