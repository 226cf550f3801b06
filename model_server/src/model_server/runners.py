"""One process per loaded model version, as a worker sees it: start it, ask it, stop it.

A runner is found by its socket, whose name follows from the model: any worker can use a runner that
another one started. Starting and stopping happen under the model's lock.
"""

import asyncio
import hashlib
import json
import logging
import socket
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from model_server.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelFailedError,
    ModelNotLoadableError,
    ModelServerError,
    RunnerBusyError,
    RunnerEndedError,
    RunnerHangsError,
)
from model_server.processes import Processes, RunnerSpec
from model_server.replies import ReplyError, read_description, read_refusal, with_lines
from model_server.runner import wire
from model_server.settings import Settings

_LOG = logging.getLogger(__name__)

_GLANCE_SECONDS = 0.5
"""How often a start looks whether the process has ended."""
_PAUSE_SECONDS = 0.01
_PIECE = 1 << 16
_WHILE_LOADING = {kind: wire.FROM_RUNNER[kind] for kind in (wire.DESCRIPTION, wire.REFUSAL)}
_REFUSED = {
    wire.INPUT_ERROR: InvalidRequestError,
    wire.MODEL_ERROR: ModelFailedError,
    wire.LOAD_ERROR: ModelNotLoadableError,
}
_SHORTEST_TIMER = 0.001
_MOST_WAITING = 1024
"""Callers of one worker that may wait for one runner."""
_MOST_WAITING_BYTES = 256 * 2**20
"""What they sent, all together; one alone may have sent more."""
_SILENT_TIMEOUTS = 1.9
"""How many times the longest prediction a process may be silent while it is asked: two callers, one
after the other, have waited in vain, less what a timer may be early. One such time alone may be
a single question that is too large, and callers behind it who will be answered."""


class RunnerNotRunningError(Exception):
    """There is no process to ask; nothing was asked."""


