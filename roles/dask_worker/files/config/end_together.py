"""Dask preload of the nannies: when one worker leaves, the unit ends, and systemd starts all of them anew.

`dask worker` lives as long as any of its nannies: a host would go on with fewer workers than it promises.
"""

from __future__ import annotations

import os
import signal

from distributed import Nanny


def dask_teardown(nanny: Nanny) -> None:
    """Stop the unit's first process in order, unless it is stopping or this nanny is a task's own."""
    first = str(os.getpid()) == os.environ.get("SYSTEMD_EXEC_PID")
    if first and callable(signal.getsignal(signal.SIGTERM)):  # Dask gives the signal back once it came
        os.kill(os.getpid(), signal.SIGTERM)
