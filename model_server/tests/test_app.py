import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from conftest import TrainedModels
from hosts import eventually
from model_server import create_app
from model_server.settings import Settings
from registry_server import RegistryServer

ROW = {"data": [[5.1, 3.5, 1.4, 0.2]]}

# What FastAPI records of one wrong request to our application, and of one to any other.
_TELEMETRY = """
import json
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry import _logs, metrics, trace
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from model_server import create_app
from model_server.settings import read_settings

spans, numbers, logs = InMemorySpanExporter(), InMemoryMetricReader(), InMemoryLogRecordExporter()
tracers, loggers = TracerProvider(), LoggerProvider()
tracers.add_span_processor(SimpleSpanProcessor(spans))
loggers.add_log_record_processor(SimpleLogRecordProcessor(logs))
trace.set_tracer_provider(tracers)
metrics.set_meter_provider(MeterProvider([numbers]))
_logs.set_logger_provider(loggers)

def recorded(app):
    with TestClient(app) as client:
        assert client.get("/load_model/rose/onnx/1").status_code == 422
    read = numbers.get_metrics_data()
    texts = {
        "traces": [span.to_json() for span in spans.get_finished_spans()],
        "metrics": [read.to_json()] if read else [],
        "logs": [record.to_json() for record in logs.get_finished_logs()],
    }
    return [kind for kind, found in texts.items() if any("fastapi" in text for text in found)]

def route(flavor: int):
    return flavor

other = FastAPI()
other.add_api_route("/load_model/rose/{flavor}/1", route)
print(json.dumps([recorded(create_app(read_settings())), recorded(other)]))
"""


@pytest.fixture
def client(settings: Settings, stocked: RegistryServer) -> Iterator[TestClient]:
    assert stocked.versions
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def empty(settings: Settings) -> Iterator[TestClient]:
    """A server beside an empty registry."""
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


def _wait_until_ready(client: TestClient) -> None:
    eventually(lambda: client.get("/health/ready").status_code, wanted=200, seconds=30)


def test_the_start_leads_to_the_docs(empty: TestClient, settings: Settings) -> None:
    answer = empty.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    page = empty.get("/docs").text
    assert "openapi.json" in page
    # Nothing of it comes from the internet.
    assert "://" not in page
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/docs/{asset}" in page
        assert len(empty.get(f"/docs/{asset}").content) > 100
    assert empty.get("/docs/core.py").status_code == 422
    behind = settings.model_copy(update={"root_path": "/inference"})
    with TestClient(create_app(behind), follow_redirects=False) as client:
        assert client.get("/").headers["location"] == "/inference/docs"
        assert "'/inference/openapi.json'" in client.get("/docs").text
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/inference"}]
        # A model may be called like the prefix.
        assert client.post("/inference/1", json=ROW).status_code == 404


def test_the_contract_is_described(empty: TestClient) -> None:
    paths = empty.get("/openapi.json").json()["paths"]
    native = {
        (path, method)
        for path, methods in paths.items()
        for method in methods
        if not path.startswith("/v2")
    }
    assert native == {
        ("/health/live", "get"),
        ("/health/ready", "get"),
        ("/metrics", "get"),
        ("/loaded_models", "get"),
        ("/load_model/{model_name}/{model_flavor}/{model_version_or_alias}", "get"),
        ("/{model_name}/{model_flavor}/{model_version_or_alias}", "delete"),
        ("/{model_name}/{model_version_or_alias}", "post"),
    }
    for path, methods in paths.items():
        field = "error" if path.startswith("/v2") else "detail"
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                content = answer.get("content", {}).get("application/json", {})
                assert status < "400" or content["example"][field], (path, status)
    body = paths["/{model_name}/{model_version_or_alias}"]["post"]["requestBody"]
    assert set(body["content"]["application/json"]["schema"]["properties"]) == {
        "data",
        "predict_function",
        "model_flavor",
        "dtype",
        "params",
    }


