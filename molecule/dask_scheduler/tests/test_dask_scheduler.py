"""What an operator asks of the scheduler: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

UNIT = "odsp-dask_scheduler.service"
PYTHON = "/opt/odsp/dask_scheduler/current/bin/python"
TLS = "/etc/odsp/tls"

CLIENT = """
import json, sys
from distributed import Client, Security
security = Security(tls_ca_file="/etc/odsp/tls/ca.crt", tls_client_cert=sys.argv[2],
                    tls_client_key=sys.argv[3], require_encryption=True)
try:
    with Client(sys.argv[1], security=security, timeout=20) as client:
        print(json.dumps({"workers": len(client.scheduler_info(n_workers=-1)["workers"])}))
except ImportError as refusal:
    print(json.dumps({"refusal": str(refusal)}))
"""

# A client installed from another lock announces another digest.
STRANGER = """
from distributed import versions
own = versions.get_package_info
versions.get_package_info = lambda packages: {**own(packages), "odsp-lock": "0123456789abcdef"}
"""


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    return {
        "dask_scheduler_listen_address": "127.0.0.1",
        "dask_scheduler_listen_port": 8786,
        "dask_scheduler_dashboard_port": 8787,
        "dask_scheduler_dashboard_prefix": "dask",
        **host.ansible.get_variables(),
    }


def client(host: Any, inputs: dict[str, Any], code: str) -> dict[str, Any]:
    """Run a client on the host with the scheduler's own certificate; return what it found."""
    where = "{dask_scheduler_listen_address}:{dask_scheduler_listen_port}".format(**inputs)
    pair = f"{TLS}/dask_scheduler.crt {TLS}/dask_scheduler.key"
    answer = host.check_output(f"{PYTHON} -c {shlex.quote(code)} tls://{where} {pair}")
    return dict(json.loads(answer.splitlines()[-1]))


def handshake(host: Any, where: str, options: str = "") -> str:
    """Return what openssl says of a connection that is held open for a moment."""
    command = f"openssl s_client -connect {where} -CAfile {TLS}/ca.crt {options}"
    words = "grep -aoE 'Verification: OK|certificate required'"
    return str(host.run(f"(sleep 1; echo; sleep 1) | timeout 10 {command} 2>&1 | {words}").stdout)


def dashboard(host: Any, inputs: dict[str, Any], page: str) -> int:
    """Return the status of a page of the dashboard, asked with a certificate."""
    where = "{dask_scheduler_listen_address}:{dask_scheduler_dashboard_port}".format(**inputs)
    path = f"/{inputs['dask_scheduler_dashboard_prefix']}/{page}"
    code = (
        "import http.client, ssl;"
        f"c = ssl.create_default_context(cafile='{TLS}/ca.crt');"
        f"c.load_cert_chain('{TLS}/dask_scheduler.pem');"
        f"h = http.client.HTTPSConnection('{where}', context=c, timeout=10);"
        f"h.request('GET', '{path}'); print(h.getresponse().status)"
    )
    return int(host.check_output(f'{PYTHON} -c "{code}"'))


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The scheduler runs, survives a reboot, and cannot touch the rest of the host."""
    unit = host.service(UNIT)
    assert unit.is_enabled and unit.is_running, host.run(f"journalctl -u {UNIT} -n 50").stdout
    properties = unit.systemd_properties
    assert properties["User"] == "dask_scheduler"
    assert properties["ProtectSystem"] == "strict"
    assert properties["NoNewPrivileges"] == "yes"


def test_clients_with_a_certificate_are_served(host: Any, inputs: dict[str, Any]) -> None:
    """A client of the platform gets in over TLS and learns of the workers."""
    assert client(host, inputs, CLIENT)["workers"] >= 0


@pytest.mark.parametrize("port", ["dask_scheduler_listen_port", "dask_scheduler_dashboard_port"])
def test_strangers_are_refused(host: Any, inputs: dict[str, Any], port: str) -> None:
    """Without a certificate of the platform neither scheduler nor dashboard says a word."""
    where = f"{inputs['dask_scheduler_listen_address']}:{inputs[port]}"
    assert "certificate required" in handshake(host, where)
    own = f"-cert {TLS}/dask_scheduler.crt -key {TLS}/dask_scheduler.key"
    accepted = handshake(host, where, own)
    assert "Verification: OK" in accepted and "certificate required" not in accepted


def test_a_client_from_another_lock_is_refused(host: Any, inputs: dict[str, Any]) -> None:
    """The refusal is one sentence that names both locks."""
    refusal = client(host, inputs, STRANGER + CLIENT)["refusal"]
    assert "odsp-lock 0123456789abcdef instead of" in refusal
    assert len(refusal.splitlines()) == 1


def test_dashboard_shows_and_does_not_act(host: Any, inputs: dict[str, Any]) -> None:
    """Pages answer under the prefix; the routes that steer the cluster are not there."""
    assert dashboard(host, inputs, "health") == 200
    assert dashboard(host, inputs, "status") == 200
    assert dashboard(host, inputs, "api/v1/retire_workers") == 404
    assert dashboard(host, inputs, "json/counts.json") == 404


def test_listens_on_its_address_only(host: Any, inputs: dict[str, Any]) -> None:
    """No port of it is open on every interface."""
    for port in (inputs["dask_scheduler_listen_port"], inputs["dask_scheduler_dashboard_port"]):
        assert host.socket(f"tcp://{inputs['dask_scheduler_listen_address']}:{port}").is_listening
        assert not host.socket(f"tcp://0.0.0.0:{port}").is_listening


def test_private_key_is_private(host: Any) -> None:
    """Only root and the service read the key and the settings."""
    for path in (f"{TLS}/dask_scheduler.key", "/etc/odsp/dask_scheduler.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", "dask_scheduler", 0o640)
