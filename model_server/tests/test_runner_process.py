import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import TrainedModels
from model_server.runner import process, wire
from model_server.runner.process import RunnerProcess, inherited_listener, trace_without_data

# What MLflow warns of inside a model's process is for its log.
pytestmark = pytest.mark.filterwarnings("default")

ROW = b'{"data": [[21]]}'
_ASKED = 2**20
"""Bytes; no question here has more."""


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def listener(address: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        yield listener


@contextmanager
def _connected(address: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(address))
        yield connection


def _frames(connection: socket.socket, count: int) -> list[tuple[bytes, bytes]]:
    reader = wire.FrameReader()
    frames: list[tuple[bytes, bytes]] = []
    while len(frames) < count:
        piece = connection.recv(1 << 16)
        if not piece:
            raise EOFError
        frames += reader.feed(piece)
    return frames


def _prediction(frame: tuple[bytes, bytes]) -> Any:
    kind, content = frame
    assert kind == wire.ANSWER, content
    return json.loads(wire.unpack_answer(content, _ASKED)[2])["prediction"]


def _refusal(frame: tuple[bytes, bytes]) -> Any:
    kind, content = frame
    assert kind == wire.REFUSAL
    return json.loads(content)


@contextmanager
def _loaded(listener: socket.socket, folder: Path, flavor: str) -> Iterator[threading.Thread]:
    """A runner with a model, and the thread in which it shall answer."""
    runner = RunnerProcess(listener)
    thread = threading.Thread(target=runner.serve)
    try:
        assert runner.load(folder, flavor)
        yield thread
        runner.end()
        thread.join(60)
        assert not thread.is_alive()
    finally:
        runner.close()


def _problem(listener: socket.socket, address: Path, folder: Path, flavor: str) -> Any:
    """What somebody who waits for the model is told."""
    runner = RunnerProcess(listener)
    with _connected(address) as connection:
        connection.sendall(wire.pack(wire.DESCRIBE))
        assert not runner.load(folder, flavor)
        (frame,) = _frames(connection, 1)
    runner.close()
    refusal = _refusal(frame)
    assert refusal["kind"] == wire.LOAD_ERROR
    return refusal


def test_what_was_asked_before_the_end_is_answered_in_order(
    listener: socket.socket, address: Path, trained: TrainedModels
) -> None:
    with _connected(address) as one, _connected(address) as other:
        # Asked before the model is even loaded: everybody waits, nobody is lost.
        one.sendall(wire.pack(wire.DESCRIBE) + wire.pack(wire.PREDICT, ROW))
        one.sendall(wire.pack(wire.PREDICT, b'{"data": [[1]]}') + wire.pack(wire.PREDICT, b"["))
        other.sendall(wire.pack(b"?") + wire.pack(wire.PREDICT, b'{"data": [[-2]]}'))
        other.sendall(wire.pack(wire.PREDICT, b'{"data": [[2], [3]]}'))
        with _loaded(listener, trained.folder / "fragile", "pyfunc") as thread:
            thread.start()
        described, first, second, third = _frames(one, 4)
        assert json.loads(described[1])["flavor"] == "pyfunc"
        assert _prediction(first)["doubled"] == [[42]]
        assert _prediction(second)["doubled"] == [[2]]
        assert _refusal(third)["kind"] == wire.INPUT_ERROR
        unknown, failed, last = _frames(other, 3)
        assert "no frame b'?'" in _refusal(unknown)["message"]
        assert _refusal(failed) == {
            "kind": wire.MODEL_ERROR,
            "message": "The model failed: RuntimeError: this number is too much",
        }
        assert _prediction(last)["doubled"] == [[4], [6]]
        assert wire.unpack_answer(last[1], _ASKED)[0] == 2


@pytest.mark.parametrize(("questions", "size"), [(1, 65536), (1, 131072), (64, 1024)])
def test_questions_that_end_where_a_piece_ends_are_answered(
    listener: socket.socket, address: Path, trained: TrainedModels, questions: int, size: int
) -> None:
    """That nothing follows is no reason to wait for more."""
    frame = wire.pack(wire.PREDICT, ROW.ljust(size - len(wire.pack(wire.PREDICT))))
    assert len(frame) == size
    with (
        _connected(address) as connection,
        _loaded(listener, trained.folder / "fragile", "pyfunc") as thread,
    ):
        connection.settimeout(5)
        connection.sendall(questions * frame)
        thread.start()
        answers = _frames(connection, questions)
    assert [_prediction(answer)["doubled"] for answer in answers] == questions * [[[42]]]


def test_the_rows_of_a_call_are_told_with_one_of_its_answers(
    listener: socket.socket, address: Path, trained: TrainedModels
) -> None:
    """Whichever worker gets that answer; what is refused was no part of a call."""
    rows = wire.pack(wire.PREDICT, json.dumps({"data": trained.rows}).encode())
    with _connected(address) as one, _connected(address) as other:
        # The first eight are the trial, each alone; the others go together.
        one.sendall(10 * rows + wire.pack(wire.PREDICT, b"["))
        other.sendall(2 * rows)
        with _loaded(listener, trained.folder / "tree", "sklearn") as thread:
            thread.start()
            answers = [_frames(one, 11), _frames(other, 2)]
        told = [
            wire.unpack_answer(content, _ASKED)[:2]
            for frames in answers
            for kind, content in frames
            if kind == wire.ANSWER
        ]
    assert [own for own, _ in told] == 12 * [3]
    assert sum(call for _, call in told) == 12 * 3
    (joined,) = (call for own, call in told if call not in {0, own})
    assert joined == 4 * 3


def test_whoever_hangs_up_or_talks_nonsense_harms_nobody(
    listener: socket.socket,
    address: Path,
    trained: TrainedModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_SEND_SECONDS", 0.2)
    many = wire.pack(wire.PREDICT, json.dumps({"data": 1000 * trained.rows}).encode())
    with _loaded(listener, trained.folder / "tree", "sklearn") as thread:
        with _connected(address) as gone:
            gone.sendall(many)
        thread.start()
        with _connected(address) as liar, _connected(address) as deaf, _connected(address) as good:
            liar.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert liar.recv(1) == b""
            # Asks and asks, and never reads an answer.
            deaf.settimeout(60)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                deaf.sendall(1000 * many)
            good.sendall(wire.pack(wire.PREDICT, json.dumps({"data": trained.rows}).encode()))
            (answer,) = _frames(good, 1)
            assert _prediction(answer) == trained.predictions["tree"]


def test_a_problem_is_told_with_its_last_lines(
    listener: socket.socket, address: Path, tmp_path: Path
) -> None:
    problem = _problem(listener, address, tmp_path, "pyfunc")
    assert "cannot be loaded as pyfunc" in problem["message"]
    assert "MLmodel" in problem["lines"][-1]


def test_nobody_who_asks_is_waited_for_only_so_long(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_LAST_WORDS_SECONDS", 0.1)
    runner = RunnerProcess(listener)
    assert not runner.load(tmp_path, "pyfunc")
    runner.close()


def test_an_example_that_the_model_fails_with_is_a_failed_load(
    listener: socket.socket, address: Path, trained: TrainedModels, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained.folder / "tree", tmp_path / "tree")
    (folder / "serving_input_example.json").write_text('{"inputs": [[1.0, 2.0]]}')
    problem = _problem(listener, address, folder, "sklearn")
    assert "fails with its own input example" in problem["message"]
    assert "4 features" in problem["message"]


def test_an_error_is_traced_to_its_cause_without_what_it_quotes() -> None:
    def convert(row: str) -> float:
        try:
            return float(row)
        except ValueError as error:
            raise RuntimeError(f"refused: {row}") from error

    with pytest.raises(RuntimeError) as raised:
        convert("secret")
    trace = trace_without_data(raised.value)
    assert "secret" not in trace.replace('convert("secret")', "")
    assert trace.index("ValueError\n") < trace.index("caused\n") < trace.index("RuntimeError\n")
    assert "return float(row)" in trace


def test_a_runner_is_not_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    with pytest.raises(SystemExit, match="started with its socket"):
        inherited_listener()


def test_the_runner_needs_nothing_but_the_standard_library() -> None:
    program = Path(process.__file__).parent / "__main__.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", program, "folder", "pyfunc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "started with its socket" in done.stderr
