"""Both sides of the door: users in front of it, components behind it.

Inputs: two users of whom the first is nginx_jupyterlab_user, and a route to each component on a
port of loopback addresses where nothing listens; the tests stand there themselves.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import scenario

PROGRAM = "/root/odsp-door-test.py"  # a reboot empties /run
COMPONENTS = {"jupyterlab", "mlflow", "dask_scheduler", "minio", "model_server"}


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    values = {"nginx_listen_port": 443, **host.ansible.get_variables()}
    assert len(values["nginx_user_passwords"]) > 1, "the tests need two users"
    assert {route["component"] for route in values["nginx_routes"]} == COMPONENTS
    return values


@pytest.fixture(scope="module")
def users(inputs: dict[str, Any]) -> list[list[str]]:
    """Return names and passwords; the first is the owner of the notebooks."""
    return [[name, password] for name, password in inputs["nginx_user_passwords"].items()]


@pytest.fixture(scope="module", autouse=True)
def program(host: Any) -> Iterator[None]:
    """Have the client and the upstream on the host."""
    encoded = base64.b64encode((Path(__file__).parent / "door.py").read_bytes()).decode()
    host.check_output(f"echo {encoded} | base64 -d > {PROGRAM}")
    yield
    host.check_output(f"rm -f {PROGRAM} /run/odsp-door-*")


@pytest.fixture(scope="module")
def run(host: Any) -> Any:
    """Return a function that runs a verb of the program on the host and returns what it prints."""

    def ran(verb: str, values: list[Any]) -> Any:
        encoded = base64.b64encode(json.dumps(values).encode()).decode()
        answer = host.run(f"echo {encoded} | base64 -d | python3 {PROGRAM} {verb}")
        assert answer.rc == 0, answer.stdout + answer.stderr
        return json.loads(answer.stdout)

    return ran


@pytest.fixture(scope="module")
def ask(run: Any, inputs: dict[str, Any]) -> Any:
    """Return a function that sends requests through the door, all in one go."""

    def asked(
        *requests: dict[str, Any], port: int = 0, at_once: bool = False
    ) -> list[dict[str, Any]]:
        verb = "crowd" if at_once else "ask"
        return list(run(verb, [port or inputs["nginx_listen_port"], *requests]))

    return asked


@pytest.fixture(scope="module")
def opens(ask: Any, users: list[list[str]]) -> Callable[[], bool]:
    """Return a question: is the door there, shut to strangers and open to users?"""

    def opened() -> bool:
        """Tell whether strangers get 401 and users the start page."""
        answers = ask({"path": "/"}, {"path": "/mlflow/"}, {"path": "/", "auth": users[0]})
        return [answer["status"] for answer in answers] == [401, 401, 200]

    return opened


@pytest.fixture(scope="module")
def behind(host: Any, inputs: dict[str, Any]) -> Any:
    """Return a context manager that stands behind the door as components, each with its hosts."""
    ends = {
        route["component"]: {name: f"{ip}:{route['port']}" for name, ip in route["hosts"].items()}
        for route in inputs["nginx_routes"]
    }

    @contextmanager
    def stand(
        verb: str, *components: str, hosts: Sequence[str] = (), unit: str = "odsp-door-test.service"
    ) -> Iterator[None]:
        chosen = [
            end
            for component in components or ends
            for name, end in ends[component].items()
            if not hosts or name in hosts
        ]
        words = f"python3 {PROGRAM} {verb} {' '.join(chosen)}"
        host.check_output(f"systemd-run --quiet --collect --unit={unit} {words}")

        def serves() -> bool:
            """Tell whether a handshake succeeds at each of its ends."""
            own = f"-cert {scenario.TLS}/nginx.crt -key {scenario.TLS}/nginx.key"
            knock = f"timeout 5 openssl s_client {own} -connect $end </dev/null"
            every = f"for end in {' '.join(chosen)}; do {knock} || exit; done"
            return bool(host.run(f"{{ {every}; }} >/dev/null 2>&1").rc == 0)

        try:
            scenario.wait_until(serves)
            yield
        finally:
            host.run(f"systemctl kill --signal KILL {unit}; systemctl stop {unit}")

    return stand


@pytest.fixture
def upstream(behind: Any) -> Iterator[None]:
    """Stand behind the door as every component."""
    with behind("serve"):
        yield


@pytest.fixture
def impostor(behind: Any) -> Iterator[None]:
    """Stand behind the door with a certificate of one's own."""
    with behind("lie"):
        yield


@pytest.fixture
def held(host: Any, inputs: dict[str, Any], users: list[list[str]]) -> Any:
    """Return a context manager that asserts at its end that a WebSocket was never broken."""
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    request = {"path": "/jupyter/ws", "auth": users[0], "headers": upgrade}
    unit, file = "odsp-door-hold.service", "/run/odsp-door-hold.json"

    @contextmanager
    def hold() -> Iterator[None]:
        text = json.dumps([inputs["nginx_listen_port"], request])
        encoded = base64.b64encode(text.encode()).decode()
        host.check_output(f"umask 077; echo {encoded} | base64 -d > {file}")
        host.check_output(f"systemd-run --quiet --unit={unit} python3 {PROGRAM} hold {file}")

        def is_open() -> bool:
            """Tell whether a word has come back."""
            return not host.file(file).exists

        try:
            scenario.wait_until(is_open)
            yield
            assert host.service(unit).is_running, scenario.journal(host, unit)
        finally:
            host.run(f"systemctl stop {unit}; systemctl reset-failed {unit}; rm -f {file}")

    return hold
