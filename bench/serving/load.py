"""Load from wrk: one identical request over and over on kept connections."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bench.serving.environments import NotAvailableError
from bench.serving.processes import Server, busy_seconds

SCRIPT = Path(__file__).parent / "post.lua"
#: CPU that others may take during a measurement (cores); above it, it is repeated once.
FOREIGN_CORES = 0.15


@dataclass(frozen=True)
class Case:
    """A model, a number of rows per request, a number of connections."""

    model: str
    rows: int
    connections: int

    @property
    def name(self) -> str:
        """As in the report's data."""
        return f"{self.model}-{self.rows}x{self.connections}"


CASES = (
    Case("lr", 1, 1),
    Case("lr", 1, 8),
    Case("lr", 1, 64),
    Case("lr", 100, 8),
    Case("rf", 1, 1),
    Case("rf", 1, 8),
    Case("rf", 1, 64),
)


@dataclass(frozen=True)
class Figures:
    """What one run of wrk saw, and what the machine did meanwhile."""

    requests: int
    seconds: float
    rate: float
    """Requests per second."""
    p50_ms: float
    p99_ms: float
    errors: int
    """Connections that failed, answers that did not come in time or were not 2xx."""
    cpu_ms: float
    """CPU time of the server's processes per request."""
    foreign_cores: float
    """CPU that neither the server nor wrk nor this program took."""


def find_wrk() -> str:
    """The program wrk."""
    found = shutil.which("wrk")
    if not found:
        raise NotAvailableError("wrk is not there: apt-get install wrk")
    return found


def measure(server: Server, url: str, body: Path, connections: int, seconds: float) -> Figures:
    """One run; a second one if others were too busy, of which the quieter counts."""
    first = _measure(server, url, body, connections, seconds)
    if first.foreign_cores <= FOREIGN_CORES:
        return first
    second = _measure(server, url, body, connections, seconds)
    return min(first, second, key=lambda figures: figures.foreign_cores)


def start(url: str, body: Path, connections: int, seconds: float) -> subprocess.Popen[str]:
    """A run of wrk; SIGINT ends it early, and it still tells its figures."""
    return subprocess.Popen(
        [
            *(find_wrk(), "--threads", "1", "--connections", str(connections)),
            *("--duration", f"{max(1, round(seconds))}s", "--timeout", "5s", "--latency"),
            *("--script", str(SCRIPT), url, "--", str(body)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read(wrk: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for the end of a run: requests, seconds, p50_ms, p99_ms, errors."""
    output, _ = wrk.communicate()
    for line in output.splitlines():
        if line.startswith("FIGURES "):
            figures: dict[str, float] = json.loads(line.removeprefix("FIGURES "))
            return figures
    raise NotAvailableError(f"wrk: {' '.join(output.split())[-200:]}")


def _measure(server: Server, url: str, body: Path, connections: int, seconds: float) -> Figures:
    busy, own, mine = busy_seconds(), server.cpu_seconds(), _own_cpu_seconds()
    started = time.monotonic()
    seen = read(start(url, body, connections, seconds))
    wall = time.monotonic() - started
    own = server.cpu_seconds() - own
    mine = _own_cpu_seconds() - mine
    foreign = busy_seconds() - busy - own - mine
    return Figures(
        requests=int(seen["requests"]),
        seconds=seen["seconds"],
        rate=round(seen["requests"] / seen["seconds"], 1),
        p50_ms=seen["p50_ms"],
        p99_ms=seen["p99_ms"],
        errors=int(seen["errors"]),
        cpu_ms=round(own / max(1, seen["requests"]) * 1e3, 4),
        foreign_cores=round(foreign / wall, 3),
    )


def _own_cpu_seconds() -> float:
    """Of this program and its ended children, wrk among them."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = os.times()
    return children.ru_utime + children.ru_stime + own.user + own.system
