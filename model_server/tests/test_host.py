"""The runners of one host: their records, and starts that fail."""

import time

import pytest

from light_models import Shelf
from model_server.environments import Environments
from model_server.errors import ModelNotFoundError, RunnerUnavailableError
from model_server.host import ModelHost
from model_server.locks import exclusive
from model_server.processes import ChildProcesses, RunnerSpec
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
    pauses = []
    for failures in (1, 2, 3):
        began = time.time()
        with pytest.raises(ZeroDivisionError):
            _start(host)
        record = host.record(ROSE, FLAVOR)
        assert record is not None
        assert (record.started, record.failures) == (None, failures)
        assert "ZeroDivisionError" in str(record.problem)
        pauses.append(round(record.retry_at - began))
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 4


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
