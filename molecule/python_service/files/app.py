"""A component in small: says what it runs on, and does what tests ask for."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HOARD: list[bytes] = []
SETTINGS: list[str] = []


def read_settings(*_: object) -> None:
    """Read the file again, as a reload asks."""
    SETTINGS[:] = [Path("/etc/odsp/probe.conf").read_text()]


def eat(mebibytes: int) -> None:
    """Take that much memory and keep it."""
    HOARD.extend(b"x" * 2**20 for _ in range(mebibytes))


def write(path: str) -> str:
    """Write a file; return how that went."""
    try:
        Path(path).write_text("here")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "written"


def app(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    """Answer with JSON."""
    question, _, argument = environ["QUERY_STRING"].partition("=")
    if question == "eat":
        eat(int(argument))
    answer = {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "prefix": str(Path(sys.prefix).resolve()),
        "settings": SETTINGS[0],
        "waitress": version("waitress"),
        "written": write(argument) if question == "write" else "",
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


read_settings()
signal.signal(signal.SIGHUP, read_settings)
