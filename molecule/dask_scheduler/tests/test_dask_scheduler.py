"""What an operator asks of the scheduler: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-dask_scheduler.service"
WORKER = "odsp-dask_worker.service"
CACHE = "/var/cache/odsp/dask_scheduler"
PYTHON = "/opt/odsp/dask_scheduler/current/bin/python"
PAIR = f"{scenario.TLS}/dask_scheduler"
PORTS = ("dask_scheduler_listen_port", "dask_scheduler_dashboard_port")

Inputs = dict[str, Any]
Note = Callable[[str], None]

# What a program of a client begins with; `v` is what the test hands over.
CLIENT = """
import asyncio, os, time, traceback
from distributed import Client, Security, Worker, versions

def security():
    if not v["pair"]:
        return Security()
    return Security(tls_ca_file=v["ca"], require_encryption=True,
                    **{f"tls_{who}_{what}": f"{v['pair']}.{end}" for who in ("client", "worker")
                       for what, end in (("cert", "crt"), ("key", "key"))})

def connect():
    return Client(v["url"], security=security(), timeout=v["timeout"])

def joined(client, former=()):
    found, deadline = [], time.monotonic() + 120
    while not set(found) - set(former) and time.monotonic() < deadline:
        known = client.scheduler_info(n_workers=-1)["workers"].values()
        # By its folder, which only it ever has: a port may come again.
        found = sorted(one["local_directory"] for one in known if one["status"] == "running")
        time.sleep(0.2)
    return found
"""

# How a peer is refused: by whom and why, or not at all.
REFUSAL = """
async def work():
    async with Worker(v["url"], security=security(), host=v["address"], dashboard_address=None):
        pass

own = versions.get_package_info
versions.get_package_info = lambda packages: {**own(packages), **v["announced"]}
began, said = time.monotonic(), ""
try:
    if v["peer"] == "client":
        connect()
    else:
        asyncio.run(work())
except Exception:
    said = traceback.format_exc()
print(json.dumps([said, time.monotonic() - began]))
"""

# A page of the dashboard, asked for with a certificate.
PAGE = """
import http.client, ssl
context = ssl.create_default_context(cafile=v["ca"])
context.load_cert_chain(f"{v['pair']}.pem")
page = http.client.HTTPSConnection(v["where"], context=context, timeout=60)
page.request("GET", v["path"], headers=v["headers"])
print(page.getresponse().status)
"""


@pytest.fixture(scope="module")
def inputs(host: Any) -> Inputs:
    """Return the role's inputs for this host."""
    return {"dask_scheduler_dashboard_prefix": "dask", **host.ansible.get_variables()}


def place(inputs: Inputs, port: str = PORTS[0]) -> str:
    """Return the address and one of the ports."""
    return f"{inputs['dask_scheduler_listen_address']}:{inputs[port]}"


def given(inputs: Inputs, **more: Any) -> dict[str, Any]:
    """Return what a client's program is told, by default with the scheduler's own certificate."""
    own = {"url": f"tls://{place(inputs)}", "ca": scenario.CA, "pair": PAIR, "timeout": 60}
    return {**own, **more}


def ask(host: Any, inputs: Inputs, code: str, **more: Any) -> Any:
    """Run a client's program on the host; return its last word."""
    return scenario.python(host, CLIENT + code, PYTHON, **given(inputs, **more))


def refusal(host: Any, inputs: Inputs, **more: Any) -> tuple[str, float]:
    """Return how the scheduler refuses a peer, nothing if it does not, and after which seconds."""
    peer = {"peer": "client", "announced": {}, "address": inputs["dask_scheduler_listen_address"]}
    said, seconds = ask(host, inputs, REFUSAL, **{**peer, **more})
    return str(said), float(seconds)


def served(host: Any, inputs: Inputs, timeout: int = 120) -> list[str]:
    """Have a task of a platform's client done by a worker; return all workers, none is missing."""
    code = """
client = connect()
found = joined(client)
assert client.submit(sum, [19, 23], pure=False).result(60) == 42
print(json.dumps(found))
"""
    found = list(ask(host, inputs, code, timeout=timeout))
    assert len(found) == int(inputs["dask_worker_processes"]), scenario.journal(host, WORKER)
    return found


def dashboard(host: Any, inputs: Inputs, page: str, prefix: str = "", **headers: str) -> int:
    """Return the status of a page of the dashboard, asked with a certificate."""
    asked = {
        "where": place(inputs, PORTS[1]),
        "path": f"/{prefix or inputs['dask_scheduler_dashboard_prefix']}/{page}",
        "headers": headers,
    }
    return int(scenario.python(host, PAGE, PYTHON, **given(inputs, **asked)))


def web_socket(host: Any, inputs: Inputs, origin: str) -> int:
    """Return the status when a page of another site opens a WebSocket of the dashboard."""
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }
    return dashboard(host, inputs, "status/ws", **upgrade, Origin=f"https://{origin}")


def environment(host: Any) -> list[str]:
    """Return the environment of the running scheduler."""
    pid = scenario.main_pid(host, UNIT)
    return str(host.check_output(f"tr '\\0' '\\n' < /proc/{pid}/environ")).splitlines()


def properties(host: Any) -> dict[str, str]:
    """Return what systemd knows of the unit now."""
    return dict(host.service(UNIT).systemd_properties)


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The scheduler runs, is started at boot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "dask_scheduler", exposure=1.5)
    assert properties(host)["MemoryMax"] == str(4 * 2**30)


def test_clients_with_a_certificate_are_served(host: Any, inputs: Inputs) -> None:
    """A client of the platform gets in over TLS and its tasks are done."""
    served(host, inputs)


@pytest.mark.parametrize("port", PORTS)
def test_strangers_are_refused(host: Any, inputs: Inputs, port: str) -> None:
    """Whoever shows no certificate of the platform hears nothing, on whichever host."""
    where = place(inputs, port)
    address = inputs["dask_scheduler_listen_address"]
    assert "certificate required" in scenario.refuses_strangers(address, int(inputs[port]))
    with scenario.foreign_pair(host, "dask_scheduler") as foreign:
        assert "unknown ca" in scenario.handshake(host, where, foreign)
    accepted = scenario.handshake(host, where, PAIR)
    assert "Verification: OK" in accepted
    assert "certificate required" not in accepted and "unknown ca" not in accepted


def test_plain_text_is_not_answered(host: Any, inputs: Inputs) -> None:
    """A client without TLS is told to go at once; a browser without TLS gets no page."""
    since = time.time()
    said, seconds = refusal(host, inputs, url=f"tcp://{place(inputs)}", pair="", timeout=60)
    assert "CommClosedError" in said and seconds < 30, said

    def told_why() -> bool:
        """Tell whether the scheduler has written why."""
        return "WRONG_VERSION_NUMBER" in scenario.journal(host, UNIT, since=since)

    scenario.wait_until(told_why)
    address = (inputs["dask_scheduler_listen_address"], int(inputs[PORTS[1]]))
    with socket.create_connection(address, timeout=60) as browser:
        browser.sendall(b"GET /dask/health HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            browser.recv(100)
    assert dashboard(host, inputs, "health") == 200


@pytest.mark.parametrize("peer", ["client", "worker"])
def test_peers_from_another_lock_are_refused(host: Any, inputs: Inputs, peer: str) -> None:
    """One sentence names both locks; who announces none is compared by what pickles depend on."""
    stranger = {"odsp-lock": "0123456789abcdef"}
    said, _ = refusal(host, inputs, peer=peer, announced=stranger)
    assert f"the Dask scheduler refuses {'the ' * (peer == 'client')}{peer} " in said, said
    assert "odsp-lock 0123456789abcdef instead of" in said, said
    said, _ = refusal(host, inputs, peer=peer, announced={"cloudpickle": "0.1"})
    assert "(cloudpickle 0.1 instead of" in said, said
    assert refusal(host, inputs, peer=peer)[0] == ""


def test_dashboard_shows_and_does_not_act(host: Any, inputs: Inputs) -> None:
    """Pages answer under the prefix; the routes that steer the cluster are not there."""
    assert dashboard(host, inputs, "health") == 200
    assert dashboard(host, inputs, "status") == 200
    assert dashboard(host, inputs, "api/v1/retire_workers") == 404
    assert dashboard(host, inputs, "json/counts.json") == 404


def test_listens_on_its_address_only(host: Any, inputs: Inputs) -> None:
    """No port of it is open on every interface."""
    for port in PORTS:
        assert host.socket(f"tcp://{place(inputs, port)}").is_listening
        assert not host.socket(f"tcp://0.0.0.0:{inputs[port]}").is_listening


def test_secrets_are_private(host: Any) -> None:
    """Only root and the service read the key and the settings; the key is nowhere else."""
    for path in (f"{PAIR}.key", f"{PAIR}.pem", "/etc/odsp/dask_scheduler.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", "dask_scheduler", 0o640)
    assert scenario.places_of(host, host.check_output(f"sed -n 2p {PAIR}.key")) == []


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_survives(host: Any, inputs: Inputs, blow: str) -> None:
    """Scheduler and workers find each other again, in whichever order they start."""
    former = served(host, inputs)
    scenario.strike(host, UNIT, blow)
    assert not set(former) & set(served(host, inputs))
    assert dashboard(host, inputs, "health") == 200


@pytest.mark.once
def test_a_client_at_work_learns_what_was_lost_and_goes_on(host: Any, inputs: Inputs) -> None:
    """Its own connection comes back, and with it workers that do its next tasks."""
    at_work = """
import logging
logging.disable()
client = connect()
former, lost, after = joined(client), 0, 0
open(v["running"], "w").close()
end = time.monotonic() + 200
while not after and time.monotonic() < end:
    over = not os.path.exists(v["running"])
    try:
        # Long enough that one is always under way.
        client.submit(time.sleep, 0.5, pure=False).result(10)
        after += over
    except (Exception, asyncio.CancelledError):
        if client.status == "closed":
            raise
        lost += 1
print(json.dumps([former, lost, after, joined(client, former)]))
"""
    # Dask's client gives up when it could not come back for as long as it may take to connect.
    patient = given(inputs, timeout=120)
    with scenario.at_work(host, CLIENT + at_work, PYTHON, 280, **patient) as end:
        scenario.kill(host, UNIT)
        served(host, inputs)
        former, lost, after, present = end()
    assert lost and after and not set(former) & set(present)


def test_bad_inputs_are_refused_by_name_and_nothing_changes(host: Any, tmp_path: Path) -> None:
    """One sentence each names host, variable and remedy; the scheduler goes on as it is."""
    wrong: dict[str, Inputs] = {
        "": {},
        "dask_scheduler_listen_port is 0 and dask_scheduler_dashboard_port is 8787; give both a"
        " number from 1 to 65535.": {PORTS[0]: 0, PORTS[1]: 8787},
        "dask_scheduler_listen_port is 8786 and dask_scheduler_dashboard_port is 65536; give both a"
        " number from 1 to 65535.": {PORTS[0]: 8786, PORTS[1]: 65536},
        "dask_scheduler_listen_port and dask_scheduler_dashboard_port are both 8786; give one of"
        " the two another port.": dict.fromkeys(PORTS, 8786),
        "dask_scheduler_dashboard_prefix is '/dask/'; write a path without a slash at its beginning"
        " or end, e.g. dask.": {"dask_scheduler_dashboard_prefix": "/dask/"},
        'dask_scheduler_memory_max is "4 gigs"; write a number with K, M, G or T, a share of the'
        " memory as 80%, or infinity.": {"dask_scheduler_memory_max": "4 gigs"},
    }
    said = scenario.sentences("dask_scheduler", wrong.values(), tmp_path)
    assert said == [f"case-{n}: {text}" if text else "" for n, text in enumerate(wrong)]

    before = scenario.units(host)
    run = scenario.layer("--tags", "dask_scheduler", dask_scheduler_memory_max="4 gigs")
    assert run.returncode != 0 and 'node-1: dask_scheduler_memory_max is "4 gigs"' in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_another_port_takes_the_workers_along(host: Any, inputs: Inputs) -> None:
    """The old ports are closed, the workers follow to the new one, and all the way back.

    Memory, one more origin and one more variable come and go with them.
    """
    moved = {**inputs, PORTS[0]: 8796, PORTS[1]: 8797, "dask_scheduler_dashboard_prefix": "compute"}
    before = scenario.units(host)
    assert web_socket(host, inputs, "door.example") == 403
    try:
        scenario.converge(
            "dask_scheduler,dask_worker",
            odsp_dask_scheduler_port=8796,
            odsp_dask_scheduler_dashboard_port=8797,
            dask_scheduler_dashboard_prefix="compute",
            dask_scheduler_dashboard_origins_extra=["door.example"],
            dask_scheduler_environment={"MOLECULE_WORD": "there"},
            dask_scheduler_memory_max="2G",
        )
        there = scenario.units(host)
        assert scenario.restarted(before, there) == {UNIT, WORKER}
        served(host, moved)
        assert dashboard(host, moved, "health") == 200
        assert dashboard(host, moved, "health", prefix="dask") == 404
        assert web_socket(host, moved, "door.example") == 101
        assert web_socket(host, moved, "other.example") == 403
        assert properties(host)["MemoryMax"] == str(2 * 2**30)
        assert "MOLECULE_WORD=there" in environment(host)
        for port in PORTS:
            assert not host.socket(f"tcp://{place(inputs, port)}").is_listening
    finally:
        scenario.converge("dask_scheduler,dask_worker")
    assert scenario.restarted(there, scenario.units(host)) == {UNIT, WORKER}
    served(host, inputs)
    assert web_socket(host, inputs, "door.example") == 403
    assert properties(host)["MemoryMax"] == str(4 * 2**30)
    assert "MOLECULE_WORD=there" not in environment(host)
    for port in PORTS:
        assert not host.socket(f"tcp://{place(moved, port)}").is_listening


@pytest.mark.fault(
    "full disk", "The scheduler keeps nothing on disk: it serves on, and even starts without room."
)
def test_a_full_disk_stops_nothing(host: Any, inputs: Inputs, measured: Note) -> None:
    """Not even the byte code of what it imports must have a place."""
    with faults.full_disk(host, UNIT, CACHE, mib=64) as disk:
        served(host, inputs)
        host.check_output(f"rm -rf {CACHE}/*")
        disk.fill()
        began = time.monotonic()
        served(host, inputs)
        on = time.monotonic() - began
        began = time.monotonic()
        host.check_output(f"systemctl restart {UNIT}")
        served(host, inputs)
        anew = time.monotonic() - began
    served(host, inputs)
    measured(
        f"a new client was served within {on:.0f} s; restarted without room it served again after"
        f" {anew:.0f} s"
    )


@pytest.mark.fault(
    "out of memory",
    "A graph larger than MemoryMax costs the scheduler's state; it and the workers come back.",
)
def test_a_graph_too_large_costs_one_restart(host: Any, inputs: Inputs, measured: Note) -> None:
    """The host stays, the others are served again."""
    large = """
client = connect()
try:
    client.submit(len, os.urandom(v["mib"] * 2**20)).result(120)
    lost = ""
except (Exception, asyncio.CancelledError) as loss:
    lost = type(loss).__name__
print(json.dumps(lost))
"""
    served(host, inputs)
    before = properties(host)
    limit = int(before["MemoryCurrent"]) // 2**20 + 96
    since = time.time()
    with faults.memory_limit(host, UNIT, limit):
        lost = ask(host, inputs, large, mib=4 * limit)
        gave_up = time.monotonic()
        assert lost, "it had room for all of it"

        def ended() -> bool:
            """Tell whether the kernel has ended the scheduler."""
            return "status=9/KILL" in scenario.journal(host, UNIT, since=since)

        scenario.wait_until(ended)
        served(host, inputs)
        seconds = time.monotonic() - gave_up
        restarts = int(properties(host)["NRestarts"]) - int(before["NRestarts"])
    assert restarts == 1
    measured(
        f"a graph of {4 * limit} MiB at a limit of {limit} MiB: its client got a {lost},"
        f" others were served again {seconds:.0f} s later; restarts: {restarts}"
    )


@pytest.mark.fault("clock jump", "Nobody is lost when its clock jumps a day ahead and back.")
def test_the_clock_may_jump(host: Any, inputs: Inputs, measured: Note) -> None:
    """Workers are not taken for dead; new clients are let in."""
    look = """
async def check(dask_scheduler):
    now = time.time()
    heard = [worker.last_seen - now for worker in dask_scheduler.workers.values()]
    if all(abs(ago) < 60 for ago in heard):
        await dask_scheduler.check_worker_ttl()  # by itself every five minutes
    return now, heard
now, heard = connect().run_on_scheduler(check)
print(json.dumps([now - time.time(), heard]))
"""
    with faults.clock(host, UNIT) as moved:
        before, run = served(host, inputs), scenario.units(host)
        seen = []
        for seconds in (86400, 0):
            moved.jump(seconds)
            jumped = time.monotonic()
            drift = 0.0

            def there(seconds: int = seconds) -> bool:
                """Tell whether the scheduler sees the moved clock, and has heard of its workers."""
                nonlocal drift
                drift, heard = ask(host, inputs, look)
                return all(abs(far) < 60 for far in (drift - seconds, *heard))

            scenario.wait_until(there)
            assert served(host, inputs) == before
            seen.append(f"{round(drift):+d} s: {time.monotonic() - jumped:.0f} s")
        restarts = scenario.restarted(run, scenario.units(host))
    assert restarts == set()
    served(host, inputs)
    measured(
        f"a new client was served by the same workers ({len(before)}), clock and wait:"
        f" {', '.join(seen)}; restarts: {len(restarts)}"
    )


@pytest.mark.fault(
    "expired certificate",
    "Nobody talks to a scheduler whose certificate has ended; the role's next run renews it.",
)
def test_an_expired_certificate_is_renewed(host: Any, inputs: Inputs, measured: Note) -> None:
    """Clients name the reason, workers stay away, and both are served after `site.yml`."""
    since = time.time()
    with faults.expired_certificate(host, "dask_scheduler", UNIT):

        def refused() -> bool:
            """Tell whether a client of the platform refuses the scheduler for its certificate."""
            pair = f"{scenario.TLS}/dask_worker"
            return "certificate has expired" in refusal(host, inputs, pair=pair, timeout=4)[0]

        def left() -> bool:
            """Tell whether the workers do so, too."""
            return "certificate has expired" in scenario.journal(host, WORKER, since=since)

        scenario.wait_until(refused, 120)
        scenario.wait_until(left, 120)
        began = time.monotonic()
        scenario.converge("dask_scheduler")
        run = time.monotonic() - began
        served(host, inputs)
        seconds = time.monotonic() - began
    measured(
        f"clients and workers refused it by name; one run of {run:.0f} s renewed it, a task was"
        f" done {seconds:.0f} s after its beginning"
    )
