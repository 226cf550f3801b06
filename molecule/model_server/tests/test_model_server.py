"""What an operator asks of the model server: does it predict, refuse, survive, keep its secrets?"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
import requests
import scenario
import source_builds
from client import Answer, Client
from mlflow_server import wait_until_all_answer

UNIT = "odsp-model_server.service"
MODELS = "odsp-model_runners.target"
PAIR = f"{scenario.TLS}/model_server"
FILES = "/var/lib/odsp/model_server"
MODEL = "odsp-iris"
#: MLflow's versions of models.
VERSIONS = "/api/2.0/mlflow/model-versions"

EMPTY = (
    "is empty; put a host in the group it comes from, or generate the secret with "
    "playbooks/ops/generate_secrets.yml"
)
NAME = "may hold letters, digits, _, - and . only; choose another name"
BODY = "write a number with K, M or G, at most 1G"
SCHEME = (
    "has no scheme; write it as in https://packages.example.org/simple, or leave it empty"
)
TOGETHER = (
    "but all models together may take 8G; lower it, or raise model_server_models_memory_max"
)
SIZE = "write a number with K, M, G or T, a share of the memory as 80%, or infinity"
#: Callers who ask all the time, whose answers must be among those that are wanted.
CALLERS = """
import pathlib, subprocess, threading, time, requests
def shown(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
def session():
    made = requests.Session()
    made.verify, made.cert = v["authority"], (v["pair"] + ".crt", v["pair"] + ".key")
    return made
over, complaints, answers = threading.Event(), [], []
def ask():
    mine = session()
    while not over.wait(v["pause"]):
        asked, prediction = time.monotonic(), None
        try:
            answer = mine.post(f"{v['url']}/{v['model']}/champion", json=v["question"], timeout=60)
            prediction = answer.json().get("prediction")
            if prediction not in v["wanted"]:
                complaints.append(answer.text[:300])
        except Exception as error:
            complaints.append(repr(error)[:300])
        answers.append((asked, prediction))
def go_on():
    goal, end = len(answers) + 200, time.monotonic() + 120
    while len(answers) < goal and time.monotonic() < end:
        time.sleep(0.1)
callers = [threading.Thread(target=ask) for _ in range(4)]
for caller in callers:
    caller.start()
go_on()
"""
#: Says how many answers came while the server replaced its workers, what was wrong with them, and
#: how many workers stayed.
RELOAD = (
    CALLERS
    + """
def workers():
    main = shown("systemctl", "show", "--value", "--property=MainPID", v["unit"])[0]
    return set(pathlib.Path(f"/proc/{main}/task/{main}/children").read_text().split())
before = workers()
shown("systemctl", "reload", v["unit"])
end = time.monotonic() + 120
while before & workers() and time.monotonic() < end:
    time.sleep(0.1)
go_on()
over.set()
for caller in callers:
    caller.join()
print(json.dumps([len(answers), complaints[:10], len(before & workers())]))
"""
)
#: Moves the alias to versions, one after the other, and says after how many seconds each was
#: noticed, after how many it answered, and how often another one did later; and what was wrong.
MOVES = (
    CALLERS
    + """
operator = session()
def runners():
    command = ("systemctl", "show", "--value", "--property=MainPID", "odsp-model_runner@*")
    return set(shown(*command)) - {"0"}
def meant():
    listing = operator.get(f"{v['url']}/loaded_models", timeout=60).json()
    named = [one for one in listing if one["model_name"] == v["model"]]
    return {one["version"] for one in named if "champion" in one["aliases"]}
def move(version, prediction):
    there = runners()
    address = f"{v['tracking']}/api/2.0/mlflow/registered-models/alias"
    body = {"name": v["model"], "alias": "champion", "version": str(version)}
    operator.post(address, json=body, timeout=60).raise_for_status()
    moved, noticed = time.monotonic(), None
    while meant() != {version} and time.monotonic() < moved + 120:
        # Its process is started some time before it answers.
        if noticed is None and runners() - there:
            noticed = time.monotonic()
        time.sleep(0.1)
    answered = time.monotonic()
    go_on()
    late = [given for asked, given in answers if asked > answered and given != prediction]
    return [(noticed or answered) - moved, answered - moved, len(late)]
told = [move(*one) for one in v["moves"]]
over.set()
for caller in callers:
    caller.join()
print(json.dumps([told, complaints[:10]]))
"""
)
READABLE = (
    "model_server_index_url holds a name or password, which the code of a package that is built "
    "could read; take it out, or set model_server_allow_source_builds to false"
)
#: Cuts each of the server's connections to its database as soon as it is seen, for some seconds.
CUT = """
DO $$
DECLARE cut integer := 0; seen integer;
BEGIN
  FOR turn IN 1..4000 LOOP
    PERFORM pg_stat_clear_snapshot();
    SELECT count(pg_terminate_backend(pid)) INTO seen
      FROM pg_stat_activity WHERE usename = 'model_server';
    cut := cut + seen;
    PERFORM pg_sleep(0.001);
  END LOOP;
  RAISE NOTICE 'cut %', cut;
END $$
"""
#: Inputs that work, though they look like those that cannot.
SOUND: list[dict[str, Any]] = [
    {},
    {"model_server_memory_budget": "8G", "model_server_model_memory_max": "8192M"},
    {"model_server_memory_budget": "9G", "model_server_models_memory_max": "80%"},
    {"model_server_model_memory_max": "9G", "model_server_models_memory_max": "infinity"},
    {"model_server_model_memory_max": "infinity"},
    {"model_server_index_url": "", "model_server_max_body_size": "1G"},
    {"model_server_index_url": "https://ada:lovelace@packages.test/simple"},
]
#: Seconds; more than a caller waits for another model that is being started.
IDLE = 30
#: Inputs that cannot work in a way their types do not show, and what is said of each.
FAULTY: list[tuple[str, Any, str]] = [
    ("model_server_listen_address", "", EMPTY),
    ("model_server_listen_port", 0, "is 0; choose one of 1 to 65535"),
    ("model_server_listen_port", 65536, "is 65536; choose one of 1 to 65535"),
    (
        "model_server_root_path",
        "inference",
        'is "inference"; write it as in /inference, or leave it empty',
    ),
    ("model_server_tracking_url", "", EMPTY),
    (
        "model_server_tracking_url",
        "192.0.2.11:5000",
        'is "192.0.2.11:5000"; write it as in https://192.0.2.11:5000',
    ),
    ("model_server_database_host", "", EMPTY),
    ("model_server_database_password", "", EMPTY),
    ("model_server_database_port", 0, "is 0; choose one of 1 to 65535"),
    ("model_server_database_port", 65536, "is 65536; choose one of 1 to 65535"),
    ("model_server_database_name", "model/server", NAME),
    ("model_server_database_user", "model@server", NAME),
    ("model_server_workers", 0, "is 0; at least 1 process must serve"),
    ("model_server_runner_threads", 0, "is 0; a model needs at least 1"),
    ("model_server_load_timeout_seconds", 0, "is 0; give a load at least 1 second"),
    ("model_server_predict_timeout_seconds", 0, "is 0; give a prediction at least 1 second"),
    ("model_server_max_body_size", "32 MB", f'is "32 MB"; {BODY}'),
    ("model_server_max_body_size", "0", f'is "0"; {BODY}'),
    ("model_server_max_body_size", "2G", f'is "2G"; {BODY}'),
    (
        "model_server_memory_max",
        "8 GB",
        f'is "8 GB"; {SIZE}',
    ),
    (
        "model_server_memory_max",
        "8",
        f'is "8"; {SIZE}',
    ),
    ("model_server_model_memory_max", "2", f'is "2"; {SIZE}'),
    ("model_server_models_memory_max", "all", f'is "all"; {SIZE}'),
    ("model_server_model_tasks_max", 4, "is 4; give a model at least 16"),
    ("model_server_model_cpu_quota", "2", 'is "2"; write a share of one processor as 200%'),
    (
        "model_server_memory_budget",
        "6 GB",
        'is "6 GB"; write a number with K, M, G or T, or 0 for no budget',
    ),
    ("model_server_memory_budget", "8193M", f"is 8193M, {TOGETHER}"),
    ("model_server_model_memory_max", "9G", f"is 9G, {TOGETHER}"),
    (
        "model_server_idle_unload_seconds",
        4,
        "is 4; write 5 seconds or more, or 0 for never",
    ),
    ("model_server_environment_keep_days", 0, "is 0; keep an environment for at least 1 day"),
    (
        "model_server_wheels_dir",
        "wheels",
        'is "wheels"; write a whole path, or leave it empty',
    ),
    ("model_server_index_url", "packages.test/simple", SCHEME),
    ("model_server_index_url", "ada:lovelace@packages.test/simple", SCHEME),
]


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the inputs of the host's roles."""
    return dict(host.ansible.get_variables())


@pytest.fixture(scope="module")
def server(host: Any, inputs: dict[str, Any]) -> Client:
    """Return a client of the server with the platform's certificate."""
    address, port = inputs["odsp_address"], inputs["model_server_listen_port"]
    return Client(host, f"https://{address}:{port}", PAIR)


@pytest.fixture(scope="module")
def tracking(host: Any, inputs: dict[str, Any]) -> Client:
    """Return a client of MLflow with the same certificate."""
    return Client(host, inputs["odsp_mlflow_url"], PAIR)


@pytest.fixture(scope="module")
def trained(tracking: Client) -> dict[str, Any]:
    """Return rows, and what the registered model itself answers to them."""
    return tracking.train(MODEL)


@pytest.fixture
def in_use(server: Client, trained: dict[str, Any]) -> dict[str, Any]:
    """Return the model while it is loaded, by its alias and its version."""
    paths = [f"/load_model/{MODEL}/sklearn/{reference}" for reference in ("champion", "1")]
    answers = server.ask_all(*paths, patience=600)
    assert [answer.status for answer in answers] == [200, 200], answers
    return trained


@pytest.fixture
def new_version(server: Client, tracking: Client, trained: dict[str, Any]) -> Iterator[str]:
    """Return a version of the model that the server has never loaded; it is not afterwards."""
    assert trained
    version = register_again(tracking)
    yield version
    assert unload(server, version).status in (200, 404)


@pytest.fixture
def three_versions(
    server: Client, tracking: Client, in_use: dict[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Return the version in use and two new ones; no other model is loaded."""
    assert in_use
    for name, flavor, version, _ in loaded(server):
        if (name, flavor, version) != (MODEL, "sklearn", 1):
            assert server.ask(f"/{name}/{flavor}/{version}", "DELETE").status == 200
    new = register_again(tracking), register_again(tracking)
    yield "1", *new
    assert {unload(server, version).status for version in new} <= {200, 404}


def register_again(tracking: Client) -> str:
    """Register the model's first version once more; return the new number."""
    first = tracking.ask(f"{VERSIONS}/get?name={MODEL}&version=1").body["model_version"]
    source = first["source"]
    body = {"name": MODEL, "source": source, "model_id": source.removeprefix("models:/")}
    made = tracking.ask(f"{VERSIONS}/create", "POST", body=body)
    assert made.status == 200, made
    return str(made.body["model_version"]["version"])


def load(server: Client, reference: str, flavor: str = "sklearn", patience: float = 600) -> Answer:
    """Have the model loaded by a version or an alias."""
    return server.ask(f"/load_model/{MODEL}/{flavor}/{reference}", patience=patience)


def unload(server: Client, reference: str, flavor: str = "sklearn") -> Answer:
    """Have the model unloaded."""
    return server.ask(f"/{MODEL}/{flavor}/{reference}", "DELETE")


def assert_predicts(
    server: Client,
    trained: dict[str, Any],
    reference: str = "champion",
    function: str = "predict",
) -> Answer:
    """The server answers as the model itself does."""
    body = {"data": trained["rows"], "model_flavor": "sklearn", "predict_function": function}
    answer = server.ask(f"/{MODEL}/{reference}", "POST", body=body, patience=600)
    assert answer.status == 200, answer
    flat, wanted = (
        [x for row in rows for x in (row if isinstance(row, list) else [row])]
        for rows in (answer.body["prediction"], trained[function])
    )
    assert flat == pytest.approx(wanted, abs=1e-9)
    return answer


def assert_told(answer: Answer, status: int, words: str) -> None:
    """The refusal has this status, and a sentence with these words."""
    assert (answer.status, words in answer.body["detail"]) == (status, True), answer


def loaded(server: Client) -> list[tuple[str, str, int, str]]:
    """Return what the server says is loaded."""
    answer = server.ask("/loaded_models")
    assert answer.status == 200, answer
    names = ("model_name", "model_flavor", "version", "state")
    return [tuple(model[name] for name in names) for model in answer.body]


def timed(request: Callable[[], Answer]) -> tuple[Answer, float]:
    """Return what a request came to, and its seconds."""
    began = time.monotonic()
    return request(), time.monotonic() - began


def workers(host: Any) -> set[int]:
    """Return the processes that speak HTTP."""
    main = scenario.main_pid(host, UNIT)
    return {int(one) for one in host.run(f"pgrep -P {main} -f model-server").stdout.split()}


def runners(host: Any) -> set[int]:
    """Return the processes that hold models."""
    shown = "systemctl show --value --property MainPID 'odsp-model_runner@*.service'"
    # Of a unit that has just ended it is 0, until systemd forgets the unit.
    return {int(one) for one in host.check_output(shown).split()} - {0}


def unit_of(model: str, flavor: str, version: int | str = 1) -> str:
    """Return the unit of a model's version."""
    digest = hashlib.sha256(json.dumps([model, int(version)]).encode()).hexdigest()[:16]
    return f"odsp-model_runner@{digest}-{flavor[0]}.service"


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, is started at boot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "model_server", exposure=1.6)
    # Only hosts with control groups of version 2 would show what else happens.
    assert host.service(UNIT).systemd_properties["OOMPolicy"] == "continue"


@pytest.mark.parametrize("function", ["predict", "predict_proba"])
@pytest.mark.parametrize("reference", ["champion", "1"])
def test_predicts_what_the_model_itself_predicts(
    server: Client, trained: dict[str, Any], reference: str, function: str
) -> None:
    """By alias or version, loaded on first use into an environment of its own."""
    assert_predicts(server, trained, reference, function)


def test_load_list_and_unload(host: Any, server: Client, trained: dict[str, Any]) -> None:
    """What is loaded is listed with its unit, by every worker alike; what is unloaded is gone."""
    assert trained
    answer = load(server, "champion", "pyfunc")
    assert answer.status == 200, answer
    assert all((MODEL, "pyfunc", 1, "ready") in loaded(server) for _ in range(4))
    unit = host.service(f"odsp-model_runner@{answer.body['runner']}.service")
    assert unit.is_running
    assert unload(server, "champion", "pyfunc").status in (200, 204)
    assert not unit.is_running
    assert not [m for m in loaded(server) if m[:2] == (MODEL, "pyfunc")]
    assert unload(server, "champion", "pyfunc").status == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/no-such-model/1", {"data": [[1, 2, 3, 4]]}, 404, "MLflow has no model 'no-such-model'"),
        (f"/{MODEL}/99", {"data": [[1, 2, 3, 4]]}, 404, "with a version 99."),
        (f"/{MODEL}/champion", {"data": [[1, 2], [3]], "model_flavor": "sklearn"}, 422, "Row 2 "),
        (
            f"/{MODEL}/champion",
            {"data": [[1, 2]], "model_flavor": "sklearn"},
            422,
            "X has 2 features",
        ),
        (f"/{MODEL}/champion", {"data": [[1, 2]], "model_flavor": "keras"}, 422, "model_flavor: "),
        (f"/{MODEL}/champion", {"rows": [[1, 2, 3, 4]]}, 422, "data: Field required."),
    ],
    ids=["model", "version", "ragged rows", "missing columns", "flavor", "misspelt"],
)
def test_wrong_requests_are_told_what_is_wrong(
    server: Client, trained: dict[str, Any], path: str, body: Any, status: int, words: str
) -> None:
    """A wrong request gets a 4xx with a sentence, never a 500."""
    assert trained
    assert_told(server.ask(path, "POST", body=body), status, words)


