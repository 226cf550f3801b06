"""Bodies of requests and answers: whole, and no more of them at once than a worker can hold."""

from typing import Any

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from model_server.errors import BodyTooLargeError, ServerBusyError, UnsupportedBodyError
from model_server.schemas import ModelFlavor, PredictFunction, schema_of

LARGE = 2**20
"""Bytes of a body that costs a worker something: an answer is counted, a mistake told in short."""
_MOST_BYTES = 256 * 2**20
_PIECE = 2**18
_HELD = "held"
_LIST, _OBJECT, _N = b"[{n"
_NULL = msgspec.Raw(b"null")


class Room:
    """What one worker holds, in bytes: of bodies that come in pieces, and of large answers.

    An answer is held until its caller has taken it. What is small is not counted, and one alone may
    have more than the limit. What a request holds is noted in its scope.
    """

    def __init__(self, limit: int = _MOST_BYTES) -> None:
        self._limit = limit
        self._held = 0

    def take(self, scope: Scope, size: int) -> None:
        """Hold so many bytes more for a request. Raises `ServerBusyError`."""
        own = scope.get(_HELD, 0)
        if self._held > own and self._held + size > self._limit:
            raise ServerBusyError(
                "Too many large requests and answers are under way; try again soon."
            )
        scope[_HELD] = own + size
        self._held += size

    def free(self, scope: Scope) -> None:
        """Give up all that a request holds."""
        if _HELD in scope:
            self._held -= scope.pop(_HELD)


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """What a worker reads of a native prediction request; the rows are the runner's to read."""

    data: msgspec.Raw
    predict_function: PredictFunction = "predict"
    model_flavor: ModelFlavor = "pyfunc"
    dtype: str | None = None
    params: msgspec.Raw = _NULL


_DECODER = msgspec.json.Decoder(Wanted)


def read_wanted(body: bytes) -> Wanted:
    """What a body asks for. Its rows are passed over: no object is made of them.

    Raises `ValueError` for what is no such request or not UTF-8.
    """
    if not (body.isascii() or _is_utf8(body)):
        raise ValueError("it is not valid UTF-8")
    try:
        wanted = _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if memoryview(wanted.data)[0] != _LIST:
        raise ValueError("data must be a list of rows")
    if wanted.params is not _NULL and memoryview(wanted.params)[0] not in {_OBJECT, _N}:
        raise ValueError("params must be an object or null")
    return wanted


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The body, as OpenAPI has it, of a route that reads it by itself."""
    content = {"application/json": {"schema": schema_of(model)}}
    return {"requestBody": {"required": required, "content": content}}


class Answer(Response):
    """JSON that a model's process has made."""

    media_type = "application/json"

    def __init__(self, body: bytes, request: Request) -> None:
        if len(body) > LARGE:
            request.app.state.room.take(request.scope, len(body))
        super().__init__(body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; done when the caller has taken it."""
        if len(self.body) <= LARGE:
            await super().__call__(scope, receive, send)
            return
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send_pieces(send, bytes(self.body))
        await send({"type": "http.response.body"})


async def send_pieces(send: Send, body: bytes) -> None:
    """Send all of a body but its end, each piece when the one before is on its way."""
    for start in range(0, len(body), _PIECE):
        piece = body[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})


async def receive_body(
    receive: Receive, limit: int, room: Room, scope: Scope
) -> tuple[bytes, Message]:
    """A body, or what comes of it until it is over `limit` bytes or its sender is gone.

    With it the last message, which tells which of these it is. Raises `ServerBusyError`.
    """
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body, message
    pieces = bytearray()
    while True:
        room.take(scope, len(body))
        pieces += body
        if not message.get("more_body") or len(pieces) > limit:
            return bytes(pieces), message
        message = await receive()
        body = message.get("body", b"")


async def read_body(request: Request, limit: int) -> bytes:
    """All of the body.

    Raises BodyTooLargeError, UnsupportedBodyError, ServerBusyError or ClientDisconnect.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedBodyError(f"Send the body as it is; {encoding[:20]!r} is not taken.")
    too_large = BodyTooLargeError(f"The body is larger than {limit} bytes; send fewer rows.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    room = request.app.state.room
    body, last = await receive_body(request.receive, limit, room, request.scope)
    if last["type"] == "http.disconnect":
        raise ClientDisconnect
    if len(body) > limit:
        raise too_large
    return body
