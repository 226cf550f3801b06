import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from conftest import TrainedModels
from model_server import create_app
from model_server.catalog import Catalog
from model_server.processes import ChildProcesses
from model_server.registry import ModelVersion
from model_server.runners import Runner
from model_server.settings import Settings
from registry_server import RegistryServer

ROW = {"data": [[5.1, 3.5, 1.4, 0.2]]}


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
    for _ in range(600):
        if client.get("/health/ready").status_code == 200:
            return
        time.sleep(0.05)
    pytest.fail("never ready")


def _process(settings: Settings, name: str, flavor: str, version: int) -> int | None:
    processes = ChildProcesses(settings)
    return processes.process_id(Runner(settings, processes, name, flavor, version).name)


def test_the_start_leads_to_the_docs(empty: TestClient, settings: Settings) -> None:
    answer = empty.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    assert "openapi.json" in empty.get("/docs").text
    behind = settings.model_copy(update={"root_path": "/inference"})
    with TestClient(create_app(behind), follow_redirects=False) as client:
        assert client.get("/").headers["location"] == "/inference/docs"
        assert "'/inference/openapi.json'" in client.get("/docs").text
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/inference"}]
        # A model may be called like the prefix.
        assert client.post("/inference/1", json=ROW).status_code == 404


def test_the_contract_is_described(empty: TestClient) -> None:
    paths = empty.get("/openapi.json").json()["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == {
        ("/health/live", "get"),
        ("/health/ready", "get"),
        ("/loaded_models", "get"),
        ("/load_model/{model_name}/{model_flavor}/{model_version_or_alias}", "get"),
        ("/{model_name}/{model_flavor}/{model_version_or_alias}", "delete"),
        ("/{model_name}/{model_version_or_alias}", "post"),
    }
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
        ("POST", "/health/live", 404, "no model 'health' with an alias 'live'"),
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
    (folder / "requirements.txt").write_text("mlflow")
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    python_version: 3.1.4\n")
    registry_server.created += 1
    answer = empty.post("/broken/1", json=ROW)
    assert answer.status_code == 422
    assert "cannot be loaded as pyfunc" in answer.json()["detail"]
    assert "stored by Python 3.1 and this server has" in answer.json()["detail"]
    assert empty.get("/loaded_models").json() == []


def test_one_life_of_a_model(
    client: TestClient, settings: Settings, stocked: RegistryServer, trained: TrainedModels
) -> None:
    """From the first question to the last: a start takes seconds, so it is one story."""
    request = {"data": trained.rows, "model_flavor": "sklearn"}
    name = "iris & co."

    # Loaded on first use, by an alias.
    answer = client.post(f"/{name}/champion", json=request)
    assert answer.json() == {"prediction": trained.predictions["logistic"]}
    loaded = client.get("/loaded_models").json()
    process = _process(settings, name, "sklearn", 1)
    assert process is not None
    assert loaded[0].pop("memory_bytes") > 10_000_000
    assert loaded[0].pop("since")
    assert loaded == [
        {
            "model_name": name,
            "model_flavor": "sklearn",
            "model_version_or_alias": "champion",
            "version": 1,
            "aliases": ["champion"],
            "state": "ready",
            "problem": None,
        }
    ]

    # The alias moves in the registry: here it still means what was loaded, until it is loaded anew.
    stocked.aliases[name, "champion"] = 2
    again = client.post(f"/{name}/champion", json=request | {"predict_function": "predict_proba"})
    assert again.json() == {"prediction": trained.probabilities["logistic"]}
    moved = client.get(f"/load_model/{name}/sklearn/champion").json()
    assert (moved["version"], moved["state"], moved["aliases"]) == (2, "ready", ["champion"])
    for version, model in ((1, "logistic"), (2, "tree"), ("champion", "tree")):
        answer = client.post(f"/{name}/{version}", json=request)
        assert answer.json() == {"prediction": trained.predictions[model]}

    # Loading what runs is no new start, and needs no files.
    assert client.get(f"/load_model/{name}/sklearn/1").json()["state"] == "ready"
    assert _process(settings, name, "sklearn", 1) == process

    # Bad data harms nobody.
    answer = client.post(f"/{name}/1", json=request | {"data": [[1, 2]]})
    assert answer.status_code == 422
    assert "the model takes 4" in answer.json()["detail"]

    # Killed, it comes back with the next question, even when the registry is away.
    stocked.versions = {}
    os.kill(process, signal.SIGKILL)
    while _process(settings, name, "sklearn", 1) is not None:
        time.sleep(0.02)
    answer = client.post(f"/{name}/1", json=request)
    assert answer.json() == {"prediction": trained.predictions["logistic"]}
    assert _process(settings, name, "sklearn", 1) not in {None, process}

    # Unloaded, it is gone with its process and files; the other one stays.
    process = _process(settings, name, "sklearn", 1)
    assert process is not None
    answer = client.delete(f"/{name}/sklearn/1")
    assert (answer.status_code, answer.json()["state"]) == (200, "unloaded")
    assert not Path(f"/proc/{process}/cmdline").exists()
    assert client.delete(f"/{name}/sklearn/1").status_code == 404
    assert client.post(f"/{name}/1", json=request).status_code == 404
    assert client.delete(f"/{name}/sklearn/champion").json()["version"] == 2
    assert client.get("/loaded_models").json() == []
    assert list((settings.state_dir / "models").iterdir()) == []


def test_what_was_loaded_comes_back_or_says_why_not(
    settings: Settings, stocked: RegistryServer, trained: TrainedModels
) -> None:
    settings.state_dir.mkdir()
    catalog = Catalog(settings.database)
    catalog.record(ModelVersion("linear", 1, "0123"), "sklearn", asked_as="1", alias=False)
    catalog.record(ModelVersion("rose", 1, "4567"), "pyfunc", asked_as="best", alias=True)
    catalog.close()
    with TestClient(create_app(settings)) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        _wait_until_ready(client)
        states = {
            entry["model_name"]: (entry["state"], entry["problem"])
            for entry in client.get("/loaded_models").json()
        }
        assert states["linear"] == ("ready", None)
        assert states["rose"][0] == "failed"
        assert "no model 'rose' version 1" in str(states["rose"][1])
        answer = client.post("/rose/best", json=ROW)
        assert answer.status_code == 404

        # A version of the same number that was deleted and made anew replaces the old one.
        process = _process(settings, "linear", "sklearn", 1)
        stocked.versions["linear", 1] = trained.folder / "tree"
        assert client.get("/load_model/linear/sklearn/1").json()["state"] == "ready"
        assert _process(settings, "linear", "sklearn", 1) != process
        request = {"data": trained.rows, "model_flavor": "sklearn"}
        answer = client.post("/linear/1", json=request)
        assert answer.json() == {"prediction": trained.predictions["tree"]}


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
