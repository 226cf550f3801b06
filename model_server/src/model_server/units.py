"""Runners as units of systemd: a user, a view of the files and limits of their own.

The server's account may not start units, nor read the journal. It asks a small helper that runs as
root, knows three verbs, and hands a runner nothing but folders of the server's own state
(`odsp-model_runnerd.socket`).
"""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from threading import Thread

from model_server.errors import OUT_OF_DESCRIPTORS, RunnerUnavailableError
from model_server.processes import ChildProcesses, Processes, RunnerSpec
from model_server.settings import Settings

_LOG = logging.getLogger(__name__)

_HELPER = Path("/run/odsp/model_runnerd.sock")
_SOCKETS = Path("/run/odsp/model_runner")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_SLICE = "odsp.slice/odsp-models.slice"
_HELPER_SECONDS = 60.0
"""The longest the helper may take beyond the end of a runner."""
_LONGEST_ANSWER = 2**16
_KILLED = ("2", "3")
"""The exit codes of systemd that stand for a signal, without and with a core dump."""
_FOLDER_BITS = stat.S_IROTH | stat.S_IXOTH
_FILES = ("active_file", "inactive_file")
_COMPILED = "compiled"
_COMPILE_SECONDS = 900.0
_COMPILE_BYTES = 2 * 2**30
"""Of address space; no compiler's needs, and less than somebody's source could have it take."""


def processes_for(settings: Settings) -> Processes:
    """Units where the platform has them; else children, and a line that says what that means."""
    if settings.runner_units:
        return UnitProcesses(settings)
    _LOG.warning(
        "models run as this user: nothing keeps their code from this user's files, its secrets "
        "and the network, and nothing limits the memory, processes and disk that they take"
    )
    return ChildProcesses(settings)


class UnitProcesses(Processes):
    """Runners as instances of `odsp-model_runner@.service`; they outlive the server's restart."""

    def __init__(
        self, settings: Settings, *, helper: Path = _HELPER, groups: Path = _CONTROL_GROUPS
    ) -> None:
        self._models = settings.state_dir / "models"
        self._environments = settings.state_dir / "environments"
        self._helper = helper
        self._groups = groups

    def address(self, name: str) -> Path:
        """The Unix socket that systemd listens on for a runner."""
        return _SOCKETS / f"{name}.sock"

    def start(self, name: str, spec: RunnerSpec) -> None:
        """Have the unit of a runner started with the model's folder and environment in its view."""
        environment = spec.python.parent.parent
        if (spec.files.parent, environment.parent) != (self._models, self._environments):
            raise ValueError(f"{spec} is not made of folders of the server's state")
        for folder in (spec.files, environment):
            let_others_read(folder)
        self._ask(f"start {name} {spec.flavor} {spec.files.name} {environment.name}")
        # Beside the load, not before it: the first runner does without.
        Thread(target=compile_modules, args=[environment], daemon=True).start()

    def stop(self, name: str, timeout: float) -> None:
        """Have the unit stopped; after the seconds that the unit allows, systemd kills it.

        Raises `RunnerUnavailableError` where that cannot be done.
        """
        self._ask(f"stop {name}", timeout)

    def ended(self, name: str) -> str | None:
        """Why the unit failed, as systemd keeps it until the next start or stop."""
        shown = subprocess.run(
            [
                *("systemctl", "show", f"odsp-model_runner@{name}.service"),
                "--property=ActiveState,Result,ExecMainCode,ExecMainStatus",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return reason(dict(line.partition("=")[::2] for line in shown.stdout.splitlines()))

    def last_lines(self, name: str) -> list[str]:
        """What a runner that failed has written to the journal, at most its end."""
        if self.ended(name) is None:
            return []
        # The reason is told, with or without them.
        with contextlib.suppress(RunnerUnavailableError):
            return self._ask(f"lines {name}").splitlines()
        return []

    def memory(self, name: str) -> int | None:
        """All that the unit's processes hold, less what the kernel keeps of files for them."""
        unit = f"{_SLICE}/odsp-model_runner@{name}.service"
        for group, usage in (
            (self._groups / unit, "memory.current"),
            (self._groups / "memory" / unit, "memory.usage_in_bytes"),
        ):
            try:
                used = int((group / usage).read_text())
                counts = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    # One that runs is not taken for one that has ended.
                    raise
                continue
            # Version 1 counts the groups below only in what it calls total.
            files = (counts.get(f"total_{kind}", counts[kind]) for kind in _FILES)
            return max(0, used - sum(map(int, files)))
        return None

    def _ask(self, request: str, patience: float = 0) -> str:
        """Have the helper do something, and what it tells; it takes as long as a runner's end."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(patience + _HELPER_SECONDS)
                connection.connect(str(self._helper))
                connection.sendall(f"{request}\n".encode("ascii"))
                with connection.makefile("rb") as lines:
                    answer = lines.read(_LONGEST_ANSWER).decode(errors="replace").strip()
        except OSError as error:
            raise RunnerUnavailableError(
                f"Models cannot be started or stopped; odsp-model_runnerd does not answer: {error}."
            ) from error
        if not answer:
            raise RunnerUnavailableError(
                "Models cannot be started or stopped; odsp-model_runnerd ended without an answer."
            )
        verdict, _, told = answer.partition("\n")
        if verdict != "ok":
            # The model's code has not run yet, or is to end: none of it is the caller's matter.
            sentence = answer.removeprefix("no ")
            raise RunnerUnavailableError(f"The model's process cannot be changed: {sentence}")
        return told


def reason(properties: dict[str, str]) -> str | None:
    """Why a unit with these properties is not running any more; None for one that did not fail."""
    if properties.get("ActiveState") != "failed":
        return None
    if properties.get("Result") == "oom-kill":
        return "out of memory"
    status = properties.get("ExecMainStatus", "")
    if properties.get("ExecMainCode") not in _KILLED:
        return f"exit status {status}"
    try:
        return signal.Signals(int(status)).name
    except ValueError:
        return f"signal {status}"


def compile_modules(environment: Path) -> None:
    """Compile an environment's modules once, as no runner may write there.

    By the server's interpreter without its site: nothing that a package brings is run by that. What
    is too large for it within its time and memory stays as it is; runners do without.
    """
    mark = environment / _COMPILED
    try:
        descriptor = os.open(environment, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mark.exists():
                return
            # Modules for other versions of Python cannot be compiled, and need not be.
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [
                        *("/usr/bin/nice", "/usr/bin/prlimit", f"--as={_COMPILE_BYTES}"),
                        *(sys.executable, "-I", "-S", "-m", "compileall", "-qq"),
                        environment / "lib",
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=_COMPILE_SECONDS,
                    check=False,
                )
            let_others_read(environment)
            mark.touch()
        finally:
            os.close(descriptor)
    except OSError as error:
        # Another one is at it, or the environment is being removed; runners do without.
        _LOG.debug("environment not compiled", extra={"reason": str(error)})


def let_others_read(folder: Path) -> None:
    """Let every user read a folder's files; who can reach the folder is decided above it.

    A runner has a user of its own, and sees this folder without those above it.
    """
    for path, _, files in os.walk(folder):
        _add(Path(path), _FOLDER_BITS)
        for file in files:
            # The compiler's own are renamed while it is at work.
            with contextlib.suppress(FileNotFoundError):
                _add(Path(path, file), stat.S_IROTH)


def _add(path: Path, bits: int) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return
    if mode & stat.S_IXUSR:
        bits |= stat.S_IXOTH
    if mode & bits != bits:
        path.chmod(stat.S_IMODE(mode) | bits)
