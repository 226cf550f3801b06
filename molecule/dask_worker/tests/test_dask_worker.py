"""What an operator asks of worker hosts: do workers join, compute, come back, stay in bounds?"""

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
import testinfra

UNIT = "odsp-dask_worker.service"
SCHEDULER = "odsp-dask_scheduler.service"
HOME = "/var/lib/odsp/dask_worker"
PYTHON = "/opt/odsp/dask_worker/current/bin/python"
TLS = "/etc/odsp/tls"
RUNNING = "/run/odsp-client"

Nodes = dict[str, Any]
Note = Callable[[str], None]

# A program begins as a client of the platform with this host's certificate, and looks at one host.
CLIENT = """
import json, os, subprocess, sys, time
from distributed import Client, Security, wait
given = json.loads(sys.argv[1])
pair = "/etc/odsp/tls/dask_worker"
security = Security(tls_ca_file="/etc/odsp/tls/ca.crt", tls_client_cert=f"{pair}.crt",
                    tls_client_key=f"{pair}.key", require_encryption=True)
def own():
    words = ("name", "nanny", "status", "nthreads", "memory_limit", "resources")
    known = client.scheduler_info(n_workers=-1)["workers"].items()
    return {address: {word: worker[word] for word in words}
            for address, worker in known if worker["host"] == given["host"]}
client = Client(given["url"], security=security, timeout=given["timeout"])
"""

LOOK = """
def look():
    return {"user": os.getuid(), "pid": os.getpid(), "square": 7**2,
            "threads": os.environ["OMP_NUM_THREADS"],
            "environment": {key: os.environ.get(key) for key in given["keys"]}}
workers = own()
print(json.dumps({"workers": list(workers.values()),
                  "looks": list(client.run(look, workers=list(workers)).values())}))
"""


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest) -> Nodes:
    """Return the scenario's hosts by name, for tests of the whole cluster."""
    inventory = request.config.getoption("--ansible-inventory")
    hosts = testinfra.get_hosts(["ansible://all"], ansible_inventory=inventory, sudo=True)
    return {name_of(host): host for host in hosts}


def name_of(host: Any) -> str:
    """Return the host's name in the inventory."""
    return str(host.backend.get_pytest_id().rsplit("://")[-1])


def variables(host: Any) -> dict[str, Any]:
    """Return the role's inputs for a host."""
    return dict(host.ansible.get_variables())


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    return variables(host)


def ask(host: Any, inputs: dict[str, Any], code: str, timeout: float = 20, **given: Any) -> Any:
    """Run a client's program on a host about the workers of the inputs' host; return its word."""
    values = {
        "url": inputs["dask_worker_scheduler_url"],
        "host": inputs["dask_worker_listen_address"],
        "keys": sorted(inputs["dask_worker_environment"]),
        "timeout": timeout,
        **given,
    }
    command = [PYTHON, "-c", CLIENT + code, json.dumps(values)]
    return json.loads(host.check_output(shlex.join(command)).splitlines()[-1])


def workers_of(host: Any, inputs: dict[str, Any]) -> list[Any]:
    """Return the workers of the inputs' host as the scheduler sees them."""
    return list(ask(host, inputs, "print(json.dumps(list(own().values())))"))


def joined(host: Any, inputs: dict[str, Any], expected: int, seconds: float = 60) -> list[Any]:
    """Wait until the scheduler knows the expected number of workers of the inputs' host."""
    wait_for = """
deadline = time.monotonic() + given["seconds"]
while len(own()) != given["expected"] and time.monotonic() < deadline:
    time.sleep(0.2)
print(json.dumps(list(own().values())))
"""
    workers = list(ask(host, inputs, wait_for, expected=expected, seconds=seconds))
    assert len(workers) == expected, scenario.journal(host, UNIT)
    return workers


def pids(host: Any, inputs: dict[str, Any]) -> list[int]:
    """Return the worker processes of the inputs' host."""
    code = "print(json.dumps(list(client.run(os.getpid, workers=list(own())).values())))"
    return sorted(ask(host, inputs, code))


def processes(host: Any) -> int:
    """Return how many worker processes the host shall run."""
    return int(variables(host)["dask_worker_processes"])


