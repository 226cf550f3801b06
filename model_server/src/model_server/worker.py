"""Gunicorn's worker: uvicorn's, which lets go of its callers without losing a request.

It also sends a short answer in one piece where uvicorn would send two.
"""

import asyncio
import math
import os
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any, ClassVar, cast

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

_LAST_CALL_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
_NOTIFY_SECONDS = 1.0
_CLOSE = (b"connection", b"close")


class DrainingServer(Server):
    """Closes no connection on which a request may be under way.

    Uvicorn closes idle connections at once when it is told to end, also one on which a request has
    been sent and not yet been read. Here each connection gets the time for one more request, whose
    answer says that it is the last one.

    It also ends, in the same way, when gunicorn's first process is gone: nobody else would end it,
    and a new service would find its port taken.
    """

    def __init__(self, config: Config, arbiter: int) -> None:
        """`arbiter` is gunicorn's first process, which has forked this one."""
        super().__init__(config)
        self._arbiter = arbiter

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; asked ten times a second."""
        return await super().on_tick(counter) or os.getppid() != self._arbiter

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connection, answer on those that there are, then end."""
        for server in self.servers:
            server.close()
        self.server_state.default_headers.append(_CLOSE)
        end = time.monotonic() + _LAST_CALL_SECONDS
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE_SECONDS)
        await super().shutdown(sockets)


class _JoiningTransport:
    """A connection's transport, which can hold back the head of an answer until its body comes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._holds = False
        self._held = b""

    def hold(self) -> None:
        """Send what is written next with what is written after it."""
        self._let_go()
        self._holds = True

    def write(self, data: bytes) -> None:
        """Send it, or keep it."""
        if self._holds:
            self._holds, self._held = False, data
            return
        if self._held:
            data, self._held = self._held + data, b""
        self._transport.write(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        """Send them all."""
        self.write(b"".join(pieces))

    def close(self) -> None:
        """Close the connection when all is sent."""
        self._let_go()
        self._transport.close()

    def _let_go(self) -> None:
        if self._held:
            self._transport.write(self._held)
            self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class JoiningProtocol(HttpToolsProtocol):
    """Uvicorn's, with a `scope["hold_head"]` for who sends a body at once behind its head.

    Each piece on its own is a system call here and a wake-up of the caller.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take up a connection."""
        super().connection_made(cast("asyncio.Transport", _JoiningTransport(transport)))

    def on_message_begin(self) -> None:
        """Take up a request."""
        super().on_message_begin()
        self.scope["hold_head"] = cast("_JoiningTransport", self.transport).hold  # type: ignore[typeddict-unknown-key]


class Worker(UvicornWorker):
    """A uvicorn worker with that server.

    Gunicorn aborts a worker that does not tell for long that it lives. Uvicorn's tells so by the
    clock on the wall, which may be set back, and no more once it drains.
    """

    # Nobody asks for the address or scheme of a caller before the door.
    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        **UvicornWorker.CONFIG_KWARGS,
        "proxy_headers": False,
        "server_header": False,
        "http": JoiningProtocol,
        "callback_notify": None,
    }

    leaving = False
    """Whether it shall end; gunicorn's first process alone looks here."""

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        settings = self.wsgi.state.settings
        # Whoever takes longer to send or to read keeps no old worker for ever.
        self.config.timeout_graceful_shutdown = math.ceil(
            settings.load_timeout_seconds + settings.predict_timeout_seconds
        )
        server = DrainingServer(self.config, self.ppid)
        self._install_sigquit_handler()
        notifying = asyncio.create_task(self._notify_always())
        await server.serve(sockets=self.sockets)
        notifying.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _notify_always(self) -> None:
        """Tell by this loop that it turns, also while it drains."""
        while True:
            self.notify()
            await asyncio.sleep(_NOTIFY_SECONDS)
