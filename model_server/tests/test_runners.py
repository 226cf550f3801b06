import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import TrainedModels
from hosts import eventually
from model_server import runners
from model_server.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelFailedError,
    ModelNotLoadableError,
    RunnerEndedError,
)
from model_server.processes import ChildProcesses, serving
from model_server.runner import wire
from model_server.runners import Runner, RunnerNotRunningError
from model_server.settings import Settings

PYTHON = Path(sys.executable)


@pytest.fixture
def runner(settings: Settings) -> Iterator[Runner]:
    with serving(settings):
        runner = _runner(settings, "../../etc/passwd", "pyfunc")
        yield runner
        runner.stop()


def _runner(settings: Settings, name: str, flavor: str) -> Runner:
    return Runner(settings, ChildProcesses(settings), name, flavor, 1)


def _start(runner: Runner, files: Path, seconds: float = 60) -> int:
    runner.start(PYTHON, files, time.monotonic() + seconds)
    return _process(runner)


def _process(runner: Runner) -> int:
    process = ChildProcesses(runner._settings).process_id(runner.name)
    assert process is not None
    return process


def _body(*row: float) -> bytes:
    return json.dumps({"data": [row]}).encode()


def _run(use: Callable[[], Awaitable[Any]], runner: Runner) -> Any:
    async def run() -> Any:
        try:
            return await use()
        finally:
            runner.close()

    return asyncio.run(run())


def _is_gone(process: int) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        # Of our own children, the dead wait to be looked at.
        if state.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_socket_that_is_still_somebody_elses_is_no_runner_yet(
    runner: Runner, trained: TrainedModels
) -> None:
    """As systemd's are, between their making and their being given away."""
    _start(runner, trained.folder / "fragile")
    before = os.geteuid()
    (runner._settings.sockets / runner.name).chmod(0o000)
    if before == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(RunnerNotRunningError):
            _run(lambda: runner.predict(_body(1.0)), runner)
    finally:
        os.seteuid(before)


def test_one_life_of_a_fragile_model(
    runner: Runner,
    settings: Settings,
    trained: TrainedModels,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A start takes seconds, so one process serves several questions."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden")
    first = _start(runner, trained.folder / "fragile")
    # Another worker, which knows the name only, finds the same process.
    other = _runner(settings, "../../etc/passwd", "pyfunc")
    assert _process(other) == first
    assert 10 * 2**20 < (other.memory() or 0) < 2**30
    assert re.fullmatch(r"[a-z0-9-]{1,22}", runner.name)
    assert {path.name for path in settings.sockets.iterdir()} == {
        "service.lock",
        runner.name,
        f"{runner.name}.process",
    }

    async def ask_all() -> None:
        # The second time, the answers before have come together, and the questions go together.
        for _ in range(2):
            answers = await asyncio.gather(
                *(worker.predict(_body(n)) for n in range(20) for worker in (runner, other))
            )
            assert {rows for rows, _, _ in answers} == {1}
            # Whoever's answers tell it: each call is told once.
            assert sum(call_rows for _, call_rows, _ in answers) == 40
            doubled = [json.loads(answer)["prediction"]["doubled"] for _, _, answer in answers]
            assert doubled == [[[2 * n]] for n in range(20) for _ in range(2)]
        answer = json.loads(answers[0][2])["prediction"]
        assert answer["not a number"] is None
        assert "hidden" not in str(answer["environment"])
        assert answer["environment"]["OMP_NUM_THREADS"] == "1"
        with pytest.raises(InvalidRequestError, match="data holds no row"):
            await runner.predict(b'{"data": []}')
        with pytest.raises(ModelFailedError, match="this number is too much"):
            await runner.predict(_body(-2))
        # Whoever was refused or failed spoils it for nobody.
        assert json.loads((await other.predict(_body(1)))[2])["prediction"]["doubled"] == [[2]]
        with pytest.raises(RunnerEndedError, match="ended before it answered"):
            await runner.predict(_body(-9))
        assert await asyncio.to_thread(_is_gone, first)
        with pytest.raises(RunnerNotRunningError):
            await other.predict(_body(1))
        runner.close()
        other.close()

    asyncio.run(ask_all())
    assert runner.memory() is None
    # Whoever has started it may see its end a little later.
    eventually(lambda: [runner.ended(), other.ended()], wanted=["SIGKILL", "SIGKILL"])
    journal = capfd.readouterr().err
    # Where it failed, and not with what.
    assert "fragile.py" in journal
    assert "RuntimeError\n" in journal
    assert "this number is too much\n" not in journal