def compute(host: Any, inputs: dict[str, Any]) -> None:
    """A task on the inputs' host gives the right answer."""
    code = "print(client.submit(sum, [19, 23], pure=False, workers=list(own())).result(20))"
    assert ask(host, inputs, code) == 42


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
    """The workers run, survive a reboot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "dask_worker", exposure=1.5)


def test_every_process_joined_with_its_size(host: Any, inputs: dict[str, Any]) -> None:
    """The scheduler knows exactly the processes asked for, by this host's name."""
    workers = workers_of(host, inputs)
    assert len(workers) == int(inputs["dask_worker_processes"])
    assert {worker["name"].split("/")[0] for worker in workers} == {name_of(host)}
    assert {worker["nthreads"] for worker in workers} == {int(inputs["dask_worker_threads"])}
    limits = sum(int(worker["memory_limit"]) for worker in workers)
    wall = int(host.service(UNIT).systemd_properties["MemoryMax"])
    assert 0 < limits < wall


def test_tasks_run_as_the_service_with_their_environment(host: Any, inputs: dict[str, Any]) -> None:
    """A task finds what the inventory promised, and no more threads than its process has."""
    uid = host.user("dask_worker").uid
    assert inputs["dask_worker_environment"]["SHOP_SECRET"]
    for found in ask(host, inputs, LOOK)["looks"]:
        assert found["user"] == uid != 0
        assert found["square"] == 49
        assert found["threads"] == str(inputs["dask_worker_threads"])
        assert found["environment"] == inputs["dask_worker_environment"]


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
    foreign = "/root/odsp-foreign"
    host.check_output(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-subj /CN=dask_worker -keyout {foreign}.key -out {foreign}.crt 2>/dev/null"
    )
    for place in network:
        for pair, words in (
            ("", "certificate required"),
            (f"-cert {foreign}.crt -key {foreign}.key", "alert unknown ca"),
        ):
            command = f"openssl s_client -connect {place} -CAfile {TLS}/ca.crt {pair}"
            held = f"(sleep 1; echo; sleep 1) | timeout 10 {command} 2>&1"
            refused = host.run(f"{held} | grep -ao '{words}'")
            assert refused.rc == 0, (place, words)
    host.check_output(f"rm {foreign}.key {foreign}.crt")


def test_plain_tcp_is_not_answered(host: Any, inputs: dict[str, Any]) -> None:
    """A client without TLS hears nothing from a worker, and soon knows that it will not."""
    code = """
import asyncio
from distributed.core import rpc
async def identity(address):
    async with rpc(address, timeout=3) as worker:
        return await asyncio.wait_for(worker.identity(), 5)
for address in own():
    try:
        asyncio.run(identity(address.replace("tls://", "tcp://")))
        sys.exit(f"{address} answered in plain text")
    except (OSError, asyncio.TimeoutError):
        pass
print(len(own()))
"""
    assert ask(host, inputs, code) == int(inputs["dask_worker_processes"])


def test_stopping_takes_the_workers_out_and_starting_brings_them_back(
    host: Any, inputs: dict[str, Any]
) -> None:
    """A stop is orderly and quick; the cluster forgets the workers at once."""
    expected = int(inputs["dask_worker_processes"])
    began = time.monotonic()
    with faults.stopped(host, UNIT):
        assert time.monotonic() - began < 25
        assert host.service(UNIT).systemd_properties["Result"] == "success"
        joined(host, inputs, 0, seconds=10)
    joined(host, inputs, expected)


def test_a_farewell_costs_nobody_else_the_scheduler(host: Any, inputs: dict[str, Any]) -> None:
    """While one connection ends, others go on: every restart brings every worker, and it stays."""
    expected = int(inputs["dask_worker_processes"])
    for _ in range(4):
        host.check_output(f"systemctl restart {UNIT}")
        before = {worker["nanny"] for worker in joined(host, inputs, expected)}
        time.sleep(3)  # broken connections were noticed after two seconds
        assert {worker["nanny"] for worker in workers_of(host, inputs)} == before


def test_a_worker_that_leaves_comes_back(host: Any, inputs: dict[str, Any]) -> None:
    """A host has all its workers or is on its way to them, whoever retired one."""
    retire = """
former = {worker["nanny"] for worker in own().values()}
client.retire_workers(list(own())[:1], close_workers=True)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    present = {worker["nanny"] for worker in own().values()}
    if len(present) == len(former) and not present & former:
        break
    time.sleep(0.2)
print(json.dumps([sorted(former), sorted(present)]))
"""
    former, present = ask(host, inputs, retire)
    assert len(present) == len(former) and not set(present) & set(former), (former, present)


