"""The runners of one host: their records, and starts that fail."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local

import pytest

from hosts import running
from light_models import Shelf
from model_server.environments import Environments
from model_server.errors import MemoryBudgetError, ModelNotFoundError, RunnerUnavailableError
from model_server.host import ModelHost
from model_server.locks import exclusive
from model_server.processes import ChildProcesses, RunnerSpec, serving
from model_server.registry import ModelRegistry, ModelVersion
from model_server.settings import Settings

ROSE = ModelVersion("rose", 1, "digest")
FLAVOR = "pyfunc"


def _host(settings: Settings, processes: ChildProcesses | None = None) -> ModelHost:
    return ModelHost(
        settings,
        processes or ChildProcesses(settings),
        ModelRegistry.connect(settings),
        Environments(settings),
    )


def _start(host: ModelHost, model: ModelVersion = ROSE) -> None:
    deadline = time.monotonic() + 60
    with host.changing(model, FLAVOR, deadline):
        host.start(model, FLAVOR, deadline, asked=True)


def test_files_that_somebody_takes_are_not_removed(light: Settings) -> None:
    host = _host(light)
    files = host.files(ROSE)
    files.mkdir(parents=True)
    now = time.time() + 60
    with exclusive(files.with_suffix(".lock"), 0.0, "its files"):
        host.remove_unused_files(set(), now)
        assert files.exists()
    host.remove_unused_files({ROSE.digest}, now)
    assert files.exists()
    host.remove_unused_files(set(), now)
    assert [path.name for path in files.parent.iterdir()] == ["digest.lock"]


def test_files_that_do_not_come_in_time_are_told_in_a_sentence(
    light: Settings, shelf: Shelf
) -> None:
    shelf.put("rose", 1, "one")
    shelf.registry.seconds_for_a_byte, shelf.registry.slow = 0.1, "/model.py"
    hasty = light.model_copy(update={"load_timeout_seconds": 0.5})
    with running(hasty) as (host,):
        got = host.load("rose", 1)
    sentence = "model 'rose' version 1 could not be fetched from MLflow within 0.5 seconds."
    assert got.status_code == 504
    assert sentence in got.text


class _Broken(ChildProcesses):
    """Starts nothing for a reason that nobody thought of, and cannot end anything either."""

    def start(self, name: str, spec: RunnerSpec) -> None:
        raise ZeroDivisionError(f"{name} {spec}")

    def stop(self, name: str, timeout: float) -> None:
        if self.address(name).with_suffix(".json").exists():
            raise RunnerUnavailableError(f"{name} cannot be ended in {timeout} seconds.")


def test_a_start_that_fails_for_whatever_reason_is_tried_again_after_pauses(
    light: Settings, shelf: Shelf
) -> None:
    shelf.put("rose", 1, "one")
    host = _host(light, _Broken(light))
    for failures, pause in ((1, 1), (2, 2), (3, 4)):
        began = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            _start(host)
        record = host.record(ROSE, FLAVOR)
        assert record is not None
        assert (record.started, record.failures) == (None, failures)
        assert "ZeroDivisionError" in str(record.problem)
        assert began + pause <= record.retry_at <= time.monotonic() + pause


class _Large(ChildProcesses):
    """Of a size that is made up; two of them are up at the same moment."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._both = Barrier(2)
        self._here = local()

    def memory(self, name: str) -> int | None:
        if self.process_id(name) is None:
            return None
        if not hasattr(self._here, "was"):
            self._here.was = True
            self._both.wait(60)
        return 60 * 2**20


def test_of_two_that_start_at_once_one_gets_the_memory(light: Settings, shelf: Shelf) -> None:
    settings = light.model_copy(update={"memory_budget": 100 * 2**20})
    registry = ModelRegistry.connect(settings)
    names = ("ash", "elm")
    for name in names:
        shelf.put(name, 1, name)
    models = [registry.resolve(name, "1") for name in names]

    def start(model: ModelVersion) -> bool:
        try:
            _start(host, model)
        except MemoryBudgetError:
            return False
        return True

    with serving(settings):
        for _ in range(5):
            host = _host(settings, _Large(settings))
            with ThreadPoolExecutor(2) as threads:
                started = list(threads.map(start, models))
            for model in models:
                host.stop(model, FLAVOR)
            assert sorted(started) == [False, True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b'{"model": "rose", "version": 1, "digest": "digest", "flavor": "pyfunc"}',
        b'{"name": "rose", "version": "1", "digest": "digest", "flavor": "pyfunc"}',
        b'{"name": "\xff", "version": 1, "digest": "digest", "flavor": "pyfunc"}',
    ],
)
def test_a_record_that_cannot_be_understood_is_as_none(light: Settings, content: bytes) -> None:
    host = _host(light)
    with pytest.raises(ModelNotFoundError):
        _start(host)
    assert len(host.records()) == 1
    (path,) = light.sockets.glob("*.json")
    path.write_bytes(content)
    assert host.records() == []
    assert host.record(ROSE, FLAVOR) is None
    host.forget_starts()
    # The next start writes it anew.
    with pytest.raises(ModelNotFoundError):
        _start(host)
    assert host.record(ROSE, FLAVOR) is not None
