"""A model is somebody else's code: what can it reach, take and break, when it tries everything?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faults
import pytest
import scenario
from client import PYTHON, Answer, Client
from hostile_code import ATTACK, CALL_OUT, EAT, FILL, FORK, LOOK, OPEN, WRITE
from test_model_server import (
    FILES,
    MODEL,
    UNIT,
    assert_predicts,
    in_use,
    inputs,
    server,
    tracking,
    trained,
    unit_of,
)

__all__ = ["in_use", "inputs", "server", "tracking", "trained"]

HOSTILE = "odsp-hostile"
ENDING = "odsp-ending"
SKLEARN = {"model_flavor": "sklearn"}
DO_NOTHING = {"data": [{"code": "told = 0"}], "model_flavor": "pyfunc"}
#: The ceiling of systemd's own score for a model's unit: 0 is locked up, 10 is free.
EXPOSURE = 0.6
HELPER = "/run/odsp/model_runnerd.sock"

#: What the helper must not do. Where a folder is given, the others are the server's own.
REFUSED = (
    "",
    "start ../../etc sklearn {model} {environment}",
    "start odsp-evil sklearn /etc/odsp {environment}",
    "start odsp-evil sklearn {model} ../../../home",
    "start odsp-evil onnx {model} {environment}",
    "start odsp-evil sklearn {model}",
    "start abcdefghijklmnopqrstuvw sklearn {model} {environment}",
    "start odsp-evil sklearn {model} {environment} more",
    "start odsp-evil sklearn {link} {environment}",
    "start odsp-evil sklearn {model} {link}",
    "start odsp-evil sklearn {none} {environment}",
    "stop -H",
    "stop odsp-evil;id",
    "stop odsp-evil ssh",
    "stop odsp-evil\nstop odsp-evil",
    "restart odsp-evil",
    "lines ../../etc",
    "lines -o",
)
ASK_HELPER = """
import socket
def ask(request):
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(v["helper"])
            connection.sendall(request.encode() + b"\\n")
            return connection.makefile().read().strip()
        except OSError as error:
            return type(error).__name__
