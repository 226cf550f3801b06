"""What an operator asks of MLflow: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import base64
import json
import re
import shlex
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-mlflow.service"
PYTHON = "/opt/odsp/mlflow/current/bin/python"
CERTIFICATE = "/etc/odsp/tls/mlflow.pem"

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
#: What the server itself asks of the store: is the object there, under the run's name?
OBJECTS = """
import boto3
store = boto3.client("s3", endpoint_url=v["url"], aws_access_key_id=v["access_key"],
                     aws_secret_access_key=v["secret_key"], verify="/etc/odsp/tls/ca.crt")
found = store.list_objects_v2(Bucket=v["bucket"]).get("Contents", [])
print(json.dumps([item["Key"] for item in found]))
"""
ASK = """
import ssl, urllib.request
context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
if v["certificate"]:
    context.load_cert_chain(v["certificate"])
data = v["data"].encode() if v["data"] is not None else None
method = "PUT" if "/artifacts/" in v["url"] and data is not None else None
try:
    request = urllib.request.Request(v["url"], data, v["headers"], method=method)
    status = urllib.request.urlopen(request, context=context, timeout=v["patience"]).status
except urllib.error.HTTPError as refused:
    status = refused.code
except OSError as refused:
    status = str(refused)
print(json.dumps(status))
"""
#: What a request of the registry asks of the database, and one of the artifacts of the store.
SEARCH = "/api/2.0/mlflow/experiments/search"
ARTIFACT = "/api/2.0/mlflow-artifacts/artifacts/odsp-test.txt"
#: Inputs that cannot work in a way their types do not show; a part of the sentence that says so.
FAULTY = {
    "mlflow_s3_secret_key": ("", "is empty"),
    "mlflow_database_host": ("", "is empty"),
    "mlflow_s3_endpoint_url": ("192.0.2.10:9000", 'is "192.0.2.10:9000"; write it as in https'),
    "mlflow_s3_bucket": ("ml flow", 'is "ml flow"; use 3 to 63'),
    "mlflow_database_user": ("ml@flow", "may hold letters, digits"),
    "mlflow_allowed_hosts": (["a b"], 'or _origins has "a b"; list names'),
    "mlflow_listen_port": (65536, "is 65536; choose one of 1 to 65535"),
    "mlflow_workers": (0, "is 0; at least 1"),
    "mlflow_memory_max": ("4 GB", 'is "4 GB", which systemd would ignore; write'),
}


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the inputs of the host's roles."""
    return dict(host.ansible.get_variables())


def python(host: Any, inputs: dict[str, Any], code: str, **values: Any) -> Any:
    """Run Python on the host as a client with the platform's certificate; return what it prints."""
    environment = {
        "MLFLOW_TRACKING_URI": inputs["odsp_mlflow_url"],
        "MLFLOW_TRACKING_SERVER_CERT_PATH": scenario.CA,
        "MLFLOW_TRACKING_CLIENT_CERT_PATH": CERTIFICATE,
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    program = f"import json\nv = json.loads({json.dumps(values)!r})\n{code}"
    encoded = base64.b64encode(program.encode()).decode()
    answer = host.run(f"echo {encoded} | base64 -d | env {settings} {PYTHON} -")
    assert answer.rc == 0, answer.stderr + scenario.journal(host, UNIT)
    return json.loads(answer.stdout.splitlines()[-1])


def ask(
    host: Any,
    inputs: dict[str, Any],
    url: str = "/health",
    certificate: str = CERTIFICATE,
    data: str | None = None,
    patience: float = 10,
    **headers: str,
) -> Any:
    """Return the status of a request to the server, or why there was none."""
    url = url if "://" in url else inputs["odsp_mlflow_url"] + url
    return python(
        host, inputs, ASK, url=url, certificate=certificate, data=data, patience=patience,
        headers={"Content-Type": "application/json", **headers},
    )  # fmt: skip


def search(host: Any, inputs: dict[str, Any], patience: float = 30) -> Any:
    """Return the status of a request that needs the database."""
    return ask(host, inputs, SEARCH, data='{"max_results": 1}', patience=patience)


def store(host: Any, inputs: dict[str, Any], patience: float = 30, size: int = 4) -> Any:
    """Return the status of a request that puts an artifact into the store."""
    return ask(host, inputs, ARTIFACT, data="x" * size, patience=patience)


def workers(host: Any) -> list[int]:
    """Return the processes that serve requests."""
    pid = scenario.main_pid(host, UNIT)
    supervisor = host.check_output(f"pgrep -P {pid}").split()[0]
    return [int(one) for one in host.run(f"pgrep -P {supervisor} -f spawn_main").stdout.split()]


@pytest.fixture(scope="module")
def written(host: Any, inputs: dict[str, Any]) -> dict[str, str]:
    """Return a run that a client has logged."""
    return dict(python(host, inputs, WRITE))


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, survives a reboot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "mlflow", 1.5)


