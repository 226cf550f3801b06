"""What an operator asks of the model server: does it predict, refuse, survive, keep its secrets?"""

from __future__ import annotations

import base64
import json
import shlex
from typing import Any

import pytest
import scenario

UNIT = "odsp-model_server.service"
PYTHON = "/opt/odsp/mlflow/current/bin/python"
CERTIFICATE = "/etc/odsp/tls/model_server.pem"
MODEL = "odsp-test"

#: Trains a real model, registers it, and says what it answers itself.
TRAIN = """
import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
data, target = load_iris(return_X_y=True)
model = LogisticRegression(max_iter=500).fit(data, target)
mlflow.set_experiment(v["name"])
with mlflow.start_run():
    mlflow.sklearn.log_model(model, name="model", registered_model_name=v["name"])
mlflow.MlflowClient().set_registered_model_alias(v["name"], "champion", 1)
rows = data[::15].tolist()
print(json.dumps({"rows": rows, "predict": model.predict(rows).tolist(),
                  "predict_proba": model.predict_proba(rows).tolist()}))
"""
ASK = """
import ssl, urllib.request
context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
if v["certificate"]:
    context.load_cert_chain(v["certificate"])
data = json.dumps(v["body"]).encode() if v["body"] is not None else None
kind = {"Content-Type": "application/json"}
request = urllib.request.Request(v["url"], data, kind, method=v["method"])
try:
    with urllib.request.urlopen(request, context=context, timeout=900) as answer:
        status, text = answer.status, answer.read().decode()
except urllib.error.HTTPError as refused:
    status, text = refused.code, refused.read().decode()
except OSError as refused:
    status, text = str(refused), "null"
print(json.dumps([status, json.loads(text or "null")]))
"""


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the inputs of the host's roles."""
    return dict(host.ansible.get_variables())


def python(host: Any, inputs: dict[str, Any], code: str, **values: Any) -> Any:
    """Run Python on the host as a client of MLflow; return what it prints."""
    environment = {
        "MLFLOW_TRACKING_URI": inputs["odsp_mlflow_url"],
        "MLFLOW_TRACKING_SERVER_CERT_PATH": scenario.CA,
        "MLFLOW_TRACKING_CLIENT_CERT_PATH": CERTIFICATE,
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "DO_NOT_TRACK": "true",
    }
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    program = f"import json\nv = json.loads({json.dumps(values)!r})\n{code}"
    encoded = base64.b64encode(program.encode()).decode()
    answer = host.run(f"echo {encoded} | base64 -d | env {settings} {PYTHON} -")
    assert answer.rc == 0, answer.stderr + scenario.journal(host, UNIT)
    return json.loads(answer.stdout.splitlines()[-1])


def url(inputs: dict[str, Any], path: str) -> str:
    """Return a URL of the server."""
    return f"https://{inputs['odsp_address']}:{inputs['model_server_listen_port']}{path}"


def ask(
    host: Any,
    inputs: dict[str, Any],
    path: str,
    method: str = "GET",
    body: Any = None,
    certificate: str = CERTIFICATE,
) -> tuple[Any, Any]:
    """Return status and body of a request, or why there was no answer."""
    values = {"method": method, "body": body, "certificate": certificate}
    status, answer = python(host, inputs, ASK, url=url(inputs, path), **values)
    return status, answer


