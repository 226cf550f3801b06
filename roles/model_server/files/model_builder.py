#!/usr/bin/python3
"""Build the wheels that a model's requirements lack: one request, one answer, over.

A build runs the package's own code. So this runs in a unit of its own, with no secret and nothing
of the host but programs, behind a socket that only the model server's account may open. A request
is a line of JSON,

    {"requirements": [...], "constraints": [...], "index_url": ..., "wheels_dir": ...}

each of the last two null where it is not used. The answer is a line, too: `{"error": ...}` with
the end of what uv said, or `{"wheels": [{"name": ..., "size": ...}, ...]}`, which the bytes of the
wheels follow. Of what has a wheel already, none is made; the model server gets that itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

LONGEST_ERROR = 2**14


class FailedError(Exception):
    """uv could not do it; the message is what it said."""


def main(uv: str, scratch: Path) -> None:
    """Answer the request on standard input; `scratch` is an empty folder."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_the_caller, daemon=True).start()
    try:
        wheels = build(uv, scratch, request)
    except FailedError as failure:
        print(json.dumps({"error": str(failure)[-LONGEST_ERROR:]}))
        return
    found = [{"name": wheel.name, "size": wheel.stat().st_size} for wheel in wheels]
    print(json.dumps({"wheels": found}), flush=True)
    for wheel in wheels:
        with wheel.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)


def end_with_the_caller() -> None:
    """End when nobody waits for the answer any more, and with this process all of the unit."""
    with suppress(ConnectionError):
        while os.read(0, 1):
            pass
    os._exit(0)


def build(uv: str, scratch: Path, request: dict[str, Any]) -> list[Path]:
    """Return the wheels of all that is required and has none."""
    # A cache of its own: what one package's code leaves there, no other one is built with.
    cache = scratch / "cache"
    settings = {"UV_CACHE_DIR": str(cache), "NO_COLOR": "1"}
    if request["index_url"]:
        settings["UV_DEFAULT_INDEX"] = request["index_url"]
    sources = []
    if request["wheels_dir"]:
        sources = ["--no-index", "--find-links", request["wheels_dir"]]

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(uv, "--no-config", "pip", command, *arguments, *sources, "--quiet"),
                *("--python", sys.executable, "--no-python-downloads"),
            ],
            cwd=scratch,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def must(command: str, *arguments: str) -> str:
        done = run(command, *arguments)
        if done.returncode:
            raise FailedError(done.stderr)
        return done.stdout

    for name in ("requirements", "constraints"):
        (scratch / name).write_text("".join(f"{line}\n" for line in request[name]))
    plain = ("--no-header", "--no-annotate")
    chosen = must("compile", *plain, "--constraints", "constraints", "requirements").splitlines()
    for package in chosen:
        one = ("--no-deps", "--target", "installed", package)
        if run("install", "--dry-run", "--no-build", *one).returncode:
            must("install", *one)
    # Where uv keeps the wheels that it has built, beside the sources, which may hold others; among
    # them are those that were only needed to build.
    found = cache.glob("sdists-*/**/*.whl")
    return sorted(
        wheel
        for wheel in found
        if (wheel.parent / "metadata.msgpack").exists() and requirement_of(wheel) in chosen
    )


def requirement_of(wheel: Path) -> str:
    """Return the line that chooses this wheel's package and version."""
    name, version = wheel.name.split("-")[:2]
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
