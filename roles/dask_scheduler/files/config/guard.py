"""Dask preload of the scheduler: refuse strangers at the dashboard and peers from another lock."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from time import time
from typing import Any

from distributed import Scheduler, node, versions
from distributed.comm import Comm

Handler = Callable[..., Awaitable[None]]

logger = logging.getLogger("distributed.scheduler")

LOCK = "odsp-lock"
# What a task's pickle depends on; compared with peers that announce no lock.
PACKAGES = ["python", "dask", "distributed", "cloudpickle", "msgpack", "tornado", "numpy", "pandas"]


class HTTPServer(node.HTTPServer):  # type: ignore[misc]
    """A dashboard server that takes nobody without a certificate of the platform.

    Dask itself reads the authority's file but then does not ask for a certificate.
    """

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Demand a client certificate before the first connection; without TLS do not start."""
        context = kwargs.get("ssl_options")
        if not isinstance(context, ssl.SSLContext):
            raise SystemExit("the dashboard of the Dask scheduler has no TLS: refusing to start")
        context.verify_mode = ssl.CERT_REQUIRED
        super().initialize(*args, **kwargs)


# This module is imported while the scheduler is built, before its dashboard listens.
node.HTTPServer = HTTPServer


def announced(package: str, peer: dict[str, Any] | None) -> str:
    """Return the version a peer announces; of Python only what pickles depend on."""
    version = str(((peer or {}).get("packages") or {}).get(package))
    return ".".join(version.split(".")[:2]) if package == "python" else version


def difference(peer: dict[str, Any] | None) -> str:
    """Return how the peer's packages differ from the scheduler's, or nothing."""
    own = versions.get_versions()
    packages = PACKAGES if announced(LOCK, peer) == "None" else [LOCK]
    pairs = [(package, announced(package, peer), announced(package, own)) for package in packages]
    return ", ".join(
        f"{what} {theirs} instead of {ours}" for what, theirs, ours in pairs if theirs != ours
    )


def refusal(who: str, peer: dict[str, Any] | None) -> str:
    """Return the sentence that refuses a peer, or nothing if it may come in."""
    found = difference(peer)
    if not found:
        return ""
    return (
        f"the Dask scheduler refuses {who}: it was not installed from the scheduler's lock"
        f" ({found}); install both from one release, on one Debian release,"
        " with 'ansible-playbook site.yml'"
    )


def guarded_worker(add_worker: Handler) -> Handler:
    """Return the registration of workers behind the check."""

    async def register_worker(comm: Comm, **message: Any) -> None:
        problem = refusal(f"worker '{message.get('name')}'", message.get("versions"))
        if problem:
            logger.warning(problem)
            await comm.write({"status": "error", "message": problem, "time": time()})
            return
        await add_worker(comm, **message)

    return register_worker


def guarded_client(add_client: Handler) -> Handler:
    """Return the registration of clients behind the check."""

    async def register_client(comm: Comm, **message: Any) -> None:
        problem = refusal(f"the client at {comm.peer_address}", message.get("versions"))
        if problem:
            logger.warning(problem)
            await comm.write([{"op": "stream-start", "error": problem}])
            await comm.close()
            return
        await add_client(comm, **message)

    return register_client


def dask_setup(scheduler: Scheduler) -> None:
    """Put the check before the registrations; end the process rather than run without it."""
    try:
        context = scheduler.http_server.ssl_options
        if context.verify_mode != ssl.CERT_REQUIRED:
            raise SystemExit(
                "the dashboard does not ask for client certificates: refusing to start"
            )
        handlers = scheduler.handlers
        handlers["register-worker"] = guarded_worker(handlers["register-worker"])
        handlers["register-client"] = guarded_client(handlers["register-client"])
    except Exception as failure:  # Dask would log it and go on
        raise SystemExit(f"cannot guard the Dask scheduler: {failure!r}") from failure
