#!/usr/bin/python3
"""Start and stop model runners for the model server, and tell why one failed: one request, over.

Runs as root behind a socket that only the model server's account may open, and trusts that account
with nothing: a request names a runner and two folders by their digests, and is refused unless it is
one of

    start NAME FLAVOR MODEL ENVIRONMENT
    stop NAME
    lines NAME

The folders are opened below the model server's state without following a single link, and bound
from their open descriptors to a place of root's own, where the runner's unit takes them from. What
the account renames or links meanwhile changes nothing: it can hand a runner its own folders only.

The answer is `ok`, or `no` and a sentence. To `lines` it goes on with the end of what the runner's
last process wrote to the journal, which the account may not read.
"""

import ctypes
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUEST = re.compile(
    r"start (?P<start>[a-z0-9][a-z0-9-]{0,21}) (?P<flavor>pyfunc|sklearn)"
    r" (?P<model>[0-9a-f]{32}) (?P<environment>[0-9a-f]{32})\n"
    r"|stop (?P<stop>[a-z0-9][a-z0-9-]{0,21})\n"
    r"|lines (?P<lines>[a-z0-9][a-z0-9-]{0,21})\n"
)
LONGEST_REQUEST = 256
LINES = 10
LONGEST_LINES = 8192

MS_BIND = 0x1000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8
#: Where a folder is bound to -> where it lies in the model server's state.
FOLDERS = {"model": "models", "environment": "environments"}

libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """What was asked for is not done; the message says why."""


def main(state: Path, runners: Path) -> None:
    """Answer the request on standard input; `runners` is the folder of root's own."""
    try:
        told = answer(os.read(0, LONGEST_REQUEST), state, runners)
    except RefusedError as refusal:
        print("no", refusal)
    else:
        print("ok", told, sep="\n")


def answer(line: bytes, state: Path, runners: Path) -> str:
    """Do what one line asks for; return what it asks to be told."""
    request = REQUEST.fullmatch(line.decode("ascii", errors="replace"))
    if request is None:
        raise RefusedError("This is no request.")
    if request["lines"]:
        return last_lines(request["lines"])
    name = request["start"] or request["stop"]
    with exclusive(runners / name) as place:
        stop(name, place)
        if request["start"]:
            start(name, place, state, request.groupdict())
    return ""


def start(name: str, place: Path, state: Path, request: dict[str, str]) -> None:
    """Give a runner its folders and start its socket and its process."""
    try:
        for target, kind in FOLDERS.items():
            bind(state, [kind, request[target]], place / target)
        (place / "settings").write_text(f"MODEL_FLAVOR={request['flavor']}\n")
        systemctl("start", f"odsp-model_runner@{name}.service")
    except BaseException:
        stop(name, place)
        raise


def stop(name: str, place: Path) -> None:
    """End a runner, if there is one, and take its folders back."""
    units = [f"odsp-model_runner@{name}.{kind}" for kind in ("service", "socket")]
    systemctl("stop", *units)
    # Else a runner that failed could not be told from one that never was.
    systemctl("reset-failed", *units, must=False)
    for target in FOLDERS:
        while (place / target).exists() and unmount(place / target):
            pass


def last_lines(name: str) -> str:
    """Return what a runner's last process wrote: no other process's, nor an earlier one's."""
    unit = f"odsp-model_runner@{name}.service"
    invocation = output("systemctl", "show", "--property=InvocationID", "--value", unit).strip()
    if not invocation:
        return ""
    # What was written a moment ago may still be on its way.
    output("journalctl", "--sync")
    options = ("--quiet", "--no-pager", "--output=cat", f"--lines={LINES}")
    return output("journalctl", *options, f"_SYSTEMD_INVOCATION_ID={invocation}")[-LONGEST_LINES:]


@contextmanager
def exclusive(place: Path) -> Iterator[Path]:
    """Have a runner's place, which is made now if need be, for one request at a time."""
    place.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield place
    finally:
        os.close(descriptor)


def bind(state: Path, path: list[str], target: Path) -> None:
    """Bind a folder of the model server's state to `target`, whatever its names become."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(state, flags)
    try:
        for part in path:
            below = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        target.mkdir(mode=0o700, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", target)
    except OSError as error:
        raise RefusedError(f"{'/'.join(path)} cannot be used ({error.strerror}).") from error
    finally:
        os.close(descriptor)


def mount(source: str, target: Path) -> None:
    """Bind one folder to another."""
    if libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def unmount(target: Path) -> bool:
    """Take away what is bound to a folder; tell whether there was something."""
    return not libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW)


def output(*command: str) -> str:
    """Return what a program tells, or nothing."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return done.stdout


def systemctl(verb: str, *units: str, must: bool = True) -> None:
    """Have systemd do something."""
    done = subprocess.run(
        ["systemctl", verb, *units],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if must and done.returncode:
        lines = done.stderr.split("\n")
        raise RefusedError(f"systemd did not {verb} the runner: {lines[0].strip()}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