def test_run_and_model_come_back(
    host: Any, inputs: dict[str, Any], written: dict[str, str]
) -> None:
    """What one client logged, another reads: parameter, metric, artifact, registered version."""
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]


def test_run_is_a_row_in_postgres(host: Any, written: dict[str, str]) -> None:
    """The run is where backups look for it, not in a file of the server."""
    sql = f"select count(*) from runs where run_uuid = '{written['run']}'"
    command = "setpriv --reuid postgres --regid postgres --clear-groups psql -At -d mlflow -c %s"
    assert host.check_output(command, sql).strip() == "1"


def test_artifact_is_an_object_in_minio(
    host: Any, inputs: dict[str, Any], written: dict[str, str]
) -> None:
    """The artifact is in the bucket, and only the server's account reaches it."""
    account = {
        "url": inputs["odsp_minio_url"],
        "access_key": "mlflow",
        "secret_key": inputs["mlflow_s3_secret_key"],
        "bucket": "mlflow",
    }
    keys = python(host, inputs, OBJECTS, **account)
    assert [key for key in keys if written["run"] in key and key.endswith("notes/a.txt")]


def test_clients_get_artifacts_through_the_server(written: dict[str, str]) -> None:
    """A client never needs an account at the store."""
    assert written["artifacts"].startswith("mlflow-artifacts:/")


def test_refuses_whoever_shows_no_certificate(host: Any, inputs: dict[str, Any]) -> None:
    """Only the platform's hosts are let in: a certificate of the platform, by TLS."""
    assert ask(host, inputs) == 200
    # The connection ends before there is a status; how, is the TLS library's affair.
    assert isinstance(ask(host, inputs, certificate=""), str)
    plain = inputs["odsp_mlflow_url"].replace("https", "http") + "/health"
    assert ask(host, inputs, plain) != 200


def test_refuses_other_hosts(host: Any, inputs: dict[str, Any]) -> None:
    """A host that sees the port but has no certificate of the platform gets nothing."""
    address = (inputs["odsp_address"], inputs["mlflow_listen_port"])
    context = ssl.create_default_context(cadata=scenario.secrets()["vault_ca_certificate"])
    answer = b""
    with (
        socket.create_connection(address, timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=address[0]) as connection,
        suppress(OSError),  # refused by an alert, or by an end
    ):
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        answer = connection.recv(100)
    assert answer == b""


def test_refuses_a_certificate_of_another_authority(host: Any, inputs: dict[str, Any]) -> None:
    """A certificate somebody made for himself is worth nothing."""
    made = "/root/odsp-own.pem"
    host.check_output(
        f"umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-subj /CN=mlflow -days 1 -keyout {made} -out {made}.crt 2>/dev/null; "
        f"cat {made}.crt >> {made}"
    )
    try:
        assert ask(host, inputs, certificate=made) != 200
    finally:
        host.check_output(f"rm -f {made} {made}.crt")


def test_refuses_other_host_names(host: Any, inputs: dict[str, Any]) -> None:
    """A name the inventory does not know is not answered: no DNS rebinding."""
    path = "/api/3.0/mlflow/server-info"
    assert ask(host, inputs, path) == 200
    assert ask(host, inputs, path, Host="evil.example") == 403


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["mlflow_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening


@pytest.mark.parametrize("blow", ["kill", "reboot"])
def test_runs_survive(
    host: Any, inputs: dict[str, Any], written: dict[str, str], blow: str
) -> None:
    """What was logged is there after a kill, and after a restart of the whole host."""
    if blow == "kill":
        scenario.kill(host, UNIT)
    else:
        scenario.reboot(host)
    scenario.wait_until(lambda: ask(host, inputs) == 200, 120)
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]


def test_a_killed_worker_is_replaced(host: Any, inputs: dict[str, Any]) -> None:
    """One process less is no outage, and not for long."""
    before = workers(host)
    assert len(before) > 1
    host.check_output(f"kill -KILL {before[0]}")
    assert search(host, inputs) == 200

    def replaced() -> bool:
        """Tell whether there are as many workers as before, without the one that was killed."""
        return len(now := workers(host)) == len(before) and before[0] not in now

    scenario.wait_until(replaced)


