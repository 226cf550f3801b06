import asyncio
import json
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from model_server.log import JsonFormatter, Observed


def test_a_record_is_one_line_of_json() -> None:
    record = logging.makeLogRecord(
        {"name": "here", "msg": "two\n%s", "args": ("lines",), "model": "iris", "levelname": "INFO"}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert content.pop("time").endswith("+00:00")
    assert content == {
        "level": "info",
        "logger": "here",
        "message": "two\nlines",
        "model": "iris",
    }


def test_an_exception_is_part_of_its_line() -> None:
    try:
        int("no")
    except ValueError as error:
        information = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(logging.makeLogRecord({"exc_info": information}))
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


def _ask(
    headers: list[tuple[bytes, bytes]], user_header: str = "", model: str = "iris"
) -> list[tuple[bytes, bytes]]:
    """Send one request to an application that predicts 7 rows; the headers of its answer."""

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        asked = scope["asked"]
        asked.route, asked.model, asked.flavor = "/{a}/{b}", model, "pyfunc"
        asked.version, asked.rows = 3, 7
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"secret answer"})

    return _call(app, headers, user_header)


def _call(
    app: Any, headers: list[tuple[bytes, bytes]], user_header: str = ""
) -> list[tuple[bytes, bytes]]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"secret question"}

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/iris/1",
        "query_string": b"secret=1",
        "headers": headers,
    }
    asyncio.run(Observed(app, user_header)(scope, receive, send))
    answer: list[tuple[bytes, bytes]] = sent[0]["headers"]
    return answer


def _line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    content: dict[str, Any] = json.loads(line)
    return content


def test_a_request_is_one_line_without_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    answer = _ask([(b"x-request-id", b"0a-B.c"), (b"authorization", b"Basic c2VjcmV0")])
    assert answer == [(b"a", b"b"), (b"x-request-id", b"0a-B.c")]
    line = _line(capsys)
    assert line.pop("time").endswith("+00:00")
    assert 0 <= line.pop("milliseconds") < 60_000
    assert line == {
        "level": "info",
        "logger": "model_server.log",
        "message": "request",
        "request_id": "0a-B.c",
        "user": None,
        "method": "POST",
        "route": "/{a}/{b}",
        "model": "iris",
        "flavor": "pyfunc",
        "version": 3,
        "rows": 7,
        "status": 200,
    }


@pytest.mark.parametrize("sent", [b"", b'"}\n{"user":"root', 65 * b"a", "ü".encode(), b"a b"])
def test_an_id_that_is_no_id_is_replaced(sent: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    ((_, first),) = _ask([(b"x-request-id", sent)])[1:]
    line = _line(capsys)
    ((_, second),) = _ask([])[1:]
    assert line["request_id"] == first.decode()
    assert first not in {sent, second}
    assert len(first) == 32


@pytest.mark.parametrize(
    ("header", "sent", "user"),
    [
        ("X-Forwarded-User", b"ann@example.org", "ann@example.org"),
        ("X-Forwarded-User", b'ann"\n', None),
        # Without a door, anybody could be anybody.
        ("", b"ann", None),
    ],
)
def test_the_user_is_the_doors_to_tell(
    header: str, sent: bytes, user: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    _ask([(b"x-forwarded-user", sent)], header)
    assert _line(capsys)["user"] == user


def test_a_name_cannot_make_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    _ask([], model='a"}\n{"status":500,\x1b[2J')
    assert _line(capsys)["model"] == 'a"}\n{"status":500,\x1b[2J'


def test_a_request_that_raises_is_told_as_failed(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(*_: Any) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        _call(app, [])
    line = _line(capsys)
    assert (line["status"], line["route"]) == (500, "none")


def test_what_is_no_request_passes() -> None:
    seen = []

    async def app(scope: Scope, *_: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Observed(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
