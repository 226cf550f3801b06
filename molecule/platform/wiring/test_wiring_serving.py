"""Several hosts that serve models behind one door: do users notice when one of them goes?"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import requests
import scenario
import test_wiring
from client import Client
from topology import Platform

#: Asked where several hosts serve models.
__test__ = os.environ.get("MOLECULE_SCENARIO_NAME") == "platform_spread"

platform = test_wiring.platform
UNIT = "odsp-model_server.service"
MODEL = "odsp-several-hosts"
CALLERS = 4
#: Answers that show that things go on.
ENOUGH = 100
#: The door leaves out a host that has failed for 10 s, see roles/nginx.
BACK_S = 120


@dataclass
class Door:
    """The door as a user sees it, and the model that it leads to."""

    url: str
    ca: str
    user: tuple[str, str]
    question: dict[str, Any]
    #: The predictions that are right.
    wanted: list[list[int]]

    def session(self) -> requests.Session:
        """Return a session of the user, who keeps the connection."""
        session = requests.Session()
        session.trust_env = False
        session.auth, session.verify = self.user, self.ca
        return session

    def complaint(self, session: requests.Session) -> str:
        """Ask for a prediction; return what is wrong with the answer."""
        path = f"{self.url}/inference/{MODEL}/champion"
        try:
            answer = session.post(path, json=self.question, timeout=120)
        except requests.RequestException as failure:
            return str(failure)
        right = [{"prediction": one} for one in self.wanted]
        if answer.status_code != 200 or answer.json() not in right:
            return f"{answer.status_code}: {answer.text[:300]}"
        return ""


@dataclass
class Callers:
    """Users who ask for predictions all the time."""

    answers: int = 0
    complaints: list[str] = field(default_factory=list)

    def go_on(self, seconds: float = 180) -> None:
        """Wait until many more answers have come."""
        goal = self.answers + ENOUGH

        def came() -> bool:
            """Tell whether they have."""
            return self.answers >= goal or bool(self.complaints)

        scenario.wait_until(came, seconds)


@contextmanager
def calling(door: Door) -> Iterator[Callers]:
    """Have users ask until the end, when none of them may have a complaint."""
    callers, over = Callers(), Event()

    def ask() -> None:
        with door.session() as session:
            while not over.is_set():
                if complaint := door.complaint(session):
                    callers.complaints.append(complaint)
                callers.answers += 1
                over.wait(0.02)  # leaves the processors to what is watched

    with ThreadPoolExecutor(CALLERS) as pool:
        asking = [pool.submit(ask) for _ in range(CALLERS)]
        try:
            callers.go_on()
            yield callers
            callers.go_on()
        finally:
            over.set()
    for one in asking:
        one.result()
    assert callers.complaints == [], f"{len(callers.complaints)} of {callers.answers}"


@pytest.fixture(scope="module")
def hosts(platform: Platform) -> list[str]:
    """Return the hosts that serve models."""
    found = platform.topology.groups["model_server"]
    assert len(found) > 1
    return found


@pytest.fixture(scope="module")
def servers(platform: Platform, hosts: list[str]) -> dict[str, Client]:
    """Return a client of each host's own server, on MLflow's host and with its certificate."""
    tracking = platform.on(platform.topology.host("mlflow"))
    pair = f"{scenario.TLS}/mlflow"
    return {h: Client(tracking, f"https://{platform.addresses[h]}:8000", pair) for h in hosts}


@pytest.fixture(scope="module")
def tracking(platform: Platform) -> Client:
    """Return a client of MLflow on its own host."""
    host = platform.topology.host("mlflow")
    url, pair = f"https://{platform.addresses[host]}:5000", f"{scenario.TLS}/mlflow"
    return Client(platform.on(host), url, pair)


@pytest.fixture(scope="module")
def trained(tracking: Client) -> dict[str, Any]:
    """Return rows, and what two versions of the model answer to them."""
    return tracking.train(MODEL)


@pytest.fixture(scope="module")
def door(platform: Platform, trained: dict[str, Any]) -> Iterator[Door]:
    """Return the door to a real model, which is loaded."""
    door = Door(
        f"https://{platform.addresses[platform.topology.host('nginx')]}",
        platform.ca,
        next(iter(platform.secrets["vault_user_passwords"].items())),
        {"data": trained["rows"], "model_flavor": "sklearn"},
        [trained["predict"]],
    )
    with door.session() as session:
        loaded = session.get(f"{door.url}/inference/load_model/{MODEL}/sklearn/champion")
        assert loaded.status_code == 200, loaded.text
        yield door
        gone = session.delete(f"{door.url}/inference/{MODEL}/sklearn/champion")
        assert gone.status_code == 200, gone.text


#: The hosts that the door asked for each prediction since a time; the last of them answered.
Ways = Callable[[float], list[list[str]]]


@pytest.fixture
def ways(platform: Platform, hosts: list[str]) -> Ways:
    """Return what the door's log tells of its ways to the hosts."""
    names = {f"{platform.addresses[host]}:8000": host for host in hosts}
    guard = platform.on(platform.topology.host("nginx"))

    def since(moment: float) -> list[list[str]]:
        # With the lines that are on their way.
        shown = f"journalctl --sync; journalctl -o cat -t nginx --since @{moment:.6f}"
        lines = guard.check_output(shown).splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{")]
        mine = [entry for entry in said if MODEL in entry["path"] and entry["status"] == 200]
        return [[names[end] for end in entry["upstream"].split(", ")] for entry in mine]

    return since


def answering(ways: list[list[str]]) -> set[str]:
    """Return the hosts that answered."""
    return {way[-1] for way in ways}


def wait_until_shared(ways: Ways, hosts: list[str]) -> None:
    """Wait until the door has answers of all hosts again."""
    began = time.time()  # the hosts are containers: their clock is this one

    def shared() -> bool:
        """Tell whether all hosts answer."""
        return answering(ways(began)) == set(hosts)

    scenario.wait_until(shared, BACK_S)


@contextmanager
def away(platform: Platform, server: Client, host: str) -> Iterator[None]:
    """Stop a host's server; afterwards it is ready again."""
    there = platform.on(host)
    there.check_output(f"systemctl stop {UNIT}")
    try:
        yield
    finally:
        there.check_output(f"systemctl start {UNIT}")
        server.wait_for("/health/ready", seconds=300)


def test_the_door_asks_all_hosts(
    platform: Platform, hosts: list[str], door: Door, ways: Ways
) -> None:
    """All are in its configuration, each for the component's own name, and all answer."""
    guard = platform.on(platform.topology.host("nginx"))
    text = guard.file("/etc/odsp/nginx/nginx.conf").content_string
    listed = set(re.findall(r"server (\S+):8000", text))
    assert listed == {platform.addresses[host] for host in hosts}
    for host in hosts:
        certificate, _ = platform.greet(host, 8000, "model_server")
        assert ("DNS", "model_server") in certificate["subjectAltName"]
    with calling(door):
        wait_until_shared(ways, hosts)


def predicted_by(server: Client, door: Door) -> list[int]:
    """Return what a host itself predicts."""
    answer = server.ask(f"/{MODEL}/champion", "POST", body=door.question, patience=300)
    assert answer.status == 200, answer
    return list(answer.body["prediction"])


def versions(server: Client) -> list[tuple[int, str]]:
    """Return the versions of the model that a host tells, and their states."""
    listing = server.ask("/loaded_models").body
    return [(one["version"], one["state"]) for one in listing if one["model_name"] == MODEL]


def test_all_hosts_tell_the_same(servers: dict[str, Client], door: Door) -> None:
    """What one has loaded, all have, and predict."""
    for server in servers.values():
        assert predicted_by(server, door) == door.wanted[0]
    told = [server.ask("/loaded_models").body for server in servers.values()]
    columns = ("model_flavor", "model_version_or_alias", "version", "state")
    mine = [[m for m in models if m["model_name"] == MODEL] for models in told]
    tables = [[[model[column] for column in columns] for model in models] for models in mine]
    assert tables == [[["sklearn", "champion", 1, "ready"]]] * len(servers)


def test_an_alias_moves_on_all_hosts_and_fails_no_request(
    servers: dict[str, Client], tracking: Client, trained: dict[str, Any], door: Door
) -> None:
    """Each host switches when it is ready; when all have, the new version alone answers."""
    new = trained["next"]
    moves = {new["version"]: new["predict"], 1: trained["predict"]}
    with calling(replace(door, wanted=list(moves.values()))) as callers:
        for version, prediction in moves.items():
            body = {"name": MODEL, "alias": "champion", "version": str(version)}
            path = "/api/2.0/mlflow/registered-models/alias"
            assert tracking.ask(path, "POST", body=body).status == 200

            def switched(version: int = version, prediction: list[int] = prediction) -> bool:
                """Tell whether all hosts tell this version alone, and answer by it."""
                told = [versions(server) for server in servers.values()]
                answered = [predicted_by(server, door) for server in servers.values()]
                return (told, answered) == (
                    len(servers) * [[(version, "ready")]],
                    len(servers) * [prediction],
                )

            scenario.wait_until(switched, 120)
            with calling(replace(door, wanted=[prediction])):
                callers.go_on()


def test_a_host_that_stops_fails_no_request(
    platform: Platform,
    hosts: list[str],
    servers: dict[str, Client],
    door: Door,
    ways: Ways,
) -> None:
    """The others answer; when it is back, it takes its share."""
    with calling(door) as callers:
        with away(platform, servers[hosts[-1]], hosts[-1]):
            callers.go_on()
            began = time.time()
            callers.go_on()
            assert answering(ways(began)) == set(hosts[:-1])
        wait_until_shared(ways, hosts)


def test_a_host_that_is_killed_fails_no_request(
    platform: Platform,
    hosts: list[str],
    servers: dict[str, Client],
    door: Door,
    ways: Ways,
) -> None:
    """What it was asked at that moment is asked of another."""
    with calling(door):
        scenario.kill(platform.on(hosts[0]), UNIT)
        servers[hosts[0]].wait_for("/health/ready", seconds=300)
        wait_until_shared(ways, hosts)


def other_limits() -> dict[str, Any]:
    """Return inputs that restart servers and models."""
    return {"model_server_workers": 1, "model_server_model_tasks_max": 96}


def other_version() -> dict[str, Any]:
    """Return the input that installs a package whose server and models speak otherwise."""
    package = Path(os.environ["ODSP_STATE_DIR"]) / "other_model_server"
    shutil.rmtree(package, ignore_errors=True)
    unneeded = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(scenario.ROOT / "model_server", package, ignore=unneeded)
    spoken = package / "src/model_server/runner/wire.py"
    ours = spoken.read_text()
    theirs = ours.replace('ANSWER = b"="', 'ANSWER = b"~"')
    assert theirs != ours
    spoken.write_text(theirs)
    return {"model_server_source": str(package)}


@pytest.mark.parametrize("other", [other_limits, other_version], ids=["limits", "version"])
def test_a_rolling_change_fails_no_request(
    platform: Platform,
    hosts: list[str],
    door: Door,
    ways: Ways,
    other: Callable[[], dict[str, Any]],
) -> None:
    """Servers and models restart host by host, and so they do on the way back."""
    before = {host: scenario.units(platform.on(host)) for host in hosts}
    with calling(door) as callers:
        for change in (other(), {}):
            run = platform.play("serving.yml", "--extra-vars", json.dumps(change))
            assert run.returncode == 0, run.stdout[-5000:]
            for host in hosts:
                after = scenario.units(platform.on(host))
                assert UNIT in scenario.restarted(before[host], after)
                before[host] = after
            callers.go_on()
        wait_until_shared(ways, hosts)


def test_another_component_at_a_hosts_address_is_asked_nothing(
    platform: Platform,
    hosts: list[str],
    servers: dict[str, Client],
    door: Door,
    ways: Ways,
) -> None:
    """The platform's authority has signed its certificate, too, but not for this name."""
    thief, name, pem = platform.on(hosts[-1]), "odsp-thief.service", "/run/odsp-thief.pem"
    notebooks = platform.on(platform.topology.host("jupyterlab"))
    stolen = notebooks.file(f"{scenario.TLS}/jupyterlab.pem").content_string
    listen = f"-accept {platform.addresses[hosts[-1]]}:8000 -cert {pem} -key {pem} -CAfile {pem}"
    with calling(door) as callers, away(platform, servers[hosts[-1]], hosts[-1]):
        try:
            scenario.python(
                thief,
                "import os\nos.umask(0o77)\nopen(v['pem'], 'w').write(v['text'])\nprint('{}')",
                pem=pem,
                text=stolen,
            )
            thief.check_output(f"systemd-run -q --unit {name} openssl s_server -www {listen}")
            address = platform.addresses[hosts[-1]]

            def listens() -> bool:
                """Tell whether the thief stands there."""
                return bool(thief.socket(f"tcp://{address}:8000").is_listening)

            scenario.wait_until(listens)
            began = time.time()

            def turned_away() -> bool:
                """Tell whether the door went there, and on to another host."""
                return any(len(way) > 1 and hosts[-1] in way for way in ways(began))

            scenario.wait_until(turned_away, BACK_S)
            callers.go_on()
            assert answering(ways(began)) == set(hosts[:-1])
        finally:
            thief.run(f"systemctl stop {name}; rm -f {pem}")
