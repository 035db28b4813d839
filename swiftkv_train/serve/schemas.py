"""What a client may ask: the OpenAI chat completions and completions, as far as they are supported.

A parameter that would change the answer and is not supported is refused by name; its neutral value is accepted.
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


def only(*neutral: Any, because: str = "it is not supported") -> AfterValidator:
    """Accept null and the values that ask for nothing; refuse any other."""

    def check(value: Any) -> Any:
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in (None, *neutral)):
            return value
        raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": f"{because}; leave it out"})

    return AfterValidator(check)


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content_part", "a text part is {{'type': 'text', 'text': a string}}")
    return "\n".join(part["text"] for part in value)


def _text_or_token_ids(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return value
    raise PydanticCustomError("prompt_type", "must be one string or one non-empty list of token ids")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class Message(_Request):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text)]
    # What an assistant message got from a server may carry when it is sent back.
    name: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None


class GenerationParameters(_Request):
    """What both routes take."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            BeforeValidator(_stop_list),
            Field(max_length=MAX_STOP_STRINGS),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    n: Annotated[Any, only(1, because="one completion per request is what is supported")] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None
    prompt_logprobs: Annotated[
        Any, only(because="the prompt skips the upper layers, so its log-probabilities do not exist")
    ] = None


class ChatCompletionRequest(GenerationParameters):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    logprobs: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only()] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only()] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    response_format: Annotated[Any, only({"type": "text"}, because="only text is supported")] = None
    modalities: Annotated[Any, only(["text"], because="only text is supported")] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    metadata: Annotated[Any, only({})] = None


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
        near = difflib.get_close_matches(param, schema.model_fields, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return ApiError(400, f"Unknown parameter '{param}'{hint}", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(400, f"Missing parameter '{param}'", code="missing_required_parameter", param=param)
    code = kind if kind == "unsupported_parameter" else "invalid_value"
    return ApiError(400, f"Parameter '{param}': {message}", code=code, param=param)
