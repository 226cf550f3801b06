"""What it costs that one process wakes another: a byte there and back over a Unix socket."""

from __future__ import annotations

import os
import select
import socket
import time
from statistics import median

TIMES = 5000


def round_trip_us(here: int, there: int) -> float:
    """Microseconds (median) between a process on CPU `here` and one on CPU `there`."""
    ours, others = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            os.sched_setaffinity(0, {there})
            poll = _poll(others)
            while True:
                poll.poll()
                others.send(others.recv(1))
        finally:
            # Also where the other end is closed.
            os._exit(0)
    before = os.sched_getaffinity(0)
    others.close()
    try:
        os.sched_setaffinity(0, {here})
        poll = _poll(ours)
        seconds = []
        for _ in range(TIMES):
            started = time.perf_counter()
            ours.send(b"x")
            poll.poll()
            ours.recv(1)
            seconds.append(time.perf_counter() - started)
    finally:
        os.sched_setaffinity(0, before)
        ours.close()
        os.waitpid(child, 0)
    return round(median(seconds) * 1e6, 1)


def _poll(end: socket.socket) -> select.epoll:
    poll = select.epoll()
    poll.register(end, select.EPOLLIN)
    return poll
