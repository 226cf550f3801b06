"""What an operator asks of the scheduler: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-dask_scheduler.service"
WORKER = "odsp-dask_worker.service"
CACHE = "/var/cache/odsp/dask_scheduler"
PYTHON = "/opt/odsp/dask_scheduler/current/bin/python"
TLS = "/etc/odsp/tls"
RUNNING = "/run/odsp-client"

Note = Callable[[str], None]

# A program begins as a client of the platform; `given` is what the test hands over.
CLIENT = """
import json, os, sys, time
from distributed import Client, Security
given = json.loads(sys.argv[1])
security = Security(tls_ca_file="/etc/odsp/tls/ca.crt", tls_client_cert=f"{given['pair']}.crt",
                    tls_client_key=f"{given['pair']}.key", require_encryption=True)
client = Client(given["url"], security=security, timeout=given["timeout"])
def workers():
    known = client.scheduler_info(n_workers=-1)["workers"].items()
    return sorted(address for address, worker in known if worker["status"] == "running")
def joined(former=()):
    deadline = time.monotonic() + 60
    while not set(workers()) - set(former) and time.monotonic() < deadline:
        time.sleep(0.2)
    return workers()
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
    return {"dask_scheduler_dashboard_prefix": "dask", **host.ansible.get_variables()}


def place(inputs: dict[str, Any], port: str = "dask_scheduler_listen_port") -> str:
    """Return the address and one of the ports."""
    return f"{inputs['dask_scheduler_listen_address']}:{inputs[port]}"


def program(inputs: dict[str, Any], code: str, **given: Any) -> str:
    """Return the command of a program, by default with the scheduler's own certificate."""
    values = {
        "url": f"tls://{place(inputs)}",
        "pair": f"{TLS}/dask_scheduler",
        "running": RUNNING,
        "timeout": 20,
        **given,
    }
    return shlex.join([PYTHON, "-c", code, json.dumps(values)])


def ask(host: Any, inputs: dict[str, Any], code: str, **given: Any) -> Any:
    """Run a client's program on the host; return its last word."""
    answer = host.check_output(program(inputs, CLIENT + code, **given))
    return json.loads(answer.splitlines()[-1])


def assert_served(host: Any, inputs: dict[str, Any], timeout: int = 20) -> list[str]:
    """A client of the platform gets a task done by a worker; return the workers."""
    code = """
found = joined()
assert client.submit(sum, [19, 23], pure=False).result(20) == 42
print(json.dumps(found))
"""
    found = list(ask(host, inputs, code, timeout=timeout))
    assert len(found) == int(inputs["dask_worker_processes"]), scenario.journal(host, WORKER)
    return found


def handshake(host: Any, where: str, options: str = "") -> str:
    """Return what openssl says of a connection that is held open for a moment."""
    command = f"openssl s_client -connect {where} -CAfile {TLS}/ca.crt {options}"
    words = "grep -aoE 'Verification: OK|certificate required|alert unknown ca'"
    return str(host.run(f"(sleep 1; echo; sleep 1) | timeout 10 {command} 2>&1 | {words}").stdout)


def dashboard(host: Any, inputs: dict[str, Any], page: str, prefix: str = "") -> int:
    """Return the status of a page of the dashboard, asked with a certificate."""
    where = place(inputs, "dask_scheduler_dashboard_port")
    path = f"/{prefix or inputs['dask_scheduler_dashboard_prefix']}/{page}"
    code = (
        "import http.client, ssl;"
        f"c = ssl.create_default_context(cafile='{TLS}/ca.crt');"
        f"c.load_cert_chain('{TLS}/dask_scheduler.pem');"
        f"h = http.client.HTTPSConnection('{where}', context=c, timeout=10);"
        f"h.request('GET', '{path}'); print(h.getresponse().status)"
    )
    return int(host.check_output(f'{PYTHON} -c "{code}"'))


