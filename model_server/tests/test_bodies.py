"""What a worker holds of large requests and answers, and what reading them costs."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from hosts import eventually
from light_models import Shelf
from model_server import create_app
from model_server.bodies import Room
from model_server.errors import InvalidRequestError, ServerBusyError
from model_server.routes import _WHOLE_TEXTS, _flavor
from model_server.settings import Settings
from servers import served

MIB = 2**20
LARGE = 24 * MIB
"""More than the kernel keeps of an answer that nobody reads."""


def test_one_alone_may_have_more_than_all_together() -> None:
    room = Room(100)
    one: dict[str, Any] = {}
    other: dict[str, Any] = {}
    room.take(one, 300)
    room.take(one, 1)
    with pytest.raises(ServerBusyError):
        room.take(other, 1)
    room.free(other)
    room.free(one)
    room.free(one)
    room.take(other, 60)
    room.take(one, 40)
    with pytest.raises(ServerBusyError):
        room.take(one, 1)
    room.free(one)
    room.take(other, 40)


@pytest.fixture
def app(light: Settings, shelf: Shelf) -> FastAPI:
    shelf.put("oak", 1, "oak", predict=f"if 'large' in rows: return ['x' * {LARGE}]")
    app = create_app(light)
    app.state.room._limit = LARGE + 2 * MIB
    return app


@contextmanager
def _asked(url: str, body: bytes, kind: str) -> Iterator[socket.socket]:
    """A caller who has asked, and takes its time to read."""
    host, port = str(urlsplit(url).hostname), urlsplit(url).port
    with socket.socket() as caller:
        # Before it connects, or the kernel would take in megabytes for it.
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect((host, port))
        caller.settimeout(60)
        head = f"POST /oak/1 HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
        caller.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield caller


def _read(caller: socket.socket) -> bytes:
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += caller.recv(65536)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    pieces = [body]
    left = length - len(body)
    while left:
        pieces.append(caller.recv(2**20))
        assert pieces[-1]
        left -= len(pieces[-1])
    return b"".join(pieces)


@pytest.mark.parametrize("kind", ["application/json", "text/plain"], ids=["short way", "routes"])
def test_answers_that_nobody_takes_do_not_fill_a_worker(app: FastAPI, kind: str) -> None:
    body = json.dumps({"data": ["large"]}).encode()
    expected = json.dumps({"prediction": [LARGE * "x"]}, separators=(",", ":")).encode()
    room = app.state.room
    headers = {"content-type": kind}
    with served(app) as url, httpx2.Client(base_url=url, timeout=60, verify=False) as client:
        assert client.get("/load_model/oak/pyfunc/1").status_code == 200
        with _asked(url, body, kind) as slow:
            eventually(lambda: room._held, wanted=len(expected))
            refused = client.post("/oak/1", content=body, headers=headers)
            assert refused.status_code == 503
            assert "Too many large requests and answers" in refused.json()["detail"]
            assert int(refused.headers["retry-after"]) >= 1
            # What is small always finds its room.
            small = client.post("/oak/1", json={"data": ["a"]})
            assert small.json() == {"prediction": ["oak"]}
            assert _read(slow) == expected
        eventually(lambda: room._held, wanted=0)
        assert client.post("/oak/1", content=body, headers=headers).content == expected
        # So does the room of whoever goes away.
        with _asked(url, body, kind):
            eventually(lambda: room._held, wanted=len(expected))
        eventually(lambda: room._held, wanted=0)


def test_requests_under_way_do_not_fill_a_worker(app: FastAPI) -> None:
    room = app.state.room
    body = json.dumps({"data": [LARGE * "x"]}).encode()
    with served(app) as url, httpx2.Client(base_url=url, timeout=60, verify=False) as client:
        host, port = str(urlsplit(url).hostname), urlsplit(url).port
        with socket.create_connection((host, port)) as slow:
            head = f"POST /oak/1 HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
            eventually(lambda: room._held > len(body) - 2**17)
            refused = client.post("/oak/1", content=body, headers={"content-type": "text/plain"})
            assert refused.status_code == 503
            assert client.get("/health/live").status_code == 200
        eventually(lambda: room._held, wanted=0)


def _peak(function: Callable[[], object]) -> int:
    """By how many bytes this process grew at most meanwhile."""
    status = Path("/proc/self/status")

    def told(field: str) -> int:
        return int(status.read_text().partition(f"{field}:")[2].split()[0]) * 1024

    # The peak so far is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = told("VmRSS")
    function()
    return told("VmHWM") - before


@pytest.mark.parametrize(
    ("start", "end", "trouble"),
    [
        (b'{"data": ["\\u00e4", ', b"]}", None),
        (b'{"data": [0, ', b'], "rows": 1}', "unknown field `rows`"),
        (b'{"data": ["\\ud800", ', b"]}", "hex escape"),
        (b'{"data": ["\\ude00", ', b"]}", "surrogate"),
        (b'{"data": ["\xff", ', b"]}", "not valid UTF-8"),
        (b'{"data": {"a": [', b"]}}", "must be a list"),
        (b'{"data": [], "params": [', b"]}", "must be an object"),
        (b'{"data": [', b"", "truncated"),
    ],
)
def test_reading_a_large_request_makes_no_objects_of_its_rows(
    start: bytes, end: bytes, trouble: str | None
) -> None:
    """They would take a gigabyte, of the process that answers for all models."""
    body = start + b",".join(MIB * [b'{"":1}']) + end

    def read() -> None:
        if trouble is None:
            assert _flavor(body) == "pyfunc"
        else:
            with pytest.raises(InvalidRequestError, match=trouble):
                _flavor(body)

    assert _peak(read) < 32 * MIB


_PARTS = ["\\ud83d", "\\uDBFF", "\\ude00", "\\uDFFF", "\\u00d8", "\\\\", "\\n", "ud83d", "ä"]


@given(st.lists(st.sampled_from(_PARTS)))
def test_half_of_a_surrogate_pair_is_found(parts: list[str]) -> None:
    body = f'{{"data": ["{"".join(parts)}"]}}'
    try:
        json.loads(body)["data"][0].encode()
        is_text = True
    except UnicodeEncodeError:
        is_text = False
    assert (_WHOLE_TEXTS.fullmatch(body.encode()) is not None) == is_text
