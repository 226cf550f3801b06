"""The process around a model: one thread that reads, asks the model and answers, in turns.

While the model works, new questions wait in the sockets; when it is free, all that came are read
and go together. Nothing is handed between threads, so a lone caller waits for nobody.
"""

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import native, open_inference, wire
from .batching import Answer, Batcher
from .inputs import InputError
from .model import ModelError, load_model
from .question import Question
from .warmup import warm_up

_STDOUT, _STDERR = 1, 2
_FIRST_PASSED_SOCKET = 3
_BACKLOG = 1024
_PIECE = 1 << 16
_SEND_SECONDS = 10.0
"""A worker that does not take its answers for so long is given up."""
_LAST_WORDS_SECONDS = 5.0
_LAST_CALL_SECONDS = 0.02
_LAST_LINES = 10
_LONGEST_TEXT = 4096
"""Characters of a message or a line, so that any refusal can be sent."""
_WAKEUP = object()

_READERS: dict[bytes, Callable[[bytes], Question]] = {
    wire.PREDICT: native.read_native,
    wire.INFER: open_inference.read_inference,
}


class _Slot:
    """A place for one answer, in the order of a connection's questions."""

    __slots__ = ("connection", "frame")

    def __init__(self, connection: "_Connection") -> None:
        self.connection = connection
        self.frame: bytes | None = None


class _Connection:
    """One worker's connection."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._reader = wire.FrameReader()
        self._slots: deque[_Slot] = deque()

    def receive(self) -> list[tuple[_Slot, bytes, bytes]]:
        """What has come: a slot for the answer, kind and content of each frame."""
        received: list[tuple[_Slot, bytes, bytes]] = []
        while True:
            try:
                piece = self.channel.recv(_PIECE)
            except BlockingIOError:
                return received
            if not piece:
                raise EOFError
            for kind, content in self._reader.feed(piece):
                slot = _Slot(self)
                self._slots.append(slot)
                received.append((slot, kind, content))
            if len(piece) < _PIECE:
                return received

    def send(self) -> None:
        """Send the answers that are there and whose turn it is."""
        frames = []
        while self._slots and (frame := self._slots[0].frame) is not None:
            self._slots.popleft()
            frames.append(frame)
        if not frames:
            return
        data = b"".join(frames)
        try:
            sent = self.channel.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.channel.settimeout(_SEND_SECONDS)
            self.channel.sendall(memoryview(data)[sent:])
            self.channel.setblocking(False)


class Conversations:
    """All connections of a runner."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        # Asked for again by whoever answers now: the kernel then names this process as the peer.
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._wakeup, self._waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wakeup, selectors.EVENT_READ, _WAKEUP)
        self._ending = False

    def end(self) -> None:
        """Have the conversations end when all is answered; from a signal's handler or a thread."""
        self._ending = True
        os.write(self._waking, b"!")

    def close(self) -> None:
        """Hang up on everybody."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Connection):
                self._hang_up(key.data)
        self._selector.close()
        os.close(self._wakeup)
        os.close(self._waking)

    def receive(self, timeout: float | None) -> list[tuple[_Slot, bytes, bytes]] | None:
        """New questions, waiting for the first; None when it is time to end and none is left."""
        received: list[tuple[_Slot, bytes, bytes]] = []
        if self._ending:
            timeout = _LAST_CALL_SECONDS
        events = self._selector.select(timeout)
        for key, _ in events:
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is _WAKEUP:
                os.read(key.fd, _PIECE)
            elif isinstance(key.data, _Connection):
                try:
                    received += key.data.receive()
                except (EOFError, OSError, wire.FrameError):
                    self._hang_up(key.data)
        return None if self._ending and not events else received

    def send(self, connection: _Connection) -> None:
        """Send what is ready for one worker."""
        try:
            connection.send()
        except OSError:
            self._hang_up(connection)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                channel, _ = self._listener.accept()
                channel.setblocking(False)
                self._selector.register(channel, selectors.EVENT_READ, _Connection(channel))

    def _hang_up(self, connection: _Connection) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.channel)
        connection.channel.close()


class RunnerProcess:
    """Answers with a model, or tells why there is none."""

    def __init__(self, listener: socket.socket) -> None:
        self._conversations = Conversations(listener)

    def load(self, folder: Path, flavor: str) -> bool:
        """Load and warm the model; where that fails, tell who asks, and return False."""
        try:
            self._model = load_model(folder, flavor)
        except ModelError as error:
            self._fail(error, traceback.format_exc())
            return False
        self._batcher = Batcher(self._model)
        try:
            warm_up(self._batcher, folder)
        except ModelError as error:
            self._fail(error, trace_without_data(error))
            return False
        self._flavor = flavor
        return True

    def serve(self) -> None:
        """Answer with the model until `end`."""
        batcher = self._batcher
        while True:
            received = self._conversations.receive(0 if batcher else None)
            if received is None and not batcher:
                return
            for slot, kind, content in received or ():
                if kind == wire.DESCRIBE:
                    self._reply(slot, self._description())
                elif kind in _READERS:
                    try:
                        batcher.put(_READERS[kind](content), len(content), slot)
                    except InputError as error:
                        self._reply(slot, _refusal(wire.INPUT_ERROR, str(error)))
                else:
                    self._reply(slot, _refusal(wire.INPUT_ERROR, f"There is no frame {kind!r}."))
            if batcher:
                connections = {}
                for slot, rows, call_rows, answer in batcher.answer_next():
                    slot.frame = _frame(rows, call_rows, answer)
                    connections[id(slot.connection)] = slot.connection
                for connection in connections.values():
                    self._conversations.send(connection)

    def end(self) -> None:
        """Have `serve` return when all that was asked is answered."""
        self._conversations.end()

    def close(self) -> None:
        """Give up all connections."""
        self._conversations.close()

    def _reply(self, slot: _Slot, frame: bytes) -> None:
        slot.frame = frame
        self._conversations.send(slot.connection)

    def _description(self) -> bytes:
        known = {"flavor": self._flavor, "batching": self._batcher.batching}
        tensors = open_inference.describe(self._model.signature)
        try:
            return wire.pack(wire.DESCRIPTION, json.dumps(tensors | known).encode())
        except wire.FrameError:
            # Of so many columns, nothing is told.
            untold = dict.fromkeys(tensors)
            return wire.pack(wire.DESCRIPTION, json.dumps(untold | known).encode())

    def _fail(self, error: ModelError, trace: str) -> None:
        sys.stderr.write(trace)
        self._tell_problem(str(error), trace.splitlines()[-_LAST_LINES:])

    def _tell_problem(self, message: str, lines: list[str]) -> None:
        """Tell it to all who wait, or to the first who comes."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        refusal = _refusal(wire.LOAD_ERROR, message, lines=lines)
        told = False
        while not told and (left := deadline - time.monotonic()) > 0:
            for slot, _, _ in self._conversations.receive(left) or ():
                self._reply(slot, refusal)
                told = True


