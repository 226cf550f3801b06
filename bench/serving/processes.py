"""Server processes: start and stop them, and read what they and others take from the machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

Command = Sequence[str | Path]
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
#: How long a server may take to end before it is killed (seconds).
STOP_S = 8.0


class Server:
    """A program with all its descendants, in a session of its own."""

    def __init__(
        self,
        command: Command,
        variables: Mapping[str, str | Path],
        folder: Path,
        log: Path,
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether the program itself has ended."""
        return self._process.poll() is not None

    def cpu_seconds(self) -> float:
        """CPU time that the tree's living processes have taken so far."""
        return sum(_cpu_seconds(process) for process in self._tree())

    def pss_bytes(self) -> int:
        """Memory of the tree: private pages, and its part of each shared one."""
        return sum(_pss_bytes(process) for process in self._tree())

    def run_on(self, cpu: int) -> None:
        """Keep the tree on one CPU from now on."""
        for process in self._tree():
            for thread in Path(f"/proc/{process}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {cpu})

    def last_words(self, lines: int = 3) -> str:
        """The end of the log, in one line."""
        text = self.log.read_text(errors="replace").strip().splitlines()
        return " / ".join(line.strip() for line in text[-lines:])

    def stop(self) -> None:
        """End the whole tree: with SIGTERM, what is left after `STOP_S` with SIGKILL."""
        tree = self._tree()
        for process in tree:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and any(_is_alive(process) for process in tree):
            time.sleep(0.05)
        for process in tree | self._tree():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def _tree(self) -> set[int]:
        """Every descendant, and everyone in a session that one of them leads."""
        children: dict[int, set[int]] = defaultdict(set)
        sessions: dict[int, set[int]] = defaultdict(set)
        for process, fields in _all_processes():
            children[int(fields[1])].add(process)
            sessions[int(fields[3])].add(process)
        tree: set[int] = set()
        found = {self._process.pid} | sessions[self._process.pid]
        while found:
            process = found.pop()
            tree.add(process)
            found |= (children[process] | sessions[process]) - tree
        return {process for process in tree if _is_alive(process)}


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server until the end of the block."""
    try:
        yield server
    finally:
        server.stop()


def free_ports(count: int = 1) -> list[int]:
    """TCP ports of the loopback device on which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def busy_seconds() -> float:
    """CPU time that all processes of the machine have taken since its start."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / TICKS_PER_SECOND


def _all_processes() -> Iterable[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))):
            yield int(entry.name), fields


def _fields(process: int) -> list[str]:
    """Of /proc/<id>/stat from the state on; none when it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _is_alive(process: int) -> bool:
    fields = _fields(process)
    return bool(fields) and fields[0] != "Z"


def _cpu_seconds(process: int) -> float:
    fields = _fields(process)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND if fields else 0.0


def _pss_bytes(process: int) -> int:
    with suppress(OSError):
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        if found := re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE):
            return int(found[1]) * 1024
    return 0
