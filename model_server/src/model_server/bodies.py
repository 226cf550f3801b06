"""The body of a request, whole and within the limit."""

from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from model_server.errors import BodyTooLargeError, UnsupportedBodyError
from model_server.schemas import schema_of


def json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The body, as OpenAPI has it, of a route that reads it by itself."""
    content = {"application/json": {"schema": schema_of(model)}}
    return {"requestBody": {"required": required, "content": content}}


async def receive_body(receive: Receive, limit: int) -> tuple[bytes, Message]:
    """A body, or what comes of it until it is over `limit` bytes or its sender is gone.

    With it the last message, which tells which of these it is.
    """
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body, message
    pieces = bytearray(body)
    while message.get("more_body") and len(pieces) <= limit:
        message = await receive()
        pieces += message.get("body", b"")
    return bytes(pieces), message


async def read_body(request: Request, limit: int) -> bytes:
    """All of the body, or BodyTooLargeError, UnsupportedBodyError or ClientDisconnect."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedBodyError(f"Send the body as it is; {encoding[:20]!r} is not taken.")
    too_large = BodyTooLargeError(f"The body is larger than {limit} bytes; send fewer rows.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    body, last = await receive_body(request.receive, limit)
    if last["type"] == "http.disconnect":
        raise ClientDisconnect
    if len(body) > limit:
        raise too_large
    return body
