"""Wait until scheduler and dashboard answer to the scheduler's own certificate.

Arguments: address of the scheduler, URL of the dashboard's health page, seconds to wait.
The certificate to show comes from Dask's configuration, in the environment.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import time
import urllib.request

import dask
from distributed.core import rpc
from distributed.security import Security


async def identity(address: str) -> None:
    """Ask the scheduler who it is."""
    arguments = Security().get_connection_args("scheduler")
    async with rpc(address, timeout=2, connection_args=arguments) as scheduler:
        answer = await scheduler.identity(n_workers=0)
    if answer["type"] != "Scheduler":
        raise OSError(f"a {answer['type']} answers there")


def dashboard(url: str) -> None:
    """Ask the dashboard's health page."""
    tls = "distributed.comm.tls"
    context = ssl.create_default_context(cafile=dask.config.get(f"{tls}.ca-file"))
    context.load_cert_chain(
        dask.config.get(f"{tls}.scheduler.cert"), dask.config.get(f"{tls}.scheduler.key")
    )
    with urllib.request.urlopen(url, timeout=2, context=context) as answer:
        if answer.read() != b"ok":
            raise OSError("something else answers there")


def main(address: str, url: str, seconds: str) -> None:
    """Ask until both answer or the time is over."""
    deadline = time.monotonic() + float(seconds)
    while True:
        asked = address
        try:
            asyncio.run(identity(address))
            asked = url
            dashboard(url)
            return
        except OSError as failure:
            if time.monotonic() > deadline:
                sys.exit(
                    f"the Dask scheduler does not answer at {asked}: {failure};"
                    " see 'journalctl -u odsp-dask_scheduler' on this host"
                )
        time.sleep(0.3)


main(*sys.argv[1:])