def test_survives_kill_9(host: Any, inputs: dict[str, Any]) -> None:
    """All processes at once, without a word: systemd starts them anew and all join again."""
    before = pids(host, inputs)
    scenario.kill(host, UNIT)
    joined(host, inputs, len(before))
    assert not set(before) & set(pids(host, inputs))


def test_a_killed_worker_process_comes_back_alone(host: Any, inputs: dict[str, Any]) -> None:
    """Its nanny replaces it; the unit and the other processes go on."""
    before, run = pids(host, inputs), scenario.units(host)
    host.check_output(f"kill -KILL {before[0]}")

    def replaced() -> bool:
        """Tell whether the host has as many processes as before, one of them new."""
        now = pids(host, inputs)
        return len(now) == len(before) and set(before) - set(now) == {before[0]}

    scenario.wait_until(replaced)
    assert scenario.restarted(run, scenario.units(host)) == set()


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """Only root and the service read the key and the environment; they are nowhere else."""
    for path in (f"{TLS}/dask_worker.key", "/etc/odsp/dask_worker.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", "dask_worker", 0o640)
    key = host.check_output(f"sed -n 2p {TLS}/dask_worker.key")
    task = inputs["dask_worker_environment"]["SHOP_SECRET"]
    assert scenario.places_of(host, f"{key}\n{task}") == []


def test_bad_sizes_are_refused_by_name_and_nothing_changes(nodes: Nodes) -> None:
    """One sentence each names host, variable and remedy; the workers go on as they are."""
    wrong = {
        "dask_worker_name": "node 1",
        "dask_worker_memory_limit": "999GiB",
        "dask_worker_resources": {"GPU": "many"},
    }
    before = {name: scenario.units(host) for name, host in nodes.items()}
    given = ("--tags", "dask_worker", "--limit", "node-1", "--extra-vars")
    run = role_alone(*given, json.dumps(wrong))
    assert run.returncode != 0
    for sentence in (
        "node-1: dask_worker_name is 'node 1'; write letters, digits,",
        "node-1: dask_worker_memory_limit (999GiB) times dask_worker_processes (1) is more than",
        "node-1: dask_worker_resources has 'GPU many'; write a number",
    ):
        assert sentence in run.stdout, run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert {name: scenario.units(host) for name, host in nodes.items()} == before


def test_another_size_of_one_host_restarts_that_host_only(nodes: Nodes) -> None:
    """The scheduler knows exactly the new sum; neither it nor other hosts are restarted."""
    one, two = nodes["node-1"], nodes["node-2"]
    # Of all this, node-2 has the sizes already.
    resources = "{{ {'LICENCE': 2} if inventory_hostname == 'node-1' else {} }}"
    sizes = {"dask_worker_processes": 2, "dask_worker_threads": 2}
    before = {name: scenario.units(host) for name, host in nodes.items()}
    try:
        run = scenario.site(
            "--extra-vars", json.dumps({**sizes, "dask_worker_resources": resources})
        )
        assert run.returncode == 0, run.stdout
        after = {name: scenario.units(host) for name, host in nodes.items()}
        assert scenario.restarted(before["node-1"], after["node-1"]) == {UNIT}
        assert scenario.restarted(before["node-2"], after["node-2"]) == set()
        assert scenario.recap(run)["node-2"]["changed"] == 0
        workers = workers_of(one, variables(one))
        assert [worker["nthreads"] for worker in workers] == [2, 2]
        assert [worker["resources"] for worker in workers] == [{"LICENCE": 2}] * 2
        licensed = (
            "print(json.dumps(client.submit(os.uname, resources={'LICENCE': 2}).result(20)[1]))"
        )
        assert ask(two, variables(two), licensed) == "node-1"
        everyone = "print(len(client.scheduler_info(n_workers=-1)['workers']))"
        assert ask(one, variables(one), everyone) == 4
    finally:
        run = scenario.site("--tags", "dask_worker")
    assert run.returncode == 0, run.stdout
    assert scenario.restarted(after["node-2"], scenario.units(two)) == set()
    workers = workers_of(one, variables(one))
    assert [(worker["nthreads"], worker["resources"]) for worker in workers] == [(1, {})]
    assert ask(one, variables(one), everyone) == 3


