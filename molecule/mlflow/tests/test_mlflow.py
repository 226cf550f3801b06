"""What an operator asks of MLflow: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
import scenario
from client import PYTHON, Answer, Client
from mlflow_server import UNIT, wait_until_all_answer, workers

PAIR = f"{scenario.TLS}/mlflow"

#: An unchanged client: a run with a parameter, a metric and an artifact, and a registered version.
WRITE = """
import mlflow, uuid
name = f"odsp-test-{uuid.uuid4()}"
mlflow.set_experiment(name)
with mlflow.start_run() as run:
    mlflow.log_param("depth", 3)
    mlflow.log_metric("accuracy", 0.5)
    mlflow.log_text("kept", "notes/a.txt")
client = mlflow.MlflowClient()
client.create_registered_model(name)
client.create_model_version(name, f"runs:/{run.info.run_id}/notes", run.info.run_id)
client.set_registered_model_alias(name, "champion", 1)
print(json.dumps({"model": name, "run": run.info.run_id, "artifacts": run.info.artifact_uri}))
"""
READ = """
import mlflow
client = mlflow.MlflowClient()
run = client.get_run(v["run"])
text = mlflow.artifacts.load_text(f"runs:/{v['run']}/notes/a.txt")
version = client.get_model_version_by_alias(v["model"], "champion").version
print(json.dumps([run.data.params["depth"], run.data.metrics["accuracy"], text, str(version)]))
"""
#: Asks the store itself: by the server's account, and by none.
OBJECTS = """
import boto3, botocore
def objects(**account):
    store = boto3.client("s3", endpoint_url=v["url"], verify="/etc/odsp/tls/ca.crt", **account)
    found = store.list_objects_v2(Bucket=v["bucket"], Prefix="artifacts/").get("Contents", [])
    return [item["Key"] for item in found]
keys = objects(aws_access_key_id=v["access_key"], aws_secret_access_key=v["secret_key"])
try:
    stranger = objects(config=botocore.client.Config(signature_version=botocore.UNSIGNED))
except botocore.exceptions.ClientError as refusal:
    stranger = refusal.response["Error"]["Code"]
print(json.dumps([keys, stranger]))
"""
#: What a request of the registry asks of the database, and one of the artifacts of the store.
SEARCH = "/api/2.0/mlflow/experiments/search"
ARTIFACT = "/api/2.0/mlflow-artifacts/artifacts/odsp-test.txt"
#: Looks at the Host header, unlike /health.
INFO = "/api/3.0/mlflow/server-info"
EMPTY = (
    "is empty; put a host in the group it comes from, or generate the secret with "
    "playbooks/ops/generate_secrets.yml"
)
NAME = "may hold letters, digits, _, - and . only; choose another name"
SIZE = "write a number with K, M, G or T, a share of the memory as 80%, or infinity"
#: Inputs that cannot work in a way their types do not show, and what is said of each.
FAULTY: list[tuple[str, Any, str]] = [
    ("mlflow_listen_address", "", EMPTY),
    ("mlflow_listen_port", 0, "is 0; choose one of 1 to 65535"),
    ("mlflow_listen_port", 65536, "is 65536; choose one of 1 to 65535"),
    ("mlflow_database_host", "", EMPTY),
    ("mlflow_database_password", "", EMPTY),
    ("mlflow_database_name", "ml/flow", NAME),
    ("mlflow_database_user", "ml@flow", NAME),
    ("mlflow_s3_endpoint_url", "", EMPTY),
    (
        "mlflow_s3_endpoint_url",
        "192.0.2.10:9000",
        'is "192.0.2.10:9000"; write it as in https://192.0.2.10:9000',
    ),
    ("mlflow_s3_secret_key", "", EMPTY),
    ("mlflow_s3_bucket", "ml flow", 'is "ml flow"; use 3 to 63 of a-z, 0-9, - and .'),
    (
        "mlflow_allowed_hosts",
        ["a b"],
        'or _origins has "a b"; list names or origins, one each',
    ),
    ("mlflow_workers", 0, "is 0; at least 1 process must serve"),
    (
        "mlflow_memory_max",
        "4 GB",
        f'is "4 GB"; {SIZE}',
    ),
    (
        "mlflow_memory_max",
        "4",
        f'is "4"; {SIZE}',
    ),
]


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the inputs of the host's roles."""
    return dict(host.ansible.get_variables())


