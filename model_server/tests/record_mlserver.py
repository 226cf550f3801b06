"""Ask a real MLServer what `test_mlserver.py` asks ours, and keep its answers.

To be run by hand, by the Python of an environment with MLServer and its runtime for scikit-learn,
as `bench/serving/peers/mlserver/requirements.txt` locks them:

    uv venv /tmp/mlserver
    uv pip install --python /tmp/mlserver --require-hashes \
        --requirement ../bench/serving/peers/mlserver/requirements.txt
    /tmp/mlserver/bin/python tests/record_mlserver.py

It trains the models of `iris_models.py`, serves them on loopback, and writes `data/mlserver.json`.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iris_models import IrisModels

RECORD = Path(__file__).parent / "data" / "mlserver.json"
START_SECONDS = 60
ANSWER_SECONDS = 120

ROWS = [[5.1, 3.5, 1.4, 0.2], [5.0, 2.0, 3.5, 1.0], [6.9, 3.2, 5.7, 2.3]]
WHOLE = [[5, 3, 1, 0], [5, 2, 4, 1], [7, 3, 6, 2]]
COLUMNS = ("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)")
#: The model on arrays, the one on named columns with texts for classes, and the regression.
TREE, LOGISTIC, LINEAR = "iris/versions/2", "iris/versions/1", "linear/versions/1"


def tensor(data: list[Any] = ROWS, datatype: str = "FP64", **other: Any) -> dict[str, Any]:
    """An input of rows, flat as most clients send it."""
    flat = [value for row in data for value in row]
    shape = [len(data), len(data[0])]
    return {"name": "x", "shape": shape, "datatype": datatype, "data": flat} | other


def columns(data: list[Any] = ROWS, datatype: str = "FP64", sizes: int = 2) -> list[dict[str, Any]]:
    """An input for each column, of shape [n, 1] or [n]."""
    shape = [len(data), 1][:sizes]
    return [
        {"name": name, "shape": shape, "datatype": datatype, "data": list(values)}
        for name, values in zip(COLUMNS, zip(*data, strict=True), strict=True)
    ]


def asked(model: str, *inputs: dict[str, Any], **other: Any) -> tuple[str, str, Any]:
    """An infer request."""
    return "POST", f"/v2/models/{model}/infer", {"inputs": list(inputs)} | other


def outputs(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    """Outputs that are asked for."""
    told = {"parameters": parameters} if parameters else {}
    return [{"name": name} | told for name in names]


PD = {"content_type": "pd"}
NP = {"content_type": "np"}

#: In this order, as some change what is loaded. A body that is a text is sent as it is.
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "live": ("GET", "/v2/health/live", None),
    "ready": ("GET", "/v2/health/ready", None),
    "server": ("GET", "/v2", None),
    "server: with a slash": ("GET", "/v2/", None),
    "metadata": ("GET", "/v2/models/iris", None),
    "metadata: version": ("GET", f"/v2/models/{LOGISTIC}", None),
    "metadata: no such model": ("GET", "/v2/models/rose", None),
    "metadata: no such version": ("GET", "/v2/models/iris/versions/7", None),
    "model ready": ("GET", "/v2/models/iris/ready", None),
    "model ready: version": ("GET", f"/v2/models/{LOGISTIC}/ready", None),
    "model ready: no such model": ("GET", "/v2/models/rose/ready", None),
    "model ready: no such version": ("GET", "/v2/models/iris/versions/7/ready", None),
    "infer: rows": asked(TREE, tensor()),
    "infer: one row": asked(TREE, tensor(ROWS[:1])),
    "infer: nested": asked(TREE, tensor() | {"data": ROWS}),
    "infer: without a version": asked("iris", tensor()),
    "infer: FP32": asked(TREE, tensor(datatype="FP32")),
    "infer: INT64": asked(TREE, tensor(WHOLE, "INT64")),
    "infer: UINT8": asked(TREE, tensor(WHOLE, "UINT8")),
    "infer: whole numbers as FP64": asked(TREE, tensor(WHOLE)),
    "id: a text": asked(TREE, tensor(), id="r-7"),
    "id: an empty text": asked(TREE, tensor(), id=""),
    "infer: np": asked(TREE, tensor(), parameters=NP),
    "infer: np input": asked(TREE, tensor(parameters=NP)),
    "infer: other parameters": asked(TREE, tensor(), parameters={"note": "mine"}),
    "infer: predict": asked(TREE, tensor(), outputs=outputs("predict")),
    "infer: predict as np": asked(TREE, tensor(), outputs=outputs("predict", **NP)),
    "infer: predict_proba": asked(TREE, tensor(), outputs=outputs("predict_proba")),
    "infer: both functions": asked(TREE, tensor(), outputs=outputs("predict", "predict_proba")),
    "infer: no outputs": asked(TREE, tensor(), outputs=[]),
    "infer: regression": asked(LINEAR, tensor()),
    "infer: texts": asked(LOGISTIC, tensor()),
    "infer: texts as str": asked(
        LOGISTIC, tensor(), outputs=outputs("predict", content_type="str")
    ),
    "infer: pd": asked(LOGISTIC, *columns(), parameters=PD),
    "infer: pd, predict_proba": asked(
        LOGISTIC, *columns(), parameters=PD, outputs=outputs("predict_proba")
    ),
    "infer: pd, [n]": asked(LOGISTIC, *columns(sizes=1), parameters=PD),
    "infer: pd, FP32": asked(
        LOGISTIC, *columns(datatype="FP32"), parameters=PD, outputs=outputs("predict_proba")
    ),
    "infer: pd, INT64": asked(
        LOGISTIC, *columns(WHOLE, "INT64"), parameters=PD, outputs=outputs("predict_proba")
    ),
    "infer: columns without pd": asked(LOGISTIC, *columns()),
    "wrong: no such model": asked("rose", tensor()),
    "wrong: no such version": asked("iris/versions/7", tensor()),
    "wrong: no such output": asked(TREE, tensor(), outputs=outputs("score")),
    "wrong: no predict_proba": asked(LINEAR, tensor(), outputs=outputs("predict_proba")),
    "data: columns too few": asked(TREE, tensor([[1.0, 2.0]])),
    "data: pd, a column too few": asked(LOGISTIC, *columns()[:3], parameters=PD),
    "data: pd, another column": asked(LOGISTIC, *columns()[:3], tensor(), parameters=PD),
    "data: values too few": asked(TREE, tensor(shape=[3, 5])),
    "wrong: a size of -1": asked(TREE, tensor(shape=[-1, 4])),
    "data: a text": asked(TREE, tensor([["a", "b", "c", "d"]])),
    "data: a missing value": asked(LINEAR, tensor([[5.1, None, 1.4, 0.2]])),
    "form: a datatype": asked(TREE, tensor(datatype="FP8")),
    "data: a datatype too small": asked(TREE, tensor([[300, 1, 1, 1]], "UINT8")),
    "wrong: a content type": asked(TREE, tensor(), parameters={"content_type": "hg"}),
    "form: an id": asked(TREE, tensor(), id=7),
    "form: no name": asked(TREE, {"shape": [1], "datatype": "FP64", "data": [1.0]}),
    "wrong: no inputs": asked(TREE),
    "form: an empty object": ("POST", f"/v2/models/{TREE}/infer", {}),
    "form: no JSON": ("POST", f"/v2/models/{TREE}/infer", "{"),
    "form: no body": ("POST", f"/v2/models/{TREE}/infer", ""),
    "form: GET": ("GET", f"/v2/models/{TREE}/infer", None),
    "index": ("POST", "/v2/repository/index", {}),
    "index: ready": ("POST", "/v2/repository/index", {"ready": True}),
    "index: no body": ("POST", "/v2/repository/index", ""),
    "unload": ("POST", "/v2/repository/models/linear/unload", {}),
    "unloaded: unload": ("POST", "/v2/repository/models/linear/unload", {}),
    "unloaded: index": ("POST", "/v2/repository/index", {"ready": True}),
    "unloaded: ready": ("GET", "/v2/models/linear/ready", None),
    "unloaded: infer": asked("linear", tensor()),
    "load": ("POST", "/v2/repository/models/linear/load", {"parameters": {"version": "1"}}),
    "load: again": ("POST", "/v2/repository/models/linear/load", {}),
    "loaded: infer": asked("linear", tensor()),
    "load: no such model": (
        "POST",
        "/v2/repository/models/rose/load",
        {"parameters": {"version": "1"}},
    ),
    "unload: no such model": ("POST", "/v2/repository/models/rose/unload", {}),
}


def store(iris: "IrisModels", folder: Path, ports: list[int]) -> None:
    """Lay out the models, and say what a registry with signatures would know of them."""
    import joblib

    assert tuple(iris.frame.columns) == COLUMNS
    assert iris.sample.to_numpy().tolist() == ROWS
    http, grpc, metrics = ports
    settings = {
        "host": "127.0.0.1",
        "http_port": http,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "parallel_workers": 0,
        "debug": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    named = [{"name": name, "datatype": "FP64", "shape": [-1, 1]} for name in COLUMNS]
    texts = [{"name": "predict", "datatype": "BYTES", "shape": [-1, 1]}]
    for estimator, name, number, inputs, results in (
        ("logistic", "iris", "1", named, texts),
        ("tree", "iris", "2", [], []),
        ("linear", "linear", "1", [], []),
    ):
        place = folder / estimator
        place.mkdir()
        joblib.dump(iris.models[estimator], place / "model.joblib")
        model = {
            "name": name,
            "implementation": "mlserver_sklearn.SKLearnModel",
            "platform": "sklearn",
            "versions": [number],
            "inputs": inputs,
            "outputs": results,
            "parameters": {"uri": "./model.joblib", "version": number},
        }
        (place / "model-settings.json").write_text(json.dumps(model))


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(port: int, method: str, path: str, body: Any) -> dict[str, Any]:
    """One answer: status, content type, and content as JSON; None where there is none."""
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    content = body if isinstance(body, str | None) else json.dumps(body)
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    kind = response.headers.get("Content-Type")
    is_json = kind is not None and kind.startswith("application/json")
    answer = json.loads(text) if is_json else (text.decode() or None)
    return {"status": response.status, "content_type": kind, "answer": answer}


def record(port: int, process: "subprocess.Popen[bytes]") -> list[dict[str, Any]]:
    """All requests with their answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if ask(port, *REQUESTS["ready"])["status"] == 200:
                break
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("MLServer does not start; it has said why.")
        time.sleep(0.2)
    exchanges = []
    for name, (method, path, body) in REQUESTS.items():
        exchange = {"name": name, "method": method, "path": path, "body": body}
        exchange |= ask(port, method, path, body)
        answer = exchange["answer"]
        if isinstance(answer, dict) and "id" in answer and "id" not in body:
            # A random one; every record would be another.
            answer["id"] = "made up"
        exchanges.append(exchange)
    return exchanges


def main() -> None:
    """Write the record."""
    # Not needed by those who read the requests only.
    from iris_models import fit_models

    ports = free_ports(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(fit_models(), folder, ports)
        program = Path(sys.executable).with_name("mlserver")
        process = subprocess.Popen([program, "start", folder], cwd=folder)
        try:
            exchanges = record(ports[0], process)
        finally:
            process.terminate()
            process.wait(START_SECONDS)
    about = {
        "mlserver": version("mlserver"),
        "scikit-learn": version("scikit-learn"),
        "recorded": datetime.now(UTC).date().isoformat(),
    }
    lines = ",\n".join(json.dumps(exchange) for exchange in exchanges)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(f'{{"about": {json.dumps(about)},\n"exchanges": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
