"""Children of a worker: how they begin, what they get, and how they end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_server.errors import ModelNotLoadableError
from model_server.processes import ChildProcesses, RunnerSpec, start_time
from model_server.settings import Settings

NAME = "0123456789abcdef-s"


@pytest.fixture
def processes(settings: Settings) -> Iterator[ChildProcesses]:
    settings.sockets.mkdir(parents=True)
    processes = ChildProcesses(settings)
    yield processes
    processes.stop(NAME, 0)


@pytest.fixture
def spec(tmp_path: Path) -> Callable[[str], RunnerSpec]:
    """A runner whose interpreter does what a script of the shell says."""

    def make(script: str) -> RunnerSpec:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return RunnerSpec(python, tmp_path, "sklearn")

    return make


def _until(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < end, "it does not become so"
        time.sleep(0.01)
    return found


def test_a_runner_gets_its_socket_and_nothing_of_the_servers(
    processes: ChildProcesses,
    spec: Callable[[str], RunnerSpec],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden")
    script = 'env > env; echo "$$ $@" > arguments; ls -l /proc/$$/fd > files; exec sleep 60'
    processes.start(NAME, spec(script))
    with socket.socket(socket.AF_UNIX) as connection:
        # It listens, long before anything accepts.
        connection.connect(str(processes.address(NAME)))
    assert processes.address(NAME).stat().st_mode & 0o777 == 0o600
    process = processes.process_id(NAME)
    assert process is not None
    scratch = settings.state_dir / "scratch" / NAME
    assert scratch.stat().st_mode & 0o777 == 0o700
    _until(lambda: Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"sleep"))
    environment = dict(line.split("=", 1) for line in (scratch / "env").read_text().splitlines())
    assert environment["LISTEN_FDS"] == "1"
    assert environment["LISTEN_PID"] == str(process)
    assert environment["HOME"] == environment["TMPDIR"] == str(scratch)
    assert environment.keys() <= {
        *("HOME", "LANG", "LISTEN_FDS", "LISTEN_PID", "MLFLOW_DISABLE_TELEMETRY", "PATH", "PWD"),
        *("MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
        *("OLDPWD", "SHLVL", "TMPDIR", "_"),
    }
    arguments = (scratch / "arguments").read_text().split()
    assert arguments[:3] == [str(process), "-I", "-u"]
    assert arguments[4:] == [
        str(spec(script).files),
        "sklearn",
        str(settings.sockets / "service.lock"),
    ]
    files = (scratch / "files").read_text()
    assert " 3 -> socket:" in files
    assert " 0 -> /dev/null" in files
    # A signal to the server's terminal is none of its business.
    assert os.getsid(process) == process
    memory = processes.memory(NAME)
    assert memory is not None
    assert 0 < memory < 2**30
    assert processes.ended(NAME) is None


def test_any_worker_may_stop_it_and_nothing_is_left(
    processes: ChildProcesses, spec: Callable[[str], RunnerSpec], settings: Settings
) -> None:
    for script, timeout in (
        ("exec sleep 60", 20),
        # Does not want to go.
        ("trap '' TERM; touch ready; while :; do sleep 0.1; done", 0.2),
    ):
        processes.start(NAME, spec(script))
        process = processes.process_id(NAME)
        other = ChildProcesses(settings)
        assert other.process_id(NAME) == process
        if "ready" in script:
            _until((settings.state_dir / "scratch" / NAME / "ready").exists)
        other.stop(NAME, timeout)
        assert processes.process_id(NAME) is None
        assert processes.memory(NAME) is None
        assert not any(settings.sockets.iterdir())
        assert not any((settings.state_dir / "scratch").iterdir())
    # Fine if there is none.
    processes.stop(NAME, 1)


START_AND_STOP = """
import sys, time
from pathlib import Path
from model_server.processes import ChildProcesses, RunnerSpec
from model_server.settings import Settings

settings, name, python = Settings.model_validate_json(sys.argv[1]), *sys.argv[2:]
processes = ChildProcesses(settings)
processes.start(name, RunnerSpec(Path(python), Path(python).parent, "sklearn"))
while processes.ended(name) is None:
    time.sleep(0.01)
