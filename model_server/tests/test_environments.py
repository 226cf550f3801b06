import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_server import environments
from model_server.environments import Environments
from model_server.errors import (
    DeadlineExceededError,
    IndexUnavailableError,
    ModelNotLoadableError,
)
from model_server.locks import exclusive, shared
from model_server.settings import Settings
from packages import put_wheel

BESIDE = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
UV = shutil.which("uv", path=BESIDE) or "no uv"


def _model(tmp_path: Path, requirements: str, constraints: str | None = None) -> Path:
    folder = tmp_path / f"model {abs(hash((requirements, constraints)))}"
    folder.mkdir(exist_ok=True)
    (folder / "requirements.txt").write_text(requirements)
    if constraints is not None:
        (folder / "constraints.txt").write_text(constraints)
    return folder


def _python(settings: Settings, model: Path, seconds: float = 30) -> Path:
    return Environments(settings).python_for(model, time.monotonic() + seconds)


def _builds(uv_log: Path) -> int:
    return uv_log.read_text().count(" venv ")


def test_an_environment_is_built_once_for_equal_requirements(
    settings: Settings, tmp_path: Path, uv_log: Path
) -> None:
    first = _model(tmp_path, "mlflow==3.17.2\nscikit-learn==1.9.1 # the newest\n\n# more\n")
    second = _model(tmp_path, "mlflow==3.17.2\r\nscikit-learn ==1.9.1\n")
    python = _python(settings, first)
    assert python == _python(settings, second)
    assert _builds(uv_log) == 1
    answer = subprocess.run([python, "-c", "print(7)"], check=True, capture_output=True)
    assert answer.stdout == b"7\n"
    assert (python.parents[1] / "requirements.txt").read_text() == (
        "mlflow==3.17.2\nscikit-learn==1.9.1\n"
    )


def test_other_requirements_or_constraints_are_another_environment(
    settings: Settings, tmp_path: Path, uv_log: Path
) -> None:
    models = [
        _model(tmp_path, "numpy==1.26.4"),
        _model(tmp_path, "numpy==2.4.6"),
        _model(tmp_path, "numpy==2.4.6\n-c constraints.txt", "scipy<2"),
    ]
    assert len({_python(settings, model) for model in models}) == 3
    assert "--constraints constraints.txt" in uv_log.read_text()


def test_workers_that_ask_at_once_build_once(
    settings: Settings, tmp_path: Path, uv_log: Path
) -> None:
    model = _model(tmp_path, "numpy")
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: _python(settings, model), range(8)))
    assert len(found) == 1
    assert _builds(uv_log) == 1


def test_uv_gets_no_secret(
    settings: Settings, tmp_path: Path, uv_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_SERVER_DATABASE_URL", "hidden")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden")
    monkeypatch.setenv("SSL_CERT_FILE", "/some/ca.crt")
    _python(settings, _model(tmp_path, "numpy"))
    environment = uv_log.with_name("uv.log.env").read_text()
    assert "hidden" not in environment
    assert "SSL_CERT_FILE=/some/ca.crt" in environment
    assert f"UV_CACHE_DIR={settings.state_dir}/cache/uv" in environment
    assert "--no-build" in uv_log.read_text()
    assert "--compile-bytecode" not in uv_log.read_text()


def test_what_cannot_be_installed_says_why_and_leaves_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    private = Settings(
        **settings.model_dump() | {"index_url": "https://me:hidden@index.test/simple"}
    )
    with pytest.raises(ModelNotLoadableError) as raised:
        _python(private, _model(tmp_path, "no-such-package==1"))
    assert "requirements (no-such-package) cannot be installed" in str(raised.value)
    assert "no-such-package was not found at <index>" in str(raised.value)
    folder = settings.state_dir / "environments"
    assert [path for path in folder.iterdir() if path.suffix != ".lock"] == []


