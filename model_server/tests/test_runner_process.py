import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import TrainedModels
from model_server.runner import wire
from model_server.runner.process import RunnerProcess

# What MLflow warns of inside a model's process is for its log.
pytestmark = pytest.mark.filterwarnings("default")

ROW = b'{"data": [[21]]}'


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def threads(address: Path) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads
        # Also after a failure: whoever waits for the model must end.
        with contextlib.suppress(OSError, EOFError):
            _ask(address, wire.STOP)


def _ask(address: Path, kind: bytes, content: bytes = b"") -> tuple[bytes, bytes]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(address))
        connection.sendall(wire.pack(kind, content))
        return wire.receive(connection)


def test_what_was_asked_before_the_stop_is_answered(
    threads: ThreadPoolExecutor, trained: TrainedModels, address: Path
) -> None:
    runner = RunnerProcess(address)
    # Asked before the model is even loaded: everybody waits, nobody is lost.
    asked = [threads.submit(_ask, address, wire.PREDICT, ROW) for _ in range(4)]
    described = threads.submit(_ask, address, wire.DESCRIBE)
    time.sleep(0.2)
    status: Future[int] = threads.submit(runner.serve, trained.folder / "fragile", "pyfunc")
    assert described.result(60) == (wire.ANSWER, b"")
    assert _ask(address, wire.STOP) == (wire.ANSWER, b"")
    assert status.result(60) == 0
    for kind, content in (one.result(60) for one in asked):
        assert kind == wire.ANSWER
        assert json.loads(content)["prediction"]["doubled"] == [[42]]


def test_a_bad_request_is_refused_and_the_next_one_answered(
    threads: ThreadPoolExecutor, trained: TrainedModels, address: Path
) -> None:
    status = threads.submit(RunnerProcess(address).serve, trained.folder / "fragile", "pyfunc")
    for body, kind in ((b"[", "input"), (b'{"data": [[-2]]}', "model"), (b"{}", "input")):
        sign, content = _ask(address, wire.PREDICT, body)
        assert (sign, json.loads(content)["kind"]) == (wire.REFUSAL, kind)
    assert _ask(address, wire.PREDICT, ROW)[0] == wire.ANSWER
    _ask(address, wire.STOP)
    assert status.result(60) == 0


def test_a_problem_is_told_before_the_end(
    threads: ThreadPoolExecutor, address: Path, tmp_path: Path
) -> None:
    status = threads.submit(RunnerProcess(address).serve, tmp_path, "pyfunc")
    sign, content = _ask(address, wire.DESCRIBE)
    assert sign == wire.REFUSAL
    assert "cannot be loaded as pyfunc" in json.loads(content)["message"]
    assert status.result(60) == 1


def test_only_its_owner_may_open_the_socket(address: Path) -> None:
    runner = RunnerProcess(address)
    runner._listener.close()
    assert address.stat().st_mode & 0o777 == 0o600
