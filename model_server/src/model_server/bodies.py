"""The body of a request, whole and within the limit."""

from fastapi import Request

from model_server.errors import BodyTooLargeError, UnsupportedBodyError


async def read_body(request: Request, limit: int) -> bytes:
    """All of the body, or BodyTooLargeError or UnsupportedBodyError."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedBodyError(f"Send the body as it is; {encoding[:20]!r} is not taken.")
    too_large = BodyTooLargeError(f"The body is larger than {limit} bytes; send fewer rows.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)
