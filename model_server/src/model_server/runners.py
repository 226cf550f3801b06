"""Start, ask and stop one process per loaded model version.

A runner is found by its socket, whose name follows from the model: any worker can use a runner that
another one started. Starting and stopping happen under the model's lock.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread

from model_server.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelFailedError,
    ModelNotLoadableError,
    RunnerEndedError,
)
from model_server.locks import exclusive, is_held
from model_server.runner import wire
from model_server.settings import Settings

_LOG = logging.getLogger(__name__)

_PROGRAM = Path(__file__).parent / "runner" / "__main__.py"
_PAUSE_SECONDS = 0.02
_CALLS_AT_ONCE = 64
_CONNECTIONS_KEPT = 32
_STDERR = 2
_PEER = struct.Struct("3i")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class RunnerNotRunningError(Exception):
    """There is no process to ask; nothing was asked."""


class Runner:
    """The process of one model version with one flavor, as this worker sees it."""

    def __init__(self, settings: Settings, name: str, flavor: str, version: int) -> None:
        self._settings = settings
        self._label = f"model {name!r} version {version} as {flavor}"
        self._flavor = flavor
        # Names are the registry's users' and never reach a path; their digests do.
        model = hashlib.sha256(json.dumps([name, version]).encode()).hexdigest()[:16]
        self._address = settings.sockets / f"{model}.{flavor}"
        self._lock = settings.sockets / f"{model}.lock"
        self._scratch = settings.state_dir / "scratch" / self._address.name
        self._idle: list[socket.socket] = []
        self._calls = asyncio.Semaphore(_CALLS_AT_ONCE)

    def changing(self, deadline: float) -> AbstractContextManager[None]:
        """The lock to hold while this model version is loaded or unloaded, with any flavor."""
        return exclusive(self._lock, deadline, self._label)

    def is_changing(self) -> bool:
        """Whether some worker is loading or unloading it."""
        return is_held(self._lock)

    def process_id(self) -> int | None:
        """The running process, or None."""
        try:
            with self._connected() as connection:
                return _peer(connection)
        except RunnerNotRunningError:
            return None

    def start(self, python: Path, model_files: Path, deadline: float) -> None:
        """Start the process and wait until its model is loaded.

        It becomes reachable for other workers only then.
        """
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True, mode=0o700)
        starting = self._address.with_name(f"{self._address.name}.new")
        starting.unlink(missing_ok=True)
        service = service_lock(self._settings)
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                [
                    *(python, "-I", "-u", _PROGRAM),
                    *(starting, model_files, self._flavor, service),
                ],
                cwd=self._scratch,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                start_new_session=True,
            )
        except OSError as error:
            raise ModelNotLoadableError(
                f"The interpreter {python} cannot be run ({error.strerror})."
            ) from error
        Thread(target=self._watch, args=[process], daemon=True).start()
        try:
            self._wait_until_loaded(process, starting, deadline)
            starting.rename(self._address)
        except BaseException:
            process.kill()
            starting.unlink(missing_ok=True)
            raise
        _LOG.info(
            "runner started",
            extra={
                "model": self._label,
                "runner_pid": process.pid,
                "seconds": round(time.monotonic() - started, 3),
            },
        )

    def stop(self) -> None:
        """End the process, whoever started it; its answers under way are still given."""
        try:
            with self._connected() as connection:
                # No new caller from here on.
                self._address.unlink(missing_ok=True)
                process = _peer(connection)
                connection.settimeout(self._settings.stop_timeout_seconds)
                with contextlib.suppress(OSError):
                    connection.sendall(wire.pack(wire.STOP))
                _end(process, self._settings.stop_timeout_seconds)
        except RunnerNotRunningError:
            self._address.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def close(self) -> None:
        """Give up this worker's connections; the process goes on."""
        while self._idle:
            self._idle.pop().close()

    async def predict(self, body: bytes) -> bytes:
        """The body of the response to the body of a prediction request."""
        try:
            async with asyncio.timeout(self._settings.predict_timeout_seconds), self._calls:
                kind, content = await self._ask(wire.pack(wire.PREDICT, body))
        except TimeoutError:
            raise DeadlineExceededError(
                f"The prediction of {self._label} took longer than "
                f"{self._settings.predict_timeout_seconds:g} seconds."
            ) from None
        if kind == wire.ANSWER:
            return content
        refusal = json.loads(content)
        if refusal["kind"] == wire.INPUT_ERROR:
            raise InvalidRequestError(refusal["message"])
        raise ModelFailedError(refusal["message"])

    async def _ask(self, frame: bytes) -> tuple[bytes, bytes]:
        loop = asyncio.get_running_loop()
        connection = self._idle_connection() or self._connect(self._address)
        try:
            await loop.sock_sendall(connection, frame)
            (length,) = wire.HEADER.unpack(await _exactly(connection, wire.HEADER.size))
            answer = await _exactly(connection, length)
        except (EOFError, ConnectionError):
            connection.close()
            raise RunnerEndedError(
                f"The process of {self._label} ended before it answered; the next request "
                "starts it again."
            ) from None
        except BaseException:
            # Cut off between question and answer: not to be used again.
            connection.close()
            raise
        if len(self._idle) < _CONNECTIONS_KEPT:
            self._idle.append(connection)
        else:
            connection.close()
        return answer[:1], answer[1:]

    def _idle_connection(self) -> socket.socket | None:
        while self._idle:
            connection = self._idle.pop()
            try:
                connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return connection
            except OSError:
                pass
            # At its end, or with bytes that nobody asked for.
            connection.close()
        return None

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with self._connect(self._address) as connection:
            connection.setblocking(True)
            yield connection

    def _connect(self, address: Path) -> socket.socket:
        """A connection, without blocking: a Unix socket connects at once or not at all."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise RunnerNotRunningError(self._label) from None
        except OSError as error:
            connection.close()
            if error.errno == errno.EAGAIN:
                raise RunnerEndedError(f"Too many callers wait for {self._label}.") from None
            raise
        return connection

    def _wait_until_loaded(
        self, process: subprocess.Popen[bytes], address: Path, deadline: float
    ) -> None:
        connection = self._first_connection(process, address, deadline)
        with connection:
            connection.settimeout(max(deadline - time.monotonic(), _PAUSE_SECONDS))
            try:
                connection.sendall(wire.pack(wire.DESCRIBE))
                kind, content = wire.receive(connection)
            except TimeoutError:
                raise self._too_late() from None
            except (EOFError, ConnectionError):
                raise self._ended(process) from None
        if kind == wire.REFUSAL:
            raise ModelNotLoadableError(json.loads(content)["message"])

    def _first_connection(
        self, process: subprocess.Popen[bytes], address: Path, deadline: float
    ) -> socket.socket:
        while True:
            try:
                connection = self._connect(address)
            except RunnerNotRunningError:
                if process.poll() is not None:
                    raise self._ended(process) from None
                if time.monotonic() > deadline:
                    raise self._too_late() from None
                time.sleep(_PAUSE_SECONDS)
            else:
                return connection

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"Loading {self._label} took longer than "
            f"{self._settings.load_timeout_seconds:g} seconds."
        )

    def _ended(self, process: subprocess.Popen[bytes]) -> ModelNotLoadableError:
        return ModelNotLoadableError(
            f"The process of {self._label} ended while it loaded ({_reason(process.wait())})."
        )

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        _LOG.log(
            logging.INFO if status == 0 else logging.WARNING,
            "runner ended",
            extra={
                "model": self._label,
                "runner_pid": process.pid,
                "reason": _reason(status),
            },
        )

    def _environment(self) -> dict[str, str]:
        """All that a runner gets; nothing is inherited, so no secret is."""
        threads = str(self._settings.runner_threads)
        return {
            "PATH": os.defpath,
            "HOME": str(self._scratch),
            "TMPDIR": str(self._scratch),
            "LANG": "C.UTF-8",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **dict.fromkeys(_THREAD_VARIABLES, threads),
        }


def service_lock(settings: Settings) -> Path:
    """The file that every worker holds a shared lock on while it lives."""
    return settings.sockets / "service.lock"


@contextmanager
def serving(settings: Settings) -> Iterator[None]:
    """Be a worker of the service: runners live as long as one of these does."""
    settings.sockets.mkdir(parents=True, exist_ok=True)
    with service_lock(settings).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _peer(connection: socket.socket) -> int:
    """The process behind a Unix socket, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    process: int = _PEER.unpack(credentials)[0]
    return process


def _end(process_id: int, timeout: float) -> None:
    """Wait until a process is gone; kill it if it takes too long."""
    try:
        descriptor = os.pidfd_open(process_id)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(timeout * 1000):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poll.poll()
    finally:
        os.close(descriptor)


def _reason(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


async def _exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < count:
        piece = await loop.sock_recv(connection, min(count - len(received), 1 << 20))
        if not piece:
            raise EOFError
        received += piece
    return bytes(received)
