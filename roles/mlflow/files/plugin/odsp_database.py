"""A plugin of SQLAlchemy: nobody waits for a PostgreSQL that takes connections and never answers.

A slow answer is waited for as long as the server lives. Whether it does is asked, every few
seconds, by opening one more connection, which the driver gives up after `connect_timeout`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

from psycopg import Connection, OperationalError, errors
from sqlalchemy import Engine, event
from sqlalchemy.engine import CreateEnginePlugin

PATIENCE_S = 5.0


class PatientConnection(Connection[Any]):
    """A connection that asks whether the server lives while an answer is late."""

    open_another: Callable[[], Connection[Any]]

    def wait(
        self, gen: Generator[Any, Any, Any], interval: float = 0.1, timeout: float | None = None
    ) -> Any:
        """Wait for an answer; fail once the server is found not to take connections in time."""
        return super().wait(self._watched(gen), interval, timeout)

    def _watched(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        due = time.monotonic() + PATIENCE_S
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                # Nothing came within an interval.
                if not ready and time.monotonic() > due:
                    self._ask_server()
                if ready or time.monotonic() > due:
                    due = time.monotonic() + PATIENCE_S
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value

    def _ask_server(self) -> None:
        try:
            self.open_another().close()
        except errors.ConnectionTimeout:
            # SQLAlchemy sees a closed connection and takes a new one next time.
            self.pgconn.finish()
            raise OperationalError("the server takes connections and does not answer") from None
        except OperationalError:
            pass  # it answers, if only that it has no connection to spare


class Plugin(CreateEnginePlugin):
    """Gives the engine such connections."""

    def update_url(self, url: Any) -> Any:
        """Leave the URL as it is: the plugin has no parameters."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Open every connection of the engine as one that does not wait for ever."""

        @event.listens_for(engine, "do_connect")
        def connect(_: Any, __: Any, args: Any, settings: Any) -> PatientConnection:
            connection = PatientConnection.connect(*args, **settings)
            connection.open_another = lambda: Connection.connect(*args, **settings)
            return connection
