"""Gunicorn's worker: uvicorn's, which lets go of its callers without losing a request."""

import asyncio
import socket
import sys
import time

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

_LAST_CALL_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
_CLOSE = (b"connection", b"close")


class DrainingServer(Server):
    """Closes no connection on which a request may be under way.

    Uvicorn closes idle connections at once when it is told to end, also one on which a request has
    been sent and not yet been read. Here each connection gets the time for one more request, whose
    answer says that it is the last one.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connection, answer on those that there are, then end."""
        for server in self.servers:
            server.close()
        self.server_state.default_headers.append(_CLOSE)
        end = time.monotonic() + _LAST_CALL_SECONDS
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE_SECONDS)
        await super().shutdown(sockets)


class Worker(UvicornWorker):
    """A uvicorn worker with that server."""

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = DrainingServer(config=self.config)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
