"""The process around a model: one thread asks the model, one per connection reads and writes."""

import fcntl
import json
import os
import queue
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import wire
from .inputs import InputError
from .model import Model, ModelError, load_model

_BACKLOG = 1024
_WATCH_SECONDS = 1.0
_LAST_WORDS_SECONDS = 5.0
_PAUSE_SECONDS = 0.01


@dataclass
class _Job:
    body: bytes
    answer: bytes = b""
    done: threading.Event = field(default_factory=threading.Event)

    def finish(self, answer: bytes) -> None:
        self.answer = answer
        self.done.set()


class RunnerProcess:
    """Listens from the start, answers when the model is there."""

    def __init__(self, address: Path) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self._problem_told = threading.Event()
        self._problem: str | None = None
        self._replies = 0
        self._counting = threading.Lock()
        address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        self._listener.bind(str(address))
        os.umask(before)
        self._listener.listen(_BACKLOG)

    def serve(self, folder: Path, flavor: str) -> int:
        """Load the model and answer until told to stop."""
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            model = load_model(folder, flavor)
        except ModelError as error:
            traceback.print_exc()
            self._problem = str(error)
            self._loaded.set()
            self._problem_told.wait(_LAST_WORDS_SECONDS)
            return 1
        self._loaded.set()
        while (job := self._jobs.get()) is not None:
            job.finish(_answer(model, job.body))
        self._finish(model)
        return 0

    def _finish(self, model: Model) -> None:
        """Answer what was asked before the socket's name went away, and let it be sent."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while self._replies and time.monotonic() < deadline:
            try:
                job = self._jobs.get(timeout=_PAUSE_SECONDS)
            except queue.Empty:
                continue
            if job is not None:
                job.finish(_answer(model, job.body))

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            while True:
                try:
                    kind, content = wire.receive(connection)
                    with self._replying():
                        connection.sendall(self._reply(kind, content))
                except (EOFError, ConnectionError):
                    return
                if self._problem is not None:
                    self._problem_told.set()

    @contextmanager
    def _replying(self) -> Iterator[None]:
        with self._counting:
            self._replies += 1
        try:
            yield
        finally:
            with self._counting:
                self._replies -= 1

    def _reply(self, kind: bytes, content: bytes) -> bytes:
        if kind == wire.STOP:
            self._jobs.put(None)
            return wire.pack(wire.ANSWER)
        self._loaded.wait()
        if self._problem is not None:
            return _refusal(wire.MODEL_ERROR, self._problem)
        if kind == wire.DESCRIBE:
            return wire.pack(wire.ANSWER)
        job = _Job(content)
        self._jobs.put(job)
        job.done.wait()
        return job.answer


def _answer(model: Model, body: bytes) -> bytes:
    try:
        return wire.pack(wire.ANSWER, model.predict(body))
    except InputError as error:
        return _refusal(wire.INPUT_ERROR, str(error))
    except ModelError as error:
        traceback.print_exc()
        return _refusal(wire.MODEL_ERROR, str(error))
    except Exception as error:  # noqa: BLE001  whatever it is, only this request fails
        traceback.print_exc()
        return _refusal(wire.MODEL_ERROR, f"The model failed: {type(error).__name__}: {error}")


def _refusal(kind: str, message: str) -> bytes:
    return wire.pack(wire.REFUSAL, json.dumps({"kind": kind, "message": message}).encode())


def end_with_service(lock: Path) -> None:
    """End this process when no worker of the service holds its lock any more."""
    with lock.open("rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_WATCH_SECONDS)
            else:
                os._exit(0)


def main(arguments: list[str]) -> int:
    """Run one model: address of the socket, the model's folder, its flavor, the service's lock."""
    address, folder, flavor, lock = arguments
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=end_with_service, args=[Path(lock)], daemon=True).start()
    status = RunnerProcess(Path(address)).serve(Path(folder), flavor)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that a model left behind must not keep the process.
    os._exit(status)
