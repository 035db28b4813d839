"""From a checked request to what the engine takes: token ids, and limits that fit the model's context."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from swiftkv_train.loading import one_line
from swiftkv_train.serve.api_error import ApiError
from swiftkv_train.serve.contract import GenerationRequest, ModelInfo
from swiftkv_train.serve.schemas import ChatCompletionRequest, CompletionRequest, GenerationParameters


class Prompt(NamedTuple):
    token_ids: Sequence[int]
    system_tokens: int = 0  # see GenerationRequest


def chat_prompt(tokenizer: Any, body: ChatCompletionRequest) -> Prompt:
    """The conversation in the model's chat template, open for the assistant's turn. Raises ApiError (400)."""
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "This model has no chat template, so it takes no messages; send a prompt to /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    messages = [{"role": message.role, "content": message.content} for message in body.messages]
    try:
        token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not token_ids:
            raise ValueError("it makes nothing of them")
        return Prompt(token_ids, _system_tokens(tokenizer, messages, token_ids))
    except Exception as error:  # a template is a program, which may fail in any way
        reason = one_line(error)
        raise ApiError(
            400, f"The model's chat template refuses these messages: {reason}", code="invalid_value", param="messages"
        ) from error


def _system_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int]) -> int:
    """How many of the conversation's first tokens are those of the system's messages that it begins with."""
    from swiftkv_models.shared_prefix import beginning_of_chat
    from swiftkv_train.kept_caches import shared_length

    system = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    if not system:
        return 0
    try:
        beginning = beginning_of_chat(tokenizer, system)
    except Exception:  # a template that would refuse them if a user spoke next
        return 0
    # Less than all of it where what comes next makes another token together with its end.
    return shared_length(beginning, token_ids)


def completion_token_ids(tokenizer: Any, body: CompletionRequest, info: ModelInfo) -> list[int]:
    """The prompt's tokens, as the tokenizer begins a text, or as given. Raises ApiError (400)."""
    if isinstance(body.prompt, str):
        token_ids = tokenizer(body.prompt)["input_ids"]
        if not token_ids:
            raise ApiError(400, "Parameter 'prompt': is empty", code="invalid_value", param="prompt")
        return token_ids
    if wrong := [token_id for token_id in body.prompt if not 0 <= token_id < info.vocab_size]:
        raise ApiError(
            400,
            f"Parameter 'prompt': {wrong[0]} is not a token id of this model (0 to {info.vocab_size - 1})",
            code="invalid_value",
            param="prompt",
        )
    return body.prompt


def generation_request(
    body: GenerationParameters, prompt: Prompt, info: ModelInfo, max_output_tokens: int
) -> GenerationRequest:
    """What the engine shall do. Raises ApiError (400) where prompt and answer do not fit the model or the server."""
    token_ids = prompt.token_ids
    param, asked = _asked_max_tokens(body)
    left = sys.maxsize if info.context_length is None else info.context_length - len(token_ids)
    if left < (asked or 1):
        raise ApiError(
            400,
            f"The model's context length is {info.context_length} tokens, but {len(token_ids) + (asked or 1)} are "
            f"needed: {len(token_ids)} for the prompt and {asked or 'at least 1'} for the answer",
            code="context_length_exceeded",
            param=param if asked else "prompt" if isinstance(body, CompletionRequest) else "messages",
        )
    if asked is not None and asked > max_output_tokens:
        raise ApiError(
            400,
            f"Parameter '{param}': is {asked}, this server generates at most {max_output_tokens} tokens per request",
            code="invalid_value",
            param=param,
        )
    return GenerationRequest(
        prompt_token_ids=token_ids,
        max_tokens=min(left, max_output_tokens) if asked is None else asked,
        temperature=info.default_temperature if body.temperature is None else body.temperature,
        top_p=info.default_top_p if body.top_p is None else body.top_p,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        stop=tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
        system_tokens=prompt.system_tokens,
    )


def _asked_max_tokens(body: GenerationParameters) -> tuple[str, int | None]:
    newer = body.max_completion_tokens if isinstance(body, ChatCompletionRequest) else None
    if newer is None:
        return "max_tokens", body.max_tokens
    if body.max_tokens not in (None, newer):
        raise ApiError(
            400,
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {newer}; give one of them",
            code="invalid_value",
            param="max_tokens",
        )
    return "max_completion_tokens", newer