processes.stop(name, 1)
print(*(settings.state_dir / "scratch").iterdir())
"""


def test_folders_that_a_model_made_unwritable_go_too(
    spec: Callable[[str], RunnerSpec], settings: Settings, tmp_path: Path
) -> None:
    settings.sockets.mkdir(parents=True)
    others = tmp_path / "others"
    others.mkdir(mode=0o555)
    python = spec(
        f"mkdir -p a/b; touch a/b/file; ln -s '{others}' a/link; chmod 0 a/b; chmod 555 a ."
    ).python
    # Root may write everywhere, unless it has given that up.
    less = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run(
        [
            *(less if os.geteuid() == 0 else []),
            *(sys.executable, "-c", START_AND_STOP, settings.model_dump_json(), NAME, python),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
    assert others.stat().st_mode & 0o777 == 0o555


@pytest.mark.parametrize("end", ["stopped", "ended", "ended where nobody watched"])
def test_what_a_runner_started_goes_with_it(
    processes: ChildProcesses,
    spec: Callable[[str], RunnerSpec],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    """A model's own processes hold memory too, and may have its files open."""
    if end == "ended where nobody watched":
        monkeypatch.setattr(ChildProcesses, "_watch", lambda _, __, process, ___: process.wait())
    # Deaf to what asks it to end.
    child = "trap '' TERM HUP; while :; do sleep 1; done"
    last = "exec sleep 60" if end == "stopped" else "exit 0"
    processes.start(NAME, spec(f'sh -c "{child}" & echo $! >child.new; mv child.new child; {last}'))
    found = settings.state_dir / "scratch" / NAME / "child"
    child_id = int(_until(lambda: found.exists() and found.read_text()))
    try:
        if end == "ended where nobody watched":
            _until(lambda: processes.process_id(NAME) is None)
        if end != "ended":
            ChildProcesses(settings).stop(NAME, 5)
        _until(lambda: not _lives(child_id))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child_id, signal.SIGKILL)


def test_what_left_its_group_and_writes_on_keeps_no_start_from_its_folder(
    processes: ChildProcesses, spec: Callable[[str], RunnerSpec], settings: Settings
) -> None:
    """Without units nothing ends what a model has put aside; the model comes back all the same."""
    writer = "import os; os.setsid(); n = 0\nwhile n < 10**6: open(str(n), 'w'); n += 1"
    script = f'{sys.executable} -c "{writer}" & echo $! >../writer; exec sleep 60'
    processes.start(NAME, spec(script))
    scratch = settings.state_dir / "scratch"
    _until((scratch / NAME / "1").exists)
    writer_id = int((scratch / "writer").read_text())
    try:
        processes.start(NAME, spec("exec sleep 60"))
        assert processes.is_running(NAME)
    finally:
        os.kill(writer_id, signal.SIGKILL)


def _lives(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 7", "exit status 7"), ("kill -SEGV $$", "SIGSEGV"), ("kill -35 $$", "signal 35")],
)
def test_every_worker_can_tell_why_it_ended(
    processes: ChildProcesses,
    spec: Callable[[str], RunnerSpec],
    settings: Settings,
    script: str,
    reason: str,
) -> None:
    processes.start(NAME, spec(f"seq 1000000 1002000 >&2; {script}"))
    other = ChildProcesses(settings)
    assert _until(lambda: other.ended(NAME)) == reason
    assert other.last_lines(NAME) == [str(number) for number in range(1001991, 1002001)]
    assert other.process_id(NAME) is None
    # The socket's name is still there, and says that nobody listens.
    with socket.socket(socket.AF_UNIX) as connection, pytest.raises(ConnectionRefusedError):
        connection.connect(str(processes.address(NAME)))
    processes.start(NAME, spec("exec sleep 60"))
    assert processes.ended(NAME) is None


def test_another_process_of_the_same_number_is_left_alone(processes: ChildProcesses) -> None:
    processes._record(NAME).write_text(f"{os.getpid()} 1\n")
    assert processes.process_id(NAME) is None
    processes.stop(NAME, 1)
    processes._record(NAME).write_text("nonsense")
    assert processes.process_id(NAME) is None
    assert processes.ended(NAME) is None


def test_a_process_may_have_any_name() -> None:
    """Also one whose last character was cut in two."""
    code = "import time; open('/proc/self/comm', 'wb').write(b'\\xc3'); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as named:
        try:
            assert named.stdout
            assert named.stdout.read(1) == b"1"
            assert start_time(named.pid)
        finally:
            named.kill()


def test_an_interpreter_that_cannot_be_run(processes: ChildProcesses, tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoadableError, match="cannot be run"):
        processes.start(NAME, RunnerSpec(tmp_path / "python", tmp_path, "sklearn"))
    assert not processes.address(NAME).exists()