def role_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the layer's playbook without the validation that `site.yml` begins with."""
    state, molecule = os.environ["ODSP_STATE_DIR"], os.environ["MOLECULE_INVENTORY_FILE"]
    sources = ("inventories/common", "molecule/_shared/inventory", f"{state}/secrets")
    command = ["ansible-playbook", str(scenario.ROOT / "playbooks/compute.yml"), "--diff"]
    for source in (*sources, str(Path(molecule).parent)):
        command += ["--inventory", str(scenario.ROOT / source)]
    run = subprocess.run(
        [*command, *arguments], check=False, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    scenario.assert_no_secret(run.stdout + run.stderr)
    return run


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The scheduler runs, survives a reboot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "dask_scheduler", exposure=1.5)
    assert host.service(UNIT).systemd_properties["MemoryMax"] == str(4 * 2**30)


def test_clients_with_a_certificate_are_served(host: Any, inputs: dict[str, Any]) -> None:
    """A client of the platform gets in over TLS and its tasks are done."""
    assert_served(host, inputs)


@pytest.mark.parametrize("port", ["dask_scheduler_listen_port", "dask_scheduler_dashboard_port"])
def test_strangers_are_refused(host: Any, inputs: dict[str, Any], port: str) -> None:
    """Without a certificate of the platform neither scheduler nor dashboard says a word."""
    foreign = "/root/odsp-foreign"
    host.check_output(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-subj /CN=dask_scheduler -keyout {foreign}.key -out {foreign}.crt 2>/dev/null"
    )
    where = place(inputs, port)
    assert "certificate required" in handshake(host, where)
    assert "unknown ca" in handshake(host, where, f"-cert {foreign}.crt -key {foreign}.key")
    own = f"-cert {TLS}/dask_scheduler.crt -key {TLS}/dask_scheduler.key"
    accepted = handshake(host, where, own)
    assert "Verification: OK" in accepted and "certificate required" not in accepted
    host.check_output(f"rm {foreign}.key {foreign}.crt")


def test_plain_text_is_not_answered(host: Any, inputs: dict[str, Any]) -> None:
    """A client without TLS gives up in its own time; a browser without TLS gets no page."""
    code = """
import json, sys
from distributed import Client
given = json.loads(sys.argv[1])
Client(given["url"], timeout=given["timeout"])
"""
    plain = host.run(program(inputs, code, url=f"tcp://{place(inputs)}", timeout=4))
    last = plain.stderr.strip().splitlines()[-1]
    assert plain.rc != 0 and ("CommClosedError" in last or "imed out" in last), plain.stderr
    port = "dask_scheduler_dashboard_port"
    page = host.run(f"curl -sS --max-time 5 http://{place(inputs, port)}/dask/health")
    assert page.rc != 0 and not page.stdout


def test_a_client_from_another_lock_is_refused(host: Any, inputs: dict[str, Any]) -> None:
    """The refusal is one sentence that names both locks."""
    refused = host.run(program(inputs, STRANGER + CLIENT))
    assert refused.rc != 0
    refusal = refused.stderr.strip().splitlines()[-1]
    assert refusal.startswith("ImportError: the Dask scheduler refuses the client"), refusal
    assert "odsp-lock 0123456789abcdef instead of" in refusal


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


def test_secrets_are_private(host: Any) -> None:
    """Only root and the service read the key and the settings; the key is nowhere else."""
    for path in (f"{TLS}/dask_scheduler.key", "/etc/odsp/dask_scheduler.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", "dask_scheduler", 0o640)
    key = host.check_output(f"sed -n 2p {TLS}/dask_scheduler.key")
    assert scenario.places_of(host, key) == []


