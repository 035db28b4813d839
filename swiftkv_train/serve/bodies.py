"""From the bytes of a request to what a client asked for, within limits of size and time."""

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from swiftkv_train.serve.api_error import ApiError
from swiftkv_train.serve.schemas import refusal

BODY_TIMEOUT_S = 60.0
CLOSE = {"Connection": "close"}  # where a part of the body may never be read

Schema = TypeVar("Schema", bound=BaseModel)


async def read_body(request: Request, schema: type[Schema], max_bytes: int) -> Schema:
    """The body as `schema`. Raises ApiError: 415, 413, 408, and 400 for what does not fit the schema."""
    # Also keeps web pages out: without this check a page the user visits could post here as plain text.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must have Content-Type: application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"The body is larger than {max_bytes} bytes", code="body_too_large", headers=CLOSE)
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
        message = f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise ApiError(408, message, code="request_timeout", headers=CLOSE) from None
    except ClientDisconnect:
        raise ApiError(400, "The body is incomplete", code="invalid_json") from None
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error, schema) from None
