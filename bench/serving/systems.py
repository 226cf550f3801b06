"""The systems measured: how each is started, asked, and read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from bench.serving import environments
from bench.serving.client import call
from bench.serving.environments import PEERS, ROOT, NotAvailableError
from bench.serving.processes import Command, Server

Rows = list[list[float]]
#: The longest that a start may take, a model's environment included (seconds).
START_S = 300
#: A server on few cores loses with more threads than these for one small prediction; set for all.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """What a system is started with."""

    programs: Path
    """`bin` of its environment."""
    folder: Path
    """Its own, empty at the first start of a run of the benchmark."""
    model: str
    registry: str
    """The address of MLflow's server."""
    models: Path
    """The folder with `<model>.joblib`."""
    ports: list[int]
    """Free ones; the first is for HTTP."""

    @property
    def port(self) -> int:
        """For HTTP."""
        return self.ports[0]


@dataclass(frozen=True)
class Start:
    """A command line, and variables beside those of this program."""

    command: Command
    variables: Mapping[str, str | Path]


@dataclass(frozen=True)
class Protocol:
    """How rows become a request, and a response classes."""

    path: Callable[[str], str]
    question: Callable[[Rows], Any]
    classes: Callable[[Any], list[int]]


@dataclass(frozen=True)
class System:
    """A server of one model, and how it is run here."""

    name: str
    title: str
    setting: str
    """How it is run, for the report."""
    environment: str
    package: str
    protocol: Protocol
    start: Callable[[Place], Start]
    load: str = ""
    """A path to get before the first question."""

    def version(self, programs: Path) -> str:
        """The package it comes from, as installed."""
        if not self.package:
            return f"commit {environments.commit()}"
        return f"{self.package} {environments.version(programs, self.package)}"

    def run(self, place: Place) -> Server:
        """Start it; `place.folder` keeps its log."""
        place.folder.mkdir(parents=True, exist_ok=True)
        start = self.start(place)
        path = f"{place.programs}{os.pathsep}{os.environ['PATH']}"
        variables = {**THREADS, "PATH": path, "MLFLOW_TRACKING_URI": place.registry}
        return Server(
            start.command,
            {**variables, **start.variables},
            place.folder,
            place.folder / "server.log",
        )

    def url(self, place: Place) -> str:
        """Where it answers questions about the model."""
        return f"http://127.0.0.1:{place.port}{self.protocol.path(place.model)}"

    def body(self, rows: Rows) -> bytes:
        """A request's."""
        return json.dumps(self.protocol.question(rows)).encode()

    def predict(self, place: Place, rows: Rows) -> list[int]:
        """Ask once."""
        return self.protocol.classes(call(self.url(place), self.body(rows)))

    def wait(self, server: Server, place: Place, rows: Rows) -> None:
        """Until it predicts; raises NotAvailableError when it ends or takes too long."""
        deadline = time.monotonic() + START_S
        problem = "no answer"
        loaded = not self.load
        while time.monotonic() < deadline:
            if server.ended():
                raise NotAvailableError(f"It ended at its start: {server.last_words()}")
            try:
                if not loaded:
                    path = self.load.format(model=place.model)
                    call(f"http://127.0.0.1:{place.port}{path}", timeout=START_S)
                    loaded = True
                self.predict(place, rows)
                return
            except HTTPError as error:
                problem = f"{error.code} {error.read()[:200].decode(errors='replace')}"
            except (OSError, HTTPException, ValueError, LookupError) as error:
                problem = repr(error)
            time.sleep(0.2)
        raise NotAvailableError(
            f"It did not answer within {START_S} s: {problem} / {server.last_words()}"
        )


def _odsp(place: Place) -> Start:
    variables: dict[str, str | Path] = {
        "PYTHONPATH": ROOT / "model_server/src",
        "MODEL_SERVER_UV": environments.find_uv(),
        # Kept between runs, unlike the state.
        "MODEL_SERVER_UV_CACHE_DIR": environments.CACHE / "uv",
    }
    if index := os.environ.get("UV_DEFAULT_INDEX"):
        variables["MODEL_SERVER_INDEX_URL"] = index
    state = place.folder / "state"
    command: Command = [
        *(place.programs / "python", "-m", "model_server"),
        *("--tracking-uri", place.registry, "--workers", "2"),
        *("--host", "127.0.0.1", "--port", str(place.port), "--state-dir", state),
    ]
    return Start(command, variables)


def _naive(place: Place) -> Start:
    command: Command = [
        *(place.programs / "uvicorn", "naive:app", "--app-dir", PEERS / "mlflow"),
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--no-access-log", "--log-level", "warning"),
    ]
    return Start(command, {"BENCH_MODEL": place.model})


def _mlflow(place: Place) -> Start:
    command: Command = [
        *(place.programs / "mlflow", "models", "serve", "--model-uri", f"models:/{place.model}/1"),
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--env-manager", "local", "--workers", "2"),
    ]
    # Uvicorn's access log costs much; others are measured without one.
    return Start(command, {"UVICORN_ACCESS_LOG": "0"})


