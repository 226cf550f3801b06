"""How the processes of the runners are started, watched and ended.

A runner gets its listening socket as file descriptor 3, by systemd's protocol for sockets
(`LISTEN_FDS`, `LISTEN_PID`), so it needs no path of its own and no right to make sockets.
"""

import contextlib
import fcntl
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from model_server.errors import ModelNotLoadableError
from model_server.settings import Settings

_LOG = logging.getLogger(__name__)

_PROGRAM = Path(__file__).parent / "runner" / "__main__.py"
# The socket comes as standard input; the process that begins here is the runner's.
_HAND_OVER = 'export LISTEN_PID=$$; exec "$0" "$@" 3<&0 0</dev/null'
_STDERR = 2
_BACKLOG = 1024
_LAST_BYTES = 4096
_LAST_LINES = 10
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@dataclass(frozen=True)
class RunnerSpec:
    """What a runner needs to begin."""

    python: Path
    """The interpreter of the model's environment."""
    files: Path
    """The model's folder."""
    flavor: str


class Processes(ABC):
    """The runners of this host, by name; any worker may stop what another one started.

    A name is made of lower case letters, digits and hyphens, 22 at most.
    """

    @abstractmethod
    def address(self, name: str) -> Path:
        """The Unix socket that a runner listens on."""

    @abstractmethod
    def start(self, name: str, spec: RunnerSpec) -> None:
        """Start a runner; its socket listens when this returns, its model is not yet loaded.

        Raises `ModelNotLoadableError` where no process can be made of it, `RunnerUnavailableError`
        where none can be made now.
        """

    @abstractmethod
    def stop(self, name: str, timeout: float) -> None:
        """End a runner, if there is one; kill it if that takes more than `timeout` seconds."""

    @abstractmethod
    def ended(self, name: str) -> str | None:
        """Why a runner is not running any more; None while it runs, or where nobody knows."""

    @abstractmethod
    def memory(self, name: str) -> int | None:
        """The bytes that a runner uses now."""

    def is_running(self, name: str) -> bool:
        """Whether a runner's process lives; asked every second, so it has to cost little."""
        return self.memory(name) is not None

    def last_lines(self, name: str) -> list[str]:
        """What a runner wrote while it loaded, at most its end, where that is kept."""
        return []


