"""A real MLflow server with the benchmark's models, trained at the first run and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.serving.client import call
from bench.serving.environments import CACHE, PEERS, NotAvailableError
from bench.serving.processes import Command, Server, free_ports, running
from bench.serving.systems import Rows

#: The longest that MLflow's server may take to answer (seconds).
START_S = 120


@dataclass(frozen=True)
class Registry:
    """A running MLflow server, and what was trained into it."""

    url: str
    models: Path
    """The folder with a `<model>.joblib` for each."""
    rows: Rows
    """100 of four numbers."""
    answers: dict[str, list[int]]
    """By model: what scikit-learn itself predicts for the rows."""

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point an alias at a version."""
        body = {"name": model, "alias": alias, "version": str(version)}
        call(
            f"{self.url}/api/2.0/mlflow/registered-models/alias",
            json.dumps(body).encode(),
            timeout=30,
        )


@contextmanager
def registry(programs: Path) -> Iterator[Registry]:
    """MLflow's server until the end of the block, on SQLite and a folder of artifacts."""
    recipe = [PEERS / "mlflow/requirements.txt", PEERS / "mlflow/train.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in recipe)).hexdigest()[:12]
    folder = CACHE / f"registry-{digest}"
    trained = folder / "answers.json"
    if not trained.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (port,) = free_ports()
    url = f"http://127.0.0.1:{port}"
    command: Command = [
        *(programs / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.sqlite'}"),
        *("--artifacts-destination", folder / "artifacts"),
    ]
    variables = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        # No processes of background jobs beside the server.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with running(Server(command, variables, folder, folder / "server.log")) as server:
        _wait(server, url)
        if not trained.exists():
            _train(programs, url, folder)
        answers = json.loads(trained.read_text())
        yield Registry(url, folder, answers.pop("rows"), answers)


def _wait(server: Server, url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not server.ended():
        try:
            call(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=5)
            return
        except (OSError, ValueError):
            time.sleep(0.2)
    raise NotAvailableError(f"MLflow's server does not answer: {server.last_words()}")


def _train(programs: Path, url: str, folder: Path) -> None:
    done = subprocess.run(
        [programs / "python", PEERS / "mlflow/train.py", folder],
        env={**os.environ, "MLFLOW_TRACKING_URI": url},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotAvailableError(f"The training failed: {done.stderr.strip()[-400:]}")
