"""The real thing: gunicorn with two workers, asked over HTTP."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import pytest

from conftest import coverage_settings
from hosts import eventually, runners_of
from light_models import Gate, Shelf
from model_server.settings import Settings

ROW = {"data": ["a"]}


class Service:
    """One service on loopback; every request comes by a connection of its own."""

    def __init__(self, settings: Settings, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._log = log
        self._lock = settings.sockets / "workers.lock"
        self._environment = coverage_settings() | {
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
                    *(sys.executable, "-m", "model_server"),
                    *("--port", self.url.rpartition(":")[2]),
                ],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        try:
            return self.ask("GET", "/health/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def workers(self) -> list[int]:
        """The workers that have come up."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split() if self._serves(Path("/proc", child))]

    def _serves(self, process: Path) -> bool:
        """Whether it holds what every worker of the service holds."""
        with contextlib.suppress(OSError):
            opened = [descriptor.readlink() for descriptor in (process / "fd").iterdir()]
            return self._lock in opened
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        # Nothing here speaks TLS, and reading all certificates for each request takes its time.
        return httpx2.request(method, f"{self.url}{path}", timeout=90, verify=False, **options)

    def ask_often(self, method: str, path: str, **options: Any) -> list[Any]:
        """The same question many times at once: both workers answer some."""
        with ThreadPoolExecutor(4) as threads:
            answers = threads.map(lambda _: self.ask(method, path, **options), range(40))
            return [(answer.status_code, answer.json()) for answer in answers]

    def answer(self, path: str) -> Any:
        got = self.ask("POST", path, json=ROW)
        return got.json()["prediction"][0] if got.status_code == 200 else got.status_code


@pytest.fixture
def service(light: Settings, shelf: Shelf, tmp_path: Path) -> Iterator[Service]:
    for version, answer in ((1, "one"), (2, "two")):
        shelf.put("rose", version, answer)
    service = Service(light, tmp_path / "service.log")
    yield service
    service.stop()


def _killed(process: int) -> None:
    descriptor = os.pidfd_open(process)
    os.kill(process, signal.SIGKILL)
    gone, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    assert gone


def test_two_workers_share_runners_and_one_truth(service: Service, light: Settings) -> None:
    # Many first users at once, of two versions: one process for each, whoever asked.
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: service.answer(f"/rose/{n % 2 + 1}"), range(16)))
    assert answers == 8 * ["one", "two"]
    runners = runners_of(light)
    assert len(runners) == 2
    listings = service.ask_often("GET", "/loaded_models")
    assert {
        tuple((model["version"], model["state"]) for model in content) for _, content in listings
    } == {((1, "ready"), (2, "ready"))}

    # One crashes: the other one does not notice, callers are told at once, and it comes back once.
    victim = min(runners)
    _killed(victim)
    with ThreadPoolExecutor(4) as threads:
        both = [threads.submit(service.answer, f"/rose/{n % 2 + 1}") for n in range(40)]
        answers = [job.result() for job in both]
    other = "two" if set(answers[::2]) != {"one"} else "one"
    assert answers.count(other) == 20
    assert set(answers) <= {503, "one", "two"}
    for version, answer in ((1, "one"), (2, "two")):
        eventually(partial(service.answer, f"/rose/{version}"), wanted=answer)
    assert len(runners_of(light)) == 2
    assert victim not in runners_of(light)

    # One unload is true for every worker, at once.
    assert service.ask("DELETE", "/rose/pyfunc/1").status_code == 200
    listings = service.ask_often("GET", "/loaded_models")
    assert {tuple(model["version"] for model in content) for _, content in listings} == {(2,)}
    assert len(runners_of(light)) == 1


def test_after_one_unload_no_worker_answers_from_the_old_runner(
    service: Service, shelf: Shelf
) -> None:
    shelf.point("rose", "champion", 1)
    for path in ("/rose/champion", "/rose/1"):
        assert service.ask_often("POST", path, json=ROW) == 40 * [(200, {"prediction": ["one"]})]
    shelf.registry.versions.clear()
    assert service.ask("DELETE", "/rose/pyfunc/champion").status_code == 200
    for path in ("/rose/champion", "/rose/1"):
        assert {status for status, _ in service.ask_often("POST", path, json=ROW)} == {404}


def test_workers_that_are_killed_change_nothing(service: Service, light: Settings) -> None:
    service.ask("GET", "/load_model/rose/pyfunc/1")
    before = runners_of(light)
    for worker in service.workers():
        _killed(worker)
        eventually(lambda: len(service.workers()), wanted=2)
        assert service.answer("/rose/1") == "one"
    assert runners_of(light) == before
    # Whichever of them has led, there is one that leads.
    (runner,) = before
    _killed(runner)
    eventually(lambda: service.answer("/rose/1"), wanted="one")


def test_a_worker_that_is_killed_while_it_loads_leaves_it_to_others(
    service: Service, light: Settings, shelf: Shelf, gate: Gate
) -> None:
    shelf.put("oak", 1, "oak", load=gate.load)
    with ThreadPoolExecutor(1) as threads:
        cut_off = threads.submit(service.ask, "GET", "/load_model/oak/pyfunc/1")
        held = gate.wait()
        (runner,) = runners_of(light)
        status = Path(f"/proc/{runner}/status").read_text()
        loads = int(status.partition("PPid:")[2].split()[0])
        _killed(loads)
        with pytest.raises(httpx2.TransportError):
            cut_off.result()
        os.close(held)
        eventually(lambda: len(service.workers()), wanted=2)
        again = threads.submit(service.answer, "/oak/1")
        gate.open()
        assert again.result() == "oak"
    eventually(lambda: len(runners_of(light)), wanted=1)


def test_a_stop_ends_every_process_and_a_start_brings_them_back(
    service: Service, light: Settings
) -> None:
    service.ask("GET", "/load_model/rose/pyfunc/2")
    service.stop()
    eventually(lambda: runners_of(light), wanted={})
    service.start()
    assert len(runners_of(light)) == 1
    assert service.ask_often("POST", "/rose/2", json=ROW) == 40 * [(200, {"prediction": ["two"]})]
    # The whole service is killed: no runner outlives it.
    for process in (service.process.pid, *service.workers()):
        os.kill(process, signal.SIGKILL)
    eventually(lambda: runners_of(light), wanted={})


def test_alias_moves_fail_no_request(service: Service, shelf: Shelf) -> None:
    shelf.point("rose", "champion", 1)
    assert service.answer("/rose/champion") == "one"
    done = Event()

    def ask() -> list[Any]:
        answers = []
        with httpx2.Client(base_url=service.url, timeout=30, verify=False) as client:
            while not done.is_set():
                answer = client.post("/rose/champion", json=ROW)
                answers.append((answer.status_code, answer.text))
        return answers

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        try:
            for version, answer in ((2, "two"), (1, "one"), (2, "two")):
                shelf.point("rose", "champion", version)
                # Noticed within five seconds; a busy machine may take more.
                eventually(lambda: service.answer("/rose/champion"), wanted=answer, seconds=30)
        finally:
            done.set()
    good = {(200, f'{{"prediction":["{answer}"]}}') for answer in ("one", "two")}
    for job in asking:
        assert set(job.result()) == good


def test_the_http_workers_are_thin(settings: Settings) -> None:
    """Models and what they need live in the runners only."""
    script = (
        "import json, sys; import model_server.__main__;"
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
    # Before it come the lines of the log.
    assert json.loads(done.stdout.splitlines()[-1]) == []