class ChildProcesses(Processes):
    """Runners as children of the workers; they end when the last worker of the service does.

    A file beside each socket says which process it is, so that every worker can find it. A
    child has its worker's user: it is not kept from files or from the network.
    """

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.sockets
        self._scratch = settings.state_dir / "scratch"
        self._threads = str(settings.runner_threads)
        self._service = service_lock(settings)

    def address(self, name: str) -> Path:
        """The Unix socket that a runner listens on."""
        return self._folder / name

    def start(self, name: str, spec: RunnerSpec) -> None:
        """Start a runner as a child of this process."""
        self.stop(name, 0)
        scratch = self._scratch / name
        # Still there where something of the old model is writing in it to its very end.
        scratch.mkdir(parents=True, mode=0o700, exist_ok=True)
        if not os.access(spec.python, os.X_OK):
            raise ModelNotLoadableError(f"The interpreter {spec.python} cannot be run.")
        address = self.address(name)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
            self._lines(name).open("wb") as lines,
        ):
            listener.bind(str(address))
            address.chmod(0o600)
            # Only now can anybody connect.
            listener.listen(_BACKLOG)
            process = subprocess.Popen(
                [
                    *("/bin/sh", "-c", _HAND_OVER),
                    *(str(spec.python), "-I", "-u", str(_PROGRAM)),
                    *(str(spec.files), spec.flavor, str(self._service)),
                ],
                cwd=scratch,
                env=self._environment(scratch),
                stdin=listener.fileno(),
                # Loaded, it writes its errors where its output goes.
                stdout=_STDERR,
                stderr=lines,
                start_new_session=True,
            )
        began = start_time(process.pid) or 0
        self._record(name).write_text(f"{process.pid} {began}\n")
        Thread(target=self._watch, args=[name, process, began], daemon=True).start()

    def stop(self, name: str, timeout: float) -> None:
        """End a runner, whoever started it; what it was asked before is still answered."""
        # No new caller from here on.
        self.address(name).unlink(missing_ok=True)
        process = self._recorded(name)
        if process is not None:
            _end(*process, timeout)
        self._record(name).unlink(missing_ok=True)
        self._lines(name).unlink(missing_ok=True)
        _remove(self._scratch / name)

    def ended(self, name: str) -> str | None:
        """Why it ended, as the worker saw it that had started it."""
        try:
            _, *reasons = self._record(name).read_text().splitlines()
        except (OSError, ValueError):
            return None
        return reasons[0] if reasons else None

    def memory(self, name: str) -> int | None:
        """Its part of the memory (PSS), which counts what it shares with others in shares."""
        process = self.process_id(name)
        if process is None:
            return None
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        return next(
            (int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None
        )

    def is_running(self, name: str) -> bool:
        """Whether the process that was started last lives."""
        return self.process_id(name) is not None

    def last_lines(self, name: str) -> list[str]:
        """What a runner wrote to its standard error while it loaded, at most its end."""
        try:
            with self._lines(name).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
                return file.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        except OSError:
            return []

    def process_id(self, name: str) -> int | None:
        """The running process, or None."""
        process = self._recorded(name)
        return process[0] if process is not None and _is_alive(*process) else None

    def _watch(self, name: str, process: subprocess.Popen[bytes], began: int) -> None:
        # Seen before it is taken note of, while its number is no other's yet.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        _end_group(process.pid, began)
        status = process.wait()
        reason = _reason(status)
        _LOG.log(
            logging.INFO if status == 0 else logging.WARNING,
            "runner ended",
            extra={"runner": name, "runner_pid": process.pid, "reason": reason},
        )
        recorded = self._recorded(name)
        if recorded is not None and recorded[0] == process.pid:
            # Without O_CREAT: where it was stopped meanwhile, nothing is left behind.
            with contextlib.suppress(OSError):
                file = os.open(self._record(name), os.O_WRONLY | os.O_APPEND)
                os.write(file, f"{reason}\n".encode())
                os.close(file)

    def _record(self, name: str) -> Path:
        return self._folder / f"{name}.process"

    def _lines(self, name: str) -> Path:
        return self._scratch / f"{name}.stderr"

    def _recorded(self, name: str) -> tuple[int, int] | None:
        """The process that was started last, by its number and when it began."""
        try:
            process, began = self._record(name).read_text().splitlines()[0].split()
        except (FileNotFoundError, ValueError, IndexError):
            return None
        return int(process), int(began)

    def _environment(self, scratch: Path) -> dict[str, str]:
        """All that a runner gets; nothing is inherited, so no secret is."""
        return {
            "PATH": os.defpath,
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
            "LANG": "C.UTF-8",
            "LISTEN_FDS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **dict.fromkeys(_THREAD_VARIABLES, self._threads),
        }


def service_lock(settings: Settings) -> Path:
    """The file that every worker holds a shared lock on while it lives."""
    return settings.sockets / "service.lock"


@contextmanager
def serving(settings: Settings) -> Iterator[None]:
    """Be a part of the service: children live as long as one of these does."""
    settings.sockets.mkdir(parents=True, exist_ok=True)
    with service_lock(settings).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def start_time(process_id: int) -> int | None:
    """When a process began, in the kernel's ticks since boot; with its number it is no other one.

    None where it is gone.
    """
    found = _stat(process_id)
    return found[1] if found else None


def _is_alive(process_id: int, began: int) -> bool:
    """Whether it is the same process still, and not only waiting to be looked at."""
    found = _stat(process_id)
    return found is not None and found[0] != "Z" and found[1] == began


def _stat(process_id: int) -> tuple[str, int] | None:
    """The state of a process and when it began."""
    try:
        # A name that a process gives itself may be cut in the middle of a character.
        stat = Path(f"/proc/{process_id}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return state, int(fields[18])


def _end(process_id: int, began: int, timeout: float) -> None:
    """Ask a process to end and wait until it is gone; kill it if that takes too long.

    What it has started goes with it, also where it is gone already.
    """
    try:
        descriptor = os.pidfd_open(process_id)
    except OSError:
        _end_group(process_id, began)
        return
    try:
        # Asked after the descriptor is there: it cannot become another process any more.
        if start_time(process_id) not in {began, None}:
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        with contextlib.suppress(ProcessLookupError):
            if timeout > 0:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            if timeout <= 0 or not poll.poll(timeout * 1000):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                poll.poll()
        _end_group(process_id, began)
    finally:
        os.close(descriptor)


def _end_group(leader: int, began: int) -> None:
    """Kill what a process that has ended left behind, unless it made groups of its own.

    The kernel gives a number to no new process while a group of that number has a member.
    """
    if start_time(leader) in {began, None}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def _remove(folder: Path) -> None:
    """Remove a folder, also where whoever wrote in it made folders that nobody may change."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
        for parent, names, _ in os.walk(folder):
            # Before they are listed in their turn; what a link leads to is somebody else's.
            for inner in (Path(parent, name) for name in names):
                if not inner.is_symlink():
                    inner.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _reason(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