@pytest.mark.fault(
    "dependency away", "Without a scheduler the workers wait; they join the next one by themselves."
)
def test_workers_come_back_to_the_scheduler(nodes: Nodes, measured: Note) -> None:
    """Nobody has to start anything on the worker hosts."""
    before = {name: scenario.units(host)[UNIT] for name, host in nodes.items()}
    with faults.stopped(nodes["node-1"], SCHEDULER):

        def noticed() -> bool:
            """Tell whether every host's workers have ended with their scheduler."""
            return all(scenario.units(host)[UNIT] != before[name] for name, host in nodes.items())

        scenario.wait_until(noticed)
    back = time.monotonic()
    for host in nodes.values():
        joined(host, variables(host), processes(host))
        compute(host, variables(host))
    measured(f"all 3 workers on 2 hosts were back {time.monotonic() - back:.0f} s after it was")


@pytest.mark.fault(
    "dependency late",
    "While the scheduler hangs, a new client gives up in time; one at work waits and goes on.",
)
def test_a_frozen_scheduler_costs_time_only(nodes: Nodes, measured: Note) -> None:
    """No worker restarts, no task is lost."""
    one, two = nodes["node-1"], nodes["node-2"]
    before = {name: scenario.units(host) for name, host in nodes.items()}
    at_work = """
open(given["running"], "w").close()
answers, longest, before = 0, 0, time.monotonic()
while os.path.exists(given["running"]):
    assert client.submit(sum, [answers, 1], pure=False).result(60) == answers + 1
    answers, longest = answers + 1, max(longest, time.monotonic() - before)
    before = time.monotonic()
    time.sleep(0.1)
print(json.dumps([answers, longest]))
"""
    with ThreadPoolExecutor() as pool:
        work = pool.submit(ask, two, variables(two), at_work, running=RUNNING)
        try:
            scenario.wait_until(lambda: two.file(RUNNING).exists)
            with faults.frozen(one, SCHEDULER):
                began = time.monotonic()
                with pytest.raises(AssertionError, match=r"[Tt]imed out"):
                    ask(two, variables(two), "print(0)", timeout=4)
                waited = time.monotonic() - began
        finally:
            two.run(f"sleep 1; rm -f {RUNNING}")
        answers, longest = work.result(timeout=90)
    assert waited < 30
    assert answers > 1 and longest > 3, "the fault did not reach the client"
    after = {name: scenario.units(host) for name, host in nodes.items()}
    assert after == before
    measured(
        f"a client with a timeout of 4 s gave up after {waited:.0f} s; one at work waited"
        f" {longest:.0f} s and lost nothing; no unit restarted"
    )


@pytest.mark.fault(
    "host away", "Tasks of a worker host that reboots are done elsewhere; its workers come back."
)
def test_a_rebooted_host_comes_back(nodes: Nodes, measured: Note) -> None:
    """A client at work gets every answer."""
    one, two = nodes["node-1"], nodes["node-2"]
    expected = processes(two)
    at_work = """
def slow(x):
    time.sleep(1)
    return x
futures = client.map(slow, range(30), pure=False)
open(given["running"], "w").close()
print(json.dumps(client.gather(futures) == list(range(30))))
"""
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        work = pool.submit(ask, one, variables(one), at_work, running=RUNNING)
        try:
            scenario.wait_until(lambda: one.file(RUNNING).exists)
            began = time.monotonic()
            scenario.reboot(two)
            joined(one, variables(two), expected)
            back = time.monotonic() - began
            assert work.result(timeout=120) is True
        finally:
            one.run(f"rm -f {RUNNING}")
    compute(two, variables(two))
    measured(
        f"30 tasks on 2 hosts, one rebooted: all answered; its workers were back in {back:.0f} s"
    )


@pytest.mark.fault(
    "out of memory",
    "A task that takes more than its process may have costs that process; the task is tried again.",
)
def test_a_greedy_task_costs_its_process_only(nodes: Nodes, measured: Note) -> None:
    """The nanny ends the process at 95 % of its limit; the unit and its other process go on."""
    two = nodes["node-2"]
    inputs = variables(two)
    before, run = pids(two, inputs), scenario.units(two)
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
    return 0
began = time.monotonic()
answer = client.submit(greedy, pure=False, workers=[given["host"]]).result(60)
print(json.dumps([answer, time.monotonic() - began]))
"""
    two.run(f"rm -f {HOME}/greedy")
    answer, seconds = ask(two, inputs, greedy)
    assert answer != 0, "the process was allowed to take what it wanted"
    joined(two, inputs, len(before))
    after = pids(two, inputs)
    assert len(set(before) & set(after)) == len(before) - 1, (before, after)
    assert scenario.restarted(run, scenario.units(two)) == set()
    measured(
        f"one of {len(before)} processes was replaced, the task answered after {seconds:.0f} s,"
        " the unit did not restart"
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
    wall = int(one.service(UNIT).systemd_properties["MemoryMax"])
    child = """
