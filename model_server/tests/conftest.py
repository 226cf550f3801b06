import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from light_models import Gate, Shelf, write_uv
from model_server import host as hosting
from model_server import serving
from model_server.settings import Settings
from registry_server import RegistryServer
from servers import kept_port

# The machine may be slow, and what failed once belongs into the tests, not into a folder.
hypothesis.settings.register_profile("here", deadline=None, database=None)
hypothesis.settings.load_profile("here")

# An environment that is the test run's own, so that real runners start without an index.
_UV = """#!/bin/sh
echo "$@" >> "{log}"
env > "{log}.env"
case "$2" in
  venv)
    mkdir bin
    printf '#!/bin/sh\\nexec "{python}" "$@"\\n' > bin/python
    chmod 755 bin/python ;;
  pip)
    if grep -q no-such-package requirements.txt; then
      echo "  x No solution found: no-such-package was not found at $UV_DEFAULT_INDEX" >&2
      exit 1
    fi
    if grep -q far-away requirements.txt; then
      echo "error: Failed to fetch: far-away" >&2
      exit 2
    fi
    if grep -q slow-package requirements.txt; then sleep 30; fi ;;
esac
"""


def coverage_settings() -> dict[str, str]:
    """What has a process that gets an environment of its own measured, too."""
    return {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}


@dataclass(frozen=True)
class TrainedModels:
    """Models as MLflow saves them, and what they answer."""

    folder: Path
    rows: list[list[float]]
    columns: list[str]
    predictions: dict[str, list[Any]]
    probabilities: dict[str, list[list[float]]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModels:
    """An iris classifier on named columns, a tree on arrays, a regression and a fragile model."""
    folder = tmp_path_factory.mktemp("models")
    # What training and MLflow warn of is theirs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.models
        import mlflow.pyfunc
        import mlflow.sklearn

        from iris_models import fit_models

        frame, sample, models = fit_models()
        for name, model in models.items():
            signature = (
                mlflow.models.infer_signature(frame, model.predict(frame))
                if name == "logistic"
                else None
            )
            mlflow.sklearn.save_model(
                model,
                folder / name,
                signature=signature,
                serialization_format="cloudpickle",
                pip_requirements=["mlflow", "scikit-learn"],
            )
        mlflow.pyfunc.save_model(
            folder / "fragile",
            python_model=str(Path(__file__).parent / "models" / "fragile.py"),
            pip_requirements=["mlflow"],
        )
        inputs = {"logistic": sample, "tree": sample.to_numpy(), "linear": sample.to_numpy()}
        return TrainedModels(
            folder=folder,
            rows=sample.to_numpy().tolist(),
            columns=list(frame.columns),
            predictions={
                name: model.predict(inputs[name]).tolist() for name, model in models.items()
            },
            probabilities={
                name: models[name].predict_proba(inputs[name]).tolist()
                for name in ("logistic", "tree")
            },
        )


@pytest.fixture
def registry_server() -> Iterator[RegistryServer]:
    # Where it is away, nobody else shall be in its place.
    with kept_port() as port:
        server = RegistryServer(port)
        yield server
        server.close()


@pytest.fixture
def stocked(registry_server: RegistryServer, trained: TrainedModels) -> RegistryServer:
    """A registry with two versions of one model, a regression and a fragile model."""
    registry_server.versions = {
        ("iris & co.", 1): trained.folder / "logistic",
        ("iris & co.", 2): trained.folder / "tree",
        ("linear", 1): trained.folder / "linear",
        ("fragile", 1): trained.folder / "fragile",
    }
    registry_server.aliases = {("iris & co.", "champion"): 1}
    return registry_server


@pytest.fixture
def uv_log(tmp_path: Path) -> Path:
    return tmp_path / "uv.log"


@pytest.fixture
def settings(tmp_path: Path, registry_server: RegistryServer) -> Settings:
    return make_settings(tmp_path, registry_server.url)


def make_settings(folder: Path, tracking_uri: str) -> Settings:
    """Settings of a server that keeps everything in this folder."""
    uv, log = folder / "uv", folder / "uv.log"
    uv.write_text(_UV.format(log=log, python=sys.executable))
    uv.chmod(0o755)
    log.touch()
    return Settings(
        state_dir=folder / "state",
        # pytest's own folders can be too long for a socket.
        runtime_dir=folder / "r",
        uv=str(uv),
        tracking_uri=tracking_uri,
        load_timeout_seconds=60,
        startup_seconds=60,
        predict_timeout_seconds=20,
        stop_timeout_seconds=2,
    )


@pytest.fixture
def shelf(registry_server: RegistryServer, tmp_path: Path) -> Shelf:
    return Shelf(registry_server, tmp_path / "shelf")


@pytest.fixture
def light(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for models of one short file; the catalog may be shared by several hosts."""
    # On a busy machine, an end that was seen by a socket may take long to be seen by all.
    monkeypatch.setattr(serving, "_END_SECONDS", 10)
    monkeypatch.setattr(hosting, "_REASON_SECONDS", 10)
    return Settings(
        **settings.model_dump()
        | {
            "uv": str(write_uv(tmp_path)),
            "database_url": f"sqlite:///{tmp_path / 'catalog.sqlite'}",
        }
    )


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")