def test_an_empty_server_is_live_and_ready(empty: TestClient) -> None:
    assert empty.get("/health/live").json() == {"status": "live"}
    _wait_until_ready(empty)
    assert empty.get("/loaded_models").json() == []


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/load_model/rose/pyfunc/1", 404, "no model 'rose' with a version 1"),
        ("GET", "/load_model/rose/pyfunc/best", 404, "no model 'rose' with an alias 'best'"),
        ("GET", "/load_model/rose/onnx/1", 422, "model_flavor: Input should be 'pyfunc' or"),
        ("GET", "/load_model/rose/pyfunc/a%0Ab", 422, "model_version_or_alias: String should"),
        ("GET", f"/load_model/{300 * 'x'}/pyfunc/1", 422, "model_name: String should have at"),
        ("GET", "/load_model/%2e%2e/pyfunc/1", 404, "no model '..'"),
        ("GET", "/load_model/..%2f..%2fetc/pyfunc/1", 404, "Not Found"),
        ("GET", "/load_model/rose/pyfunc/..%5c..%5cetc", 404, "no model 'rose'"),
        ("DELETE", "/rose/pyfunc/1", 404, "'rose' is not loaded as pyfunc by '1'"),
        ("DELETE", "/rose/pyfunc/champion", 404, "is not loaded as pyfunc by 'champion'"),
        ("DELETE", "/rose/tree/1", 422, "model_flavor"),
        ("DELETE", "/..%5c../pyfunc/1", 404, "is not loaded"),
        ("POST", "/rose/1", 404, "no model 'rose' with a version 1"),
        ("POST", "/rose/" + 30 * "9", 404, "no model 'rose' with an alias '999"),
        # No name of a route is kept from models.
        ("POST", "/health/live", 404, "no model 'health' with an alias 'live'"),
        ("POST", "/v2/1", 404, "no model 'v2' with a version 1"),
        ("GET", "/load_model/docs/pyfunc/1", 404, "no model 'docs' with a version 1"),
        ("DELETE", "/v2/pyfunc/1", 404, "'v2' is not loaded as pyfunc by '1'"),
        ("GET", "/iris", 404, "there is no GET of this address; see /docs"),
        ("GET", "/iris/1", 405, "there is no GET of this address; see /docs"),
        ("DELETE", "/../../etc", 404, "there is no DELETE of this address"),
    ],
)
def test_what_is_not_there_is_told_in_a_sentence(
    empty: TestClient, settings: Settings, method: str, path: str, status: int, sentence: str
) -> None:
    answer = empty.request(method, path, json=ROW if method == "POST" else None)
    assert answer.status_code == status
    assert sentence in answer.json()["detail"]
    assert not (settings.state_dir / "models").exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is wrong: Invalid JSON"),
        (b"{", "The body is wrong: Invalid JSON"),
        (b"[]", "The body is wrong: Input should be an object"),
        (b"{}", "data: Field required"),
        (b'{"data": {"a": 1}}', "data: Input should be a valid array"),
        (b'{"data": [[1]], "rows": 1}', "rows: Extra inputs are not permitted"),
        (b'{"data": [[1]], "predict_function": "score"}', "predict_function: Input should be 'pr"),
        (b'{"data": [[1]], "model_flavor": "onnx"}', "model_flavor: Input should be 'pyfunc' or"),
        (b'{"data": [[1]], "dtype": 5}', "dtype: Input should be a valid string"),
        (b'{"data": [[1]], "params": []}', "params: Input should be an object"),
        (b'{"data": ["\xff"]}', "The body is wrong: Invalid JSON"),
        (b'{"data": ["\\ud800"]}', "The body is wrong: Invalid JSON"),
        (b'{"data": ' + 100_000 * b"[", "The body is wrong: Invalid JSON"),
        (b'{"data": 1, "a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', "And 1 more."),
    ],
)
def test_a_wrong_body_is_told_in_a_sentence(empty: TestClient, body: bytes, sentence: str) -> None:
    answer = empty.post("/iris/1", content=body)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_a_body_over_the_limit_is_refused(settings: Settings) -> None:
    small = settings.model_copy(update={"max_body_bytes": 1024})
    with TestClient(create_app(small)) as client:
        announced = client.post("/iris/1", content=2000 * b" ")
        streamed = client.post("/iris/1", content=(100 * b" " for _ in range(20)))
    for answer in (announced, streamed):
        assert answer.status_code == 413
        assert answer.json()["detail"] == "The body is larger than 1024 bytes; send fewer rows."


def test_a_full_disk_is_told_in_a_sentence(settings: Settings) -> None:
    app = create_app(settings)
    app.add_api_route("/write", lambda: Path("/dev/full").write_bytes(b"more"))
    app.add_api_route("/read", lambda: Path("/dev/null/nothing").read_bytes())
    with TestClient(app) as client:
        answer = client.get("/write")
        assert answer.status_code == 507
        assert "disk is full" in answer.json()["detail"]
        with pytest.raises(NotADirectoryError):
            client.get("/read")