def test_database_may_come_back_later(
    host: Any, inputs: dict[str, Any], written: dict[str, str]
) -> None:
    """A restart of PostgreSQL needs no restart of the server."""
    before = scenario.main_pid(host, UNIT)
    host.check_output("systemctl restart odsp-postgres.service")
    scenario.wait_until(lambda: python(host, inputs, READ, **written)[0] == "3", 60)
    assert scenario.main_pid(host, UNIT) == before


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No secret in arguments, the journal or a file that everyone may read."""
    for name in ("mlflow_database_password", "mlflow_s3_secret_key"):
        assert scenario.places_of(host, inputs[name]) == [], name
    for path in ("/etc/odsp/mlflow.env", "/etc/odsp/tls/mlflow.key", CERTIFICATE):
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
def test_faulty_inputs_stop_the_role(host: Any) -> None:
    """A sentence for each names the host, the variable and the remedy; nothing is changed."""
    before = scenario.units(host)
    given = {name: value for name, (value, _) in FAULTY.items()}
    run = scenario.site("--tags", "mlflow", "--extra-vars", json.dumps(given))
    assert run.returncode != 0
    said = " ".join(run.stdout.replace("\\n", " ").replace('\\"', '"').split())
    for name, (_, sentence) in FAULTY.items():
        assert f"node-1: {name} {sentence}" in said
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_changed_inputs_are_in_force_and_taken_back(
    host: Any, inputs: dict[str, Any], written: dict[str, str]
) -> None:
    """Another port, size and name: one restart of MLflow alone, the old port and name are gone."""
    old, path = inputs["mlflow_listen_port"], "/api/3.0/mlflow/server-info"
    changed = {
        "odsp_mlflow_port": old + 1,
        "mlflow_workers": 1,
        "mlflow_memory_max": "3G",
        "mlflow_allowed_hosts_extra": ["other.example"],
    }
    moved = {**inputs, "odsp_mlflow_url": f"https://{inputs['odsp_address']}:{old + 1}"}
    before = scenario.units(host)
    try:
        run = scenario.site("--extra-vars", json.dumps(changed))
        assert run.returncode == 0, run.stdout[-3000:]
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        assert python(host, moved, READ, **written) == ["3", 0.5, "kept", "1"]
        assert ask(host, moved, path, Host="other.example") == 200
        assert not host.socket(f"tcp://{inputs['odsp_address']}:{old}").is_listening
        assert len(workers(host)) <= 1
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(3 * 2**30)
    finally:
        again = scenario.site("--tags", "mlflow")
    assert again.returncode == 0, again.stdout[-3000:]
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    assert ask(host, inputs, path, Host="other.example") == 403
    assert not host.socket(f"tcp://{inputs['odsp_address']}:{old + 1}").is_listening


@pytest.mark.fault(
    "dependency away",
    "While PostgreSQL or MinIO is stopped, requests that need it end with an error at once, the "
    "others go on; when it is back, so are they, without a restart.",
)
@pytest.mark.parametrize("dependency", ["postgres", "minio"])
def test_dependency_away(
    host: Any,
    inputs: dict[str, Any],
    written: dict[str, str],
    measured: Callable[[str], None],
    dependency: str,
) -> None:
    """Requests that need it fail at once, the others do not; all is well when it is back."""
    needs, other = (search, store) if dependency == "postgres" else (store, search)
    assert (needs(host, inputs), other(host, inputs)) == (200, 200)
    before = scenario.main_pid(host, UNIT)
    with faults.stopped(host, f"odsp-{dependency}.service"):
        began = time.monotonic()
        status = needs(host, inputs)
        seconds = time.monotonic() - began
        assert status in (500, 503)
        assert other(host, inputs) == 200
    began = time.monotonic()
    scenario.wait_until(lambda: needs(host, inputs) == 200)
    back = time.monotonic() - began
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    assert scenario.main_pid(host, UNIT) == before
    measured(
        f"{dependency} stopped: {status} after {seconds:.1f} s; served again {back:.1f} s after "
        "its start"
    )


@pytest.mark.fault(
    "dependency late",
    "While PostgreSQL takes connections and never answers, requests that need it wait as long as "
    "their client does and the server's health answers; when PostgreSQL goes on, so does MLflow.",
)
def test_database_hangs(
    host: Any, inputs: dict[str, Any], written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """The client's patience is the bound, and nothing has to be restarted afterwards."""
    assert search(host, inputs) == 200
    before = scenario.main_pid(host, UNIT)
    with faults.frozen(host, "odsp-postgres.service"):
        assert search(host, inputs, patience=5) != 200
        assert ask(host, inputs) == 200
    began = time.monotonic()
    scenario.wait_until(lambda: search(host, inputs) == 200)
    back = time.monotonic() - began
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    assert scenario.main_pid(host, UNIT) == before
    measured(f"PostgreSQL frozen: a client gave up after 5 s; served again after {back:.1f} s")