def loaded(host: Any, inputs: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    """Return what the server says is loaded."""
    status, models = ask(host, inputs, "/loaded_models")
    assert status == 200
    return [(m["model_name"], m["model_flavor"], m["version"], m["state"]) for m in models]


@pytest.fixture(scope="module")
def trained(host: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return rows, and what the registered model itself answers to them."""
    return dict(python(host, inputs, TRAIN, name=MODEL))


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, survives a reboot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "model_server")


@pytest.mark.parametrize("function", ["predict", "predict_proba"])
@pytest.mark.parametrize("reference", ["champion", "1"])
def test_predicts_what_the_model_itself_predicts(
    host: Any, inputs: dict[str, Any], trained: dict[str, Any], reference: str, function: str
) -> None:
    """By alias or version, loaded on first use into an environment of its own."""
    body = {"data": trained["rows"], "predict_function": function, "model_flavor": "sklearn"}
    status, answer = ask(host, inputs, f"/{MODEL}/{reference}", "POST", body)
    assert status == 200, answer
    expected = trained[function]
    flat = [x for row in answer["prediction"] for x in (row if isinstance(row, list) else [row])]
    wanted = [x for row in expected for x in (row if isinstance(row, list) else [row])]
    assert flat == pytest.approx(wanted, abs=1e-9)


def test_load_list_and_unload(host: Any, inputs: dict[str, Any], trained: dict[str, Any]) -> None:
    """What is loaded is listed, by every worker alike; what is unloaded is gone."""
    assert trained
    status, answer = ask(host, inputs, f"/load_model/{MODEL}/pyfunc/champion")
    assert status == 200, answer
    answers = [loaded(host, inputs) for _ in range(4)]
    assert all((MODEL, "pyfunc", 1, "ready") in answer for answer in answers)
    assert ask(host, inputs, f"/{MODEL}/pyfunc/champion", "DELETE")[0] in (200, 204)
    assert not [m for m in loaded(host, inputs) if m[:2] == (MODEL, "pyfunc")]
    assert ask(host, inputs, f"/{MODEL}/pyfunc/champion", "DELETE")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/no-such-model/1", {"data": [[1, 2, 3, 4]]}, 404),
        (f"/{MODEL}/99", {"data": [[1, 2, 3, 4]]}, 404),
        (f"/{MODEL}/champion", {"data": [[1, 2], [3]], "model_flavor": "sklearn"}, 422),
        (f"/{MODEL}/champion", {"data": [[1, 2]], "model_flavor": "sklearn"}, 422),
        (f"/{MODEL}/champion", {"data": [[1, 2, 3, 4]], "model_flavor": "keras"}, 422),
        (f"/{MODEL}/champion", {"rows": [[1, 2, 3, 4]]}, 422),
    ],
    ids=["model", "version", "ragged rows", "missing columns", "flavor", "misspelt"],
)
def test_wrong_requests_are_told_what_is_wrong(
    host: Any, inputs: dict[str, Any], trained: dict[str, Any], path: str, body: Any, status: int
) -> None:
    """A wrong request gets a 4xx with a sentence, never a 500."""
    assert trained
    answer = ask(host, inputs, path, "POST", body)
    assert answer[0] == status, answer
    assert len(answer[1]["detail"]) > 10


def test_refuses_whoever_shows_no_certificate(host: Any, inputs: dict[str, Any]) -> None:
    """Only the platform's hosts are let in, by TLS."""
    assert ask(host, inputs, "/health/live")[0] == 200
    assert ask(host, inputs, "/health/live", certificate="")[0] != 200
    plain = url(inputs, "/health/live").replace("https", "http")
    answer = python(host, inputs, ASK, url=plain, method="GET", body=None, certificate="")
    assert answer[0] != 200


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["model_server_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening


@pytest.mark.parametrize("blow", ["restart", "kill"])
def test_what_was_loaded_comes_back(
    host: Any, inputs: dict[str, Any], trained: dict[str, Any], blow: str
) -> None:
    """After a restart, and after the processes were shot."""
    assert ask(host, inputs, f"/load_model/{MODEL}/sklearn/champion")[0] == 200
    if blow == "restart":
        host.check_output(f"systemctl restart {UNIT}")
    else:
        scenario.kill(host, UNIT)
    scenario.wait_until(lambda: ask(host, inputs, "/health/ready")[0] == 200, 120)
    assert (MODEL, "sklearn", 1, "ready") in loaded(host, inputs)
    body = {"data": trained["rows"], "model_flavor": "sklearn"}
    assert ask(host, inputs, f"/{MODEL}/champion", "POST", body)[1] == {
        "prediction": trained["predict"]
    }


def test_registry_may_be_away_while_loaded_models_predict(
    host: Any, inputs: dict[str, Any], trained: dict[str, Any]
) -> None:
    """MLflow's rest is no rest for what is loaded."""
    assert ask(host, inputs, f"/load_model/{MODEL}/sklearn/1")[0] == 200
    host.check_output("systemctl stop odsp-mlflow.service")
    try:
        body = {"data": trained["rows"], "model_flavor": "sklearn"}
        status, answer = ask(host, inputs, f"/{MODEL}/1", "POST", body)
        assert (status, answer) == (200, {"prediction": trained["predict"]})
    finally:
        host.check_output("systemctl start odsp-mlflow.service")


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No secret in arguments, the journal or a file that everyone may read."""
    assert scenario.places_of(host, inputs["model_server_database_password"]) == []
    for path in ("/etc/odsp/model_server.env", "/etc/odsp/tls/model_server.key", CERTIFICATE):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "model_server", 0o640), path


def test_empty_endpoint_stops_the_role(host: Any, inputs: dict[str, Any]) -> None:
    """One sentence names the host, the variable and the remedy; the server goes on as before."""
    before = scenario.main_pid(host, UNIT)
    run = scenario.site(
        "--tags", "model_server", "--extra-vars", '{"model_server_tracking_url": ""}'
    )
    assert run.returncode != 0
    assert "node-1: model_server_tracking_url is empty" in " ".join(run.stdout.split())
    assert scenario.main_pid(host, UNIT) == before
