"""What an operator asks of the model server: does it predict, refuse, survive, keep its secrets?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
import scenario
from client import Answer, Client

UNIT = "odsp-model_server.service"
PAIR = f"{scenario.TLS}/model_server"
FILES = "/var/lib/odsp/model_server"
MODEL = "odsp-iris"

#: Trains a real model, registers it, and says what it answers itself.
TRAIN = """
import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
data, target = load_iris(return_X_y=True)
model = LogisticRegression(max_iter=500).fit(data, target)
mlflow.set_experiment(v["name"])
with mlflow.start_run():
    made = mlflow.sklearn.log_model(model, name="model", registered_model_name=v["name"])
mlflow.MlflowClient().set_registered_model_alias(v["name"], "champion", 1)
rows = data[::15].tolist()
print(json.dumps({"rows": rows, "predict": model.predict(rows).tolist(),
                  "predict_proba": model.predict_proba(rows).tolist()}))
"""
EMPTY = (
    "is empty; put a host in the group it comes from, or generate the secret with "
    "playbooks/ops/generate_secrets.yml"
)
NAME = "may hold letters, digits, _, - and . only; choose another name"
SIZE = "write a number with K, M, G or T, a share of the memory as 80%, or infinity"
#: Has callers ask all the time while the server replaces its workers, and says what went wrong.
RELOAD = """
import pathlib, subprocess, threading, time, requests
def shown(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
def workers():
    main = shown("systemctl", "show", "--value", "--property=MainPID", v["unit"])[0]
    return set(pathlib.Path(f"/proc/{main}/task/{main}/children").read_text().split())
over, complaints, answers = threading.Event(), [], []
def ask():
    session = requests.Session()
    session.verify, session.cert = v["authority"], (v["pair"] + ".crt", v["pair"] + ".key")
    while not over.is_set():
        try:
            answer = session.post(v["url"], json=v["question"], timeout=60)
            if answer.json() != {"prediction": v["wanted"]}:
                complaints.append(answer.text[:300])
        except Exception as error:
            complaints.append(repr(error)[:300])
        answers.append(time.monotonic())
def go_on():
    goal, end = len(answers) + 200, time.monotonic() + 120
    while len(answers) < goal and time.monotonic() < end:
        time.sleep(0.1)
callers = [threading.Thread(target=ask) for _ in range(4)]
for caller in callers:
    caller.start()
go_on()
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
    ("model_server_database_name", "model/server", NAME),
    ("model_server_database_user", "model@server", NAME),
    ("model_server_workers", 0, "is 0; at least 1 process must serve"),
    ("model_server_runner_threads", 0, "is 0; a model needs at least 1"),
    ("model_server_load_timeout_seconds", 0, "is 0; give a load at least 1 second"),
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
    return dict(tracking.run(TRAIN, name=MODEL))


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
    versions = "/api/2.0/mlflow/model-versions"
    first = tracking.ask(f"{versions}/get?name={MODEL}&version=1").body["model_version"]
    source = first["source"]
    body = {"name": MODEL, "source": source, "model_id": source.removeprefix("models:/")}
    made = tracking.ask(f"{versions}/create", "POST", body=body)
    assert made.status == 200, made
    version = str(made.body["model_version"]["version"])
    yield version
    assert unload(server, version).status in (200, 404)


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
    return {int(one) for one in host.check_output(shown).split()}


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


def test_load_list_and_unload(server: Client, trained: dict[str, Any]) -> None:
    """What is loaded is listed, by every worker alike; what is unloaded is gone."""
    assert trained
    answer = load(server, "champion", "pyfunc")
    assert answer.status == 200, answer
    assert all((MODEL, "pyfunc", 1, "ready") in loaded(server) for _ in range(4))
    assert unload(server, "champion", "pyfunc").status in (200, 204)
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
        url=f"{server.url}/{MODEL}/champion",
        question={"data": in_use["rows"], "model_flavor": "sklearn"},
        wanted=in_use["predict"],
        pair=server.pair,
        authority=scenario.CA,
    )
    assert (answers >= 400, complaints, stayed) == (True, [], 0)
    assert runners(host) == models


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
    cases: list[dict[str, Any]] = [{}, *({name: value} for name, value, _ in FAULTY)]
    wanted = [f"case-{n}: {name} {said}." for n, (name, _, said) in enumerate(FAULTY, 1)]
    assert scenario.sentences("model_server", cases, tmp_path) == ["", *wanted]
    before = scenario.units(host)
    run = scenario.layer("--tags", "model_server", model_server_workers=0)
    assert run.returncode != 0
    assert "node-1: model_server_workers is 0; at least 1 process must serve." in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_changed_inputs_are_in_force_and_taken_back(
    host: Any, inputs: dict[str, Any], server: Client, in_use: dict[str, Any]
) -> None:
    """Another port, prefix and size: one restart of this unit alone; the way back is one, too."""
    address, old = inputs["odsp_address"], inputs["model_server_listen_port"]
    changed = {
        "odsp_model_server_port": old + 1,
        "model_server_workers": 1,
        "model_server_root_path": "/other",
        "model_server_memory_max": "6G",
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
        assert len(workers(host)) == 1
        assert not host.socket(f"tcp://{address}:{old}").is_listening
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(6 * 2**30)
    finally:
        scenario.converge("model_server,nginx")
    assert scenario.restarted(between, scenario.units(host)) == {UNIT}
    server.wait_for("/health/ready")
    assert_predicts(server, in_use)
    assert not host.socket(f"tcp://{address}:{old + 1}").is_listening
    assert host.service(UNIT).systemd_properties["MemoryMax"] == limit


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
    in_use: dict[str, Any],
    new_version: str,
    measured: Callable[[str], None],
    dependency: str,
    status: int,
    reason: str,
) -> None:
    """Whoever else is away, it is no rest for what is loaded."""
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
    scenario.wait_until(loads, 120)
    back = time.monotonic() - began
    assert_predicts(server, in_use, new_version)
    assert scenario.main_pid(host, UNIT) == before
    measured(
        f"{dependency} stopped: a load {refusal.status} after {seconds:.1f} s; loaded {back:.1f} s "
        "after its start"
    )


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
        greedy, seconds = timed(lambda: server.ask(f"/{MODEL}/1", "POST", body=body, size=2**25))
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
    "Two days forward and back again neither stop a prediction nor need a restart.",
)
def test_clock_jump(
    host: Any, server: Client, in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """Predictions go on under a wrong clock, and so do loads."""
    told = []
    with faults.clock(host, UNIT) as time_of:
        server.wait_for("/health/ready")
        before = scenario.main_pid(host, UNIT)
        for jump in (2 * 86400, 0):
            time_of.jump(jump)

            def seen(jump: int = jump) -> bool:
                """Tell whether the workers' clock has jumped."""
                true = float(host.check_output("date +%s"))
                return abs(server.ask("/health/live").date - true - jump) < 60

            scenario.wait_until(seen, 20)
            answer, seconds = timed(lambda: assert_predicts(server, in_use))
            ahead = answer.date - float(host.check_output("date +%s"))
            assert ahead == pytest.approx(jump, abs=60)
            assert load(server, "champion").status == 200
            told.append(f"{ahead / 3600:.0f} h ahead: predicts after {seconds:.1f} s")
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
        scenario.wait_until(listens, 120)
        # A client's own certificate ended with it; the server's is looked at first.
        refusal = server.ask("/health/live")
        assert "certificate has expired" in refusal.text
        began = time.monotonic()
        scenario.converge("model_server")
        seconds = time.monotonic() - began
        server.wait_for("/health/ready")
        assert_predicts(server, in_use)
    measured(f"clients: certificate has expired; renewed by a run of {seconds:.0f} s")
