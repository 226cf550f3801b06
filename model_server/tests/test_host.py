"""The runners of one host: their records, and starts that fail."""

import time

import pytest

from model_server.environments import Environments
from model_server.errors import ModelNotFoundError
from model_server.host import ModelHost
from model_server.processes import ChildProcesses
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
