"""What an operator asks of the model server: does it predict, refuse, survive, keep its secrets?"""

from __future__ import annotations

import base64
import json
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

UNIT = "odsp-model_server.service"
PYTHON = "/opt/odsp/mlflow/current/bin/python"
CERTIFICATE = "/etc/odsp/tls/model_server.pem"
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
print(json.dumps({"version": int(made.registered_model_version), "rows": rows,
                  "predict": model.predict(rows).tolist(),
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
    with urllib.request.urlopen(request, context=context, timeout=v["patience"]) as answer:
        status, text = answer.status, answer.read().decode()
except urllib.error.HTTPError as refused:
    status, text = refused.code, refused.read().decode()
except OSError as refused:
    status, text = str(refused), "null"
print(json.dumps([status, json.loads(text or "null")]))
"""

#: Inputs that cannot work in a way their types do not show; a part of the sentence that says so.
FAULTY = {
    "model_server_tracking_url": ("", "is empty"),
    "model_server_database_password": ("", "is empty"),
    "model_server_database_user": ("model@server", "may hold letters, digits"),
    "model_server_listen_port": (0, "is 0; choose one of 1 to 65535"),
    "model_server_root_path": ("inference", 'is "inference"; write it as in /inference'),
    "model_server_workers": (0, "is 0; at least 1"),
    "model_server_runner_threads": (0, "is 0; a model needs"),
    "model_server_load_timeout_seconds": (0, "is 0; give a load"),
    "model_server_memory_max": ("8 GB", 'is "8 GB", which systemd would ignore; write'),
}


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
        "GIT_PYTHON_REFRESH": "quiet",
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
    patience: float = 900,
) -> tuple[Any, Any]:
    """Return status and body of a request, or why there was no answer."""
    values = {"method": method, "body": body, "certificate": certificate, "patience": patience}
    address = path if "://" in path else url(inputs, path)
    status, answer = python(host, inputs, ASK, url=address, **values)
    return status, answer


def predict(
    host: Any, inputs: dict[str, Any], trained: dict[str, Any], reference: str = "champion"
) -> bool:
    """Tell whether the server answers as the model itself does; fail if it answers otherwise."""
    body = {"data": trained["rows"], "model_flavor": "sklearn"}
    status, answer = ask(host, inputs, f"/{MODEL}/{reference}", "POST", body, patience=60)
    assert status != 200 or answer == {"prediction": trained["predict"]}
    return bool(status == 200)


def ready(host: Any, inputs: dict[str, Any]) -> bool:
    """Tell whether everything that shall be loaded has been brought back."""
    return bool(ask(host, inputs, "/health/ready", patience=10)[0] == 200)


def loaded(host: Any, inputs: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    """Return what the server says is loaded."""
    status, models = ask(host, inputs, "/loaded_models")
    assert status == 200
    return [(m["model_name"], m["model_flavor"], m["version"], m["state"]) for m in models]


@pytest.fixture(scope="module")
def trained(host: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return rows, and what the registered model itself answers to them."""
    return dict(python(host, inputs, TRAIN, name=MODEL))


@pytest.fixture
def in_use(host: Any, inputs: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Return the model while it is loaded, by its alias and its version."""
    for reference in ("champion", "1"):
        assert ask(host, inputs, f"/load_model/{MODEL}/sklearn/{reference}")[0] == 200
    return trained


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
    assert ask(host, inputs, plain, certificate="")[0] != 200


def test_refuses_a_certificate_of_another_authority(host: Any, inputs: dict[str, Any]) -> None:
    """A certificate somebody made for himself is worth nothing."""
    made = "/root/odsp-own.pem"
    host.check_output(
        f"umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-subj /CN=model_server -days 1 -keyout {made} -out {made}.crt 2>/dev/null; "
        f"cat {made}.crt >> {made}"
    )
    try:
        assert ask(host, inputs, "/health/live", certificate=made)[0] != 200
    finally:
        host.check_output(f"rm -f {made} {made}.crt")


def test_refuses_other_hosts(inputs: dict[str, Any]) -> None:
    """A host that sees the port but has no certificate of the platform gets nothing."""
    address = (inputs["odsp_address"], inputs["model_server_listen_port"])
    context = ssl.create_default_context(cadata=scenario.secrets()["vault_ca_certificate"])
    answer = b""
    with (
        socket.create_connection(address, timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=address[0]) as connection,
        suppress(OSError),  # refused by an alert, or by an end
    ):
        connection.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        answer = connection.recv(100)
    assert answer == b""


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["model_server_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening


@pytest.mark.parametrize("blow", ["kill", "reboot"])
def test_what_was_loaded_comes_back(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], blow: str
) -> None:
    """After the processes were shot, and after a restart of the whole host."""
    if blow == "kill":
        scenario.kill(host, UNIT)
    else:
        scenario.reboot(host)
    scenario.wait_until(lambda: ready(host, inputs), 120)
    assert (MODEL, "sklearn", 1, "ready") in loaded(host, inputs)
    assert predict(host, inputs, in_use)


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No secret in arguments, the journal or a file that everyone may read."""
    assert scenario.places_of(host, inputs["model_server_database_password"]) == []
    for path in ("/etc/odsp/model_server.env", "/etc/odsp/tls/model_server.key", CERTIFICATE):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "model_server", 0o640), path


@pytest.mark.once
def test_faulty_inputs_stop_the_role(host: Any) -> None:
    """A sentence for each names the host, the variable and the remedy; nothing is changed."""
    before = scenario.units(host)
    given = {name: value for name, (value, _) in FAULTY.items()}
    run = scenario.site("--tags", "model_server", "--extra-vars", json.dumps(given))
    assert run.returncode != 0
    said = " ".join(run.stdout.replace("\\n", " ").replace('\\"', '"').split())
    for name, (_, sentence) in FAULTY.items():
        assert f"node-1: {name} {sentence}" in said
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before


def test_changed_inputs_are_in_force_and_taken_back(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any]
) -> None:
    """Another port, prefix and size: one restart of this unit alone; the old port is gone."""
    old = inputs["model_server_listen_port"]
    changed = {
        "odsp_model_server_port": old + 1,
        "model_server_workers": 1,
        "model_server_root_path": "/other",
        "model_server_memory_max": "6G",
    }
    moved = {**inputs, "model_server_listen_port": old + 1}
    before = scenario.units(host)
    try:
        run = scenario.site("--extra-vars", json.dumps(changed))
        assert run.returncode == 0, run.stdout[-3000:]
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        scenario.wait_until(lambda: ready(host, moved), 120)
        assert predict(host, moved, in_use)
        assert ask(host, moved, "/openapi.json")[1]["servers"] == [{"url": "/other"}]
        assert not host.socket(f"tcp://{inputs['odsp_address']}:{old}").is_listening
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(6 * 2**30)
    finally:
        again = scenario.site("--tags", "model_server")
    assert again.returncode == 0, again.stdout[-3000:]
    scenario.wait_until(lambda: ready(host, inputs), 120)
    assert predict(host, inputs, in_use)
    assert not host.socket(f"tcp://{inputs['odsp_address']}:{old + 1}").is_listening


@pytest.mark.fault(
    "dependency away",
    "While MLflow or PostgreSQL is stopped, loaded models go on predicting by their version; what "
    "needs MLflow is refused with a sentence, and works again when MLflow is back.",
)
@pytest.mark.parametrize("dependency", ["mlflow", "postgres"])
def test_dependency_away(
    host: Any,
    inputs: dict[str, Any],
    in_use: dict[str, Any],
    measured: Callable[[str], None],
    dependency: str,
) -> None:
    """MLflow's rest is no rest for what is loaded, nor is the database's."""
    before = scenario.main_pid(host, UNIT)
    with faults.stopped(host, f"odsp-{dependency}.service"):
        assert predict(host, inputs, in_use, "1")
        began = time.monotonic()
        status, answer = ask(host, inputs, f"/load_model/{MODEL}/pyfunc/1", patience=60)
        seconds = time.monotonic() - began
        assert status in (502, 503)
        assert len(answer["detail"]) > 10
    scenario.wait_until(lambda: ask(host, inputs, f"/load_model/{MODEL}/pyfunc/1")[0] == 200, 120)
    assert scenario.main_pid(host, UNIT) == before
    assert ask(host, inputs, f"/{MODEL}/pyfunc/1", "DELETE")[0] == 200
    measured(f"{dependency} stopped: loaded 200; a load {status} after {seconds:.1f} s, later 200")


@pytest.mark.fault(
    "dependency late",
    "While MLflow or PostgreSQL takes connections and never answers, loaded models go on "
    "predicting by their version.",
)
@pytest.mark.parametrize("dependency", ["mlflow", "postgres"])
def test_dependency_hangs(
    host: Any,
    inputs: dict[str, Any],
    in_use: dict[str, Any],
    measured: Callable[[str], None],
    dependency: str,
) -> None:
    """Nobody who asks a loaded model waits for somebody else."""
    with faults.frozen(host, f"odsp-{dependency}.service"):
        began = time.monotonic()
        assert predict(host, inputs, in_use, "1")
        seconds = time.monotonic() - began
    assert seconds < 10
    measured(f"{dependency} frozen: loaded 200 after {seconds:.1f} s")


@pytest.mark.long
@pytest.mark.fault(
    "dependency late",
    "A load that needs an MLflow that never answers ends with a sentence within a minute, and "
    "succeeds when MLflow goes on.",
)
def test_loads_do_not_wait_for_ever(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """A request that needs MLflow ends in bounded time."""
    assert in_use
    with faults.frozen(host, "odsp-mlflow.service"):
        began = time.monotonic()
        status, answer = ask(host, inputs, f"/load_model/{MODEL}/pyfunc/1", patience=120)
        seconds = time.monotonic() - began
    assert status in (503, 504)
    assert len(answer["detail"]) > 10
    assert seconds < 60
    scenario.wait_until(lambda: ask(host, inputs, f"/load_model/{MODEL}/pyfunc/1")[0] == 200, 120)
    measured(f"mlflow frozen: {status} after {seconds:.0f} s; later 200")


@pytest.mark.fault(
    "full disk",
    "Without room a load ends with an error that says so and leaves nothing half; loaded models go "
    "on; with room again the same load works.",
)
def test_full_disk(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """No room costs a load, not the service."""
    version = python(host, inputs, TRAIN, name=MODEL)["version"]
    with faults.full_disk(host, UNIT, "/var/lib/odsp/model_server", mib=3072) as disk:
        scenario.wait_until(lambda: ready(host, inputs), 120)
        before = scenario.main_pid(host, UNIT)
        disk.fill()
        status, answer = ask(host, inputs, f"/load_model/{MODEL}/sklearn/{version}")
        assert status == 507
        assert "disk is full" in answer["detail"]
        assert predict(host, inputs, in_use)
        disk.free()
        assert ask(host, inputs, f"/load_model/{MODEL}/sklearn/{version}")[0] == 200
        assert predict(host, inputs, in_use, str(version))
        assert ask(host, inputs, f"/{MODEL}/sklearn/{version}", "DELETE")[0] == 200
        assert scenario.main_pid(host, UNIT) == before
    scenario.wait_until(lambda: ready(host, inputs), 120)
    measured(f"a load without room: {status}; with room: 200, the same process")


@pytest.mark.fault(
    "out of memory",
    "What takes more than model_server_memory_max is ended by the kernel; the server answers again "
    "by itself, with what was loaded.",
)
def test_out_of_memory(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """The limit holds, and the server goes on or comes back."""
    before = scenario.main_pid(host, UNIT)
    faults.eat_memory(host, UNIT)
    began = time.monotonic()
    scenario.wait_until(lambda: ready(host, inputs) and predict(host, inputs, in_use), 120)
    seconds = time.monotonic() - began
    same = scenario.main_pid(host, UNIT) == before
    measured(f"predicts {seconds:.1f} s later, {'the same process' if same else 'restarted'}")


@pytest.mark.long
@pytest.mark.fault(
    "clock jump",
    "Two days forward and back again neither stop a prediction nor need a restart.",
)
def test_clock_jump(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """Predictions go on under a wrong clock, and so do loads."""
    with faults.clock(host, UNIT) as time_of:
        scenario.wait_until(lambda: ready(host, inputs), 120)
        before = scenario.main_pid(host, UNIT)
        for seconds in (2 * 86400, 0):
            time_of.jump(seconds)
            assert predict(host, inputs, in_use)
            assert ask(host, inputs, f"/load_model/{MODEL}/sklearn/champion")[0] == 200
        assert scenario.main_pid(host, UNIT) == before
    scenario.wait_until(lambda: ready(host, inputs), 120)
    measured("two days ahead and back: predictions and loads 200, the same process")


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse the server, and say why; the next run of site.yml renews the certificate.",
)
def test_expired_certificate(
    host: Any, inputs: dict[str, Any], in_use: dict[str, Any], measured: Callable[[str], None]
) -> None:
    """An ended certificate is worth nothing, and is made anew by itself."""
    listening = f"tcp://{inputs['odsp_address']}:{inputs['model_server_listen_port']}"
    with faults.expired_certificate(host, "model_server", UNIT):
        scenario.wait_until(lambda: host.socket(listening).is_listening, 120)
        answer = ask(host, inputs, "/health/live", certificate="")
        assert "certificate has expired" in str(answer[0])
        run = scenario.site("--tags", "model_server")
        assert run.returncode == 0, run.stdout[-3000:]
        scenario.wait_until(lambda: ready(host, inputs), 120)
        assert predict(host, inputs, in_use)
    measured("clients: certificate has expired; after one run of the role all is well")