@pytest.mark.long
@pytest.mark.fault(
    "dependency late",
    "A MinIO that takes connections and never answers costs an upload or download at most 150 "
    "seconds, then it gets an error; runs and metrics go on meanwhile.",
)
def test_store_hangs(
    host: Any, inputs: dict[str, Any], written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """An upload ends with an error in bounded time; the registry does not notice."""
    assert store(host, inputs) == 200
    before = scenario.main_pid(host, UNIT)
    with faults.frozen(host, "odsp-minio.service"):
        began = time.monotonic()
        status = store(host, inputs, patience=300)
        seconds = time.monotonic() - began
        assert search(host, inputs) == 200
    assert status in (500, 503)
    assert seconds < 150
    scenario.wait_until(lambda: store(host, inputs) == 200)
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    assert scenario.main_pid(host, UNIT) == before
    measured(f"minio frozen: {status} after {seconds:.0f} s")


@pytest.mark.fault(
    "full disk",
    "Artifacts pass through the host's temporary files: without room there an upload ends with an "
    "error and nothing half is stored, runs and metrics go on; with room again uploads work.",
)
def test_full_disk(
    host: Any, inputs: dict[str, Any], written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """No room is an error, never a torn artifact, and needs no restart when it is over."""
    with faults.full_disk(host, UNIT, "/tmp") as disk:
        scenario.wait_until(lambda: store(host, inputs) == 200, 120)
        before = scenario.main_pid(host, UNIT)
        disk.fill()
        status = store(host, inputs, size=50_000)
        assert status not in (200, 404)
        assert search(host, inputs) == 200
        disk.free()
        assert store(host, inputs, size=50_000) == 200
        assert scenario.main_pid(host, UNIT) == before
    scenario.wait_until(lambda: ask(host, inputs) == 200, 120)
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    measured(f"an upload without room: {status}; runs went on; with room: 200, the same process")


@pytest.mark.fault(
    "out of memory",
    "What takes more than mlflow_memory_max is ended by the kernel; MLflow answers again by itself "
    "and has lost nothing.",
)
def test_out_of_memory(
    host: Any, inputs: dict[str, Any], written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """The limit holds, and the server goes on or comes back."""
    before = scenario.main_pid(host, UNIT)
    faults.eat_memory(host, UNIT)
    began = time.monotonic()
    scenario.wait_until(lambda: ask(host, inputs) == 200, 120)
    seconds = time.monotonic() - began
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    same = scenario.main_pid(host, UNIT) == before
    measured(f"answers {seconds:.1f} s later, {'the same process' if same else 'restarted'}")


@pytest.mark.long
@pytest.mark.fault(
    "clock jump",
    "Two days forward and back again neither stop the server nor need a restart; the store refuses "
    "signatures that are off by more than 15 minutes, so artifacts wait until the clock is right.",
)
def test_clock_jump(
    host: Any, inputs: dict[str, Any], written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """Runs go on under a wrong clock; artifacts at the latest when it is right again."""
    with faults.clock(host, UNIT) as time_of:
        scenario.wait_until(lambda: ask(host, inputs) == 200, 120)
        before = scenario.main_pid(host, UNIT)
        time_of.jump(2 * 86400)
        scenario.wait_until(lambda: store(host, inputs) != 200, 10)
        assert search(host, inputs) == 200
        status = store(host, inputs)
        time_of.jump(0)
        scenario.wait_until(lambda: store(host, inputs) == 200, 10)
        assert scenario.main_pid(host, UNIT) == before
    scenario.wait_until(lambda: ask(host, inputs) == 200, 120)
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    measured(f"two days ahead: runs 200, artifacts {status}; right again: all 200, same process")


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse the server, and say why; the next run of site.yml renews the certificate.",
)
def test_expired_certificate(
    host: Any, inputs: dict[str, Any], written: dict[str, str], measured: Callable[[str], None]
) -> None:
    """An ended certificate is worth nothing, and is made anew by itself."""
    with faults.expired_certificate(host, "mlflow", UNIT):
        scenario.wait_until(
            lambda: (
                host.socket(
                    f"tcp://{inputs['odsp_address']}:{inputs['mlflow_listen_port']}"
                ).is_listening
            ),
            120,
        )
        # A client's own certificate ended with it: shown or not, the server's is looked at first.
        answer = ask(host, inputs, certificate="")
        assert "certificate has expired" in str(answer)
        run = scenario.site("--tags", "mlflow")
        assert run.returncode == 0, run.stdout[-3000:]
        assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]
    measured("clients: certificate has expired; after one run of the role all is well")
