"""What an operator asks of MLflow: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import base64
import json
import re
import shlex
from typing import Any

import pytest
import scenario

UNIT = "odsp-mlflow.service"
PYTHON = "/opt/odsp/mlflow/current/bin/python"
CERTIFICATE = "/etc/odsp/tls/mlflow.pem"

#: An unchanged client: a run with a parameter, a metric and an artifact, and a registered version.
WRITE = """
import mlflow, tempfile, pathlib
name = "odsp-test"
mlflow.set_experiment(name)
with mlflow.start_run() as run:
    mlflow.log_param("depth", 3)
    mlflow.log_metric("accuracy", 0.5)
    mlflow.log_text("kept", "notes/a.txt")
client = mlflow.MlflowClient()
client.create_registered_model(name)
client.create_model_version(name, f"runs:/{run.info.run_id}/notes", run.info.run_id)
client.set_registered_model_alias(name, "champion", 1)
print(json.dumps({"run": run.info.run_id, "artifacts": run.info.artifact_uri}))
"""
READ = """
import mlflow
client = mlflow.MlflowClient()
run = client.get_run(v["run"])
text = mlflow.artifacts.load_text(f"runs:/{v['run']}/notes/a.txt")
version = client.get_model_version_by_alias("odsp-test", "champion").version
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
try:
    request = urllib.request.Request(v["url"], headers=v["headers"])
    status = urllib.request.urlopen(request, context=context, timeout=10).status
except urllib.error.HTTPError as refused:
    status = refused.code
except OSError as refused:
    status = str(refused)
print(json.dumps(status))
"""


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
    }
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    program = f"import json\nv = json.loads({json.dumps(values)!r})\n{code}"
    encoded = base64.b64encode(program.encode()).decode()
    answer = host.run(f"echo {encoded} | base64 -d | env {settings} {PYTHON} -")
    assert answer.rc == 0, answer.stderr + scenario.journal(host, UNIT)
    return json.loads(answer.stdout.splitlines()[-1])


def ask(
    host: Any, inputs: dict[str, Any], url: str = "", certificate: str = CERTIFICATE, **headers: str
) -> Any:
    """Return the status of a request to the server, or why there was none."""
    url = url or f"{inputs['odsp_mlflow_url']}/health"
    return python(host, inputs, ASK, url=url, certificate=certificate, headers=headers)


@pytest.fixture(scope="module")
def written(host: Any, inputs: dict[str, Any]) -> dict[str, str]:
    """Return a run that a client has logged."""
    return dict(python(host, inputs, WRITE))


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, survives a reboot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "mlflow")


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
    url = f"{inputs['odsp_mlflow_url']}/api/3.0/mlflow/server-info"
    assert ask(host, inputs, url) == 200
    assert ask(host, inputs, url, Host="evil.example") == 403


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["mlflow_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening


@pytest.mark.parametrize("blow", ["restart", "kill"])
def test_runs_survive(
    host: Any, inputs: dict[str, Any], written: dict[str, str], blow: str
) -> None:
    """What was logged is there after a restart, and after the processes were shot."""
    if blow == "restart":
        host.check_output(f"systemctl restart {UNIT}")
    else:
        scenario.kill(host, UNIT)
    scenario.wait_until(lambda: ask(host, inputs) == 200, 120)
    assert python(host, inputs, READ, **written) == ["3", 0.5, "kept", "1"]


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


def test_empty_secret_stops_the_role(host: Any, inputs: dict[str, Any]) -> None:
    """One sentence names the host, the variable and the remedy; the server goes on as before."""
    before = scenario.main_pid(host, UNIT)
    run = scenario.site("--tags", "mlflow", "--extra-vars", '{"mlflow_s3_secret_key": ""}')
    assert run.returncode != 0
    assert "node-1: mlflow_s3_secret_key is empty" in " ".join(run.stdout.split())
    assert "changed=0" in run.stdout
    assert scenario.main_pid(host, UNIT) == before
