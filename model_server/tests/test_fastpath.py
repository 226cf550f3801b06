import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conftest import TrainedModels
from model_server import create_app
from model_server.bodies import Room
from model_server.fastpath import FastPath
from model_server.settings import Settings
from registry_server import RegistryServer

IRIS = "/iris%20&%20co./1"
ROW = [5.1, 3.5, 1.4, 0.2]
GOOD = json.dumps({"data": [ROW], "model_flavor": "sklearn"}).encode()
LIMIT = 20_000

# Path, headers, body; and whether the short way answers it.
CORPUS: dict[str, tuple[str, dict[str, str], bytes, bool]] = {
    "good": (IRIS, {}, GOOD, True),
    "by an alias": ("/iris%20&%20co./champion", {}, GOOD, True),
    "with everything": (
        IRIS,
        {"content-type": "application/json; charset=utf-8"},
        (
            b' {"params": null, "dtype": "float64", "data": [[1, 2, 3, 4e0]],'
            b' "predict_function": "predict_proba", "model_flavor": "sklearn"} '
        ),
        True,
    ),
    "named twice": (IRIS, {}, GOOD[:-1] + b', "model_flavor": "sklearn"}', True),
    "without a type": (IRIS, {"content-type": ""}, GOOD, False),
    "as a form": (IRIS, {"content-type": "application/x-www-form-urlencoded"}, GOOD, False),
    "packed": (IRIS, {"content-encoding": "gzip"}, GOOD, False),
    "in other letters": (IRIS, {}, '{"data": [["ä", 1, 1, 1]], "dtype": "ü"}'.encode(), True),
    "the model refuses": (IRIS, {}, b'{"data": [[1]], "model_flavor": "sklearn"}', True),
    "no rows": (IRIS, {}, b'{"data": []}', True),
    "ragged": (IRIS, {}, b'{"data": [[1], [1, 2]]}', True),
    "object dtype": (IRIS, {}, b'{"data": [[1]], "dtype": "object"}', True),
    "params": (IRIS, {}, b'{"data": [[1, 1, 1, 1]], "params": {"a": 1}}', True),
    "no such version": ("/iris%20&%20co./7", {}, GOOD, True),
    "no such model": ("/rose/champion", {}, GOOD, True),
    "a model called like a route": ("/health/live", {}, GOOD, True),
    "dots": ("/%2e%2e/1", {}, GOOD, True),
    "a control character": ("/a%0Ab/1", {}, GOOD, False),
    "a slash in the name": ("/..%2fetc/1", {}, GOOD, False),
    "a name too long": (f"/{257 * 'x'}/1", {}, GOOD, False),
    "a name as long as can be": (f"/{256 * 'x'}/1", {}, GOOD, True),
    "an empty name": ("//1", {}, GOOD, False),
    "an empty version": ("/iris/", {}, GOOD, False),
    "one segment": ("/iris", {}, GOOD, False),
    "three segments": ("/iris/1/1", {}, GOOD, False),
    "empty": (IRIS, {}, b"", False),
    "no JSON": (IRIS, {}, b"{", False),
    "more than JSON": (IRIS, {}, GOOD + b"x", False),
    "a list": (IRIS, {}, b"[]", False),
    "no data": (IRIS, {}, b"{}", False),
    "null data": (IRIS, {}, b'{"data": null}', False),
    "data no list": (IRIS, {}, b'{"data": {"a": 1}}', False),
    "unknown field": (IRIS, {}, b'{"data": [[1]], "rows": 1}', False),
    "unknown function": (IRIS, {}, b'{"data": [[1]], "predict_function": "score"}', False),
    "unknown flavor": (IRIS, {}, b'{"data": [[1]], "model_flavor": "onnx"}', False),
    "dtype no text": (IRIS, {}, b'{"data": [[1]], "dtype": 5}', False),
    "params no object": (IRIS, {}, b'{"data": [[1]], "params": []}', False),
    "a character by its number": (IRIS, {}, b'{"data": [["\\u00e4\\ud83d\\ude00"]]}', False),
    "no UTF-8": (IRIS, {}, b'{"data": ["\xff"]}', False),
    "half a surrogate": (IRIS, {}, b'{"data": ["\\ud800"]}', False),
    "nested deep": (IRIS, {}, b'{"data": ' + 9_000 * b"[" + 9_000 * b"]" + b"}", False),
    "not a number": (IRIS, {}, b'{"data": [[NaN]]}', False),
    "too large": (IRIS, {}, b'{"data": [' + LIMIT * b" " + b"]}", False),
}


