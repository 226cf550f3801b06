"""The body of a request, whole and within the limit."""

from typing import Any

from fastapi import Request
from pydantic import BaseModel

from model_server.errors import BodyTooLargeError, UnsupportedBodyError
from model_server.schemas import schema_of


def json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The body, as OpenAPI has it, of a route that reads it by itself."""
    content = {"application/json": {"schema": schema_of(model)}}
    return {"requestBody": {"required": required, "content": content}}


async def read_body(request: Request, limit: int) -> bytes:
    """All of the body, or BodyTooLargeError or UnsupportedBodyError."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedBodyError(f"Send the body as it is; {encoding[:20]!r} is not taken.")
    too_large = BodyTooLargeError(f"The body is larger than {limit} bytes; send fewer rows.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)
