"""A route that two hosts share: does the other answer while one is away, busy or an impostor?"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import scenario

ONE, OTHER = "odsp-door-one.service", "odsp-door-other.service"
BOTH = {"127.0.0.1", "127.0.0.2"}
MEGABYTES = 5_000_000


@pytest.fixture
def post(ask: Any, users: list[list[str]]) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that asks the shared route, one by one or all at once."""

    def posted(
        path: str = "x", count: int = 20, size: int = 10, *, at_once: bool = False
    ) -> list[dict[str, Any]]:
        request = {"path": f"/inference/{path}", "auth": users[0], "method": "POST", "size": size}
        answers = ask(*[request] * count, at_once=at_once)
        return [
            {"status": answer["status"], **json.loads(answer["text"] or "{}")} for answer in answers
        ]

    return posted


def answered(answers: list[dict[str, Any]]) -> set[str]:
    """Return who answered; nobody was refused."""
    assert {answer["status"] for answer in answers} == {200}, answers
    return {answer["address"] for answer in answers}


def test_one_host_answers_for_both(host: Any, behind: Any, post: Any) -> None:
    """A host that goes while it is asked costs nobody an answer, and is used again when it is back.

    Nor does one that shows no certificate of the platform: it sees no request.
    """
    gone = Event()

    def post_on() -> list[dict[str, Any]]:
        """Ask until the host is gone, however long that takes."""
        answers = []
        for _ in range(20):
            answers += post(count=300)
            if gone.is_set():
                break
        return answers

    with behind("serve", "model_server", hosts=["node-1"], unit=ONE), ThreadPoolExecutor() as pool:
        with behind("serve", "model_server", hosts=["node-2"], unit=OTHER):
            assert answered(post(at_once=True)) == BOTH
            under_way = pool.submit(post_on)
        gone.set()
        assert "127.0.0.1" in answered(under_way.result())
        since = float(host.check_output("date +%s.%N"))
        with behind("lie", "model_server", hosts=["node-2"], unit=OTHER):
            assert answered(post("odsp-impostor")) == {"127.0.0.1"}
        assert "/odsp-impostor" not in scenario.journal(host, OTHER, since)
        with behind("serve", "model_server", hosts=["node-2"], unit=OTHER):

            def shared() -> bool:
                """Tell whether both hosts answer again."""
                return answered(post(at_once=True)) == BOTH

            scenario.wait_until(shared)


def test_a_busy_host_passes_its_requests_on(behind: Any, post: Any) -> None:
    """Whole, and once; when the other is as busy, the user hears what it says and others go on."""
    with behind("serve", "model_server"):
        answers = post("busy/127.0.0.2", size=MEGABYTES)
        assert answered(answers) == {"127.0.0.1"}
        assert {answer["received"] for answer in answers} == {MEGABYTES}
        refused = post("busy/127.0.0.1,127.0.0.2")
        assert {answer["status"] for answer in refused} == {503}
        assert {answer["address"] for answer in refused} <= BOTH
        assert answered(post()) <= BOTH


def test_both_hosts_away_are_named(ask: Any, users: list[list[str]]) -> None:
    """Whoever looks after the platform learns where to look."""
    (answer,) = ask({"path": "/inference/x", "auth": users[0]})
    assert answer["status"] == 502
    assert "odsp-model_server.service on node-1 and node-2" in json.loads(answer["text"])["detail"]
