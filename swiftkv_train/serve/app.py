"""The routes: an OpenAI-compatible API over an `Engine`.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}   GET /health   GET /metrics

Every answer that is not a success is {"error": {message, type, param, code}}. Leaving early cancels the request.
"""

import asyncio
import hmac
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from swiftkv_train.errors import UserError
from swiftkv_train.serve.api_error import ApiError
from swiftkv_train.serve.contract import (
    Engine,
    EngineStats,
    EngineStoppingError,
    GenerationError,
    GenerationRequest,
    QueueFullError,
    TokenStream,
)
from swiftkv_train.serve.prompts import chat_token_ids, completion_token_ids, generation_request
from swiftkv_train.serve.replies import ChatReply, CompletionReply, Reply, Usage
from swiftkv_train.serve.schemas import ChatCompletionRequest, CompletionRequest, GenerationParameters, refusal

try:
    import anyio.to_thread
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from sse_starlette import EventSourceResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import Receive, Scope, Send
except ImportError as missing:
    raise UserError(f"serving needs {missing.name}: pip install 'swiftkv-train[serve]'") from missing

DEFAULT_MAX_BODY_BYTES = 4 * 2**20
DEFAULT_MAX_OUTPUT_TOKENS = 4096
BODY_TIMEOUT_S = 60.0
RETRY_AFTER_S = 1
# sse-starlette would cut streams as soon as uvicorn is told to exit; `server.py` bounds that time itself.
STREAM_GRACE_S = 3600.0

Schema = TypeVar("Schema", bound=GenerationParameters)


def create_app(
    engine: Engine,
    *,
    api_key: str | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
) -> FastAPI:
    """The application; the caller owns and closes the engine. Raises UserError for a key that no client can send and
    for limits below 1.
    """
    check_api_key(api_key)
    for name, limit in (("max_body_bytes", max_body_bytes), ("max_output_tokens", max_output_tokens)):
        if limit < 1:
            raise UserError(f"{name} is {limit}; it must be 1 or more")

    app = FastAPI(title="swiftkv", openapi_url=None)  # no documentation pages: they load scripts from elsewhere
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_unexpected)  # starlette raises it again afterwards, for uvicorn's log
    keyed = [Depends(_key_check(api_key))]
    tokenizing = anyio.CapacityLimiter(1)  # in a thread, for long prompts, but one at a time
    started = int(time.time())
    info = engine.info

    async def answer(
        request: Request, schema: type[Schema], token_ids_of: Callable[[Schema], list[int]], reply: Reply
    ) -> Response:
        body = await _read_body(request, schema, max_body_bytes)
        _check_model(body.model, info.name)
        if body.stream_options is not None and not body.stream:
            raise ApiError(
                400, "Parameter 'stream_options': needs stream", code="invalid_value", param="stream_options"
            )
        _check_accepting(engine)  # before the work of tokenizing
        token_ids = await anyio.to_thread.run_sync(token_ids_of, body, limiter=tokenizing)
        tokens = _submit(engine, generation_request(body, token_ids, info, max_output_tokens))
        if not body.stream:
            return await _whole_answer(request, tokens, reply, len(token_ids))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _StreamedAnswer(tokens, _sse_data(tokens, reply, len(token_ids), with_usage))

    @app.post("/v1/chat/completions", dependencies=keyed, response_model=None)
    async def chat_completions(request: Request) -> Response:
        def token_ids_of(body: ChatCompletionRequest) -> list[int]:
            return chat_token_ids(engine.tokenizer, body)

        return await answer(request, ChatCompletionRequest, token_ids_of, ChatReply(info.name))

    @app.post("/v1/completions", dependencies=keyed, response_model=None)
    async def completions(request: Request) -> Response:
        def token_ids_of(body: CompletionRequest) -> list[int]:
            return completion_token_ids(engine.tokenizer, body, info)

        return await answer(request, CompletionRequest, token_ids_of, CompletionReply(info.name))

    model_card = {
        "id": info.name,
        "object": "model",
        "created": started,
        "owned_by": "swiftkv",
        "max_model_len": info.context_length,
    }

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{model_id:path}", dependencies=keyed)
    async def model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, info.name)
        return model_card

    @app.get("/health")
    async def health() -> dict[str, str]:
        _check_accepting(engine)
        return {"status": "ok"}

    @app.get("/metrics", dependencies=keyed)
    async def metrics() -> Response:
        return Response(_prometheus(engine.stats()), media_type="text/plain; version=0.0.4")

    return app