def test_a_bug_is_told_by_the_id_of_its_log(settings: Settings) -> None:
    app = create_app(settings)
    app.add_api_route("/bug", lambda: 1 // 0)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/bug", headers={"X-Request-ID": "r-7"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "r-7")
    assert answer.json()["detail"].endswith("its log says more by the id r-7.")


def test_a_registry_that_is_away_can_be_tried_again(
    empty: TestClient, registry_server: RegistryServer
) -> None:
    registry_server.close()
    answer = empty.post("/iris/1", json=ROW)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert "does not answer" in answer.json()["detail"]


def test_a_model_that_cannot_be_loaded_says_why(
    empty: TestClient, registry_server: RegistryServer, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "requirements.txt").write_text("no-such-package==1")
    registry_server.versions["broken", 1] = folder
    answer = empty.get("/load_model/broken/pyfunc/1")
    assert answer.status_code == 422
    assert "no-such-package was not found" in answer.json()["detail"]
    # Most often, it is the requirements of an old Python that cannot be installed.
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    python_version: 3.1.4\n")
    registry_server.created += 1
    answer = empty.get("/load_model/broken/pyfunc/1")
    assert answer.status_code == 422
    assert "no-such-package was not found" in answer.json()["detail"]
    assert answer.json()["detail"].startswith("It was stored by Python 3.1 and this server has")
    (folder / "requirements.txt").write_text("mlflow")
    registry_server.created += 1
    answer = empty.post("/broken/1", json=ROW)
    assert answer.status_code == 422
    assert "cannot be loaded as pyfunc" in answer.json()["detail"]
    assert "stored by Python 3.1 and this server has" in answer.json()["detail"]
    assert empty.get("/loaded_models").json() == []


def test_nothing_records_requests_beside_the_log(settings: Settings) -> None:
    """Not even where somebody in the process has set up OpenTelemetry."""
    done = subprocess.run(
        [sys.executable, "-c", _TELEMETRY],
        env={
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "MODEL_SERVER_STATE_DIR": str(settings.state_dir),
            "MODEL_SERVER_UV": settings.uv,
            "MODEL_SERVER_RUNTIME_DIR": str(settings.runtime_dir),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, others = json.loads(done.stdout.splitlines()[-1])
    assert (ours, others) == ([], ["traces", "metrics", "logs"])


def test_a_real_model_answers(client: TestClient, trained: TrainedModels) -> None:
    request = {"data": trained.rows, "model_flavor": "sklearn"}
    name = "iris & co."
    answer = client.post(f"/{name}/champion", json=request)
    assert answer.json() == {"prediction": trained.predictions["logistic"]}
    answer = client.post(f"/{name}/1", json=request | {"predict_function": "predict_proba"})
    assert answer.json() == {"prediction": trained.probabilities["logistic"]}
    # Bad data harms nobody.
    answer = client.post(f"/{name}/1", json=request | {"data": [[1, 2]]})
    assert answer.status_code == 422
    assert "the model takes 4" in answer.json()["detail"]
    answer = client.post(f"/{name}/champion", json=request)
    assert answer.json() == {"prediction": trained.predictions["logistic"]}


def test_every_way_to_a_prediction_counts_the_models_calls(
    client: TestClient, trained: TrainedModels
) -> None:
    # Only of what is loaded, counters are told.
    assert client.get("/load_model/iris & co./sklearn/1").status_code == 200
    native = {"data": trained.rows, "model_flavor": "sklearn"}
    tensor = {"name": "x", "shape": [3, 4], "datatype": "FP64", "data": trained.rows}
    inference = {"inputs": [tensor], "parameters": {"model_flavor": "sklearn"}}
    # By the short way, by the application, by V2.
    for path, content, kind in (
        ("/iris & co./1", native, "application/json"),
        ("/iris & co./1", native, "text/plain"),
        ("/v2/models/iris & co./versions/1/infer", inference, "application/json"),
    ):
        before = _batch_rows(client)
        answer = client.post(path, content=json.dumps(content), headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert _batch_rows(client) == (before[0] + 3, before[1] + 1)


def _batch_rows(client: TestClient) -> tuple[float, float]:
    """The rows of a model's calls, and how many calls there were."""
    counted = client.get("/metrics").text
    labels = '{flavor="sklearn",model="iris & co.",version="1"}'
    told = dict(line.rsplit(" ", 1) for line in counted.splitlines() if line[0] != "#")
    rows, calls = (f"model_server_batch_rows_{what}{labels}" for what in ("sum", "count"))
    return float(told.get(rows, 0)), float(told.get(calls, 0))


def test_a_database_that_is_away_keeps_nobody_from_being_live(settings: Settings) -> None:
    away = Settings(
        **settings.model_dump() | {"database_url": f"sqlite:///{settings.state_dir}/no/catalog"}
    )
    with TestClient(create_app(away)) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        answer: Any = client.get("/loaded_models")
        assert answer.status_code == 503
        assert json.loads(answer.text)["detail"].startswith("The database of loaded models")


@pytest.mark.parametrize(
    "headers",
    [[(b"content-type", b"application/json")], [(b"content-type", b"text/plain")]],
    ids=["by the short way", "by the application"],
)
def test_a_caller_who_hangs_up_while_sending_is_no_bug(
    empty: TestClient, capsys: pytest.CaptureFixture[str], headers: list[tuple[bytes, bytes]]
) -> None:
    """The web server would log what is raised here, and the counters would tell of a 500."""
    come: list[Message] = [
        {"type": "http.request", "body": b'{"data": [[1', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return come.pop(0)

    async def send(_: Message) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/iris/1",
        "query_string": b"",
        "headers": headers,
    }
    capsys.readouterr()
    asyncio.run(empty.app(scope, receive, send))  # type: ignore[arg-type]
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["status"] == 499
    counted = empty.get("/metrics").text
    assert 'route="/{model_name}/{model_version_or_alias}",status="499"' in counted
