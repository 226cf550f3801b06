"""What an operator asks of a worker host: do workers join, compute, come back, stay in bounds?"""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

import pytest

UNIT = "odsp-dask_worker.service"
PYTHON = "/opt/odsp/dask_worker/current/bin/python"
TLS = "/etc/odsp/tls"

CLIENT = """
import json, os, sys
from distributed import Client, Security
tls = "/etc/odsp/tls"
security = Security(tls_ca_file=f"{tls}/ca.crt", tls_client_cert=f"{tls}/dask_worker.crt",
                    tls_client_key=f"{tls}/dask_worker.key", require_encryption=True)
def look():
    return {"user": os.getuid(), "threads": os.environ["OMP_NUM_THREADS"],
            "environment": {key: os.environ.get(key) for key in sys_keys}, "square": 7**2}
with Client(sys.argv[1], security=security, timeout=20) as client:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    own = {key: value for key, value in workers.items() if value["host"] == sys.argv[2]}
    sys_keys = json.loads(sys.argv[3])
    print(json.dumps({
        "workers": list(own.values()),
        "looks": list(client.run(look, workers=list(own)).values()),
    }, default=str))
"""

RETIRE = """
import sys
from distributed import Client, Security
tls = "/etc/odsp/tls"
security = Security(tls_ca_file=f"{tls}/ca.crt", tls_client_cert=f"{tls}/dask_worker.crt",
                    tls_client_key=f"{tls}/dask_worker.key", require_encryption=True)
with Client(sys.argv[1], security=security, timeout=20) as client:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    own = [key for key, value in workers.items() if value["host"] == sys.argv[2]]
    client.retire_workers(own[:1], close_workers=True)
"""


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    return {
        "dask_worker_listen_address": "127.0.0.1",
        "dask_worker_threads": 1,
        **host.ansible.get_variables(),
    }


def look(host: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return this host's workers as the scheduler sees them, and what each sees of itself."""
    keys = json.dumps(sorted(inputs.get("dask_worker_environment", {})))
    values = (inputs["dask_worker_scheduler_url"], inputs["dask_worker_listen_address"], keys)
    arguments = " ".join(shlex.quote(str(value)) for value in (CLIENT, *values))
    return dict(json.loads(host.check_output(f"{PYTHON} -c {arguments}").splitlines()[-1]))


def joined(host: Any, inputs: dict[str, Any], expected: int, seconds: float = 60) -> list[Any]:
    """Wait until the scheduler knows the expected number of this host's workers."""
    deadline = time.monotonic() + seconds
    while True:
        workers = list(look(host, inputs)["workers"])
        if len(workers) == expected or time.monotonic() > deadline:
            return workers
        time.sleep(1)


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The workers run, survive a reboot, and cannot touch the rest of the host."""
    unit = host.service(UNIT)
    assert unit.is_enabled and unit.is_running, host.run(f"journalctl -u {UNIT} -n 50").stdout
    properties = unit.systemd_properties
    assert properties["User"] == "dask_worker"
    assert properties["ProtectSystem"] == "strict"
    assert properties["MemoryMax"].isdigit()


def test_every_process_joined_with_its_size(host: Any, inputs: dict[str, Any]) -> None:
    """The scheduler knows exactly the processes asked for, by this host's name."""
    name = inputs.get("dask_worker_name", host.check_output("hostname"))
    workers = look(host, inputs)["workers"]
    assert len(workers) == int(inputs["dask_worker_processes"])
    assert {worker["name"].split("/")[0] for worker in workers} == {name}
    assert {worker["nthreads"] for worker in workers} == {int(inputs["dask_worker_threads"])}
    limits = sum(int(worker["memory_limit"]) for worker in workers)
    wall = int(host.service(UNIT).systemd_properties["MemoryMax"])
    assert 0 < limits < wall


def test_tasks_run_as_the_service_with_their_environment(host: Any, inputs: dict[str, Any]) -> None:
    """A task finds what the inventory promised, and no more threads than its process has."""
    uid = host.user("dask_worker").uid
    for found in look(host, inputs)["looks"]:
        assert found["user"] == uid != 0
        assert found["square"] == 49
        assert found["threads"] == str(inputs["dask_worker_threads"])
        assert found["environment"] == inputs.get("dask_worker_environment", {})


def test_workers_are_open_to_nobody_else(host: Any, inputs: dict[str, Any]) -> None:
    """Each port on the network demands a certificate of the platform; the rest is loopback."""
    address = inputs["dask_worker_listen_address"]
    pids = host.check_output("ps -u dask_worker -o pid=").split()
    listening = [
        line
        for line in host.check_output("ss -Hltnp").splitlines()
        if any(f"pid={pid}," in line for pid in pids)
    ]
    places = {line.split()[3] for line in listening}
    assert {place.rsplit(":", 1)[0] for place in places} <= {address, "127.0.0.1"}
    network = [place for place in places if place.startswith(f"{address}:")]
    assert len(network) >= 2 * int(inputs["dask_worker_processes"]), "workers and their nannies"
    for place in network:
        command = f"openssl s_client -connect {place} -CAfile {TLS}/ca.crt"
        held = f"(sleep 1; echo; sleep 1) | timeout 10 {command} 2>&1"
        refused = host.run(f"{held} | grep -ao 'certificate required'")
        assert refused.rc == 0, place


def test_stopping_takes_the_workers_out_and_starting_brings_them_back(
    host: Any, inputs: dict[str, Any]
) -> None:
    """A stop is orderly and quick; the cluster forgets the workers at once."""
    expected = int(inputs["dask_worker_processes"])
    try:
        began = time.monotonic()
        host.check_output(f"systemctl stop {UNIT}")
        assert time.monotonic() - began < 25
        assert host.service(UNIT).systemd_properties["Result"] == "success"
        assert joined(host, inputs, 0, seconds=10) == []
    finally:
        host.check_output(f"systemctl start {UNIT}")
    assert len(joined(host, inputs, expected)) == expected


def test_a_farewell_costs_nobody_else_the_scheduler(host: Any, inputs: dict[str, Any]) -> None:
    """While one connection ends, others go on: every restart brings every worker, and it stays."""
    expected = int(inputs["dask_worker_processes"])
    for _ in range(6):
        host.check_output(f"systemctl restart {UNIT}")
        assert len(joined(host, inputs, expected)) == expected
        time.sleep(3)  # broken connections were noticed after two seconds
        assert len(look(host, inputs)["workers"]) == expected


def test_a_worker_that_leaves_comes_back(host: Any, inputs: dict[str, Any]) -> None:
    """A host has all its workers or is on its way to them, whoever retired one."""
    before = {worker["nanny"] for worker in look(host, inputs)["workers"]}
    values = (inputs["dask_worker_scheduler_url"], inputs["dask_worker_listen_address"])
    host.check_output(f"{PYTHON} -c {' '.join(shlex.quote(value) for value in (RETIRE, *values))}")
    deadline = time.monotonic() + 60
    while True:
        after = {worker["nanny"] for worker in look(host, inputs)["workers"]}
        if len(after) == len(before) and not after & before:
            return
        assert time.monotonic() < deadline, (before, after)
        time.sleep(1)


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """Only root and the service read the key and the environment; no argument holds a secret."""
    for path in (f"{TLS}/dask_worker.key", "/etc/odsp/dask_worker.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", "dask_worker", 0o640)
    arguments = host.check_output("ps -eo args")
    secrets = [
        value for key, value in inputs.get("dask_worker_environment", {}).items() if "SECRET" in key
    ]
    assert not [secret for secret in secrets if secret in arguments]