def test_stopping_ends_the_process_even_when_it_hangs(
    runner: Runner, settings: Settings, trained: TrainedModels
) -> None:
    process = _start(runner, trained.folder / "fragile")
    impatient = _runner(
        settings.model_copy(update={"predict_timeout_seconds": 0.2}), "../../etc/passwd", "pyfunc"
    )
    with pytest.raises(DeadlineExceededError, match=r"longer than 0\.2 seconds"):
        _run(lambda: impatient.predict(_body(-1)), impatient)
    assert not _is_gone_now(process)
    _runner(settings, "../../etc/passwd", "pyfunc").stop()
    assert _is_gone(process)
    assert not any((settings.state_dir / "scratch").iterdir())


def test_each_caller_waits_for_his_own_time(
    runner: Runner, settings: Settings, trained: TrainedModels
) -> None:
    _start(runner, trained.folder / "fragile")
    impatient = _runner(
        settings.model_copy(update={"predict_timeout_seconds": 0.4}), "../../etc/passwd", "pyfunc"
    )

    async def waits() -> float:
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            await impatient.predict(_body(-1))
        return time.monotonic() - began

    async def one_after_the_other() -> list[float]:
        first = asyncio.create_task(waits())
        await asyncio.sleep(0.2)
        return list(await asyncio.gather(first, waits()))

    assert min(_run(one_after_the_other, impatient)) > 0.39


def test_one_timer_is_enough_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(runners, "time", clock)

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        ours, others = socket.socketpair()
        with others:
            _, connection = await loop.create_unix_connection(
                lambda: runners._Connection(10), sock=ours
            )
            first = connection.ask(wire.pack(wire.PREDICT))
            clock.now = 4
            second = connection.ask(wire.pack(wire.PREDICT))
            clock.now = 10
            connection._give_up()
            assert isinstance(first.exception(), TimeoutError)
            assert not second.done()
            assert connection._timer is not None
            assert connection._timer.when() - loop.time() <= 4
            others.sendall(2 * wire.pack(wire.DESCRIPTION, b"{}"))
            assert await second == (wire.DESCRIPTION, b"{}")
            clock.now = 12
            third = connection.ask(wire.pack(wire.PREDICT))
            clock.now = 14
            connection._give_up()
            assert not third.done()
            assert connection._timer.when() - loop.time() <= 8
        with pytest.raises(ConnectionResetError):
            await third
        assert connection._timer is None

    asyncio.run(ask())