class Passed:
    """The application behind the short way, which notes what comes to it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.paths.append(scope["path"])
        await self._app(scope, receive, send)


class Both:
    """One application with the short way and one without it; they share their runners."""

    def __init__(self, fast: TestClient, passed: Passed, slow: TestClient) -> None:
        self._fast, self._passed, self._slow = fast, passed, slow

    def ask(self, path: str, headers: dict[str, str], content: Any) -> tuple[Any, Any, bool]:
        """Both answers, and whether the short way was taken."""
        before = len(self._passed.paths)
        answers = []
        for client in (self._fast, self._slow):
            answer = client.post(
                path,
                content=content() if callable(content) else content,
                headers={"content-type": "application/json", "x-request-id": "the-same"} | headers,
            )
            answers.append((answer.status_code, answer.headers.multi_items(), answer.content))
        return answers[0], answers[1], len(self._passed.paths) == before


def _is_short(entry: Any) -> bool:
    return entry.cls is FastPath


def _passes(app: FastAPI) -> Passed:
    """Put an observer behind the short way."""
    found: list[Passed] = []

    class Observer(Passed):
        def __init__(self, app: ASGIApp) -> None:
            super().__init__(app)
            found.append(self)

    # Before it in the list is around it.
    place = next(n for n, entry in enumerate(app.user_middleware) if _is_short(entry))
    app.add_middleware(Observer)
    app.user_middleware.insert(place + 1, app.user_middleware.pop(0))
    app.middleware_stack = app.build_middleware_stack()
    return found[0]


@pytest.fixture
def both(settings: Settings, stocked: RegistryServer, trained: TrainedModels) -> Iterator[Both]:
    assert stocked.versions
    settings = settings.model_copy(update={"max_body_bytes": LIMIT})
    fast, slow = create_app(settings), create_app(settings)
    passed = _passes(fast)
    slow.user_middleware = [entry for entry in slow.user_middleware if not _is_short(entry)]
    with TestClient(fast) as fast_client, TestClient(slow) as slow_client:
        yield Both(fast_client, passed, slow_client)


def test_both_ways_answer_alike(both: Both) -> None:
    """Status, headers and every byte."""
    told = {}
    for what, (path, headers, body, short) in CORPUS.items():
        fast, slow, was_short = both.ask(path, headers, body)
        assert fast == slow, what
        assert was_short == short, what
        told[what] = fast[0]
    assert {told[what] for what in ("good", "by an alias", "with everything", "named twice")} == {
        200
    }
    # In pieces, of a length that nobody announced.
    for size, status, short in ((10, 200, True), (LIMIT, 413, False)):
        fast, slow, was_short = both.ask(
            IRIS, {}, lambda size=size: iter([GOOD[:7], GOOD[7:], size * b" "])
        )
        assert fast == slow
        assert (fast[0], was_short) == (status, short)


@pytest.mark.parametrize("end", [b" ", b"\xff"], ids=["unusual", "over the limit"])
def test_a_large_body_in_many_pieces_costs_what_its_bytes_cost(end: bytes) -> None:
    """Nobody else is answered while a worker copies."""
    piece = 4096 * b" "
    size = 32 * 2**20
    pieces = [*(size // len(piece) * [piece]), end]
    limit = size + 1 if end == b" " else size
    passed = bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def app(scope: Scope, receive: Receive, _: Send) -> None:
        assert scope["path"] == "/iris/1"
        more = True
        while more:
            message = await receive()
            passed.extend(message["body"])
            more = message["more_body"]

    async def send(_: Message) -> None:
        pytest.fail("the application answers")

    scope = {"type": "http", "method": "POST", "path": "/iris/1", "headers": []}
    serving: Any = None
    began = time.process_time()
    asyncio.run(FastPath(app, serving, limit, Room())(scope, receive, send))
    # A copy for each piece would be 128 GiB.
    assert time.process_time() - began < 5
    assert len(passed) == size + 1
    assert passed.endswith(end)
