"""The routes: an OpenAI-compatible API over an `Engine`.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}   GET /health   GET /metrics

Every answer that is not a success is {"error": {message, type, param, code}}. Leaving early cancels the request.
"""

import asyncio
import difflib
import hmac
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel

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
from swiftkv_train.serve.prompts import Prompt, chat_prompt, completion_token_ids, generation_request
from swiftkv_train.serve.replies import ChatReply, CompletionReply, PromptTokensDetails, Reply, Usage
from swiftkv_train.serve.request_log import RequestLog, Served, served
from swiftkv_train.serve.schemas import ChatCompletionRequest, CompletionRequest, GenerationParameters

try:
    import anyio.to_thread
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from sse_starlette import EventSourceResponse
    from sse_starlette.sse import SendTimeoutError
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.types import Receive, Scope, Send
except ImportError as missing:
    raise UserError(f"serving needs {missing.name}: pip install 'swiftkv-train[serve]'") from missing

from swiftkv_train.serve.bodies import read_body

DEFAULT_MAX_BODY_BYTES = 4 * 2**20
DEFAULT_MAX_OUTPUT_TOKENS = 4096
MAX_UNTOKENIZED = 64  # requests whose prompt waits to be tokenized; those that wait for the model come on top
RETRY_AFTER_S = 1
SEND_TIMEOUT_S = 60.0  # for a client that does not read its stream
# sse-starlette would cut streams as soon as uvicorn is told to exit; `server.py` bounds that time itself.
STREAM_GRACE_S = 3600.0

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models")

Schema = TypeVar("Schema", bound=GenerationParameters)


def create_app(
    engine: Engine,
    *,
    api_key: str | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
    cors_origins: Sequence[str] = (),
    log: Callable[[str], None] | None = None,
) -> FastAPI:
    """The application; the caller owns and closes the engine. Web pages of `cors_origins` may use it; `log` is given a
    line about every request. Raises UserError for a key that no client can send, an origin that no browser sends and
    for limits below 1.
    """
    check_api_key(api_key)
    check_origins(cors_origins)
    for name, limit in (("max_body_bytes", max_body_bytes), ("max_output_tokens", max_output_tokens)):
        if limit < 1:
            raise UserError(f"{name} is {limit}; it must be 1 or more")

    app = FastAPI(title="swiftkv", openapi_url=None)  # no documentation pages: they load scripts from elsewhere
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    if log is not None:
        app.add_middleware(RequestLog, write=log)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_unexpected)  # starlette raises it again afterwards, for uvicorn's log
    keyed = [Depends(_key_check(api_key))]
    tokenizing = anyio.CapacityLimiter(1)  # in a thread, for long prompts, but one at a time
    started = int(time.time())
    info = engine.info

    async def answer(
        request: Request, schema: type[Schema], prompt_of: Callable[[Schema], Prompt], reply: Reply
    ) -> Response:
        body = await read_body(request, schema, max_body_bytes)
        _check_model(body.model, info.name)
        if body.stream_options is not None and not body.stream:
            raise ApiError(
                400, "Parameter 'stream_options': needs stream", code="invalid_value", param="stream_options"
            )
        _check_accepting(engine)  # before the work of tokenizing
        if tokenizing.statistics().tasks_waiting >= MAX_UNTOKENIZED:
            raise _queue_full()
        prompt = await anyio.to_thread.run_sync(prompt_of, body, limiter=tokenizing)
        tokens = _submit(engine, generation_request(body, prompt, info, max_output_tokens))
        record = served(request.scope)
        record.prompt_tokens = len(prompt.token_ids)
        if not body.stream:
            return await _whole_answer(request, tokens, reply, record)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _StreamedAnswer(tokens, _sse_data(tokens, reply, record, with_usage))

    @app.post("/v1/chat/completions", dependencies=keyed, response_model=None)
    async def chat_completions(request: Request) -> Response:
        def prompt_of(body: ChatCompletionRequest) -> Prompt:
            return chat_prompt(engine.tokenizer, body)

        return await answer(request, ChatCompletionRequest, prompt_of, ChatReply(info.name))

    @app.post("/v1/completions", dependencies=keyed, response_model=None)
    async def completions(request: Request) -> Response:
        def prompt_of(body: CompletionRequest) -> Prompt:
            return Prompt(completion_token_ids(engine.tokenizer, body, info))

        return await answer(request, CompletionRequest, prompt_of, CompletionReply(info.name))

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


def check_origins(origins: Sequence[str]) -> None:
    """Raises UserError for what no browser sends as the origin of a page."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UserError(
                f"origin {origin!r} is none; give a page's scheme, host and port, like http://localhost:3000, or *"
            )


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


def _submit(engine: Engine, request: GenerationRequest) -> TokenStream:
    try:
        return engine.submit(request)
    except QueueFullError:
        raise _queue_full() from None
    except EngineStoppingError:
        raise _shutting_down() from None


def _queue_full() -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(429, "Too many requests wait already; try again later", code="queue_full", headers=headers)


def _engine_failure(error: Exception) -> ApiError:
    if isinstance(error, EngineStoppingError):
        return _shutting_down()
    return ApiError(500, "The server failed while generating; its log says why", code="internal_error")


def _usage(record: Served) -> Usage:
    prompt_tokens = record.prompt_tokens or 0
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=record.new_tokens,
        total_tokens=prompt_tokens + record.new_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=record.cached_tokens),
    )


async def _whole_answer(request: Request, tokens: TokenStream, reply: Reply, record: Served) -> Response:
    async def collect() -> BaseModel:
        pieces = []
        async for event in tokens:
            record.add(event)
            pieces.append(event.text)
        return reply.whole("".join(pieces), record.finish_reason or "length", _usage(record))

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


async def _sse_data(tokens: TokenStream, reply: Reply, record: Served, with_usage: bool) -> AsyncIterator[dict]:
    def data(part: BaseModel) -> dict:
        # As ASCII: some clients break lines at U+2028 or U+0085 too.
        return {"data": json.dumps(part.model_dump())}

    for part in reply.opening():
        yield data(part)
    try:
        async for event in tokens:
            record.add(event)
            if event.text or event.finish_reason:
                yield data(reply.piece(event.text, event.finish_reason))
        if with_usage:
            yield data(reply.closing_usage(_usage(record)))
    except (EngineStoppingError, GenerationError) as error:
        failure = _engine_failure(error)
        record.error = failure.code
        yield {"data": json.dumps(failure.body())}
    yield {"data": "[DONE]"}


class _StreamedAnswer(EventSourceResponse):
    """Server-sent events that close their token stream however they end, before the first event too."""

    def __init__(self, tokens: TokenStream, events: AsyncIterator[dict]):
        super().__init__(events, sep="\n", shutdown_grace_period=STREAM_GRACE_S, send_timeout=SEND_TIMEOUT_S)
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except* SendTimeoutError:
            served(scope).error = "send_timeout"
        finally:
            await self._tokens.aclose()


async def _answer_api_error(request: Request, error: Any) -> Response:
    served(request.scope).error = error.code
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_exception(request: Request, error: Any) -> Response:
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{HTTPStatus(error.status_code).phrase}: {request.method} {request.url.path}"
    if error.status_code == 404 and (near := difflib.get_close_matches(request.url.path, ROUTES, n=1, cutoff=0.7)):
        message += f"; did you mean {near[0]}? A client's base URL here ends in /v1"
    answer = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
    return await _answer_api_error(request, answer)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    return await _answer_api_error(request, ApiError(500, "The server failed; its log says why", code="internal_error"))