@pytest.fixture(scope="module")
def server(host: Any, inputs: dict[str, Any]) -> Client:
    """Return a client of the server with the platform's certificate."""
    return Client(host, inputs["odsp_mlflow_url"], PAIR)


@pytest.fixture(scope="module")
def written(server: Client) -> dict[str, str]:
    """Return a run that a client has logged."""
    return dict(server.run(WRITE))


def search(server: Client, patience: float = 30) -> Answer:
    """Make a request that needs the database."""
    return server.ask(SEARCH, "POST", body={"max_results": 1}, patience=patience)


def put(server: Client, size: int = 4, patience: float = 30) -> Answer:
    """Make a request that puts an artifact of so many bytes into the store."""
    return server.ask(ARTIFACT, "PUT", size=size, patience=patience)


def timed(request: Callable[[], Answer]) -> tuple[Answer, float]:
    """Return what a request came to, and its seconds."""
    began = time.monotonic()
    return request(), time.monotonic() - began


def assert_kept(server: Client, written: dict[str, str]) -> None:
    """What the client logged is there: the run with its values, the artifact, the alias."""
    path = written["artifacts"].removeprefix("mlflow-artifacts:")
    answers = server.ask_all(
        f"/api/2.0/mlflow/runs/get?run_id={written['run']}",
        f"/api/2.0/mlflow/registered-models/alias?name={written['model']}&alias=champion",
        f"/api/2.0/mlflow-artifacts/artifacts{path}/notes/a.txt",
    )
    assert [answer.status for answer in answers] == [200, 200, 200], answers
    run, alias, artifact = answers
    data = run.body["run"]["data"]
    assert [data["params"][0]["value"], data["metrics"][0]["value"]] == ["3", 0.5]
    assert alias.body["model_version"]["version"] == "1"
    assert artifact.text == "kept"


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, is started at boot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "mlflow", exposure=1.6)
    # Only hosts with control groups of version 2 would show what else happens.
    assert host.service(UNIT).systemd_properties["OOMPolicy"] == "continue"


def test_run_and_model_come_back(server: Client, written: dict[str, str]) -> None:
    """What one client logged, another reads: parameter, metric, artifact, registered version."""
    assert server.run(READ, **written) == ["3", 0.5, "kept", "1"]


def test_run_is_a_row_in_postgres(host: Any, written: dict[str, str]) -> None:
    """The run is where backups look for it, not in a file of the server."""
    sql = f"select count(*) from runs where run_uuid = '{written['run']}'"
    command = "setpriv --reuid postgres --regid postgres --clear-groups psql -At -d mlflow -c %s"
    assert host.check_output(command, sql).strip() == "1"


def test_artifact_is_an_object_in_minio(
    server: Client, inputs: dict[str, Any], written: dict[str, str]
) -> None:
    """The artifact is in the bucket, where nobody without an account sees it."""
    account = {
        "url": inputs["odsp_minio_url"],
        "access_key": "mlflow",
        "secret_key": inputs["mlflow_s3_secret_key"],
        "bucket": "mlflow",
    }
    keys, stranger = server.run(OBJECTS, **account)
    assert [key for key in keys if written["run"] in key and key.endswith("notes/a.txt")]
    assert stranger == "AccessDenied"


def test_clients_get_artifacts_through_the_server(written: dict[str, str]) -> None:
    """A client never needs an account at the store."""
    assert written["artifacts"].startswith("mlflow-artifacts:/")


def test_refuses_whoever_shows_no_certificate(server: Client) -> None:
    """Only certificates of the platform are let in, and only by TLS."""
    refused = dict.fromkeys(("foreign", "none", "plain text"), "closed")
    assert server.knocks() == {"ours": "let in", **refused}


def test_refuses_other_hosts(inputs: dict[str, Any]) -> None:
    """A host that sees the port but has no certificate of the platform is cut off."""
    refusal = scenario.refuses_strangers(inputs["odsp_address"], inputs["mlflow_listen_port"])
    assert re.search("closed|EOF|reset|Broken pipe", refusal), refusal


