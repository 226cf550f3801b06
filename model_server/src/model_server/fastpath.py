"""The short way of a usual prediction request, past everything that FastAPI does for it.

Whatever is unusual, by its address, its headers or its body, goes on to the application as it came,
so that every refusal has one source. What this answers, it answers as the application would.
"""

import re
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_server.bodies import LARGE, Room, Wanted, read_wanted, receive_body, send_pieces
from model_server.errors import ServerBusyError
from model_server.serving import ModelServing

if TYPE_CHECKING:
    from model_server.log import Asked

_ROUTE = "/{model_name}/{model_version_or_alias}"

_SHORT = 2**16
"""Bytes of a body that is sent together with its head; a larger one would cost a copy."""
_SEGMENTS = 3
_SEGMENT = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_JSON = b"application/json"
_CHANGES_THE_BODY = b"content-encoding"


class FastPath:
    """ASGI middleware of a FastAPI application: answers usual predictions itself."""

    def __init__(
        self, app: ASGIApp, serving: ModelServing, max_body_bytes: int, room: Room
    ) -> None:
        self._app = app
        self._serving = serving
        self._max_body_bytes = max_body_bytes
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or let the application do it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            segments = scope["path"].split("/")
            if (
                scope["method"] != "POST"
                or scope.get("root_path")
                or len(segments) != _SEGMENTS
                or not all(map(_SEGMENT.fullmatch, segments[1:]))
                or not self._has_usual_headers(scope)
            ):
                await self._app(scope, receive, send)
                return
            try:
                body, last = await receive_body(receive, self._max_body_bytes, self._room, scope)
            except ServerBusyError as error:
                scope["asked"].route = _ROUTE
                await _tell(error, scope, receive, send)
                return
            wanted = self._read(body) if last["type"] == "http.request" else None
            if wanted is None:
                await self._app(scope, _again(body, last, receive), send)
                return
            _, name, reference = segments
            asked: Asked = scope["asked"]
            asked.route, asked.model, asked.flavor = _ROUTE, name, wanted.model_flavor
            try:
                predicted = await self._serving.predict(name, wanted.model_flavor, reference, body)
                size = len(predicted.body)
                if size > LARGE:
                    self._room.take(scope, size)
            except Exception as error:  # noqa: BLE001  the application tells it
                await _tell(error, scope, receive, send)
                return
            asked.version, asked.rows = predicted.version, predicted.rows
            asked.call_rows = predicted.call_rows
            headers = [(b"content-length", b"%d" % size), (b"content-type", _JSON)]
            if size <= _SHORT and (hold_head := scope.get("hold_head")):
                hold_head()
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            end = predicted.body
            if size > LARGE:
                await send_pieces(send, end)
                end = b""
            await send({"type": "http.response.body", "body": end})
        finally:
            self._room.free(scope)

    def _has_usual_headers(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"content-length":
                if not value.isdigit() or int(value[:20]) > self._max_body_bytes:
                    return False
            elif name == b"content-type":
                if not value.startswith(_JSON):
                    return False
            elif name == _CHANGES_THE_BODY:
                return False
        return True

    def _read(self, body: bytes) -> Wanted | None:
        """What is wanted, where the application would certainly find nothing wrong with it."""
        # Rows are passed over unread; a text in them could be no text.
        if len(body) > self._max_body_bytes or b"\\u" in body:
            return None
        try:
            return read_wanted(body)
        except ValueError:
            return None


def _again(body: bytes, last: Message, receive: Receive) -> Receive:
    """Receive first, in one piece, what was received already."""
    is_gone = last["type"] == "http.disconnect"
    more = is_gone or last.get("more_body", False)
    come = [{"type": "http.request", "body": body, "more_body": more}] + is_gone * [last]

    async def receive_again() -> Message:
        return come.pop(0) if come else await receive()

    return receive_again


async def _tell(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what the application's own handler makes of an error."""
    handlers: dict[Any, Any] = scope["app"].exception_handlers
    for kind in type(error).__mro__:
        if kind is not Exception and kind in handlers:
            response = await handlers[kind](Request(scope), error)
            await response(scope, receive, send)
            return
    raise error
