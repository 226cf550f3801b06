"""Wait until the scheduler reports exactly the worker processes that this host shall run.

Arguments: address of the scheduler, address of this host, number of processes, seconds to wait.
The certificate to show comes from Dask's configuration, in the environment.
"""

from __future__ import annotations

import asyncio
import sys
import time

from distributed.core import rpc
from distributed.security import Security


async def running(address: str, host: str) -> int:
    """Return how many workers at the host's address the scheduler knows."""
    arguments = Security().get_connection_args("worker")
    async with rpc(address, timeout=2, connection_args=arguments) as scheduler:
        answer = await scheduler.identity(n_workers=-1)
    return sum(
        worker["host"] == host and worker["status"] == "running"
        for worker in answer["workers"].values()
    )


def main(address: str, host: str, processes: str, seconds: str) -> None:
    """Ask until the number is right or the time is over."""
    deadline = time.monotonic() + float(seconds)
    while True:
        try:
            found = asyncio.run(running(address, host))
            if found == int(processes):
                return
            problem = f"the Dask scheduler knows {found} of the {processes} workers at {host}"
        except OSError as failure:
            problem = f"the Dask scheduler does not answer at {address}: {failure}"
        if time.monotonic() > deadline:
            sys.exit(f"{problem}; see 'journalctl -u odsp-dask_worker' on this host")
        time.sleep(0.3)


main(*sys.argv[1:])