print(json.dumps([ask(request) for request in v["requests"]]))
"""
#: Logs a model that does whatever it is told, in the neighbour's environment.
LOG_HOSTILE = """
import mlflow
class Hostile(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        import os
        self.at_load = [path for path in ("/etc/odsp", "/etc/shadow") if os.path.exists(path)]
    def predict(self, context, model_input, params=None):
        import json
        scope = {"at_load": self.at_load}
        exec(model_input.iloc[0]["code"], scope)
        return [json.dumps(scope["told"], default=str)]
mlflow.set_experiment(v["name"])
requirements = mlflow.pyfunc.get_model_dependencies(f"models:/{v['neighbour']}/1")
with mlflow.start_run():
    mlflow.pyfunc.log_model(name="model", python_model=Hostile(), pip_requirements=requirements,
                            registered_model_name=v["name"])
print("null")
"""
#: Logs a model whose process ends while it loads.
LOG_ENDING = """
import mlflow
class Ending(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        import os
        print("its last words", flush=True)
        os._exit(3)
    def predict(self, context, model_input, params=None):
        return model_input
mlflow.set_experiment(v["name"])
requirements = mlflow.pyfunc.get_model_dependencies(f"models:/{v['neighbour']}/1")
with mlflow.start_run():
    mlflow.pyfunc.log_model(name="model", python_model=Ending(), pip_requirements=requirements,
                            registered_model_name=v["name"])
print("null")
"""
#: Asks the neighbour ten times a second, and counts what it gets.
ASK_NEIGHBOUR = """
import os, pathlib, requests, time
asked = failed = 0
slowest = 0.0
session = requests.Session()
session.verify, session.cert = v["authority"], (v["pair"] + ".crt", v["pair"] + ".key")
while True:
    began = time.monotonic()
    answer = session.post(v["url"], json=v["body"], timeout=60)
    slowest = max(slowest, time.monotonic() - began)
    asked, failed = asked + 1, failed + (answer.status_code != 200)
    if asked == 1:
        pathlib.Path(v["running"]).touch()
    elif not os.path.exists(v["running"]):
        break
    time.sleep(0.1)
print(json.dumps({"asked": asked, "failed": failed, "slowest": slowest}))
"""


@pytest.fixture(scope="module")
def hostile(server: Client, tracking: Client, trained: dict[str, Any]) -> None:
    """Have the model that does what it is told registered and loaded."""
    assert trained
    tracking.run(LOG_HOSTILE, name=HOSTILE, neighbour=MODEL)
    answer = server.ask(f"/load_model/{HOSTILE}/pyfunc/1", patience=600)
    assert answer.status == 200, answer


@pytest.fixture(scope="module")
def limits_hold(host: Any) -> None:
    """Fail unless this host heeds the limits of units at all."""
    faults.assert_limits_hold(host)


def attempt(server: Client, code: str, **given: Any) -> Answer:
    """Have the hostile model run Python with some values given."""
    text = "".join(f"{name} = {value!r}\n" for name, value in given.items()) + code
    body = {"data": [{"code": text}], "model_flavor": "pyfunc"}
    return server.ask(f"/{HOSTILE}/1", "POST", body=body, patience=120)


def told(answer: Answer) -> Any:
    """Return what the hostile model found out."""
    assert answer.status == 200, answer
    return json.loads(answer.body["prediction"][0])


def by_another_user(host: Any, code: str, **given: Any) -> Any:
    """Return what the same code finds out without a sandbox, as the server's own account."""
    text = "".join(f"{name} = {value!r}\n" for name, value in given.items()) + code
    program = scenario.program(f"at_load = []\n{text}\nprint(json.dumps(told, default=str))", {})
    answer = host.run(f"{program} | runuser -u model_server -- timeout 60 python3 -")
    assert answer.rc == 0, answer.stderr
    return json.loads(answer.stdout)


@contextmanager
def neighbour_answers(host: Any, server: Client, trained: dict[str, Any]) -> Iterator[None]:
    """Ask the other model meanwhile: it must answer every time."""
    values = {
        "url": f"{server.url}/{MODEL}/1",
        "body": {"data": trained["rows"], "model_flavor": "sklearn"},
        "pair": server.pair,
        "authority": scenario.CA,
    }
    process = scenario.main_pid(host, unit_of(MODEL, "sklearn"))
    with scenario.at_work(host, ASK_NEIGHBOUR, PYTHON, seconds=300, **values) as end:
        yield
        seen = end()
    assert seen["failed"] == 0, seen
    assert seen["asked"] > 1, seen
    assert scenario.main_pid(host, unit_of(MODEL, "sklearn")) == process


def test_models_are_units_and_confined(host: Any, hostile: None, in_use: dict[str, Any]) -> None:
    """Each model runs as a user of its own, and systemd finds nearly nothing to object to."""
    assert hostile is None
    assert in_use
    users = set()
    for unit in (unit_of(MODEL, "sklearn"), unit_of(HOSTILE, "pyfunc")):
        process = scenario.main_pid(host, unit)
        assert process, scenario.journal(host, unit)
        users.add(host.check_output(f"stat -c %u /proc/{process}"))
        assert "io_uring_setup" not in host.service(unit).systemd_properties["SystemCallFilter"]
        verdict = host.check_output(f"systemd-analyze security --no-pager {unit} | tail -n 1")
        score = re.search(r"for \S+: ([0-9.]+) ", verdict)
        assert score, verdict
        assert float(score[1]) <= EXPOSURE, verdict
    assert len(users) == 2, users
    assert users.isdisjoint({"0", host.check_output("id -u model_server")})


def test_sees_nothing_of_the_host(host: Any, server: Client, hostile: None) -> None:
    """Neither secrets nor files nor processes: its own folder, its environment, an interpreter."""
    assert hostile is None
    seen, free = told(attempt(server, LOOK)), by_another_user(host, LOOK)
    assert len(free["processes"]) > 0
    assert "/etc/odsp/tls/ca.crt" in free["files"]
    assert seen["at_load"] == []
    assert seen["processes"] == [seen["own"]]
    secrets = [one for one in scenario.secrets().values() if isinstance(one, str)]
    assert secrets
    assert [one for one in secrets if one in json.dumps(seen)] == []
    # systemd itself shows the journal's sockets, which nobody can use who may not call socket().
    private = ("/etc/odsp", "/var/lib", "/run/odsp", "/run/dbus", "/home", "/root")
    assert [file for file in seen["files"] if file.startswith(private)] == []
    assert "/etc/passwd" not in seen["files"]
    assert {"model", "environment", "scratch"} <= set(seen["root"])
    assert "MLFLOW_TRACKING_URI" not in seen["environ"]
    pids = [scenario.main_pid(host, u) for u in (UNIT, unit_of(MODEL, "sklearn"))]
    paths = ["/etc/odsp/model_server.env", "/etc/shadow", f"{FILES}/models", HELPER]
    paths += [f"/proc/{pid}/{name}" for pid in (1, *pids) for name in ("environ", "root/etc/hosts")]
    assert told(attempt(server, OPEN, paths=paths)) == []
    assert by_another_user(host, OPEN, paths=["/etc/odsp/model_server.env"]) != []


def test_talks_to_nobody(host: Any, server: Client, hostile: None, inputs: dict[str, Any]) -> None:
    """Neither by the network nor by sockets of the host, of whatever kind."""
    assert hostile is None
    given = {"address": inputs["odsp_address"], "helper": HELPER}
    reached = by_another_user(host, CALL_OUT, **given)
    assert len(reached) > 3, reached
    assert told(attempt(server, CALL_OUT, **given)) == []


def test_writes_nowhere_but_to_its_scratch(host: Any, server: Client, hostile: None) -> None:
    """Not to other environments, nor to its own, nor to its model."""
    assert hostile is None
    written = told(attempt(server, WRITE))
    assert "/scratch" in written
    # systemd 257 gives it a /tmp of its own, 252 a /run: memory, which has its limit.
    assert written.keys() <= {"/scratch", "/dev/shm", "/tmp", "/var/tmp", "/run"}
    assert set(written.values()) == {"tmpfs"}
    assert host.run("find / /tmp /var/tmp /dev/shm /run -xdev -name odsp-was-here | grep .").rc != 0


def test_leaves_others_alone(host: Any, server: Client, hostile: None) -> None:
    """No signal, no trace, no look into another process, and no way to become somebody else."""
    assert hostile is None
    units = (UNIT, unit_of(MODEL, "sklearn"))
    processes = [1, *(scenario.main_pid(host, unit) for unit in units)]
    free = by_another_user(host, ATTACK, processes=processes)
    assert ["signalled", processes[1]] in free, free
    assert told(attempt(server, ATTACK, processes=processes)) == []


@pytest.mark.usefixtures("hostile", "limits_hold")
def test_takes_no_more_processes_and_disk_than_it_may(
    host: Any, server: Client, in_use: dict[str, Any], inputs: dict[str, Any]
) -> None:
    """A fork bomb and a full scratch folder, while the neighbour goes on answering."""
    with neighbour_answers(host, server, in_use):
        forked = told(attempt(server, FORK))
        filled = told(attempt(server, FILL))
    tasks = int(host.service(unit_of(HOSTILE, "pyfunc")).systemd_properties["TasksMax"])
    assert tasks == inputs.get("model_server_model_tasks_max", 256)
    assert 8 < forked < tasks
    assert 8 < filled <= 256


@pytest.mark.usefixtures("hostile", "limits_hold")
@pytest.mark.fault(
    "out of memory",
    "A model that takes more than model_server_model_memory_max is ended alone: its caller gets "
    "503, its neighbours go on answering, and it is started again.",
)
def test_takes_no_more_memory_than_it_may(
    host: Any, server: Client, in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """Who eats memory spoils only his own answers."""
    unit = unit_of(HOSTILE, "pyfunc")
    assert int(host.service(unit).systemd_properties["MemoryMax"]) == 2 * 2**30
    before = scenario.main_pid(host, unit)
    with neighbour_answers(host, server, in_use), faults.memory_limit(host, unit, 768):
        answer = attempt(server, EAT)
        assert answer.status == 503, answer
    server.wait_for(f"/{HOSTILE}/1", method="POST", body=DO_NOTHING)
    assert scenario.main_pid(host, unit) not in (0, before)
    measured(f"the caller of a model that took 768 MiB: {answer.status}")


@pytest.mark.usefixtures("trained")
def test_a_model_that_ends_while_it_loads_leaves_its_last_lines(
    server: Client, tracking: Client
) -> None:
    """Whoever loads it is told, although the server's account may not read the journal."""
    tracking.run(LOG_ENDING, name=ENDING, neighbour=MODEL)
    answer = server.ask(f"/load_model/{ENDING}/pyfunc/1", patience=600)
    assert answer.status == 422, answer
    assert "ended while it loaded (exit status 3)" in answer.text
    assert "Its last lines:" in answer.text
    assert "its last words" in answer.text


@pytest.mark.usefixtures("hostile")
def test_killed_models_come_back(host: Any, server: Client, in_use: dict[str, Any]) -> None:
    """After kill -9 of a model; after kill -9 of the server, without their noticing."""
    unit = unit_of(MODEL, "sklearn")
    first = scenario.main_pid(host, unit)
    host.check_output(f"kill -9 {first}")
    server.wait_for(f"/{MODEL}/1", method="POST", body={"data": in_use["rows"]} | SKLEARN)
    second = scenario.main_pid(host, unit)
    assert second not in (0, first)
    scenario.kill(host, UNIT)
    server.wait_for("/health/ready")
    assert_predicts(server, in_use)
    assert scenario.main_pid(host, unit) == second


@pytest.mark.usefixtures("hostile")
def test_helper_refuses_all_else(host: Any) -> None:
    """Whatever the server's account asks of root, it is its own models' units and folders only."""
    own = {
        kind: host.check_output(f"ls {FILES}/{kind}s | grep -xE '[0-9a-f]{{32}}' | head -n 1")
        for kind in ("model", "environment")
    }
    given = {**own, "link": "e" * 32, "none": "0" * 32}
    links = [f"{FILES}/{kind}s/{given['link']}" for kind in own]
    before = scenario.units(host)
    try:
        for link in links:
            host.check_output(f"runuser -u model_server -- ln -sfn /etc/odsp {link}")
        said = ask_helper(host, [one.format(**given) for one in REFUSED], "model_server")
    finally:
        host.check_output(f"rm -f {' '.join(links)}")
    assert [one for one, answer in zip(REFUSED, said, strict=True) if answer[:3] != "no "] == []
    assert scenario.units(host) == before
    assert host.run("grep odsp-evil /proc/mounts").rc != 0


def test_helper_hears_nobody_else(host: Any) -> None:
    """Only the model server's account may ask."""
    for account in ("nobody", "mlflow"):
        assert ask_helper(host, ["stop odsp-evil"], account) == ["PermissionError"]
    assert ask_helper(host, ["stop odsp-evil"], "model_server") == ["ok"]


def ask_helper(host: Any, requests: list[str], account: str) -> list[str]:
    """Return what the helper answers to an account's requests."""
    program = scenario.program(ASK_HELPER, {"requests": requests, "helper": HELPER})
    answer = host.run(f"{program} | runuser -u {account} -- timeout 60 python3 -")
    assert answer.rc == 0, answer.stderr
    return list(json.loads(answer.stdout))
