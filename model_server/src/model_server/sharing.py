"""Where the workers of one service keep the files of their counters.

To be asked before prometheus-client is imported: it decides then whether it counts in files.
"""

import os
import shutil
from pathlib import Path

_PREFIX = "metrics-"


def share_metrics(runtime_dir: Path) -> None:
    """Let this worker count for the whole service: that is, for all children of its parent.

    What an earlier service has counted is removed.
    """
    parent = os.getppid()
    directory = runtime_dir / f"{_PREFIX}{parent}-{_start_time(parent)}"
    directory.mkdir(parents=True, exist_ok=True)
    for other in runtime_dir.glob(f"{_PREFIX}*"):
        process, _, started = other.name.removeprefix(_PREFIX).partition("-")
        if _start_time(int(process)) != started:
            shutil.rmtree(other, ignore_errors=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)


def _start_time(process: int) -> str | None:
    """When a process started, in ticks since boot; with its id it names no other one."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