def _prometheus(stats: EngineStats) -> str:
    """In the text format of Prometheus: what is in the engine now, and what has been since it started."""
    lines = []
    for name, value in asdict(stats).items():
        now = name in ("running", "waiting")
        what = name if name.endswith("_tokens") else f"requests_{name}"
        metric = f"swiftkv_{what}" if now else f"swiftkv_{what}_total"
        lines += [f"# TYPE {metric} {'gauge' if now else 'counter'}", f"{metric} {value}"]
    return "\n".join(lines) + "\n"


def check_api_key(api_key: str | None) -> None:
    """Raises UserError for a key that no client can send."""
    if api_key is not None and not api_key:
        raise UserError("the API key is empty; give one, or none (then SWIFTKV_API_KEY must not be set either)")
    if api_key is not None and any(character.isspace() or ord(character) < 32 for character in api_key):
        raise UserError("the API key holds white space, which clients do not send as it is; give one without")


def _key_check(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if api_key is None:
            return
        # Headers arrive as latin-1. As bytes, for those of neither side need be UTF-8.
        scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        # compare_digest takes the same time wherever the first difference is.
        right = hmac.compare_digest(given.strip(), os.fsencode(api_key))
        if scheme.lower() != b"bearer" or not right:
            raise ApiError(
                401,
                "Wrong or missing API key; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _check_model(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(
            404, f"The model '{asked}' does not exist; this server has '{name}'", code="model_not_found", param="model"
        )


def _check_accepting(engine: Engine) -> None:
    if not engine.accepting:
        raise _shutting_down()


def _shutting_down() -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, "The server is shutting down", code="shutting_down", headers=headers)


async def _read_body(request: Request, schema: type[Schema], max_bytes: int) -> Schema:
    # Also keeps web pages out: without this check a page the user visits could post here as plain text.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must have Content-Type: application/json", code="unsupported_media_type")
    too_large = ApiError(
        413, f"The body is larger than {max_bytes} bytes", code="body_too_large", headers={"Connection": "close"}
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s", code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The body is incomplete", code="invalid_json") from None
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error, schema) from None


def _submit(engine: Engine, request: GenerationRequest) -> TokenStream:
    try:
        return engine.submit(request)
    except QueueFullError:
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        raise ApiError(
            429, "Too many requests wait already; try again later", code="queue_full", headers=headers
        ) from None
    except EngineStoppingError:
        raise _shutting_down() from None


def _engine_failure(error: Exception) -> ApiError:
    if isinstance(error, EngineStoppingError):
        return _shutting_down()
    return ApiError(500, "The server failed while generating; its log says why", code="internal_error")


def _usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


async def _whole_answer(request: Request, tokens: TokenStream, reply: Reply, prompt_tokens: int) -> Response:
    async def collect() -> BaseModel:
        pieces, count, finish_reason = [], 0, "length"
        async for event in tokens:
            count += 1
            pieces.append(event.text)
            finish_reason = event.finish_reason or finish_reason
        return reply.whole("".join(pieces), finish_reason, _usage(prompt_tokens, count))

    async def client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async with aclosing(tokens):
        work = asyncio.create_task(collect())
        leaving = asyncio.create_task(client_leaves())
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(work.result().model_dump())
        except (EngineStoppingError, GenerationError) as error:
            raise _engine_failure(error) from None
        finally:
            work.cancel()
            leaving.cancel()


async def _sse_data(tokens: TokenStream, reply: Reply, prompt_tokens: int, with_usage: bool) -> AsyncIterator[dict]:
    def data(part: BaseModel) -> dict:
        # As ASCII: some clients break lines at U+2028 or U+0085 too.
        return {"data": json.dumps(part.model_dump())}

    for part in reply.opening():
        yield data(part)
    count = 0
    try:
        async for event in tokens:
            count += 1
            if event.text or event.finish_reason:
                yield data(reply.piece(event.text, event.finish_reason))
        if with_usage:
            yield data(reply.closing_usage(_usage(prompt_tokens, count)))
    except (EngineStoppingError, GenerationError) as error:
        yield {"data": json.dumps(_engine_failure(error).body())}
    yield {"data": "[DONE]"}


class _StreamedAnswer(EventSourceResponse):
    """Server-sent events that close their token stream however they end, before the first event too."""

    def __init__(self, tokens: TokenStream, events: AsyncIterator[dict]):
        super().__init__(events, sep="\n", shutdown_grace_period=STREAM_GRACE_S)
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._tokens.aclose()


async def _answer_api_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_exception(request: Request, error: Any) -> Response:
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    what = HTTPStatus(error.status_code).phrase
    message = f"{what}: {request.method} {request.url.path}"
    answer = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
    return await _answer_api_error(request, answer)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    return await _answer_api_error(request, ApiError(500, "The server failed; its log says why", code="internal_error"))
