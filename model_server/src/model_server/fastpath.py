"""The short way of a usual prediction request, past everything that FastAPI does for it.

Whatever is unusual, by its address, its headers or its body, goes on to the application as it came,
so that every refusal has one source. What this answers, it answers as the application would.
"""

import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_server.bodies import receive_body
from model_server.serving import ModelServing

if TYPE_CHECKING:
    from model_server.log import Asked

_ROUTE = "/{model_name}/{model_version_or_alias}"

_SEGMENTS = 3
_SEGMENT = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_JSON = b"application/json"
_LIST = ord("[")
_CHANGES_THE_BODY = b"content-encoding"


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """What this reads of a body; the rows are the runner's to read."""

    data: msgspec.Raw
    predict_function: Literal["predict", "predict_proba"] = "predict"
    model_flavor: Literal["pyfunc", "sklearn"] = "pyfunc"
    dtype: str | None = None
    params: dict[str, msgspec.Raw] | None = None


_DECODER = msgspec.json.Decoder(_Body)


class FastPath:
    """ASGI middleware of a FastAPI application: answers usual predictions itself."""

    def __init__(self, app: ASGIApp, serving: ModelServing, max_body_bytes: int) -> None:
        self._app = app
        self._serving = serving
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or let the application do it."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
            await self._app(scope, receive, send)
            return
        segments = scope["path"].split("/")
        if (
            len(segments) != _SEGMENTS
            or not all(map(_SEGMENT.fullmatch, segments[1:]))
            or not self._has_usual_headers(scope)
        ):
            await self._app(scope, receive, send)
            return
        body, last = await receive_body(receive, self._max_body_bytes)
        wanted = self._read(body) if last["type"] == "http.request" else None
        if wanted is None:
            await self._app(scope, _again(body, last, receive), send)
            return
        _, name, reference = segments
        asked: Asked = scope["asked"]
        asked.route, asked.model, asked.flavor = _ROUTE, name, wanted.model_flavor
        try:
            predicted = await self._serving.predict(name, wanted.model_flavor, reference, body)
        except Exception as error:  # noqa: BLE001  the application tells it
            await _tell(error, scope, receive, send)
            return
        asked.version, asked.rows = predicted.version, predicted.rows
        headers = [
            (b"content-length", b"%d" % len(predicted.body)),
            (b"content-type", _JSON),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": predicted.body})

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

    def _read(self, body: bytes) -> _Body | None:
        """What is wanted, where the application would certainly find nothing wrong with it."""
        if len(body) > self._max_body_bytes:
            return None
        # Rows are passed over unread; a text in them could be no text.
        if b"\\u" in body or not (body.isascii() or _is_utf8(body)):
            return None
        try:
            wanted = _DECODER.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return None
        return wanted if memoryview(wanted.data)[0] == _LIST else None


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


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