def _frame(rows: int, call_rows: int, answer: Answer) -> bytes:
    if isinstance(answer, bytes):
        try:
            return wire.pack_answer(rows, call_rows, answer)
        except wire.FrameError:
            message = f"The model's answer, {len(answer)} bytes, is too large to be sent."
            return _refusal(wire.MODEL_ERROR, message)
    if isinstance(answer, InputError):
        return _refusal(wire.INPUT_ERROR, str(answer))
    _write_trace(answer)
    return _refusal(wire.MODEL_ERROR, str(answer))


def _write_trace(error: BaseException) -> None:
    sys.stderr.write(trace_without_data(error))


def trace_without_data(error: BaseException | None) -> str:
    """Where an error and its causes happened and of what types they are.

    Not their texts, which often quote rows: only the caller gets those.
    """
    lines = []
    while error is not None:
        frames = traceback.format_tb(error.__traceback__)
        lines.append("".join([*frames, f"{type(error).__name__}\n"]))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "caused\n".join(reversed(lines))


def _refusal(kind: str, message: str, lines: Sequence[str] = ()) -> bytes:
    refusal: dict[str, Any] = {"kind": kind, "message": message[:_LONGEST_TEXT]}
    if lines:
        refusal["lines"] = [line[:_LONGEST_TEXT] for line in lines]
    return wire.pack(wire.REFUSAL, json.dumps(refusal).encode())


def end_with_service(lock: Path) -> None:
    """End this process when no worker of the service holds its lock any more."""
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # It leads a group: what the model has started is no orphan.
        os.killpg(0, signal.SIGKILL)


def inherited_listener() -> socket.socket:
    """The socket that whoever started this process has made for it."""
    if (os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")) != (
        str(os.getpid()),
        "1",
    ):
        raise SystemExit("A runner is started with its socket, by LISTEN_PID and LISTEN_FDS=1.")
    return socket.socket(fileno=_FIRST_PASSED_SOCKET)


def main(arguments: list[str]) -> None:
    """Run one model: its folder, its flavor and, for a child of a worker, the service's lock."""
    folder, flavor, *lock = arguments
    listener = inherited_listener()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if lock:
        threading.Thread(target=end_with_service, args=[Path(lock[0])], daemon=True).start()
    runner = RunnerProcess(listener)
    loaded = runner.load(Path(folder), flavor)
    sys.stderr.flush()
    if loaded:
        # What it wrote until now may be kept by whoever started it; from now on there is no end.
        os.dup2(_STDOUT, _STDERR)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runner.end())
        # A bug's text may quote rows as well.
        sys.excepthook = lambda _, error, __: _write_trace(error)
        runner.serve()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that a model left behind must not keep the process.
    os._exit(0 if loaded else 1)