class Runner:
    """The process of one model version with one flavor, as this worker sees it."""

    def __init__(
        self, settings: Settings, processes: Processes, name: str, flavor: str, version: int
    ) -> None:
        self._settings = settings
        self._processes = processes
        self._label = f"model {name!r} version {version} as {flavor}"
        self._flavor = flavor
        # Names are the registry's users' and never reach a path; their digests do.
        model = hashlib.sha256(json.dumps([name, version]).encode()).hexdigest()[:16]
        self.name = f"{model}-{flavor[0]}"
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    def ended(self) -> str | None:
        """Why the process is not running any more, where that is known."""
        return self._processes.ended(self.name)

    def memory(self) -> int | None:
        """The bytes that the process uses now."""
        return self._processes.memory(self.name)

    def start(self, python: Path, files: Path, deadline: float) -> None:
        """Start the process and wait until its model is loaded and warm.

        Raises `ModelNotLoadableError` with the runner's reason and the last lines that it wrote.
        """
        started = time.monotonic()
        self._processes.start(self.name, RunnerSpec(python, files, self._flavor))
        try:
            self._wait_until_loaded(deadline)
        except BaseException:
            self._processes.stop(self.name, 0)
            raise
        _LOG.info(
            "runner started",
            extra={
                "model": self._label,
                "runner": self.name,
                "seconds": round(time.monotonic() - started, 3),
                "wrote": self._processes.last_lines(self.name),
            },
        )

    def stop(self) -> None:
        """End the process, whoever started it; its answers under way are still given."""
        self._processes.stop(self.name, self._settings.stop_timeout_seconds)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._processes.stop(self.name, 0)

    def is_connected(self) -> bool:
        """Whether this worker speaks to the process already, so that it is a loaded one."""
        return self._connection is not None and not self._connection.is_closing()

    def answered(self) -> float:
        """When the process said something to this worker last, by `time.monotonic`."""
        return self._connection.answered if self._connection is not None else 0.0

    def close(self) -> None:
        """Give up this worker's connection when its last answer has come; the process goes on."""
        if self._connection is not None:
            self._connection.finish()
            self._connection = None

    async def predict(self, body: bytes, kind: bytes = wire.PREDICT) -> tuple[int, int, bytes]:
        """Rows of the request, rows of the model's call if not told yet, body of the response."""
        content = await self._ask(wire.pack(kind, body), wire.ANSWER)
        try:
            return wire.unpack_answer(content, len(body))
        except wire.FrameError as error:
            raise self._nonsense(error) from None

    async def describe(self) -> dict[str, Any]:
        """What the model takes and gives: `inputs`, `outputs`, `flavor`, `batching`."""
        content = await self._ask(wire.pack(wire.DESCRIBE), wire.DESCRIPTION)
        try:
            return read_description(content)
        except ReplyError as error:
            raise self._nonsense(error) from None

    async def _ask(self, frame: bytes, wanted: bytes) -> bytes:
        """The content of the wanted kind of frame that comes for this one."""
        connection = self._connection
        if connection is None or connection.is_closing():
            connection = await self._connected()
        if not connection.has_room(len(frame)):
            raise RunnerBusyError(f"Too many callers wait for {self._label}; try again soon.")
        longest = self._settings.predict_timeout_seconds
        try:
            kind, content = await connection.ask(frame)
        except TimeoutError:
            sentence = f"The prediction of {self._label} took longer than {longest:g} seconds."
            silent = connection.silent_seconds()
            if silent > _SILENT_TIMEOUTS * longest:
                raise RunnerHangsError(sentence, silent) from None
            raise DeadlineExceededError(sentence) from None
        except ConnectionError:
            raise RunnerEndedError(
                f"The process of {self._label} ended before it answered; it is started again "
                "after a pause."
            ) from None
        except wire.FrameError as error:
            raise self._nonsense(error) from None
        if kind == wanted:
            return content
        try:
            raise _refused(kind, content)
        except ReplyError as error:
            raise self._nonsense(error) from None

    def _nonsense(self, error: Exception) -> ModelFailedError:
        return ModelFailedError(f"{_capital(self._label)} gives no proper answer: {error}.")

    async def _connected(self) -> "_Connection":
        async with self._connecting:
            connection = self._connection
            if connection is None or connection.is_closing():
                channel = self._connect()
                longest = self._settings.predict_timeout_seconds
                _, connection = await asyncio.get_running_loop().create_unix_connection(
                    partial(_Connection, longest), sock=channel
                )
                self._connection = connection
            return connection

    def _connect(self) -> socket.socket:
        """A connection, without blocking: a Unix socket connects at once or not at all."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            channel.connect(str(self._processes.address(self.name)))
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            # Refused also while systemd makes the socket: it is root's before it is given away.
            channel.close()
            raise RunnerNotRunningError(self._label) from None
        except BlockingIOError:
            channel.close()
            raise RunnerBusyError(f"Too many callers wait for {self._label}.") from None
        except BaseException:
            channel.close()
            raise
        return channel

    def _wait_until_loaded(self, deadline: float) -> None:
        try:
            with self._connect() as channel:
                kind, content = self._first_answer(channel, deadline)
            if kind != wire.DESCRIPTION:
                raise ModelNotLoadableError(str(_refused(kind, content)))
            read_description(content)
        except (EOFError, ConnectionError, RunnerNotRunningError):
            raise self._not_loadable() from None
        except (wire.FrameError, ReplyError) as error:
            raise ModelNotLoadableError(
                f"The process of {self._label} does not say properly that it is loaded: {error}."
            ) from None

    def _first_answer(self, channel: socket.socket, deadline: float) -> tuple[bytes, bytes]:
        reader = wire.FrameReader(_WHILE_LOADING)
        channel.settimeout(_GLANCE_SECONDS)
        channel.sendall(wire.pack(wire.DESCRIBE))
        while time.monotonic() < deadline:
            try:
                piece = channel.recv(_PIECE)
            except TimeoutError:
                if self._processes.ended(self.name) is not None:
                    raise EOFError from None
                continue
            if not piece:
                raise EOFError
            for frame in reader.feed(piece):
                return frame
        raise DeadlineExceededError(
            f"Loading {self._label} took longer than "
            f"{self._settings.load_timeout_seconds:g} seconds."
        )

    def _not_loadable(self) -> ModelNotLoadableError:
        # Its end is seen by its socket first.
        patience = time.monotonic() + _GLANCE_SECONDS
        while (reason := self._processes.ended(self.name)) is None:
            if time.monotonic() > patience:
                reason = "for a reason unknown"
                break
            time.sleep(_PAUSE_SECONDS)
        sentence = f"The process of {self._label} ended while it loaded ({reason})."
        return ModelNotLoadableError(with_lines(sentence, self._processes.last_lines(self.name)))


class _Waiting(NamedTuple):
    """One caller."""

    answer: "asyncio.Future[tuple[bytes, bytes]]"
    size: int
    """Bytes of what was asked."""
    until: float
    """By `time.monotonic`."""


class _Connection(asyncio.Protocol):
    """A connection to a runner, whose answers come in the order of the questions.

    Nobody waits for one longer than `longest` seconds.
    """

    _transport: asyncio.Transport

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._loop = asyncio.get_running_loop()
        self._reader = wire.FrameReader(wire.FROM_RUNNER)
        self._waiting: deque[_Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None
        """For who has waited longest: one timer for each question would cost more than the rest."""
        self._waiting_bytes = 0
        self._unsent: list[bytes] = []
        self._several = False
        """Whether answers come together, as to many callers at once: then they also ask together,
        and what is asked in one turn of the loop is sent in one piece."""
        self._asked = 0.0
        self.answered = 0.0
        """When anything came last, by `time.monotonic`."""
        self._finishing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def has_room(self, size: int) -> bool:
        """Whether one more may wait, who has sent so many bytes."""
        return not self._waiting or (
            len(self._waiting) < _MOST_WAITING and self._waiting_bytes + size <= _MOST_WAITING_BYTES
        )

    def silent_seconds(self) -> float:
        """For how long nothing has come, although it was asked."""
        return time.monotonic() - max(self._asked, self.answered) if self._waiting else 0.0

    def ask(self, frame: bytes) -> "asyncio.Future[tuple[bytes, bytes]]":
        """Send a frame; what comes back for it, or TimeoutError.

        A caller who stops waiting harms nobody.
        """
        answer: asyncio.Future[tuple[bytes, bytes]] = self._loop.create_future()
        now = time.monotonic()
        if not self._waiting:
            self._asked = now
        if self._timer is None:
            self._timer = self._loop.call_later(self._longest, self._give_up)
        self._waiting.append(_Waiting(answer, len(frame), now + self._longest))
        self._waiting_bytes += len(frame)
        if self._several:
            if not self._unsent:
                self._loop.call_soon(self._send)
            self._unsent.append(frame)
        else:
            self._transport.write(frame)
        return answer

    def _send(self) -> None:
        frames, self._unsent = self._unsent, []
        if not self._transport.is_closing():
            self._transport.writelines(frames)

    def _give_up(self) -> None:
        """Tell those whose time is over; their answers, should they come, are for nobody."""
        self._timer = None
        now = time.monotonic()
        for waiting in self._waiting:
            if waiting.until > now:
                # What is less than a millisecond is none to the loop.
                left = max(waiting.until - now, _SHORTEST_TIMER)
                self._timer = self._loop.call_later(left, self._give_up)
                return
            if not waiting.answer.done():
                waiting.answer.set_exception(TimeoutError())
        if self._finishing:
            self._close_if_nobody_waits()

    def finish(self) -> None:
        """Close when the last answer has come."""
        self._finishing = True
        self._close_if_nobody_waits()

    def data_received(self, data: bytes) -> None:
        self.answered = time.monotonic()
        before = len(self._waiting)
        try:
            for frame in self._reader.feed(data):
                if not self._waiting:
                    # Nobody asked for it.
                    self._transport.abort()
                    return
                answer = self._next()
                if not answer.done():
                    answer.set_result(frame)
        except wire.FrameError as error:
            if self._waiting and not (answer := self._next()).done():
                answer.set_exception(error)
            self._transport.abort()
            return
        self._several = before - len(self._waiting) > 1 or bool(self._unsent)
        if self._finishing:
            self._close_if_nobody_waits()

    def _next(self) -> "asyncio.Future[tuple[bytes, bytes]]":
        """Take who has waited longest."""
        waiting = self._waiting.popleft()
        self._waiting_bytes -= waiting.size
        return waiting.answer

    def _close_if_nobody_waits(self) -> None:
        if all(waiting.answer.done() for waiting in self._waiting):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            if not (answer := self._next()).done():
                answer.set_exception(ConnectionResetError())


def _refused(kind: bytes, content: bytes) -> ModelServerError:
    """The error that a refusal stands for, or ReplyError."""
    if kind != wire.REFUSAL:
        raise ReplyError(f"there is no {kind!r} to what was asked")
    refusal = read_refusal(content)
    return _REFUSED[refusal.kind](refusal.message)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