def _mlserver(batching: Mapping[str, float]) -> Callable[[Place], Start]:
    def start(place: Place) -> Start:
        http, grpc, metrics = place.ports
        settings = {
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            # Its own process alone is the fastest for LR, and without batching for RF too.
            "parallel_workers": 2 if batching and place.model == "rf" else 0,
            # By default true, with an access log.
            "debug": False,
        }
        model = {
            "name": place.model,
            "implementation": "mlserver_sklearn.SKLearnModel",
            "parameters": {"uri": str(place.models / f"{place.model}.joblib"), "version": "1"},
            **batching,
        }
        (place.folder / "settings.json").write_text(json.dumps(settings))
        (place.folder / "model-settings.json").write_text(json.dumps(model))
        return Start([place.programs / "mlserver", "start", place.folder], {})

    return start


def _bentoml(place: Place) -> Start:
    command: Command = [
        *(place.programs / "bentoml", "serve", "service:Model"),
        *("--working-dir", PEERS / "bentoml"),
        *("--host", "127.0.0.1", "--port", str(place.port)),
    ]
    variables = {
        **_model(place),
        # For LR its batching costs more than it saves.
        "BENCH_BATCH": "1" if place.model == "rf" else "0",
        "BENTOML_HOME": place.folder,
        "BENTOML_DO_NOT_TRACK": "1",
    }
    return Start(command, variables)


def _litserve(place: Place) -> Start:
    command: Command = [place.programs / "python", PEERS / "litserve/server.py"]
    return Start(command, {**_model(place), "BENCH_PORT": str(place.port)})


def _triton(place: Place) -> Start:
    command: Command = [place.programs / "python", PEERS / "triton/server.py"]
    ports = ",".join(str(port) for port in place.ports)
    return Start(
        command, {**_model(place), "BENCH_PORTS": ports, "PYTRITON_HOME": place.folder / "home"}
    )


def _limit(place: Place) -> Start:
    command: Command = [
        *(place.programs / "gunicorn", "--worker-class", "uvicorn_worker.UvicornWorker"),
        *("--workers", "2", "--bind", f"127.0.0.1:{place.port}"),
        *("--chdir", PEERS / "limit", "--log-level", "warning", "server:app"),
    ]
    return Start(command, {})


def _model(place: Place) -> dict[str, str | Path]:
    return {"BENCH_MODEL": place.model, "BENCH_FILE": place.models / f"{place.model}.joblib"}


def _odsp_question(rows: Rows) -> Any:
    return {
        "data": rows,
        "predict_function": "predict",
        "model_flavor": "sklearn",
        "dtype": None,
        "params": None,
    }


def _v2_question(rows: Rows) -> Any:
    tensor = {"name": "rows", "datatype": "FP64", "shape": [len(rows), len(rows[0])]}
    return {"inputs": [{**tensor, "data": [number for row in rows for number in row]}]}


NATIVE = Protocol(lambda model: f"/{model}/1", _odsp_question, lambda answer: answer["prediction"])
V2 = Protocol(
    lambda model: f"/v2/models/{model}/infer",
    _v2_question,
    lambda answer: answer["outputs"][0]["data"],
)
MLFLOW = Protocol(
    lambda _: "/invocations", lambda rows: {"inputs": rows}, lambda answer: answer["predictions"]
)
BENTOML = Protocol(lambda _: "/predict", lambda rows: {"data": rows}, lambda answer: answer)
LITSERVE = Protocol(
    lambda _: "/predict", lambda rows: {"data": rows}, lambda answer: answer["prediction"]
)

LIMIT = System("limit", "bare FastAPI, a constant", "2 workers", "limit", "fastapi", NATIVE, _limit)
SYSTEMS = (
    System(
        "odsp",
        "**ODSP**",
        "2 HTTP workers, one process for the model",
        "odsp",
        "",
        NATIVE,
        _odsp,
        load="/load_model/{model}/sklearn/1",
    ),
    System("naive", "naive FastAPI", "1 worker, sync routes", "mlflow", "fastapi", NATIVE, _naive),
    System(
        "mlflow", "mlflow models serve", "2 workers, pyfunc", "mlflow", "mlflow", MLFLOW, _mlflow
    ),
    System("mlserver", "MLServer", "one process", "mlserver", "mlserver", V2, _mlserver({})),
    System(
        "mlserver-batch",
        "MLServer, batching",
        "64 rows, 5 ms; one process, RF: 2 workers",
        "mlserver",
        "mlserver",
        V2,
        _mlserver({"max_batch_size": 64, "max_batch_time": 0.005}),
    ),
    System(
        "bentoml",
        "BentoML",
        "2 workers; RF: batching, 128 rows",
        "bentoml",
        "bentoml",
        BENTOML,
        _bentoml,
    ),
    System(
        "litserve", "LitServe, batching", "64 rows", "litserve", "litserve", LITSERVE, _litserve
    ),
    System("triton", "NVIDIA Triton", "dynamic batching", "triton", "nvidia-pytriton", V2, _triton),
)