def test_survives_kill_9(host: Any, inputs: dict[str, Any]) -> None:
    """It comes back, so do workers; a client at work learns what was lost and goes on."""
    at_work = """
import logging
logging.disable()
former, lost, after = joined(), 0, 0
open(given["running"], "w").close()
end = time.monotonic() + 80
while not after and time.monotonic() < end:
    over = not os.path.exists(given["running"])
    try:
        # Long enough that one is always under way.
        client.submit(time.sleep, 0.5, pure=False).result(60)
        after += over
    except BaseException as loss:
        if client.status == "closed":
            raise
        lost += 1
print(json.dumps([former, lost, after, joined(former)]))
"""
    with ThreadPoolExecutor() as pool:
        work = pool.submit(ask, host, inputs, at_work)
        try:
            scenario.wait_until(lambda: host.file(RUNNING).exists)
            scenario.kill(host, UNIT)
            assert_served(host, inputs)
        finally:
            host.run(f"rm -f {RUNNING}")
        former, lost, after, present = work.result(timeout=90)
    assert lost and after and not set(former) & set(present)


def test_survives_a_reboot(host: Any, inputs: dict[str, Any]) -> None:
    """Scheduler and workers find each other again, in whichever order they start."""
    scenario.reboot(host)
    assert_served(host, inputs)
    assert dashboard(host, inputs, "health") == 200


def test_bad_inputs_are_refused_by_name_and_nothing_changes(host: Any) -> None:
    """One sentence each names host, variable and remedy; the scheduler goes on as it is."""
    wrong = {
        "dask_scheduler_listen_port": 0,
        "dask_scheduler_dashboard_port": 0,
        "dask_scheduler_dashboard_prefix": "/dask/",
        "dask_scheduler_memory_max": "4 gigs",
    }
    before = scenario.units(host)
    run = role_alone("--tags", "dask_scheduler", "--extra-vars", json.dumps(wrong))
    assert run.returncode != 0
    for sentence in (
        "node-1: dask_scheduler_listen_port is 0 and dask_scheduler_dashboard_port is 0; give both",
        "node-1: dask_scheduler_listen_port and dask_scheduler_dashboard_port are both 0; give one",
        "node-1: dask_scheduler_dashboard_prefix is '/dask/'; write a path without a slash",
        "node-1: dask_scheduler_memory_max is '4 gigs', which systemd would ignore; write a number",
    ):
        assert sentence in run.stdout, run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_another_port_takes_the_workers_along(host: Any, inputs: dict[str, Any]) -> None:
    """The old ports are closed, the workers follow to the new one, and all the way back."""
    ports = ("dask_scheduler_listen_port", "dask_scheduler_dashboard_port")
    changed = {
        "odsp_dask_scheduler_port": 8796,
        "odsp_dask_scheduler_dashboard_port": 8797,
        "dask_scheduler_dashboard_prefix": "compute",
        "dask_scheduler_memory_max": "2G",
    }
    moved = {**inputs, ports[0]: 8796, ports[1]: 8797, "dask_scheduler_dashboard_prefix": "compute"}
    before = scenario.units(host)
    try:
        run = scenario.site("--extra-vars", json.dumps(changed))
        assert run.returncode == 0, run.stdout
        assert scenario.restarted(before, scenario.units(host)) == {UNIT, WORKER}
        assert_served(host, moved)
        assert dashboard(host, moved, "health") == 200
        assert dashboard(host, moved, "health", prefix="dask") == 404
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(2 * 2**30)
        for port in ports:
            assert not host.socket(f"tcp://{place(inputs, port)}").is_listening
    finally:
        run = scenario.site()
    assert run.returncode == 0, run.stdout
    assert_served(host, inputs)
    for port in ports:
        assert not host.socket(f"tcp://{place(moved, port)}").is_listening