def _is_gone_now(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_runner_ends_when_the_service_is_gone(settings: Settings, trained: TrainedModels) -> None:
    runner = _runner(settings, "tree", "sklearn")
    with serving(settings):
        process = _start(runner, trained.folder / "tree")
        with serving(settings):
            pass
        # Gone is the service only with its last worker.
        time.sleep(1.5)
        assert _process(runner) == process
    assert _is_gone(process)


def test_a_model_that_does_not_load_says_why(
    runner: Runner, tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(ModelNotLoadableError, match="cannot be loaded as pyfunc"):
        _start(runner, tmp_path)
    assert runner.memory() is None
    with pytest.raises(RunnerNotRunningError):
        _run(lambda: runner.predict(_body(1)), runner)
    assert settings.sockets.exists()


@pytest.mark.parametrize(
    ("script", "seconds", "error", "sentence"),
    [
        ("exit 7", 60, ModelNotLoadableError, "exit status 7"),
        ("kill -SEGV $$", 60, ModelNotLoadableError, "SIGSEGV"),
        ("kill -35 $$", 60, ModelNotLoadableError, "signal 35"),
        ("sleep 30", 0.7, DeadlineExceededError, "took longer"),
    ],
)
def test_a_process_that_ends_or_hangs_while_it_starts(
    runner: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    seconds: float,
    error: type[Exception],
    sentence: str,
) -> None:
    # The thread that sees why it ended may be late.
    monkeypatch.setattr(runners, "_GLANCE_SECONDS", min(seconds, 10))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec 2>/dev/null\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(error, match=sentence):
        runner.start(python, tmp_path, time.monotonic() + seconds)


def test_an_interpreter_that_is_missing(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoadableError, match="cannot be run"):
        runner.start(tmp_path / "python", tmp_path, time.monotonic() + 5)


# A process in a runner's place, which sends these bytes to its first caller, the second, ...
_SPEAKER = """#!{python}
import socket
listener = socket.socket(fileno=3)
for said in {said!r}:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(said)
    connection.recv(65536)
"""
_DESCRIBED = {"inputs": None, "outputs": None, "flavor": "pyfunc", "batching": True}
_LOADED = wire.pack(wire.DESCRIPTION, json.dumps(_DESCRIBED).encode())


def _speaker(folder: Path, *said: bytes) -> Path:
    python = folder / "python"
    python.write_text(_SPEAKER.format(python=sys.executable, said=said))
    python.chmod(0o755)
    return python


def _too_large(kind: bytes) -> bytes:
    return (wire.FROM_RUNNER[kind] + 2).to_bytes(4, "big") + kind


def _says(kind: bytes, content: Any) -> bytes:
    return wire.pack(kind, json.dumps(content).encode())


_NO_FRAMES = {
    "an unknown frame": wire.pack(b"?"),
    "a question": wire.pack(wire.PREDICT, b"{}"),
    "no frame": b"HTTP/1.1 200 OK",
    "a large refusal": _too_large(wire.REFUSAL),
    "no JSON": wire.pack(wire.REFUSAL, b"x"),
    "no UTF-8": wire.pack(wire.REFUSAL, b'{"kind": "\xff'),
    "nested deep": wire.pack(wire.REFUSAL, 100_000 * b"["),
    "no object": _says(wire.REFUSAL, ["input"]),
    "no kind": _says(wire.REFUSAL, {"message": "a"}),
    "an unknown kind": _says(wire.REFUSAL, {"kind": "\ud800", "message": "a"}),
    "no text": _says(wire.REFUSAL, {"kind": "model", "message": {"a": 1}}),
    "no lines": _says(wire.REFUSAL, {"kind": "load", "message": "a", "lines": [1]}),
}


@pytest.mark.parametrize(
    "said",
    [
        *_NO_FRAMES.values(),
        _too_large(wire.DESCRIPTION),
        wire.pack_answer(1, 1, b"{}"),
        _says(wire.DESCRIPTION, {}),
        _says(wire.DESCRIPTION, _DESCRIBED | {"inputs": [{"name": 5}]}),
    ],
)
def test_nonsense_while_loading_is_a_model_that_does_not_load(
    runner: Runner, tmp_path: Path, said: bytes
) -> None:
    with pytest.raises(ModelNotLoadableError, match="not say properly"):
        runner.start(_speaker(tmp_path, said), tmp_path, time.monotonic() + 60)


@pytest.mark.parametrize(
    "said",
    [
        *_NO_FRAMES.values(),
        _too_large(wire.ANSWER),
        wire.pack(wire.ANSWER, b"abc"),
        # What is counted: more rows than were asked, in a call of more than there can be.
        wire.pack_answer(1000, 0, b"{}"),
        wire.pack_answer(1, wire.MOST_JOINED_ROWS + 1, b"{}"),
        _LOADED,
    ],
)
def test_nonsense_for_an_answer_is_a_model_that_failed(
    runner: Runner, tmp_path: Path, said: bytes
) -> None:
    """For this caller; the next ones find the worker as it was."""
    # The first one asks whether it is loaded.
    runner.start(_speaker(tmp_path, _LOADED, said), tmp_path, time.monotonic() + 60)
    with pytest.raises(ModelFailedError, match="no proper answer"):
        _run(lambda: runner.predict(_body(1)), runner)


def test_what_a_runner_says_is_cut_and_cleaned(runner: Runner, tmp_path: Path) -> None:
    """It goes to callers, into the log and into the database."""
    said = {
        "kind": "load",
        "message": "\0a\ud800b\x1b[2J\nü" + 10_000 * "x",
        "lines": [*(20 * ["old"]), *(10 * [2_000 * "\x9bü"])],
    }
    with pytest.raises(ModelNotLoadableError) as told:
        runner.start(_speaker(tmp_path, _says(wire.REFUSAL, said)), tmp_path, time.monotonic() + 60)
    sentence = str(told.value)
    assert sentence.startswith("\ufffda\ufffdb\ufffd[2J\nü")
    assert "old" not in sentence
    assert 4096 < len(sentence.encode()) < 10_000
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", sentence)
