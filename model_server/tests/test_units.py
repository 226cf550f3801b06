"""Runners as units: what is asked of the helper, and what is read of systemd and the kernel."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_server.errors import RunnerUnavailableError
from model_server.processes import RunnerSpec
from model_server.settings import Settings
from model_server.units import (
    UnitProcesses,
    compile_modules,
    let_others_read,
    processes_for,
    reason,
)

NAME = "0123456789abcdef-s"
MODEL, ENVIRONMENT = "a" * 32, "b" * 32
START = f"start {NAME} sklearn {MODEL} {ENVIRONMENT}\n"


@contextmanager
def helper(path: Path, answer: str) -> Iterator[list[str]]:
    """Answer one request as the helper's socket does; what was asked is in the list."""
    asked: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw", encoding="ascii") as stream:
                asked.append(stream.readline())
                stream.write(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def spec(settings: Settings) -> RunnerSpec:
    """A model's folder and environment as the server makes them: nobody else may read them."""
    files = settings.state_dir / "models" / MODEL
    python = settings.state_dir / "environments" / ENVIRONMENT / "bin" / "python"
    for folder in (files, python.parent):
        folder.mkdir(parents=True, mode=0o700)
    (files / "MLmodel").touch(mode=0o600)
    python.symlink_to("/usr/bin/python3")
    return RunnerSpec(python=python, files=files, flavor="sklearn")


@pytest.fixture
def units(settings: Settings, tmp_path: Path) -> UnitProcesses:
    """Units whose helper and control groups are below the test's own folder."""
    return UnitProcesses(settings, helper=tmp_path / "helper.sock", groups=tmp_path / "cgroup")


def test_start_names_the_runner_and_its_folders_only(
    units: UnitProcesses, spec: RunnerSpec, tmp_path: Path
) -> None:
    """No path crosses the border to root, and the runner's user can read what it is given."""
    with helper(tmp_path / "helper.sock", "ok\n") as asked:
        units.start(NAME, spec)
    assert asked == [START]
    modes = {path: path.stat().st_mode & 0o777 for path in (spec.files, spec.files / "MLmodel")}
    assert modes == {spec.files: 0o705, spec.files / "MLmodel": 0o604}


def test_a_start_that_is_refused_says_why(
    units: UnitProcesses, spec: RunnerSpec, tmp_path: Path
) -> None:
    """The caller of a load learns what the helper said, and that it is not the model's fault."""
    with (
        helper(tmp_path / "helper.sock", "no systemd did not start the runner: broken\n"),
        pytest.raises(RunnerUnavailableError, match=r"cannot be changed: systemd did .* broken"),
    ):
        units.start(NAME, spec)


def test_a_helper_that_is_away_costs_the_load(units: UnitProcesses, spec: RunnerSpec) -> None:
    """It is said which unit does not answer, and that it may do so later."""
    with pytest.raises(RunnerUnavailableError, match="odsp-model_runnerd does not answer"):
        units.start(NAME, spec)


def test_a_helper_that_dies_is_no_success(
    units: UnitProcesses, spec: RunnerSpec, tmp_path: Path
) -> None:
    """Silence is not a yes, nor the model's fault."""
    with (
        helper(tmp_path / "helper.sock", ""),
        pytest.raises(RunnerUnavailableError, match="ended without an answer"),
    ):
        units.start(NAME, spec)


def test_folders_from_elsewhere_are_a_bug(units: UnitProcesses, tmp_path: Path) -> None:
    """Only the server's own state may be handed to a runner."""
    with pytest.raises(ValueError, match="not made of folders"):
        units.start(NAME, RunnerSpec(tmp_path / "bin/python", tmp_path, "sklearn"))


@pytest.mark.parametrize(("answer", "error"), [("ok\n", None), ("no such luck\n", "such luck")])
def test_stop(units: UnitProcesses, tmp_path: Path, answer: str, error: str | None) -> None:
    """The runner is gone when this returns; one that is not is an error."""
    with helper(tmp_path / "helper.sock", answer) as asked:
        if error is None:
            units.stop(NAME, 1)
        else:
            with pytest.raises(RunnerUnavailableError, match=error):
                units.stop(NAME, 1)
    assert asked == [f"stop {NAME}\n"]


@pytest.mark.parametrize(
    ("reason", "answer", "lines"),
    [
        ("exit status 3", "ok\nfirst\nlast\n", ["first", "last"]),
        ("SIGSEGV", "ok\n\n", []),
        # A helper of before the upgrade.
        ("SIGSEGV", "no This is no request.\n", []),
    ],
)
def test_the_helper_tells_what_a_failed_runner_wrote(
    units: UnitProcesses,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    answer: str,
    lines: list[str],
) -> None:
    """The server's account cannot read the journal."""
    # systemd knows nothing of it here: nobody is asked.
    assert units.last_lines(NAME) == []
    monkeypatch.setattr(units, "ended", lambda _: reason)
    with helper(tmp_path / "helper.sock", answer) as asked:
        assert units.last_lines(NAME) == lines
    assert asked == [f"lines {NAME}\n"]


@pytest.mark.parametrize(
    ("properties", "told"),
    [
        ({"ActiveState": "active", "Result": "success"}, None),
        ({"ActiveState": "inactive", "Result": "success"}, None),
        ({}, None),
        ({"ActiveState": "failed", "Result": "oom-kill"}, "out of memory"),
        ({"ActiveState": "failed", "ExecMainCode": "1", "ExecMainStatus": "3"}, "exit status 3"),
        ({"ActiveState": "failed", "ExecMainCode": "2", "ExecMainStatus": "9"}, "SIGKILL"),
        ({"ActiveState": "failed", "ExecMainCode": "3", "ExecMainStatus": "11"}, "SIGSEGV"),
        ({"ActiveState": "failed", "ExecMainCode": "2", "ExecMainStatus": "63"}, "signal 63"),
    ],
)
def test_why_a_runner_ended(properties: dict[str, str], told: str | None) -> None:
    """What systemd keeps of a failed unit, in a word."""
    assert reason(properties) == told


def test_nobody_knows_why_a_runner_ended_that_never_was(units: UnitProcesses) -> None:
    """Where systemd knows nothing, nothing is made up."""
    assert units.ended(NAME) is None


@pytest.mark.parametrize(
    ("root", "usage", "statistics"),
    [
        (".", "memory.current", "anon 60\nactive_file 30\ninactive_file 10\n"),
        (
            "memory",
            "memory.usage_in_bytes",
            "active_file 1\ninactive_file 1\ntotal_active_file 30\ntotal_inactive_file 10\n",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_memory_of_a_runner(
    units: UnitProcesses, tmp_path: Path, root: str, usage: str, statistics: str
) -> None:
    """Files that the kernel keeps for it could be dropped any time and do not count."""
    group = (
        tmp_path
        / "cgroup"
        / root
        / f"odsp.slice/odsp-models.slice/odsp-model_runner@{NAME}.service"
    )
    assert units.memory(NAME) is None
    group.mkdir(parents=True)
    (group / usage).write_text("100\n")
    (group / "memory.stat").write_text(statistics)
    assert units.memory(NAME) == 60


def test_modules_are_compiled_once_and_nothing_of_theirs_is_run(tmp_path: Path) -> None:
    """A package's code runs in runners only, which find its byte code but cannot write it."""
    packages = tmp_path / "environment/lib/python3/site-packages"
    packages.mkdir(parents=True)
    (packages / "good.py").write_text("1 + 1")
    (packages / "bad.py").write_text("print 'an older Python'")
    (packages / "evil.pth").write_text(f"import pathlib; pathlib.Path('{tmp_path}/ran').touch()")
    compile_modules(tmp_path / "environment")
    (packages / "late.py").touch()
    compile_modules(tmp_path / "environment")
    compiled = list((packages / "__pycache__").iterdir())
    assert [path.name.split(".")[0] for path in compiled] == ["good"]
    assert compiled[0].stat().st_mode & 0o004
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("limit", "value"), [("_COMPILE_SECONDS", 1.0), ("_COMPILE_BYTES", 100 * 2**20)]
)
def test_a_module_that_is_too_much_for_the_compiler_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    """Somebody else's source takes neither the host's memory nor a processor for long."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "large.py").write_text(200_000 * "a = [1, 2, 3, b, c, d]\n")
    monkeypatch.setattr(f"model_server.units.{limit}", value)
    compile_modules(tmp_path)
    assert not list(tmp_path.rglob("large*.pyc"))
    assert (tmp_path / "compiled").exists()


def test_an_environment_is_handed_out_while_it_is_compiled(tmp_path: Path) -> None:
    """A second model may start meanwhile: that the compiler's own files come and go is no error."""
    packages = tmp_path / "lib"
    packages.mkdir()
    modules = [packages / f"module_{number}.py" for number in range(500)]
    for module in modules:
        module.write_text("1 + 1")
    compiling = threading.Thread(target=compile_modules, args=[tmp_path])
    compiling.start()
    times = 0
    while compiling.is_alive():
        let_others_read(tmp_path)
        times += 1
    compiling.join()
    assert times > 1
    assert len(list(packages.rglob("*.pyc"))) == len(modules)


def test_an_environment_that_is_gone_needs_no_compiling(tmp_path: Path) -> None:
    """It may be removed at any time."""
    compile_modules(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_without_units_the_log_says_what_is_not_protected(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone on a laptop one is told; on the platform there is nothing to tell."""
    processes_for(settings)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nothing keeps their code from this user's files" in caplog.text
    caplog.clear()
    assert isinstance(
        processes_for(settings.model_copy(update={"runner_units": True})), UnitProcesses
    )
    assert caplog.records == []


def test_reading_is_granted_once_and_links_are_left_alone(tmp_path: Path) -> None:
    """Modes are added to, programs stay programs, and what lies elsewhere stays as it is."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.touch(mode=0o600)
    folder.mkdir(mode=0o700)
    (folder / "program").touch(mode=0o700)
    (folder / "link").symlink_to(elsewhere)
    for _ in range(2):
        let_others_read(folder)
        modes = [path.stat().st_mode & 0o777 for path in (folder, folder / "program", elsewhere)]
        assert modes == [0o705, 0o705, 0o600]