@pytest.mark.fault(
    "full disk", "The scheduler keeps nothing on disk: it serves on, and even starts without room."
)
def test_a_full_disk_stops_nothing(host: Any, inputs: dict[str, Any], measured: Note) -> None:
    """Not even the byte code of what it imports must have a place."""
    with faults.full_disk(host, UNIT, CACHE, mib=64) as disk:
        assert_served(host, inputs)
        host.check_output(f"rm -rf {CACHE}/*")
        disk.fill()
        assert_served(host, inputs)
        began = time.monotonic()
        host.check_output(f"systemctl restart {UNIT}")
        assert_served(host, inputs, timeout=120)  # it compiles all it imports
        seconds = time.monotonic() - began
    assert_served(host, inputs, timeout=120)
    measured(f"served on; restarted without room it served again after {seconds:.0f} s")


@pytest.mark.fault(
    "out of memory",
    "A graph larger than MemoryMax costs the scheduler's state; it and the workers come back.",
)
def test_a_graph_too_large_costs_one_restart(
    host: Any, inputs: dict[str, Any], measured: Note
) -> None:
    """The host stays, the others are served again."""
    assert_served(host, inputs)
    before = scenario.units(host)[UNIT]
    used = int(host.service(UNIT).systemd_properties["MemoryCurrent"]) // 2**20
    limit = used + 96
    host.check_output(f"systemctl set-property --runtime {UNIT} MemoryMax={limit}M")
    try:
        large = f"client.submit(len, os.urandom({4 * limit} * 2**20)).result(10)"
        assert host.run(program(inputs, CLIENT + large)).rc != 0, "it had room for all of it"
        began = time.monotonic()

        def ended() -> bool:
            """Tell whether the scheduler was ended by the kernel and started anew."""
            return host.service(UNIT).is_running and scenario.units(host)[UNIT] != before

        scenario.wait_until(ended)
        assert "status=9/KILL" in scenario.journal(host, UNIT)
        assert_served(host, inputs)
        seconds = time.monotonic() - began
    finally:
        host.check_output(f"rm -rf /run/systemd/system.control/{UNIT}.d; systemctl daemon-reload")
    measured(
        f"a graph of {4 * limit} MiB at a limit of {limit} MiB: one restart, others were served"
        f" again {seconds:.0f} s after the client had given up"
    )


@pytest.mark.fault("clock jump", "Nobody is lost when its clock jumps a day ahead and back.")
def test_the_clock_may_jump(host: Any, inputs: dict[str, Any], measured: Note) -> None:
    """Workers are not taken for dead; new clients are let in."""
    now = """
print(client.run_on_scheduler(time.time) - time.time())
"""
    with faults.clock(host, UNIT) as moved:
        before, run = assert_served(host, inputs), scenario.units(host)
        for seconds in (86400, 0):
            moved.jump(seconds)

            def there(seconds: int = seconds) -> bool:
                """Tell whether the scheduler sees the moved clock."""
                return abs(float(ask(host, inputs, now)) - seconds) < 60

            scenario.wait_until(there)
            assert assert_served(host, inputs) == before
        assert scenario.restarted(run, scenario.units(host)) == set()
    assert_served(host, inputs)
    measured("after +1 day and after -1 day the same workers served new clients; no restart")


@pytest.mark.fault(
    "expired certificate",
    "Nobody talks to a scheduler whose certificate has ended; the role's next run renews it.",
)
def test_an_expired_certificate_is_renewed(
    host: Any, inputs: dict[str, Any], measured: Note
) -> None:
    """Clients name the reason, workers stay away, and both are served after `site.yml`."""
    with faults.expired_certificate(host, "dask_scheduler", UNIT):
        pair = f"{TLS}/dask_worker"
        refused = host.run(program(inputs, CLIENT, pair=pair, timeout=4))
        assert refused.rc != 0 and "certificate has expired" in refused.stderr, refused.stderr
        began = time.monotonic()
        run = scenario.site("--tags", "dask_scheduler")
        assert run.returncode == 0, run.stdout
        seconds = time.monotonic() - began
        assert_served(host, inputs)
    measured(f"clients refused it by name; one run of {seconds:.0f} s renewed it, workers joined")
