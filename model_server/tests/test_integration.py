"""From a training to predictions, with a real MLflow and environments built by the real uv."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from model_server import create_app
from model_server.settings import Settings
from servers import kept_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with kept_port() as port:
        yield from _served(folder, port)


def _served(folder: Path, port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--backend-store-uri", f"sqlite:///{folder}/mlflow.sqlite"),
                *("--artifacts-destination", str(folder / "artifacts")),
            ],
            cwd=folder,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def client(tracking_uri: str, tmp_path: Path) -> Iterator[TestClient]:
    uv = Path(sys.executable).with_name("uv")
    program = str(uv) if uv.exists() else shutil.which("uv")
    assert program
    cache = subprocess.run([program, "cache", "dir"], check=True, capture_output=True, text=True)
    settings = Settings(
        state_dir=tmp_path / "state",
        runtime_dir=tmp_path / "r",
        uv=program,
        uv_cache_dir=Path(cache.stdout.strip()),
        index_url=os.environ.get("UV_DEFAULT_INDEX"),
        tracking_uri=tracking_uri,
    )
    with TestClient(create_app(settings)) as client:
        yield client


def test_from_training_to_predictions(client: TestClient, tracking_uri: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
        import mlflow.pyfunc
        import mlflow.sklearn
        from sklearn.datasets import load_breast_cancer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        mlflow.set_tracking_uri(tracking_uri)
        frame, target = load_breast_cancer(return_X_y=True, as_frame=True)
        trained = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, target)
        with mlflow.start_run():
            logged = mlflow.sklearn.log_model(
                trained,
                name="model",
                signature=mlflow.models.infer_signature(frame, target),
                registered_model_name="breast cancer",
            )
        assert logged.model_uri.startswith("models:/m-")
        mlflow.MlflowClient().set_registered_model_alias("breast cancer", "champion", "1")
        for version in ("24.2", "25.0"):
            with mlflow.start_run():
                mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).parent / "models" / "versions.py"),
                    pip_requirements=[f"mlflow=={mlflow.__version__}", f"packaging=={version}"],
                    registered_model_name="versions",
                )

    sample = frame.iloc[::50]
    for flavor in ("pyfunc", "sklearn"):
        for function in ("predict", "predict_proba"):
            request: dict[str, Any] = {
                "data": sample.to_numpy().tolist(),
                "model_flavor": flavor,
                "predict_function": function,
            }
            answer = client.post("/breast cancer/champion", json=request)
            assert answer.status_code == 200, answer.text
            expected = getattr(trained, function)(sample)
            # Threads and memory layout may change a float's last bits.
            assert np.array(answer.json()["prediction"]) == pytest.approx(expected, rel=1e-9)
    records = sample.to_dict(orient="records")
    answer = client.post("/breast cancer/1", json={"data": records})
    assert answer.json() == {"prediction": trained.predict(sample).tolist()}

    # Requirements that exclude each other, side by side.
    for number, version in ((1, "24.2"), (2, "25.0")):
        answer = client.post(f"/versions/{number}", json={"data": ["packaging"]})
        assert answer.json() == {"prediction": [version]}

    assert client.get("/load_model/versions/pyfunc/latest").json()["version"] == 2
    assert client.get("/load_model/versions/pyfunc/3").status_code == 404
    assert client.get("/load_model/versions/pyfunc/champion").status_code == 404
    answer = client.get("/load_model/versions/sklearn/1")
    assert answer.status_code == 422
    assert "cannot be loaded as sklearn" in answer.json()["detail"]
    states = {
        (entry["model_name"], entry["model_flavor"], entry["version"]): entry["state"]
        for entry in client.get("/loaded_models").json()
    }
    assert states == {
        ("breast cancer", "pyfunc", 1): "ready",
        ("breast cancer", "sklearn", 1): "ready",
        ("versions", "pyfunc", 1): "ready",
        ("versions", "pyfunc", 2): "ready",
    }
    for name, flavor, number in states:
        assert client.delete(f"/{name}/{flavor}/{number}").status_code == 200
    assert client.get("/loaded_models").json() == []


@pytest.mark.parametrize("name", ["%2e%2e", "a:b", "%20", "nothing"])
@pytest.mark.parametrize("reference", ["1", "champion"])
def test_no_name_is_another_ones_mistake(client: TestClient, name: str, reference: str) -> None:
    answer = client.get(f"/load_model/{name}/pyfunc/{reference}")
    assert (answer.status_code, "MLflow has no model" in answer.text) == (404, True), answer.text