def test_refuses_other_host_names(server: Client) -> None:
    """A name the inventory does not know is not answered: no DNS rebinding."""
    assert server.ask(INFO).status == 200
    refusal = server.ask(INFO, Host="evil.example")
    assert (refusal.status, "Invalid Host header" in refusal.text) == (403, True)


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["mlflow_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_runs_survive(host: Any, server: Client, written: dict[str, str], blow: str) -> None:
    """What was logged is there after a restart, after kill -9, after a reboot of the host."""
    scenario.strike(host, UNIT, blow)
    server.wait_for("/health")
    assert_kept(server, written)


def test_a_killed_worker_is_replaced(host: Any, server: Client) -> None:
    """One process less is no outage, and not for long."""
    before = workers(host)
    assert len(before) > 1
    victim = min(before)
    host.check_output(f"kill -KILL {victim}")
    assert search(server).status == 200

    def replaced() -> bool:
        """Tell whether there are as many workers as before, without the one that was killed."""
        return len(now := workers(host)) == len(before) and victim not in now

    scenario.wait_until(replaced)


@pytest.mark.once
def test_database_may_start_anew(host: Any, server: Client, written: dict[str, str]) -> None:
    """Connections that a restart of PostgreSQL has ended cost no request and no restart."""
    assert_kept(server, written)
    before = scenario.main_pid(host, UNIT)
    host.check_output("systemctl restart odsp-postgres.service")
    server.wait_for(SEARCH, method="POST", body={"max_results": 1})
    assert_kept(server, written)
    assert scenario.main_pid(host, UNIT) == before


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No secret in arguments, the journal or a file that everyone may read."""
    given = [inputs[name] for name in ("mlflow_database_password", "mlflow_s3_secret_key")]
    assert scenario.places_of(host, *given) == []
    for path in ("/etc/odsp/mlflow.env", f"{PAIR}.key", f"{PAIR}.pem"):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "mlflow", 0o640), path


def test_environment_is_the_lock(host: Any) -> None:
    """The host runs what the repository locked, not what an index offers today."""
    lock = (scenario.ROOT / "roles/mlflow/files/requirements.txt").read_text()
    locked = re.search(r"^mlflow==([\d.]+)", lock, re.MULTILINE)
    assert locked
    command = f"{PYTHON} -c 'import importlib.metadata as m; print(m.version(\"mlflow\"))'"
    assert host.check_output(command).strip() == locked[1]


@pytest.mark.once
def test_faulty_inputs_stop_the_role(host: Any, tmp_path: Path) -> None:
    """One sentence names host, variable and remedy; the role stops and nothing is changed."""
    cases: list[dict[str, Any]] = [{}, *({name: value} for name, value, _ in FAULTY)]
    wanted = [f"case-{n}: {name} {said}." for n, (name, _, said) in enumerate(FAULTY, 1)]
    assert scenario.sentences("mlflow", cases, tmp_path) == ["", *wanted]
    before = scenario.units(host)
    run = scenario.layer("--tags", "mlflow", mlflow_workers=0)
    assert run.returncode != 0
    assert "node-1: mlflow_workers is 0; at least 1 process must serve." in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_changed_inputs_are_in_force_and_taken_back(
    host: Any, inputs: dict[str, Any], server: Client, written: dict[str, str]
) -> None:
    """Another port, size and name: one restart of MLflow alone; the way back is one, too."""
    address, old = inputs["odsp_address"], inputs["mlflow_listen_port"]
    changed = {
        "odsp_mlflow_port": old + 1,
        "mlflow_workers": 1,
        "mlflow_memory_max": "3G",
        "mlflow_allowed_hosts_extra": ["other.example"],
    }
    moved = replace(server, url=f"https://{address}:{old + 1}")
    limit = host.service(UNIT).systemd_properties["MemoryMax"]
    before = scenario.units(host)
    try:
        scenario.converge("mlflow", **changed)
        between = scenario.units(host)
        assert scenario.restarted(before, between) == {UNIT}
        assert moved.run(READ, **written) == ["3", 0.5, "kept", "1"]
        assert moved.ask(INFO, Host="other.example").status == 200
        assert not host.socket(f"tcp://{address}:{old}").is_listening
        # A single one serves itself, without a supervisor.
        assert workers(host) == set()
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(3 * 2**30)
    finally:
        scenario.converge("mlflow")
    assert scenario.restarted(between, scenario.units(host)) == {UNIT}
    assert_kept(server, written)
    assert server.ask(INFO, Host="other.example").status == 403
    assert not host.socket(f"tcp://{address}:{old + 1}").is_listening
    assert host.service(UNIT).systemd_properties["MemoryMax"] == limit


@pytest.mark.fault(
    "dependency away",
    "While PostgreSQL or MinIO is stopped, requests that need it end with an error within 10 "
    "seconds, the others go on; when it is back, so are they, without a restart; only a process "
    "that has not reached PostgreSQL since its start tries for two minutes before it says so.",
)
@pytest.mark.parametrize("dependency", ["postgres", "minio"])
def test_dependency_away(
    host: Any,
    server: Client,
    written: dict[str, str],
    measured: Callable[[str], None],
    dependency: str,
) -> None:
    """Requests that need it fail soon, the others do not; all is well when it is back."""
    needs, other = (search, put) if dependency == "postgres" else (put, search)
    assert (needs(server).status, other(server).status) == (200, 200)
    wait_until_all_answer(server, SEARCH, method="POST", body={"max_results": 1})
    before = scenario.main_pid(host, UNIT)
    with faults.stopped(host, f"odsp-{dependency}.service"):
        refusal, seconds = timed(lambda: needs(server))
        assert refusal.status in (500, 503), refusal
        assert seconds < 10
        assert other(server).status == 200
    began = time.monotonic()

    def served() -> bool:
        """Tell whether requests that need the dependency succeed again."""
        return needs(server).status == 200

    scenario.wait_until(served)
    back = time.monotonic() - began
    assert_kept(server, written)
    assert scenario.main_pid(host, UNIT) == before
    measured(
        f"{dependency} stopped: {refusal.status} after {seconds:.1f} s; served again {back:.1f} s "
        "after its start"
    )


@pytest.mark.fault(
    "dependency late",
    "While PostgreSQL takes connections and never answers, requests that need it wait as long as "
    "their client does and the server's health answers; when PostgreSQL goes on, so does MLflow.",
)
def test_database_hangs(
    host: Any, server: Client, written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """The client's patience is the bound, and nothing has to be restarted afterwards."""
    assert search(server).status == 200
    before = scenario.main_pid(host, UNIT)
    with faults.frozen(host, "odsp-postgres.service"):
        waiting = search(server, patience=5)
        assert (waiting.status, "Read timed out" in waiting.text) == (0, True)
        health, seconds = timed(lambda: server.ask("/health"))
        assert health.status == 200
    back = server.wait_for(SEARCH, method="POST", body={"max_results": 1})
    assert_kept(server, written)
    assert scenario.main_pid(host, UNIT) == before
    measured(f"PostgreSQL frozen: health after {seconds:.1f} s; served again after {back:.1f} s")


@pytest.mark.long
@pytest.mark.fault(
    "dependency late",
    "A MinIO that takes connections and never answers costs an upload or download at most 150 "
    "seconds, then it gets an error; runs and metrics go on meanwhile.",
)
def test_store_hangs(
    host: Any, server: Client, written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """An upload ends with an error in bounded time; the registry does not notice."""
    assert put(server).status == 200
    before = scenario.main_pid(host, UNIT)
    with faults.frozen(host, "odsp-minio.service"):
        refusal, seconds = timed(lambda: put(server, patience=280))
        assert search(server).status == 200
    assert refusal.status in (500, 503), refusal
    assert seconds < 150
    server.wait_for(ARTIFACT, method="PUT", size=4)
    assert_kept(server, written)
    assert scenario.main_pid(host, UNIT) == before
    measured(f"MinIO frozen: {refusal.status} after {seconds:.0f} s")


@pytest.mark.fault(
    "full disk",
    "Artifacts pass through the host's temporary files: without room there an upload ends with an "
    "error and nothing half is stored, runs and metrics go on; with room again uploads work.",
)
def test_full_disk(
    host: Any, server: Client, written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """No room is an error, never a torn artifact, and needs no restart when it is over."""
    with faults.full_disk(host, UNIT, "/var/tmp", mib=16) as disk:
        server.wait_for(ARTIFACT, method="PUT", size=4)
        before = scenario.main_pid(host, UNIT)
        disk.fill()
        refusal, seconds = timed(lambda: put(server, 50_000))
        assert refusal.status == 500, refusal
        assert search(server).status == 200
        disk.free()
        assert server.ask(ARTIFACT).text == " " * 4
        assert put(server, 50_000).status == 200
        assert scenario.main_pid(host, UNIT) == before
    server.wait_for("/health")
    assert_kept(server, written)
    measured(f"an upload without room: {refusal.status} after {seconds:.1f} s")


@pytest.mark.fault(
    "out of memory",
    "A request that makes its worker take more than mlflow_memory_max costs that worker, which the "
    "kernel ends; the server itself goes on, is itself complete again, and has lost nothing; an "
    "artifact on its way does not count, as it passes through the disk.",
)
def test_out_of_memory(
    host: Any, server: Client, written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """The limit holds, and what it costs is made again."""
    # What a process takes that is still starting would count as the request's.
    wait_until_all_answer(server, SEARCH, method="POST", body={"max_results": 1})
    main, before = scenario.main_pid(host, UNIT), workers(host)
    # The kernel ends the largest process: room for more than the idle ones differ by, as 4G leave.
    with faults.little_memory(host, UNIT, mib=192):
        assert put(server, 2**28, patience=280).status == 200
        assert workers(host) == before
        greedy, seconds = timed(lambda: server.ask(SEARCH, "POST", size=2**28, patience=280))
        assert greedy.status == 0, greedy
        assert "timed out" not in greedy.text
    began = time.monotonic()

    def complete() -> bool:
        """Tell whether there are as many workers as before, and not the same."""
        return len(now := workers(host)) == len(before) and now != before

    scenario.wait_until(complete)
    server.wait_for("/health")
    assert_kept(server, written)
    assert scenario.main_pid(host, UNIT) == main
    back = time.monotonic() - began
    measured(f"the request ended after {seconds:.1f} s; complete again {back:.1f} s later")


@pytest.mark.long
@pytest.mark.fault(
    "clock jump",
    "Two days forward and back again neither stop the server nor need a restart; the store refuses "
    "signatures that are off by more than 15 minutes, so artifacts wait until the clock is right.",
)
def test_clock_jump(
    host: Any, server: Client, written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """Runs go on under a wrong clock; artifacts when it is right again."""
    with faults.clock(host, UNIT) as time_of:
        server.wait_for(ARTIFACT, method="PUT", size=4)
        before, began = scenario.main_pid(host, UNIT), float(host.check_output("date +%s"))
        time_of.jump(2 * 86400)

        def refused() -> bool:
            """Tell whether the store refuses what the server signs."""
            return put(server).status != 200

        scenario.wait_until(refused)
        found = search(server)
        ahead = found.date - float(host.check_output("date +%s"))
        assert found.status == 200
        assert ahead == pytest.approx(2 * 86400, abs=60)
        refusal = put(server)
        assert "RequestTimeTooSkewed" in scenario.journal(host, UNIT, since=began)
        time_of.jump(0)
        back = server.wait_for(ARTIFACT, method="PUT", size=4)
        assert scenario.main_pid(host, UNIT) == before
    server.wait_for("/health")
    assert_kept(server, written)
    measured(
        f"{ahead / 3600:.0f} h ahead: runs {found.status}, artifacts {refusal.status}; right "
        f"again: artifacts 200 after {back:.1f} s"
    )


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse the server, and say why; the next run of site.yml renews the certificate.",
)
def test_expired_certificate(
    host: Any,
    inputs: dict[str, Any],
    server: Client,
    written: dict[str, str],
    measured: Callable[[str], None],
) -> None:
    """An ended certificate is worth nothing, and is made anew by itself."""
    port = host.socket(f"tcp://{inputs['odsp_address']}:{inputs['mlflow_listen_port']}")

    def listens() -> bool:
        """Tell whether the server takes connections."""
        return bool(port.is_listening)

    with faults.expired_certificate(host, "mlflow", UNIT):
        scenario.wait_until(listens)
        # A client's own certificate ended with it; the server's is looked at first.
        refusal = server.ask("/health")
        assert "certificate has expired" in refusal.text
        began = time.monotonic()
        scenario.converge("mlflow")
        seconds = time.monotonic() - began
        assert_kept(server, written)
    measured(f"clients: certificate has expired; renewed by a run of {seconds:.0f} s")