def test_an_index_that_is_away_is_another_error(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(IndexUnavailableError, match="Failed to fetch"):
        _python(settings, _model(tmp_path, "far-away==1"))


def test_a_slow_install_ends(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceededError, match="could not be installed within"):
        _python(settings, _model(tmp_path, "slow-package"), seconds=0)


def test_what_a_killed_build_left_is_swept(settings: Settings, tmp_path: Path) -> None:
    model = _model(tmp_path, "numpy")
    environment = _python(settings, model).parents[1]
    stale = environment.with_name(f"{environment.name}.partial-abc")
    environment.rename(stale)
    assert _python(settings, model).exists()
    assert not stale.exists()


def test_what_the_disk_did_not_take_is_no_environment(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "the disk is broken", str(folder))

    model = _model(tmp_path, "numpy")
    with monkeypatch.context() as broken:
        broken.setattr(environments, "write_out", fail)
        with pytest.raises(OSError, match="the disk is broken"):
            _python(settings, model)
    folder = settings.state_dir / "environments"
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    assert _python(settings, model).exists()


def test_only_names_and_versions_are_installed(
    settings: Settings, tmp_path: Path, uv_log: Path
) -> None:
    line = "git+https://evil.test/x"
    for model in (_model(tmp_path, f"numpy\n{line}"), _model(tmp_path, "numpy", line)):
        with pytest.raises(ModelNotLoadableError) as raised:
            _python(settings, model)
        assert repr(line) in str(raised.value)
    assert uv_log.read_text() == ""


def test_wheels_can_come_from_a_folder_alone(
    settings: Settings, tmp_path: Path, uv_log: Path
) -> None:
    offline = settings.model_copy(update={"wheels_dir": tmp_path / "wheels"})
    _python(offline, _model(tmp_path, "numpy"))
    assert f"--no-index --find-links {tmp_path}/wheels" in uv_log.read_text()


def test_environments_that_nobody_has_used_for_long_are_removed(
    settings: Settings, tmp_path: Path
) -> None:
    used, running, forgotten = (
        _python(settings, _model(tmp_path, name)).parents[1] for name in ("a", "b", "c")
    )
    for environment in (used, running, forgotten):
        os.utime(environment, (1000, 1000))
    _python(settings, _model(tmp_path, "a"))
    Environments(settings).remove_unused({running}, oldest=2000)
    assert [path.exists() for path in (used, running, forgotten)] == [True, True, False]
    # Whoever needs it again builds it again, and nothing of the old one is left.
    assert _python(settings, _model(tmp_path, "c")).exists()
    assert {path for path in used.parent.iterdir() if path.is_dir()} == {used, running, forgotten}


def test_an_environment_that_is_done_while_others_are_removed_ends_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _python(settings, _model(tmp_path, "a")).parents[1]
    forgotten = _python(settings, _model(tmp_path, "b")).parents[1]
    os.utime(forgotten, (1000, 1000))
    half = done.rename(done.with_name(f"{done.name}.partial-x"))

    @contextmanager
    def late(path: Path, deadline: float, what: str) -> Iterator[None]:
        """Take the lock when the build, which has held it, has ended."""
        if path.stem == done.name:
            half.rename(done)
        with exclusive(path, deadline, what):
            yield

    monkeypatch.setattr(environments, "exclusive", late)
    Environments(settings).remove_unused(set(), oldest=2000)
    assert [path.exists() for path in (done, forgotten)] == [True, False]


@pytest.fixture
def offline(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with the real uv and three packages, one of them large."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, module in (("large", 2**20 * "#"), ("small", ""), ("other", "")):
        put_wheel(wheels, name, module)
    return settings.model_copy(update={"uv": UV, "wheels_dir": wheels})


def _bytes(folder: Path) -> int:
    """What all files take, each counted once however many names it has."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum({(file.st_dev, file.st_ino): file.st_size for file in found}.values())


def test_the_room_of_a_removed_environment_is_free_again(offline: Settings, tmp_path: Path) -> None:
    forgotten = _python(offline, _model(tmp_path, "large\nsmall"))
    used = _python(offline, _model(tmp_path, "small\nother"))
    taken = _bytes(offline.state_dir)
    Environments(offline).remove_unused({used.parents[1]}, oldest=1000)
    assert _bytes(offline.state_dir) == taken
    Environments(offline).remove_unused({used.parents[1]}, oldest=time.time() + 60)
    assert not forgotten.exists()
    assert taken - _bytes(offline.state_dir) > 2**20
    # What is used is still shared with those to come, and what has gone is there again.
    again = _python(offline, _model(tmp_path, "large\nsmall\nother"))
    subprocess.run([again, "-c", "import large, small, other"], check=True)
    (small,) = used.parents[1].rglob("small.py")
    assert small.stat().st_nlink == 3


def test_a_cache_is_let_be_while_somebody_installs_from_it(
    offline: Settings, tmp_path: Path
) -> None:
    _python(offline, _model(tmp_path, "large"))
    hasty = offline.model_copy(update={"load_timeout_seconds": 1})
    with shared(offline.state_dir / "cache" / "uv" / ".lock"):
        Environments(hasty).remove_unused(set(), oldest=time.time() + 60)
    assert _bytes(offline.state_dir) > 2**20
    Environments(offline).remove_unused(set(), oldest=time.time() + 60)
    assert _bytes(offline.state_dir) < 2**20


def test_a_cache_that_an_operator_named_is_let_be(offline: Settings, tmp_path: Path) -> None:
    named = offline.model_copy(update={"uv_cache_dir": tmp_path / "everybody's cache"})
    _python(named, _model(tmp_path, "large"))
    Environments(named).remove_unused(set(), oldest=time.time() + 60)
    assert _bytes(tmp_path / "everybody's cache") > 2**20


def test_an_environment_that_is_being_taken_is_not_removed(
    settings: Settings, tmp_path: Path
) -> None:
    environment = _python(settings, _model(tmp_path, "a")).parents[1]
    os.utime(environment, (1000, 1000))
    with exclusive(environment.with_suffix(".lock"), time.monotonic(), "it"):
        Environments(settings).remove_unused(set(), oldest=2000)
    assert environment.exists()


def test_a_builder_that_cannot_run_is_named(settings: Settings, tmp_path: Path) -> None:
    Path(settings.uv).chmod(0o644)
    with pytest.raises(ModelNotLoadableError, match="cannot be run"):
        _python(settings, _model(tmp_path, "numpy"))