@pytest.mark.once
def test_what_has_no_wheel_is_not_built(server: Client, tracking: Client) -> None:
    """Its code would run; the refusal names the package, and what would allow it."""
    requirement = f"{source_builds.OLD_PACKAGE}==0.6.2"
    with source_builds.asked(server, tracking, requirement) as answer:
        assert_told(answer, 422, f"({source_builds.OLD_PACKAGE}) cannot be installed")
        assert_told(answer, 422, "which model_server_allow_source_builds would allow")


def test_refuses_whoever_shows_no_certificate(server: Client) -> None:
    """Only certificates of the platform are let in, and only by TLS."""
    refused = dict.fromkeys(("foreign", "none", "plain text"), "closed")
    assert server.knocks() == {"ours": "let in", **refused}
    assert server.ask("/health/live").status == 200


def test_refuses_other_hosts(inputs: dict[str, Any]) -> None:
    """A host that sees the port but has no certificate of the platform is cut off."""
    address, port = inputs["odsp_address"], inputs["model_server_listen_port"]
    refusal = scenario.refuses_strangers(address, port)
    assert re.search("closed|EOF|reset|Broken pipe", refusal), refusal


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["model_server_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening


@pytest.mark.once
def test_a_reload_fails_no_request(host: Any, server: Client, in_use: dict[str, Any]) -> None:
    """All HTTP processes are replaced under callers who keep their connections; models stay."""
    models = runners(host)
    answers, complaints, stayed = server.run(
        RELOAD,
        unit=UNIT,
        pause=0,
        wanted=[in_use["predict"]],
        **asked_by_callers(server, in_use),
    )
    assert (answers >= 400, complaints, stayed) == (True, [], 0)
    assert runners(host) == models


def asked_by_callers(server: Client, trained: dict[str, Any]) -> dict[str, Any]:
    """Return whom callers ask, and what."""
    return {
        "url": server.url,
        "model": MODEL,
        "question": {"data": trained["rows"], "model_flavor": "sklearn"},
        "pair": server.pair,
        "authority": scenario.CA,
    }


def test_an_alias_moves_and_fails_no_request(
    host: Any, server: Client, tracking: Client, in_use: dict[str, Any]
) -> None:
    """Noticed within 5 s; its new version is made ready beside the old one, and answers then."""
    models, new = runners(host), in_use["next"]
    moves, complaints = server.run(
        MOVES,
        tracking=tracking.url,
        pause=0.02,  # leaves the processors to what is watched
        moves=[(new["version"], new["predict"]), (1, in_use["predict"])],
        wanted=[in_use["predict"], new["predict"]],
        **asked_by_callers(server, in_use),
    )
    assert complaints == []
    for _, answered, late in moves:
        assert (answered < 120, late) == (True, 0), moves
    # One of them may be held up by a busy machine.
    assert min(noticed for noticed, _, _ in moves) < 5, moves

    def gone() -> bool:
        """Tell whether the new version is unloaded, as nobody asks for it any more."""
        return runners(host) == models

    scenario.wait_until(gone)


@pytest.mark.once
def test_the_log_tells_who_asked_as_the_door_does(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever a user says of himself on the way to the door."""
    known, authority = scenario.secrets(), tmp_path / "ca.crt"
    authority.write_text(known["vault_ca_certificate"])
    user = next(iter(known["vault_user_passwords"].items()))
    door = f"https://{inputs['odsp_address']}/inference"
    began = time.time()  # the host is a container: its clock is this one
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(
            f"{door}/{MODEL}/1",
            json={"data": in_use["rows"], "model_flavor": "sklearn"},
            auth=user,
            verify=str(authority),
            headers={"X-Forwarded-User": "somebody-else"},
            timeout=60,
        )
    assert answer.json() == {"prediction": in_use["predict"]}

    def told() -> list[dict[str, Any]]:
        """Return the log's lines about this request."""
        command = f"journalctl -o cat --unit {UNIT} --since @{began:.6f}"
        lines = [line for line in host.check_output(command).splitlines() if line.startswith("{")]
        said = [json.loads(line) for line in lines]
        wanted = answer.headers["X-Request-ID"]
        return [line for line in said if line.get("request_id") == wanted]

    scenario.wait_until(told)
    (line,) = told()
    assert (line["user"], line["model"], line["version"]) == (user[0], MODEL, 1)
    assert line["rows"] == len(in_use["rows"])


def test_an_upgrade_stops_the_server_before_its_models(
    host: Any, server: Client, in_use: dict[str, Any]
) -> None:
    """Both are of one version when they speak: the old server asks no model of the new one."""

    def last(change: str, unit: str) -> int:
        """Return when the unit last changed so, in microseconds since the host's start."""
        return int(host.service(unit).systemd_properties[f"{change}EnterTimestampMonotonic"])

    host.check_output("touch --no-dereference /opt/odsp/model_server/current")
    scenario.converge("model_server_sandbox,model_server_service")
    assert last("Inactive", UNIT) < last("Inactive", MODELS)
    assert last("Active", MODELS) < last("Active", UNIT)
    server.wait_for("/health/ready")
    assert_predicts(server, in_use)


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_what_was_loaded_comes_back(
    host: Any, server: Client, in_use: dict[str, Any], blow: str
) -> None:
    """After a restart, after kill -9, after a reboot of the host."""
    scenario.strike(host, UNIT, blow)
    server.wait_for("/health/ready")
    assert (MODEL, "sklearn", 1, "ready") in loaded(server)
    assert_predicts(server, in_use)


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No secret in arguments, the journal or a file that everyone may read."""
    assert scenario.places_of(host, inputs["model_server_database_password"]) == []
    for path in ("/etc/odsp/model_server.env", f"{PAIR}.key", f"{PAIR}.pem"):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "model_server", 0o640), path


@pytest.mark.once
def test_faulty_inputs_stop_the_role(host: Any, tmp_path: Path) -> None:
    """One sentence names host, variable and remedy; the role stops and nothing is changed."""
    cases = [*SOUND, *({name: value} for name, value, _ in FAULTY)]
    cases.append(SOUND[-1] | {"model_server_allow_source_builds": True})
    said = [*(f"{name} {said}" for name, _, said in FAULTY), READABLE]
    wanted = [f"case-{number}: {one}." for number, one in enumerate(said, len(SOUND))]
    assert scenario.sentences("model_server", cases, tmp_path) == [*[""] * len(SOUND), *wanted]
    before = scenario.units(host)
    run = scenario.layer("--tags", "model_server", model_server_workers=0)
    assert run.returncode != 0
    assert "node-1: model_server_workers is 0; at least 1 process must serve." in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_changed_inputs_are_in_force_and_taken_back(
    host: Any, inputs: dict[str, Any], server: Client, tracking: Client, in_use: dict[str, Any]
) -> None:
    """Another port, prefix and size: one restart of this unit alone; the way back is one, too.

    Packages may be built meanwhile, by a unit that is gone afterwards.
    """
    address, old = inputs["odsp_address"], inputs["model_server_listen_port"]
    changed = {
        "odsp_model_server_port": old + 1,
        "model_server_workers": 1,
        "model_server_root_path": "/other",
        "odsp_model_server_load_timeout_seconds": 1200,
        "odsp_model_server_max_body_size": "1M",
        "model_server_memory_max": "6G",
        "model_server_allow_source_builds": True,
        "model_server_wheels_dir": source_builds.SOURCES,
    }
    moved = replace(server, url=f"https://{address}:{old + 1}")
    limit = host.service(UNIT).systemd_properties["MemoryMax"]
    before = scenario.units(host)
    try:
        # The door follows to the new port, by a reload.
        scenario.converge("model_server,nginx", **changed)
        between = scenario.units(host)
        assert scenario.restarted(before, between) == {UNIT}
        moved.wait_for("/health/ready")
        assert_predicts(moved, in_use)
        assert moved.ask("/openapi.json").body["servers"] == [{"url": "/other"}]
        settings = host.file("/etc/odsp/model_server.env").content_string
        assert 'MODEL_SERVER_LOAD_TIMEOUT_SECONDS="1200"' in settings
        door = host.file("/etc/odsp/nginx/nginx.conf").content_string
        assert "proxy_read_timeout 1290s;" in door
        assert "client_max_body_size 1048576;" in door
        large = moved.ask(f"/{MODEL}/champion", "POST", body={"data": []}, size=2**20 + 1)
        assert_told(large, 413, "larger than 1048576 bytes")
        assert len(workers(host)) == 1
        assert not host.socket(f"tcp://{address}:{old}").is_listening
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(6 * 2**30)
        assert_builds(host, inputs, moved, tracking)
    finally:
        scenario.converge("model_server,nginx")
    assert scenario.restarted(between, scenario.units(host)) == {UNIT}
    server.wait_for("/health/ready")
    assert_predicts(server, in_use)
    assert not host.socket(f"tcp://{address}:{old + 1}").is_listening
    assert host.service(UNIT).systemd_properties["MemoryMax"] == limit
    assert host.run("systemctl list-unit-files | grep model_builder").rc != 0
    assert host.run(f"test -e {source_builds.SOCKET}").rc != 0


def assert_builds(host: Any, inputs: dict[str, Any], server: Client, tracking: Client) -> None:
    """What has no wheel is built: by nobody's account, for nobody else, from the index, too."""
    faults.assert_limits_hold(host)
    source_builds.assert_confined(host)
    processes = [1, scenario.main_pid(host, UNIT), *runners(host)]
    address = inputs["odsp_address"]
    source_builds.assert_built_in_a_cell(host, server, tracking, processes, address)
    source_builds.assert_greed_ends_alone(host, server, tracking)
    source_builds.assert_broken_unit_is_told(host, server, tracking)
    for account in ("nobody", "mlflow"):
        assert source_builds.ask(host, account, source_builds.OLD_PACKAGE, "") == "PermissionError"
    url = inputs["model_server_index_url"]
    answer = source_builds.ask(host, "model_server", source_builds.OLD_PACKAGE, url)
    assert [one["name"] for one in json.loads(answer).get("wheels", [])] == [
        "docopt-0.6.2-py2.py3-none-any.whl"
    ], answer


@pytest.mark.long
def test_memory_is_spared_as_configured(
    host: Any, server: Client, in_use: dict[str, Any], three_versions: tuple[str, str, str]
) -> None:
    """Beyond the budget a load is refused, or the least recently used goes; what is idle goes, too.

    What went is back when it is asked; without these inputs nothing goes.
    """
    for version in three_versions[:2]:
        assert load(server, version).status == 200
    sizes = [model["memory_bytes"] for model in server.ask("/loaded_models").body]
    # Two models and a half.
    budget = {"model_server_memory_budget": f"{sum(sizes) * 5 // 4 // 2**20}M"}
    others = {
        "model_server_memory_policy": "unload_least_recent",
        "model_server_idle_unload_seconds": IDLE,
    }
    try:
        scenario.converge("model_server_service", **budget)
        assert_refuses_a_third(host, server, in_use, three_versions)
        scenario.converge("model_server_service", **budget, **others)
        assert_makes_room_for_a_third(host, server, in_use, three_versions)
        assert_unloads_the_idle(host, server, in_use, three_versions)
    finally:
        scenario.converge("model_server_service")
    assert {load(server, version).status for version in three_versions} == {200}
    assert states(server) == dict.fromkeys(three_versions, "ready")


def states(server: Client) -> dict[str, str]:
    """Return the state of each version of the model."""
    return {str(version): state for _, _, version, state in loaded(server)}


def process_of(host: Any, version: str) -> int:
    """Return the process that holds a version of the model, 0 for none."""
    return scenario.main_pid(host, unit_of(MODEL, "sklearn", version))


def assert_refuses_a_third(
    host: Any, server: Client, in_use: dict[str, Any], versions: tuple[str, str, str]
) -> None:
    """The load is told what to do, its process is gone, and the two others go on."""
    first, second, third = versions
    before = [process_of(host, version) for version in (first, second)]
    refusal = load(server, third)
    assert_told(refusal, 507, "The memory for models, ")
    assert_told(refusal, 507, "unload others.")
    for version in (first, second):
        assert_predicts(server, in_use, version)
    assert states(server) == {first: "ready", second: "ready"}
    assert [process_of(host, version) for version in versions] == [*before, 0]


def assert_makes_room_for_a_third(
    host: Any, server: Client, in_use: dict[str, Any], versions: tuple[str, str, str]
) -> None:
    """The one used least recently goes with its process, the other one goes on."""
    first, second, third = versions
    question = {"data": in_use["rows"], "model_flavor": "sklearn"}

    def are_back() -> bool:
        """Tell whether both are loaded; they may have been idle during the converge."""
        paths = (f"/{MODEL}/{version}" for version in (first, second))
        answers = server.ask_all(*paths, method="POST", body=question)
        ready = set(states(server).values()) == {"ready"}
        return ready and all(answer.status == 200 for answer in answers)

    scenario.wait_until(are_back, 240)
    since, kept = float(host.check_output("date +%s.%N")), process_of(host, second)
    # A worker may tell of a use a second later.
    time.sleep(1)
    assert_predicts(server, in_use, second)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, server, third)
        while not loading.done():
            assert_predicts(server, in_use, second)
    assert loading.result().status == 200, loading.result()
    assert states(server) == {first: "stopped", second: "ready", third: "ready"}
    assert "model unloaded to make room" in scenario.journal(host, UNIT, since)
    assert (process_of(host, first), process_of(host, second)) == (0, kept)


def assert_unloads_the_idle(
    host: Any, server: Client, in_use: dict[str, Any], versions: tuple[str, str, str]
) -> None:
    """What nobody asks goes with its process and is back when it is asked; what is used stays."""
    _, second, third = versions
    kept, began = process_of(host, second), time.monotonic()

    def is_gone() -> bool:
        """Tell whether the model that nobody asks was unloaded."""
        assert_predicts(server, in_use, second)
        return states(server)[third] == "stopped"

    scenario.wait_until(is_gone, 120)
    assert time.monotonic() - began > IDLE / 2
    assert (process_of(host, second), process_of(host, third)) == (kept, 0)
    body = {"data": in_use["rows"], "model_flavor": "sklearn"}
    server.wait_for(f"/{MODEL}/{third}", method="POST", body=body)
    assert_predicts(server, in_use, third)
    assert process_of(host, third) != 0


@pytest.mark.fault(
    "dependency away",
    "While MLflow, PostgreSQL or MinIO is stopped, loaded models go on predicting by their "
    "version; a load that needs one of them is refused with a sentence within 10 seconds, and "
    "works again when it is back.",
)
@pytest.mark.parametrize(
    ("dependency", "status", "reason"),
    [
        ("mlflow", 503, "does not answer"),
        ("postgres", 502, "MLflow answered 503: "),
        ("minio", 502, "MLflow answered 500: "),
    ],
    ids=["mlflow", "postgres", "minio"],
)
def test_dependency_away(
    host: Any,
    server: Client,
    tracking: Client,
    in_use: dict[str, Any],
    new_version: str,
    measured: Callable[[str], None],
    dependency: str,
    status: int,
    reason: str,
) -> None:
    """Whoever else is away, it is no rest for what is loaded."""
    wait_until_all_answer(tracking, f"{VERSIONS}/get?name={MODEL}&version=1")
    before = scenario.main_pid(host, UNIT)
    with faults.stopped(host, f"odsp-{dependency}.service"):
        assert_predicts(server, in_use, "1")
        refusal, seconds = timed(lambda: load(server, new_version))
        assert_told(refusal, status, reason)
        assert seconds < 10

    def loads() -> bool:
        """Tell whether the new version can be loaded."""
        return load(server, new_version).status == 200

    began = time.monotonic()
    scenario.wait_until(loads, 300)
    back = time.monotonic() - began
    assert_predicts(server, in_use, new_version)
    assert scenario.main_pid(host, UNIT) == before
    measured(
        f"{dependency} stopped: a load {refusal.status} after {seconds:.1f} s; loaded {back:.1f} s "
        "after its start"
    )


@pytest.mark.fault(
    "dependency away",
    "While each connection to PostgreSQL is cut as soon as it is there, loaded models go on "
    "predicting, and a load is done or refused with a sentence; afterwards all is as before.",
)
def test_connections_to_the_database_are_cut(
    host: Any, server: Client, in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """What is cut in the middle is told, not half done."""
    psql = "setpriv --reuid postgres --regid postgres --clear-groups psql -d model_server -c %s"
    answers: list[Answer] = []
    with ThreadPoolExecutor(1) as threads:
        cutting = threads.submit(host.run, psql, CUT)
        while not cutting.done():
            assert_predicts(server, in_use)
            answers += server.ask_all(*4 * [f"/load_model/{MODEL}/sklearn/1"])
    cut = int(cutting.result().stderr.rpartition("cut ")[2])
    refused = [answer for answer in answers if answer.status != 200]
    for answer in refused:
        assert_told(answer, 503, "The database of loaded models does not answer")
    assert cut > 0
    assert (MODEL, "sklearn", 1, "ready") in loaded(server)
    assert load(server, "champion").status == 200
    measured(f"{cut} connections cut: {len(refused)} of {len(answers)} loads refused")


@pytest.mark.fault(
    "dependency late",
    "While MLflow or PostgreSQL takes connections and never answers, loaded models go on "
    "predicting by their version within 10 seconds.",
)
@pytest.mark.parametrize("dependency", ["mlflow", "postgres"])
def test_dependency_hangs(
    host: Any,
    server: Client,
    in_use: dict[str, Any],
    measured: Callable[[str], None],
    dependency: str,
) -> None:
    """Nobody who asks a loaded model waits for somebody else."""
    with faults.frozen(host, f"odsp-{dependency}.service"):
        _, seconds = timed(lambda: assert_predicts(server, in_use, "1"))
    assert seconds < 10
    measured(f"{dependency} frozen: predicts after {seconds:.1f} s")


@pytest.mark.long
@pytest.mark.fault(
    "dependency late",
    "A load that needs an MLflow that never answers ends with a sentence within a minute, and "
    "succeeds when MLflow goes on.",
)
def test_loads_do_not_wait_for_ever(
    host: Any, server: Client, in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """A request that needs MLflow ends in bounded time."""
    assert in_use
    with faults.frozen(host, "odsp-mlflow.service"):
        refusal, seconds = timed(lambda: load(server, "1", "pyfunc", patience=120))
    assert_told(refusal, 503, "does not answer")
    assert seconds < 60
    back = server.wait_for(f"/load_model/{MODEL}/pyfunc/1")
    assert unload(server, "1", "pyfunc").status == 200
    measured(f"MLflow frozen: {refusal.status} after {seconds:.0f} s; loaded {back:.1f} s after")


@pytest.mark.fault(
    "full disk",
    "Without room a load ends with an error that says so and leaves nothing half; loaded models go "
    "on; with room again the same load works.",
)
def test_full_disk(
    host: Any,
    server: Client,
    in_use: dict[str, Any],
    new_version: str,
    measured: Callable[[str], None],
) -> None:
    """No room costs a load, not the service."""
    folder = f"{FILES}/models"
    listing = f"ls -A {folder} | grep -vE 'odsp-filler|[.]lock$'"
    with faults.full_disk(host, UNIT, folder, mib=16) as disk:
        server.wait_for("/health/ready")
        before, files = scenario.main_pid(host, UNIT), host.check_output(listing)
        disk.fill()
        refusal, seconds = timed(lambda: load(server, new_version))
        assert_told(refusal, 507, "disk is full")
        assert host.check_output(listing) == files
        assert_predicts(server, in_use)
        disk.free()
        assert load(server, new_version).status == 200
        assert_predicts(server, in_use, new_version)
        # Its files are gone with the small disk.
        assert unload(server, new_version).status == 200
        assert scenario.main_pid(host, UNIT) == before
    server.wait_for("/health/ready")
    assert_predicts(server, in_use)
    measured(f"a load without room: {refusal.status} after {seconds:.1f} s")


@pytest.mark.fault(
    "out of memory",
    "A request that makes the server take more than model_server_memory_max costs the HTTP process "
    "that took it, which the kernel ends; the server itself and its models go on.",
)
def test_out_of_memory(
    host: Any, server: Client, in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """The limit holds, and what it costs is made again."""
    main, before = scenario.main_pid(host, UNIT), workers(host) | runners(host)
    body = {"data": in_use["rows"], "model_flavor": "sklearn"}
    with faults.little_memory(host, UNIT, mib=32):
        # As large as is allowed.
        greedy, seconds = timed(
            lambda: server.ask(f"/{MODEL}/1", "POST", body=body, size=2**25, patience=120)
        )
        # Cut off, its model ended, or ended once more when it was to come back.
        assert greedy.status in (0, 422, 503), greedy
        assert "timed out" not in greedy.text
    began = time.monotonic()
    server.wait_for("/health/ready")
    assert_predicts(server, in_use)
    back = time.monotonic() - began
    assert (MODEL, "sklearn", 1, "ready") in loaded(server)
    assert scenario.main_pid(host, UNIT) == main

    def complete() -> bool:
        """Tell whether there are as many processes as before, and not the same."""
        return len(now := workers(host) | runners(host)) == len(before) and now != before

    scenario.wait_until(complete)
    measured(f"the request ended after {seconds:.1f} s; predicts {back:.1f} s later")


@pytest.mark.long
@pytest.mark.fault(
    "clock jump",
    "Two days forward and back again neither stop a prediction nor need a restart; a model that "
    "crashes meanwhile comes back as soon as by a true clock.",
)
def test_clock_jump(
    host: Any, server: Client, in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """Predictions go on under a wrong clock, and so do loads."""
    told = []
    path, question = f"/{MODEL}/champion", {"data": in_use["rows"], "model_flavor": "sklearn"}

    def fails() -> bool:
        """Tell whether the server has noticed the model's crash."""
        return (MODEL, "sklearn", 1, "failed") in loaded(server)

    with faults.clock(host, UNIT, python=True) as time_of:
        server.wait_for("/health/ready")
        before = scenario.main_pid(host, UNIT)
        for jump in (2 * 86400, 0):
            time_of.jump(jump)

            def seen(jump: int = jump) -> bool:
                """Tell whether the workers' clock has jumped."""
                true = float(host.check_output("date +%s"))
                return abs(server.ask("/health/live").date - true - jump) < 60

            scenario.wait_until(seen)
            back = server.wait_for(path, method="POST", body=question)
            answer, seconds = timed(lambda: assert_predicts(server, in_use))
            ahead = answer.date - float(host.check_output("date +%s"))
            assert ahead == pytest.approx(jump, abs=60)
            assert load(server, "champion").status == 200
            told.append(f"{ahead / 3600:.0f} h ahead: predicts after {seconds:.1f} s")
            if jump:
                # It crashes until the pause before its next start is one of eight seconds.
                for _ in range(4):
                    server.wait_for(path, method="POST", body=question)
                    runner = scenario.main_pid(host, unit_of(MODEL, "sklearn"))
                    host.check_output(f"kill -9 {runner}")
                scenario.wait_until(fails, 20)
        told.append(f"back {back:.0f} s after its crashes")
        assert scenario.main_pid(host, UNIT) == before
    server.wait_for("/health/ready")
    measured("; ".join(told))


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse the server, and say why; the next run of site.yml renews the certificate.",
)
def test_expired_certificate(
    host: Any,
    inputs: dict[str, Any],
    server: Client,
    in_use: dict[str, Any],
    measured: Callable[[str], None],
) -> None:
    """An ended certificate is worth nothing, and is made anew by itself."""
    port = host.socket(f"tcp://{inputs['odsp_address']}:{inputs['model_server_listen_port']}")

    def listens() -> bool:
        """Tell whether the server takes connections."""
        return bool(port.is_listening)

    with faults.expired_certificate(host, "model_server", UNIT):
        scenario.wait_until(listens)
        # A client's own certificate ended with it; the server's is looked at first.
        refusal = server.ask("/health/live")
        assert "certificate has expired" in refusal.text
        began = time.monotonic()
        scenario.converge("model_server")
        seconds = time.monotonic() - began
        server.wait_for("/health/ready")
        assert_predicts(server, in_use)
    measured(f"clients: certificate has expired; renewed by a run of {seconds:.0f} s")