def child():
    eater = f"hoard = [b'x' * 2**23 for _ in range({given['mib'] // 8})]"
    return subprocess.run([sys.executable, "-c", eater]).returncode
began = time.monotonic()
status = client.submit(child, pure=False, workers=list(own())).result(60)
print(json.dumps([status, time.monotonic() - began]))
"""
    status, seconds = ask(one, inputs, child, mib=2 * wall // 2**20)
    assert status == -9
    assert pids(one, inputs) == before
    assert scenario.restarted(run, scenario.units(one)) == set()
    measured(
        f"a child that wanted {2 * wall // 2**20} MiB was ended at {wall // 2**20} MiB after"
        f" {seconds:.0f} s; worker and unit went on"
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
open(given["running"], "w").close()
wait(futures, timeout=100)
sizes = client.gather(client.map(len, futures, pure=False))
print(json.dumps([len(futures), sizes.count(10 * 2**20)]))
"""
    with faults.full_disk(one, UNIT, HOME, mib=320) as disk:
        joined(one, inputs, 1)
        before, run = pids(one, inputs), scenario.units(one)
        disk.fill()
        with ThreadPoolExecutor() as pool:
            work = pool.submit(ask, one, inputs, hold, running=RUNNING)
            try:
                scenario.wait_until(lambda: one.file(RUNNING).exists)

                def paused() -> bool:
                    """Tell whether the worker has paused."""
                    return [worker["status"] for worker in workers_of(one, inputs)] == ["paused"]

                scenario.wait_until(paused)
                assert "No space left on device" in scenario.journal(one, UNIT)
            finally:
                disk.free()
                one.run(f"rm -f {RUNNING}")
            freed = time.monotonic()
            asked, answered = work.result(timeout=120)
        assert answered == asked
        seconds = time.monotonic() - freed
        assert pids(one, inputs) == before
        assert scenario.restarted(run, scenario.units(one)) == set()
    joined(one, inputs, 1)
    measured(
        f"{asked} blocks of 10 MiB with 512 MiB of memory: paused, then all {answered} kept,"
        f" {seconds:.0f} s after there was room; no process restarted"
    )


@pytest.mark.fault("clock jump", "The workers go on when their clock jumps a day ahead and back.")
def test_the_clock_may_jump(nodes: Nodes, measured: Note) -> None:
    """Neither heartbeats nor tasks nor new connections depend on the time of day."""
    one, two = nodes["node-1"], nodes["node-2"]
    inputs = variables(one)
    now = """
print(client.submit(time.time, pure=False, workers=list(own())).result(20) - time.time())
"""
    with faults.clock(one, UNIT) as moved:
        joined(two, inputs, 1)
        before, run = pids(two, inputs), scenario.units(one)
        seen = []
        for seconds in (86400, 0):
            moved.jump(seconds)

            def there(seconds: int = seconds) -> bool:
                """Tell whether a task sees the moved clock."""
                return abs(float(ask(two, inputs, now)) - seconds) < 60

            scenario.wait_until(there)
            compute(two, inputs)
            seen.append(pids(two, inputs))
        assert seen == [before, before]
        assert scenario.restarted(run, scenario.units(one)) == set()
    joined(two, inputs, 1)
    measured("tasks and new clients were served after +1 day and after -1 day; nothing restarted")


@pytest.mark.fault(
    "expired certificate",
    "Workers with an expired certificate stay outside; the role's next run renews it, they join.",
)
def test_an_expired_certificate_is_renewed(nodes: Nodes, measured: Note) -> None:
    """Nobody has to look for it: `site.yml` does."""
    one, two = nodes["node-1"], nodes["node-2"]
    inputs, run = variables(one), scenario.units(two)
    with faults.expired_certificate(one, "dask_worker", UNIT):
        joined(two, inputs, 0, seconds=20)
        # The scheduler's word.
        scenario.wait_until(
            lambda: "certificate has expired" in scenario.journal(one, SCHEDULER), 20
        )
        began = time.monotonic()
        renewed = scenario.site("--tags", "dask_worker")
        assert renewed.returncode == 0, renewed.stdout
        seconds = time.monotonic() - began
        joined(two, inputs, 1)
    assert scenario.restarted(run, scenario.units(two)) == set()
    measured(
        f"refused by the scheduler; one run of {seconds:.0f} s renewed it, and the worker joined"
    )
