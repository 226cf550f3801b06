"""Dask preload of every peer: announce its lock; workers of one unit end together."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from distributed import Nanny, versions

LOCK = "odsp-lock"
PackageInfo = Callable[[Iterable[str]], dict[str, str | None]]


def lock_digest() -> str | None:
    """Return the name of the environment, a digest of lock and Python; None outside of ODSP."""
    name = Path(sys.prefix).resolve().name
    return name if re.fullmatch("[0-9a-f]{16}", name) else None


def with_lock(get_package_info: PackageInfo) -> PackageInfo:
    """Return a function that adds the lock to what Dask announces of itself."""
    digest = lock_digest()

    @wraps(get_package_info)
    def announced(pkgs: Iterable[str]) -> dict[str, str | None]:
        return {**get_package_info(pkgs), LOCK: digest}

    return announced


# Dask imports a preload file and then reloads it: the second time there is nothing left to do.
if not hasattr(versions.get_package_info, "__wrapped__"):
    versions.get_package_info = with_lock(versions.get_package_info)


def dask_teardown(peer: Any) -> None:
    """Stop the unit when one of its nannies ends, that systemd may start all of them anew.

    `dask worker` lives as long as any of its nannies: a host would go on with fewer workers.
    """
    of_unit = isinstance(peer, Nanny) and str(os.getpid()) == os.environ.get("SYSTEMD_EXEC_PID")
    # Once the signal came, Dask has given it back and is stopping already.
    if of_unit and callable(signal.getsignal(signal.SIGTERM)):
        os.kill(os.getpid(), signal.SIGTERM)
