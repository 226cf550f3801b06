"""The real thing: gunicorn with two workers, asked over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conftest import TrainedModels
from model_server.settings import Settings
from registry_server import RegistryServer

NAME = "iris%20&%20co."


class Service:
    """One gunicorn on loopback; every request comes by a connection of its own."""

    def __init__(self, settings: Settings, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._log = log
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(log.parent),
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "MODEL_SERVER_STATE_DIR": str(settings.state_dir),
            "MODEL_SERVER_RUNTIME_DIR": str(settings.runtime_dir),
            "MODEL_SERVER_UV": settings.uv,
            "MLFLOW_TRACKING_URI": settings.tracking_uri,
        }
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gunicorn", "--workers", "2"),
                    *("--worker-class", "uvicorn_worker.UvicornWorker"),
                    *("--bind", self.url.removeprefix("http://")),
                    "model_server.asgi:app",
                ],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        for _ in range(600):
            try:
                if self.ask("GET", "/health/ready").status_code == 200:
                    return
            except httpx2.TransportError:
                assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.05)
        pytest.fail(self._log.read_text())

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(child)
            for child in children.split()
            if b"gunicorn" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return httpx2.request(method, f"{self.url}{path}", timeout=90, **options)

    def ask_often(self, method: str, path: str, **options: Any) -> list[Any]:
        """The same question many times at once: both workers answer some."""
        with ThreadPoolExecutor(4) as threads:
            answers = threads.map(lambda _: self.ask(method, path, **options), range(40))
            return [(answer.status_code, answer.json()) for answer in answers]


@pytest.fixture
def service(settings: Settings, stocked: RegistryServer, tmp_path: Path) -> Iterator[Service]:
    assert stocked.versions
    service = Service(settings, tmp_path / "service.log")
    yield service
    service.stop()


def _runners(settings: Settings) -> set[int]:
    own = str(settings.runtime_dir).encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if own in command and b"runner/__main__.py" in command:
            found.add(int(process.name))
    return found


def _wait_for_no_runner(settings: Settings) -> None:
    for _ in range(100):
        if not _runners(settings):
            return
        time.sleep(0.05)
    pytest.fail("runners are left")


def test_two_workers_share_runners_and_one_truth(
    service: Service, settings: Settings, trained: TrainedModels
) -> None:
    body = {"data": trained.rows, "model_flavor": "sklearn"}
    good = {
        version: (200, {"prediction": trained.predictions[model]})
        for version, model in ((1, "logistic"), (2, "tree"))
    }

    # Many first users at once, of two versions: one process for each, whoever asked.
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(
                lambda n: service.ask("POST", f"/{NAME}/{n % 2 + 1}", json=body).json(), range(16)
            )
        )
    assert answers == [good[n % 2 + 1][1] for n in range(16)]
    assert len(_runners(settings)) == 2
    assert len(service.workers()) == 2
    listings = service.ask_often("GET", "/loaded_models")
    assert {
        tuple((model["version"], model["state"]) for model in content) for _, content in listings
    } == {((1, "ready"), (2, "ready"))}

    # One is killed: the other one does not notice, and it comes back, once.
    victim = min(_runners(settings))
    os.kill(victim, signal.SIGKILL)
    while victim in _runners(settings):
        time.sleep(0.02)
    for version in (1, 2):
        answers = service.ask_often("POST", f"/{NAME}/{version}", json=body)
        assert answers == 40 * [good[version]]
    assert len(_runners(settings)) == 2
    assert victim not in _runners(settings)

    # A worker is killed: the runners stay.
    before = _runners(settings)
    os.kill(service.workers()[0], signal.SIGKILL)
    time.sleep(0.5)
    assert service.ask("POST", f"/{NAME}/1", json=body).json() == good[1][1]
    assert _runners(settings) == before

    # One unload is true for every worker.
    assert service.ask("DELETE", f"/{NAME}/sklearn/1").status_code == 200
    assert len(_runners(settings)) == 1
    listings = service.ask_often("GET", "/loaded_models")
    assert {tuple(model["version"] for model in content) for _, content in listings} == {(2,)}

    # A stop ends every process; a start brings back what was loaded.
    service.stop()
    _wait_for_no_runner(settings)
    service.start()
    assert len(_runners(settings)) == 1
    assert service.ask_often("POST", f"/{NAME}/2", json=body) == 40 * [good[2]]

    # The whole service is killed: no runner outlives it.
    for process in (service.process.pid, *service.workers()):
        os.kill(process, signal.SIGKILL)
    _wait_for_no_runner(settings)


def test_a_wrong_setting_is_one_sentence(settings: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import model_server.asgi"],
        env={
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "MODEL_SERVER_STATE_DIR": "here",
            "MODEL_SERVER_UV": settings.uv,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr == (
        "The model server cannot start: MODEL_SERVER_STATE_DIR must be an absolute path.\n"
    )
    assert done.stdout == ""


def test_the_http_workers_are_thin(settings: Settings) -> None:
    """Models and what they need live in the runners only."""
    script = (
        "import json, sys; import model_server.asgi;"
        "print(json.dumps(list({'numpy', 'pandas', 'mlflow', 'sklearn'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "MODEL_SERVER_STATE_DIR": str(settings.state_dir),
            "MODEL_SERVER_UV": settings.uv,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []
