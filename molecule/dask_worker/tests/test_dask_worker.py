"""What an operator asks of worker hosts: do workers join, compute, come back, stay in bounds?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import pytest
import scenario
import testinfra

UNIT = "odsp-dask_worker.service"
SCHEDULER = "odsp-dask_scheduler.service"
HOME = "/var/lib/odsp/dask_worker"
PYTHON = "/opt/odsp/dask_worker/current/bin/python"
PAIR = f"{scenario.TLS}/dask_worker"
MIB = 2**20

Inputs = dict[str, Any]
Nodes = dict[str, Any]
Note = Callable[[str], None]

# What a program of a client begins with: it has this host's certificate, and looks at one host.
CLIENT = """
import os, subprocess, sys, time
from distributed import Client, Security, wait

def connect():
    security = Security(tls_ca_file=v["ca"], tls_client_cert=f"{v['pair']}.crt",
                        tls_client_key=f"{v['pair']}.key", require_encryption=True)
    return Client(v["url"], security=security, timeout=v["timeout"])

def own():
    words = ("name", "status", "nthreads", "memory_limit", "resources", "last_seen",
             "local_directory")
    known = client.scheduler_info(n_workers=-1)["workers"].items()
    return {address: {word: worker[word] for word in words}
            for address, worker in known if worker["host"] == v["address"]}

# When each was heard of; by its folder, which only it ever has: a port may come again.
def folders():
    return {worker["local_directory"]: worker["last_seen"] for worker in own().values()}
"""
CONNECTED = CLIENT + "client = connect()\n"

LOOK = """
def look():
    return {"user": os.getuid(), "pid": os.getpid(), "square": 7**2,
            "threads": os.environ["OMP_NUM_THREADS"],
            "environment": {key: os.environ.get(key) for key in v["keys"]}}
print(json.dumps(list(client.run(look, workers=list(own())).values())))
"""


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest) -> Nodes:
    """Return the scenario's hosts by name, for tests of the whole cluster."""
    inventory = request.config.getoption("--ansible-inventory")
    hosts = testinfra.get_hosts(["ansible://all"], ansible_inventory=inventory, sudo=True)
    return {scenario.name_of(host): host for host in hosts}


def variables(host: Any) -> Inputs:
    """Return the role's inputs for a host."""
    return dict(host.ansible.get_variables())


@pytest.fixture(scope="module")
def inputs(host: Any) -> Inputs:
    """Return the role's inputs for this host."""
    return variables(host)


def units(nodes: Nodes) -> dict[str, dict[str, str]]:
    """Return the platform's units of every host."""
    return {name: scenario.units(host) for name, host in nodes.items()}


def given(inputs: Inputs, **more: Any) -> dict[str, Any]:
    """Return what a client's program is told; it looks at the inputs' host."""
    own = {
        "url": inputs["dask_worker_scheduler_url"],
        "address": inputs["dask_worker_listen_address"],
        "keys": sorted(inputs["dask_worker_environment"]),
        "ca": scenario.CA,
        "pair": PAIR,
        "timeout": 100,
    }
    return {**own, **more}


def ask(host: Any, inputs: Inputs, code: str, **more: Any) -> Any:
    """Run a client's program on a host about the workers of the inputs' host; return its word."""
    return scenario.python(host, CONNECTED + code, PYTHON, **given(inputs, **more))


def workers_of(host: Any, inputs: Inputs) -> list[Any]:
    """Return the workers of the inputs' host as the scheduler sees them."""
    return list(ask(host, inputs, "print(json.dumps(list(own().values())))"))


def joined(
    host: Any, inputs: Inputs, expected: int, *, former: Iterable[str] = (), seconds: float = 120
) -> list[str]:
    """Wait until the scheduler knows so many workers of the inputs' host, none of the former ones.

    Returns their folders, of which every process has another.
    """
    wait_for = """
def right():
    present = set(folders())
    return len(present) == v["expected"] and not present & set(v["former"])
deadline = time.monotonic() + v["seconds"]
while not right() and time.monotonic() < deadline:
    time.sleep(0.2)
print(json.dumps(sorted(folders())))
"""
    own = {"expected": expected, "former": list(former), "seconds": seconds}
    found = list(ask(host, inputs, wait_for, **own))
    assert len(found) == expected and not set(found) & set(former), scenario.journal(host, UNIT)
    return found


def pids(host: Any, inputs: Inputs) -> list[int]:
    """Return the worker processes of the inputs' host that answer."""
    code = """
found = client.run(os.getpid, workers=list(own()), on_error="ignore")
print(json.dumps(sorted(found.values())))
"""
    return list(ask(host, inputs, code))


def processes(host: Any) -> int:
    """Return how many worker processes the host shall run."""
    return int(variables(host)["dask_worker_processes"])


def compute(host: Any, inputs: Inputs) -> None:
    """A task on the inputs' host gives the right answer."""
    code = "print(client.submit(sum, [19, 23], pure=False, workers=list(own())).result(60))"
    assert ask(host, inputs, code) == 42


def told(host: Any, inputs: Inputs) -> list[str | None]:
    """Return what the tasks of each process of the inputs' host find as SHOP_SECRET."""
    return [found["environment"]["SHOP_SECRET"] for found in ask(host, inputs, LOOK)]


def ports(host: Any, inputs: Inputs) -> list[int]:
    """Return the workers' open ports on the network; what else they have open is loopback's."""
    own = set(host.check_output("ps -u dask_worker -o pid=").split())
    lines = host.check_output("ss -Hltnp").splitlines()
    listening = [line for line in lines if own & {w.split(",")[0] for w in line.split("pid=")[1:]}]
    places = [line.split()[3].rsplit(":", 1) for line in listening]
    address = inputs["dask_worker_listen_address"]
    assert {place for place, _ in places} <= {address, "127.0.0.1"}
    return sorted(int(port) for place, port in places if place == address)


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The workers run, are started at boot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "dask_worker", exposure=1.5)


def test_every_process_joined_with_its_size(host: Any, inputs: Inputs) -> None:
    """The scheduler knows exactly the processes asked for, by this host's name."""
    workers, expected = workers_of(host, inputs), int(inputs["dask_worker_processes"])
    assert len(workers) == expected
    assert {worker["name"].split("/")[0] for worker in workers} == {scenario.name_of(host)}
    assert {worker["nthreads"] for worker in workers} == {int(inputs["dask_worker_threads"])}
    assert {worker["memory_limit"] for worker in workers} == {512 * MIB}
    wall = int(host.service(UNIT).systemd_properties["MemoryMax"])
    assert wall // MIB == int(expected * (1.1 * 512 + 256) + 256)


def test_tasks_run_as_the_service_with_their_environment(host: Any, inputs: Inputs) -> None:
    """A task finds what the inventory promised, and no more threads than its process has."""
    uid = host.user("dask_worker").uid
    assert inputs["dask_worker_environment"]["SHOP_SECRET"]
    looks = ask(host, inputs, LOOK)
    assert len(looks) == int(inputs["dask_worker_processes"])
    for found in looks:
        assert found["user"] == uid != 0
        assert found["square"] == 49
        assert found["threads"] == str(inputs["dask_worker_threads"])
        assert found["environment"] == inputs["dask_worker_environment"]


def test_workers_are_open_to_nobody_else(host: Any, inputs: Inputs) -> None:
    """Each port on the network demands a certificate of the platform; the rest is loopback."""
    address, network = inputs["dask_worker_listen_address"], ports(host, inputs)
    assert len(network) >= 2 * int(inputs["dask_worker_processes"]), "workers and their nannies"
    for port in network:
        assert "certificate required" in scenario.refuses_strangers(address, port)

    def shaken(pair: str) -> list[str]:
        with ThreadPoolExecutor() as pool:
            places = [f"{address}:{port}" for port in network]
            return list(pool.map(lambda place: scenario.handshake(host, place, pair), places))

    with scenario.foreign_pair(host, "dask_worker") as foreign:
        assert all("unknown ca" in said for said in shaken(foreign))
    accepted = shaken(PAIR)
    assert all("Verification: OK" in said and "unknown ca" not in said for said in accepted)
    assert not any("certificate required" in said for said in accepted)


def test_plain_tcp_is_not_answered(host: Any, inputs: Inputs) -> None:
    """A client without TLS is told to go by every worker."""
    code = """
import asyncio
from distributed.core import rpc
async def identity(address):
    async with rpc(address, timeout=60) as worker:
        return await asyncio.wait_for(worker.identity(), 60)
answers = []
for address in own():
    try:
        answers.append(asyncio.run(identity(address.replace("tls://", "tcp://"))))
    except OSError as closed:
        answers.append(type(closed).__name__)
print(json.dumps(answers, default=str))
"""
    since, expected = time.time(), int(inputs["dask_worker_processes"])
    assert ask(host, inputs, code) == ["CommClosedError"] * expected

    def told_why() -> bool:
        """Tell whether every worker has written why."""
        said = scenario.journal(host, UNIT, since=since)
        return said.count("WRONG_VERSION_NUMBER") == expected

    scenario.wait_until(told_why)


def test_stopping_takes_the_workers_out_and_starting_brings_them_back(
    host: Any, inputs: Inputs
) -> None:
    """A stop is orderly and quick; the cluster forgets the workers at once."""
    with faults.stopped(host, UNIT):
        # Else systemd had to kill them, after half a minute.
        assert host.service(UNIT).systemd_properties["Result"] == "success"
        joined(host, inputs, 0, seconds=30)
    joined(host, inputs, int(inputs["dask_worker_processes"]))


@pytest.mark.once
def test_tasks_take_a_connection_closed_without_farewell_for_its_end(
    host: Any, inputs: Inputs
) -> None:
    """The platform's settings of TLS are in force where tasks run: no error is left for others."""
    code = """
def close():
    import ssl
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain("/etc/odsp/tls/dask_worker.crt", "/etc/odsp/tls/dask_worker.key")
    asked = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
    asked.check_hostname = False
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = asked.wrap_bio(back, there), served.wrap_bio(there, back, server_side=True)
    for end in (client, server) * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
    server.write(b"hello")
    back.write_eof()
    return repr(client.read() + client.read())
print(json.dumps(list(client.run(close, workers=list(own())).values())))
"""
    expected = int(inputs["dask_worker_processes"])
    assert ask(host, inputs, code) == ["b'hello'"] * expected


@pytest.mark.once
def test_a_farewell_costs_nobody_else_the_scheduler(host: Any, inputs: Inputs) -> None:
    """While one connection ends, others go on: every restart brings every worker, and it stays."""
    stay = """
former, deadline = folders(), time.monotonic() + 60
present, heard = former, 0
# Connections that broke were noticed after two seconds.
while set(present) == set(former) and heard < 3 and time.monotonic() < deadline:
    time.sleep(0.2)
    present = folders()
    heard = min(present.get(folder, 0) - seen for folder, seen in former.items())
print(json.dumps([sorted(present), heard]))
"""
    for _ in range(2):
        host.check_output(f"systemctl restart {UNIT}")
        before = joined(host, inputs, int(inputs["dask_worker_processes"]))
        stayed, heard = ask(host, inputs, stay)
        assert stayed == before and heard >= 3, scenario.journal(host, UNIT)


def test_a_worker_that_leaves_comes_back(host: Any, inputs: Inputs) -> None:
    """A host has all its workers or is on its way to them, whoever retired one."""
    retire = """
former = folders()
client.retire_workers(list(own())[:1], close_workers=True)
print(json.dumps(sorted(former)))
"""
    former = ask(host, inputs, retire)
    joined(host, inputs, len(former), former=former)


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_survives(nodes: Nodes, blow: str) -> None:
    """All workers of every host, in order, without a word or with their hosts: all join again."""
    former = {name: joined(host, variables(host), processes(host)) for name, host in nodes.items()}
    for host in nodes.values():
        scenario.strike(host, UNIT, blow)
    for name, host in nodes.items():
        joined(host, variables(host), processes(host), former=former[name])
        compute(host, variables(host))


def test_a_killed_worker_process_comes_back_alone(host: Any, inputs: Inputs) -> None:
    """Its nanny replaces it; the unit and the other processes go on."""
    before, run = pids(host, inputs), scenario.units(host)
    host.check_output(f"kill -KILL {before[0]}")

    def replaced() -> bool:
        """Tell whether the host has as many processes as before, one of them new."""
        now = pids(host, inputs)
        return len(now) == len(before) and set(before) - set(now) == {before[0]}

    scenario.wait_until(replaced, 120)
    assert scenario.restarted(run, scenario.units(host)) == set()


def test_secrets_are_private(host: Any, inputs: Inputs) -> None:
    """Only root and the service read the key and the environment; they are nowhere else."""
    for path in (f"{PAIR}.key", f"{PAIR}.pem", "/etc/odsp/dask_worker.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", "dask_worker", 0o640)
    key = host.check_output(f"sed -n 2p {PAIR}.key")
    task = inputs["dask_worker_environment"]["SHOP_SECRET"]
    assert scenario.places_of(host, key, task) == []


def test_bad_sizes_are_refused_by_name_and_nothing_changes(nodes: Nodes, tmp_path: Path) -> None:
    """One sentence each names host, variable and remedy; the workers go on as they are."""
    wrong: dict[str, Inputs] = {
        "": {},
        "dask_worker_scheduler_url is ''; put a host in the group dask_scheduler.": {
            "dask_worker_scheduler_url": ""
        },
        "dask_worker_name is 'node 1'; write letters, digits, '.', '_' and '-'.": {
            "dask_worker_name": "node 1"
        },
        "dask_worker_processes is 0; set it to 1 or more, or take the host out of the group"
        " dask_worker.": {"dask_worker_processes": 0},
        "dask_worker_threads is 0; set it to 1 or more.": {"dask_worker_threads": 0},
        "dask_worker_memory_limit is '2 gigs'; write a number and one of B, kB, MB, GB, TB, KiB,"
        " MiB, GiB, TiB, e.g. 2GiB.": {"dask_worker_memory_limit": "2 gigs"},
        "dask_worker_memory_limit (512MiB) times dask_worker_processes (3) is more than the host's"
        " memory of 1024MiB; lower one of the two.": {"dask_worker_processes": 3},
        "dask_worker_resources has 'GPU many'; write a number for each name of letters, digits,"
        " '_' and '-', e.g. {GPU: 1}.": {"dask_worker_resources": {"GPU": "many"}},
    }
    said = scenario.sentences("dask_worker", wrong.values(), tmp_path, memtotal_mb=1024)
    assert said == [f"case-{n}: {text}" if text else "" for n, text in enumerate(wrong)]

    before = units(nodes)
    run = scenario.layer("--tags", "dask_worker", dask_worker_memory_limit="999GiB")
    assert run.returncode != 0
    for name in nodes:
        assert f"{name}: dask_worker_memory_limit (999GiB) times" in run.stdout
        assert scenario.recap(run)[name]["changed"] == 0
    assert units(nodes) == before


def test_another_size_of_one_host_restarts_that_host_only(nodes: Nodes) -> None:
    """The scheduler knows exactly the new sum; neither it nor other hosts are restarted.

    One resource more and one variable fewer come and go with it.
    """
    one, two = nodes["node-1"], nodes["node-2"]
    inputs, other = variables(one), variables(two)
    extra = other["dask_worker_environment"]["SHOP_SECRET"]
    everyone = "print(len(client.scheduler_info(n_workers=-1)['workers']))"
    licensed = "print(json.dumps(client.submit(os.uname, resources={'LICENCE': 2}).result(60)[1]))"
    before = units(nodes)
    try:
        # Of all this, node-2 has what is not for node-1 alone.
        run = scenario.converge(
            "dask_worker",
            dask_worker_processes=2,
            dask_worker_threads=2,
            dask_worker_resources="{{ {'LICENCE': 2} if inventory_hostname == 'node-1' else {} }}",
            dask_worker_environment_extra="{{ {} if inventory_hostname == 'node-1' else "
            f"{{'SHOP_SECRET': '{extra}'}} }}}}",
        )
        there = units(nodes)
        assert scenario.restarted(before["node-1"], there["node-1"]) == {UNIT}
        assert scenario.restarted(before["node-2"], there["node-2"]) == set()
        assert scenario.changed(run, "node-2") == 0
        workers = workers_of(one, inputs)
        assert [worker["nthreads"] for worker in workers] == [2, 2]
        assert [worker["resources"] for worker in workers] == [{"LICENCE": 2}] * 2
        assert ask(two, other, licensed) == "node-1"
        assert told(one, inputs) == [None, None]
        assert ask(one, inputs, everyone) == 4
    finally:
        run = scenario.converge("dask_worker")
    back = units(nodes)
    assert scenario.restarted(there["node-1"], back["node-1"]) == {UNIT}
    assert scenario.restarted(there["node-2"], back["node-2"]) == set()
    assert scenario.changed(run, "node-2") == 0
    workers = workers_of(one, inputs)
    assert [(worker["nthreads"], worker["resources"]) for worker in workers] == [(1, {})]
    assert told(one, inputs) == [extra]
    assert ask(one, inputs, everyone) == 3


@pytest.mark.fault(
    "dependency away", "Without a scheduler the workers wait; they join the next one by themselves."
)
def test_workers_come_back_to_the_scheduler(nodes: Nodes, measured: Note) -> None:
    """Nobody has to start anything on the worker hosts."""
    before = units(nodes)
    with faults.stopped(nodes["node-1"], SCHEDULER):

        def noticed() -> bool:
            """Tell whether every host's workers have ended with their scheduler."""
            now = units(nodes)
            return all(now[name][UNIT] != before[name][UNIT] for name in nodes)

        scenario.wait_until(noticed, 120)
    back, found = time.monotonic(), 0
    for host in nodes.values():
        found += len(joined(host, variables(host), processes(host)))
        compute(host, variables(host))
    measured(
        f"all workers ({found} on {len(nodes)} hosts) did tasks again"
        f" {time.monotonic() - back:.0f} s after it was back"
    )


@pytest.mark.fault(
    "dependency late",
    "While the scheduler hangs, a new client gives up in time; one at work waits and goes on.",
)
def test_a_frozen_scheduler_costs_time_only(nodes: Nodes, measured: Note) -> None:
    """No worker restarts, no task is lost."""
    one, two = nodes["node-1"], nodes["node-2"]
    inputs, before = variables(two), units(nodes)
    at_work = """
open(v["running"], "w").close()
answers, longest, over = 0, 0, False
while not over:
    over = not os.path.exists(v["running"])  # once more after that
    before = time.monotonic()
    assert client.submit(sum, [answers, 1], pure=False).result(60) == answers + 1
    answers, longest = answers + 1, max(longest, time.monotonic() - before)
    time.sleep(0.1)
print(json.dumps([answers, longest]))
"""
    give_up = """
began = time.monotonic()
try:
    connect()
    said = ""
except OSError as late:
    said = str(late)
print(json.dumps([said, time.monotonic() - began]))
"""
    with scenario.at_work(two, CONNECTED + at_work, PYTHON, **given(inputs)) as end:
        with faults.frozen(one, SCHEDULER):
            late = given(inputs, timeout=4)
            said, waited = scenario.python(two, CLIENT + give_up, PYTHON, **late)
        answers, longest = end()
    assert "imed out" in said and waited < 25, said
    assert answers > 1 and longest > 3, "the fault did not reach the client at work"
    restarts = sum(len(scenario.restarted(before[name], now)) for name, now in units(nodes).items())
    assert restarts == 0
    measured(
        f"a client with a timeout of {late['timeout']} s gave up after {waited:.0f} s; one at work"
        f" waited {longest:.0f} s and got all of its {answers} answers; restarts: {restarts}"
    )


@pytest.mark.fault(
    "host away", "Tasks of a worker host that reboots are done elsewhere; its workers come back."
)
def test_a_rebooted_host_comes_back(nodes: Nodes, measured: Note) -> None:
    """A client at work gets every answer."""
    one, two = nodes["node-1"], nodes["node-2"]
    inputs = variables(two)
    at_work = """
def slow(x):
    time.sleep(1)
    return x
futures = client.map(slow, range(40), pure=False)
deadline = time.monotonic() + 30
while time.monotonic() < deadline and not any(client.processing(list(own())).values()):
    time.sleep(0.1)
busy = sum(map(len, client.processing(list(own())).values()))
open(v["running"], "w").close()
print(json.dumps([busy, client.gather(futures) == list(range(40))]))
"""
    former = joined(one, inputs, processes(two))
    with scenario.at_work(one, CONNECTED + at_work, PYTHON, 280, **given(inputs)) as end:
        began = time.monotonic()
        scenario.reboot(two)
        joined(one, inputs, processes(two), former=former)
        back = time.monotonic() - began
        busy, answered = end()
    assert busy and answered
    compute(two, inputs)
    measured(
        f"the host rebooted with {busy} of 40 tasks; all 40 were answered, its workers were back in"
        f" {back:.0f} s"
    )


@pytest.mark.fault(
    "out of memory",
    "A task that takes more than its process may have costs that process; the task is tried again.",
)
def test_a_greedy_task_costs_its_process_only(nodes: Nodes, measured: Note) -> None:
    """The nanny ends the process at 95 % of its limit; the unit and its other process go on."""
    two = nodes["node-2"]
    inputs = variables(two)
    before, run, since = pids(two, inputs), scenario.units(two), time.time()
    greedy = """
def greedy():
    try:
        open("greedy", "x").close()
    except FileExistsError:
        os.unlink("greedy")
        return os.getpid()
    hoard = []
    for _ in range(80):  # up to 1.25 GiB, faster than spilling could help
        hoard.append(b"x" * 2**24)
        time.sleep(0.02)
    time.sleep(30)  # a nanny may look late
    return 0
began = time.monotonic()
answer = client.submit(greedy, pure=False, workers=[v["address"]]).result(120)
print(json.dumps([answer, time.monotonic() - began]))
"""
    two.run(f"rm -f {HOME}/greedy")
    answer, seconds = ask(two, inputs, greedy)
    assert answer != 0, "the process was allowed to take what it wanted"

    def told_why() -> bool:
        """Tell whether the nanny has written why it ended the process."""
        return "95% memory budget" in scenario.journal(two, UNIT, since=since)

    scenario.wait_until(told_why)
    joined(two, inputs, len(before))
    lost = set(before) - set(pids(two, inputs))
    restarts = scenario.restarted(run, scenario.units(two))
    assert len(lost) == 1 and restarts == set()
    measured(
        f"processes replaced: {len(lost)} of {len(before)}; the task answered after"
        f" {seconds:.0f} s; restarts of the unit: {len(restarts)}"
    )


@pytest.mark.fault(
    "out of memory",
    "What a task starts beside its process ends at the unit's MemoryMax; the workers go on.",
)
def test_the_wall_holds_for_children_of_tasks(nodes: Nodes, measured: Note) -> None:
    """A nanny sees only its worker; the kernel sees all of the unit."""
    one = nodes["node-1"]
    inputs = variables(one)
    before, run = pids(one, inputs), scenario.units(one)
    wall = int(one.service(UNIT).systemd_properties["MemoryMax"]) // MIB
    # Of workers of 512 MiB; without such a wall the whole machine would have to be filled.
    assert wall < 2048
    child = """
def child():
    eater = f"hoard = [b'x' * 2**23 for _ in range({v['mib'] // 8})]"
    return subprocess.run([sys.executable, "-c", eater]).returncode
began = time.monotonic()
status = client.submit(child, pure=False, workers=list(own())).result(120)
print(json.dumps([status, time.monotonic() - began]))
"""
    status, seconds = ask(one, inputs, child, mib=2 * wall)
    assert status == -9
    assert pids(one, inputs) == before
    restarts = scenario.restarted(run, scenario.units(one))
    assert restarts == set()
    measured(
        f"a child that wanted {2 * wall} MiB was ended at {wall} MiB after {seconds:.0f} s;"
        f" restarts of the unit: {len(restarts)}, the worker's process was the same"
    )


@pytest.mark.fault(
    "full disk",
    "A worker that cannot spill says so, keeps its data, pauses, and goes on when there is room.",
)
def test_a_full_disk_pauses_the_worker(nodes: Nodes, measured: Note) -> None:
    """No result is lost for lack of room under the local directory."""
    one = nodes["node-1"]
    inputs = variables(one)
    hold = """
def block(number):
    time.sleep(0.05)
    return os.urandom(10 * 2**20)
futures = client.map(block, range(40), pure=False, workers=list(own()))
open(v["running"], "w").close()
wait(futures, timeout=250)
sizes = client.gather(client.map(len, futures, pure=False))
print(json.dumps([len(futures), sizes.count(10 * 2**20)]))
"""

    def paused() -> bool:
        """Tell whether the worker has paused."""
        return [worker["status"] for worker in workers_of(one, inputs)] == ["paused"]

    def told_why() -> bool:
        """Tell whether the worker, which may pause before it tries to spill, has written why."""
        return "No space left on device" in scenario.journal(one, UNIT, since=since)

    with faults.full_disk(one, UNIT, HOME, mib=320) as disk:
        joined(one, inputs, 1)
        before, run, since = pids(one, inputs), scenario.units(one), time.time()
        disk.fill()
        with scenario.at_work(one, CONNECTED + hold, PYTHON, 280, **given(inputs)) as end:
            scenario.wait_until(paused)
            scenario.wait_until(told_why)
            disk.free()
            freed = time.monotonic()
            asked, answered = end()
            seconds = time.monotonic() - freed
        assert answered == asked
        assert pids(one, inputs) == before
        restarts = scenario.restarted(run, scenario.units(one))
        assert restarts == set()
    joined(one, inputs, 1)
    measured(
        f"with {asked} blocks of 10 MiB and 512 MiB of memory it paused; {answered} were there"
        f" {seconds:.0f} s after there was room; restarts: {len(restarts)}"
    )


@pytest.mark.fault("clock jump", "The workers go on when their clock jumps a day ahead and back.")
def test_the_clock_may_jump(nodes: Nodes, measured: Note) -> None:
    """Neither tasks nor new connections depend on the time of day."""
    one, two = nodes["node-1"], nodes["node-2"]
    inputs = variables(one)
    now = """
print(client.submit(time.time, pure=False, workers=list(own())).result(60) - time.time())
"""
    former = joined(two, inputs, 1)
    with faults.clock(one, UNIT) as moved:
        joined(two, inputs, 1, former=former)
        before, run, seen = pids(two, inputs), scenario.units(one), []
        since = time.time()
        for seconds in (86400, 0):
            moved.jump(seconds)
            jumped = time.monotonic()
            drift = 0.0

            def there(seconds: int = seconds) -> bool:
                """Tell whether a task sees the moved clock."""
                nonlocal drift
                drift = float(ask(two, inputs, now))
                return abs(drift - seconds) < 60

            scenario.wait_until(there)
            compute(two, inputs)
            seen.append(f"{round(drift):+d} s: {time.monotonic() - jumped:.0f} s")
            assert pids(two, inputs) == before, scenario.journal(one, UNIT, since=since)
        restarts = scenario.restarted(run, scenario.units(one))
    assert restarts == set()
    joined(two, inputs, 1)
    measured(
        f"new clients had tasks done by the same process, clock and wait: {', '.join(seen)};"
        f" restarts: {len(restarts)}"
    )


@pytest.mark.fault(
    "expired certificate",
    "Workers with an expired certificate stay outside; the role's next run renews it, they join.",
)
def test_an_expired_certificate_is_renewed(nodes: Nodes, measured: Note) -> None:
    """Nobody has to look for it: `site.yml` does."""
    one, two = nodes["node-1"], nodes["node-2"]
    inputs, run, since = variables(one), scenario.units(two), time.time()
    with faults.expired_certificate(one, "dask_worker", UNIT):

        def refused() -> bool:
            """Tell whether the scheduler has refused the worker for its certificate."""
            return "certificate has expired" in scenario.journal(one, SCHEDULER, since=since)

        scenario.wait_until(refused, 120)
        joined(two, inputs, 0, seconds=60)
        began = time.monotonic()
        scenario.converge("dask_worker")
        seconds = time.monotonic() - began
        joined(two, inputs, 1)
    assert scenario.restarted(run, scenario.units(two)) == set()
    measured(
        f"refused by the scheduler; one run of {seconds:.0f} s renewed it, and the worker joined"
    )
