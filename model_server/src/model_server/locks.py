"""Locks between processes: one file each, released by the kernel when its holder dies."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_server.errors import DeadlineExceededError

_PAUSE_SECONDS = 0.05


@contextmanager
def exclusive(path: Path, deadline: float, what: str) -> Iterator[None]:
    """Hold the lock, waiting for it until the deadline (of `time.monotonic`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceededError(
                        f"Waited too long for another worker that is busy with {what}."
                    ) from None
                time.sleep(_PAUSE_SECONDS)
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock together with all others who share it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_shared(path: Path) -> bool:
    """Whether anybody holds the lock, alone or with others."""
    return _is_refused(path, fcntl.LOCK_EX)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock exclusively at this moment."""
    return _is_refused(path, fcntl.LOCK_SH)


def _is_refused(path: Path, kind: int) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
