"""One JSON object a line on standard output, for the journal.

One line for each request: who asked which model for how many rows, how it ended and how long it
took. Never what was asked or answered, nor a path but the route's own.
"""

import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_server import metrics

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SANE_USER = re.compile(rb"[A-Za-z0-9._@+-]{1,128}")
_ID_HEADER = b"x-request-id"
_NO_ROUTE = "none"
_FAILED = 500
_ENCODER = msgspec.json.Encoder()


class JsonFormatter(logging.Formatter):
    """A record, and what was given as `extra`, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging() -> None:
    """Send everything, also what the web server says, through the formatter."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    # One line for each request that MLflow is asked is too much.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "gunicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True


@dataclass(slots=True)
class Asked:
    """One request; whoever answers it adds what it turned out to be about.

    It is `scope["asked"]` of every request.
    """

    id: str
    """The caller's or the door's `X-Request-ID` if it is a sane one, else a new one."""
    user: str | None
    """As the door tells it; None where no door is trusted."""
    method: str
    started: float
    """By `time.perf_counter()`."""
    route: str | None = None
    """The route's template; None where no route was found."""
    model: str | None = None
    flavor: str | None = None
    version: int | None = None
    rows: int | None = None
    call_rows: int = 0
    """Of the model's call, where this request is the one that tells."""


def begin(scope: Scope, user_header: bytes | None) -> Asked:
    """Take up a request; `user_header` is the lower-case header that a door tells the user in."""
    request_id = user = None
    for name, value in scope["headers"]:
        if name == _ID_HEADER:
            if _SANE_ID.fullmatch(value):
                request_id = value.decode("ascii")
        elif name == user_header and _SANE_USER.fullmatch(value):
            user = value.decode("ascii")
    asked = Asked(request_id or os.urandom(16).hex(), user, scope["method"], time.perf_counter())
    scope["asked"] = asked
    return asked


def observe(asked: Asked, status: int) -> None:
    """Log and count a request that was answered with this status."""
    seconds = time.perf_counter() - asked.started
    route = asked.route or _NO_ROUTE
    metrics.count_request(route, status)
    if asked.model and asked.version and asked.flavor and asked.rows is not None:
        metrics.count_prediction(
            asked.model,
            asked.version,
            asked.flavor,
            asked.rows,
            seconds,
            call_rows=asked.call_rows,
        )
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": "info",
        "logger": __name__,
        "message": "request",
        "request_id": asked.id,
        "user": asked.user,
        "method": asked.method,
        "route": route,
        "model": asked.model,
        "flavor": asked.flavor,
        "version": asked.version,
        "rows": asked.rows,
        "status": status,
        "milliseconds": round(seconds * 1000, 3),
    }
    # Not through logging, which costs several times as much.
    sys.stdout.buffer.write(_ENCODER.encode(line) + b"\n")
    sys.stdout.buffer.flush()


class Observed:
    """An ASGI application whose every request is logged and counted and answered with its id."""

    def __init__(self, app: ASGIApp, user_header: str = "") -> None:
        self._app = app
        self._user_header = user_header.lower().encode("ascii") or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = begin(scope, self._user_header)
        status = _FAILED

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (_ID_HEADER, asked.id.encode("ascii")),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        finally:
            route: Any = scope.get("route")
            if asked.route is None and route is not None:
                asked.route = getattr(route, "path", None)
            observe(asked, status)
