"""The real thing: gunicorn with two workers, asked over HTTP."""

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from conftest import coverage_settings
from hosts import eventually, runners_of
from light_models import Gate, Shelf
from model_server.settings import Settings
from model_server.worker import Worker, _JoiningTransport
from servers import kept_port, served

ROW = {"data": ["a"]}
# Told by a signal, a worker's loop hangs; gunicorn waits for it no longer than this.
SHORT_OF_PATIENCE = """
import sys, time
from pathlib import Path
from model_server import __main__ as command, worker

set_back, usual = Path(sys.argv.pop(1)), time.time
time.time = lambda: usual() - 3600 * set_back.exists()
worker.Worker.handle_usr1 = lambda *_: time.sleep(60)

class Gunicorn(command._Gunicorn):
    def load_config(self):
        super().load_config()
        self.cfg.set("timeout", 10)

command._Gunicorn = Gunicorn
sys.exit(command.main())
"""
FORGED = {
    "X-Forwarded-User": "forged",
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "Forwarded": "for=203.0.113.7;proto=https",
}


class Service:
    """One service on loopback; every request comes by a connection of its own."""

    def __init__(
        self,
        settings: Settings,
        log: Path,
        *,
        command: Sequence[str | Path] = ("-m", "model_server"),
        **environment: str,
    ) -> None:
        self._held = ExitStack()
        self.address = "127.0.0.1", self._held.enter_context(kept_port())
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._command = command
        self._log = log
        self._lock = settings.sockets / "workers.lock"
        self._environment = {
            **coverage_settings(),
            **environment,
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
                    *(sys.executable, *self._command),
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
            ready = self.ask("GET", "/health/ready").status_code == 200
        except httpx2.TransportError:
            return False
        return ready and len(self.workers()) == 2

    def workers(self) -> list[int]:
        """The workers that have come up."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split() if self._serves(Path("/proc", child))]

    def _serves(self, process: Path) -> bool:
        """Whether it holds what every worker of the service holds."""
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                # One that was closed meanwhile was another.
                with contextlib.suppress(FileNotFoundError):
                    if descriptor.readlink() == self._lock:
                        return True
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def close(self) -> None:
        self.stop()
        self._held.close()

    def refuses(self) -> bool:
        """Whether nobody takes connections any more."""
        try:
            socket.create_connection(self.address, timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

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

    def counted(self) -> dict[str, float]:
        """What its metrics say, summed up over all labels."""
        counted: dict[str, float] = {}
        for family in text_string_to_metric_families(self.ask("GET", "/metrics").text):
            for sample in family.samples:
                counted[sample.name] = counted.get(sample.name, 0) + sample.value
        return counted

    @contextmanager
    def only(self, worker: int) -> Iterator[None]:
        """Have all other workers stand still, so that this one answers."""
        others = [other for other in self.workers() if other != worker]
        for other in others:
            os.kill(other, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)


@pytest.fixture
def service(light: Settings, shelf: Shelf, tmp_path: Path) -> Iterator[Service]:
    for version, answer in ((1, "one"), (2, "two")):
        shelf.put("rose", version, answer)
    service = Service(light, tmp_path / "service.log")
    yield service
    service.close()


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


def test_what_was_asked_before_a_stop_is_answered(
    service: Service, shelf: Shelf, gate: Gate
) -> None:
    shelf.put("oak", 1, "oak", predict=gate.load)
    assert service.ask("GET", "/load_model/oak/pyfunc/1").status_code == 200
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(service.answer, "/oak/1")
        held = gate.wait()
        service.process.terminate()
        eventually(service.refuses)
        # Longer than idle connections are kept for a last request.
        time.sleep(3)
        assert service.process.poll() is None
        os.close(held)
        assert asked.result() == "oak"
    assert service.process.wait(60) == 0


def test_only_a_worker_whose_loop_hangs_is_aborted(
    light: Settings, shelf: Shelf, gate: Gate, tmp_path: Path
) -> None:
    set_back, log = tmp_path / "the clock is set back", tmp_path / "service.log"
    shelf.put("oak", 1, "oak", load=gate.load)
    service = Service(light, log, command=("-c", SHORT_OF_PATIENCE, set_back))
    try:
        before = set(service.workers())
        with ThreadPoolExecutor(1) as threads:
            loaded = threads.submit(service.ask, "GET", "/load_model/oak/pyfunc/1")
            held = gate.wait()
            service.process.send_signal(signal.SIGHUP)
            # One of the old ones loads.
            eventually(lambda: len(service.workers()), wanted=3)
            hangs, *_ = set(service.workers()) - before
            set_back.touch()
            os.kill(hangs, signal.SIGUSR1)
            eventually(lambda: "WORKER TIMEOUT" in log.read_text())
            # As long as any of the others can have been silent.
            time.sleep(2)
            os.close(held)
            assert loaded.result().status_code == 200
        assert re.findall(r"WORKER TIMEOUT \(pid:(\d+)\)", log.read_text()) == [str(hangs)]
        eventually(lambda: len(service.workers()), wanted=2)
        assert service.answer("/oak/1") == "oak"
    finally:
        service.close()


@contextmanager
def _half_a_request(service: Service) -> Iterator[None]:
    """One that a worker waits for the rest of."""
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as half:
        half.settimeout(60)
        half.sendall(
            b"POST /rose/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        )
        assert half.recv(100).startswith(b"HTTP/1.1 100 ")
        half.sendall(b"[")
        yield


def test_half_a_request_keeps_no_old_worker_for_ever(light: Settings, tmp_path: Path) -> None:
    limits = {f"MODEL_SERVER_{kind}_TIMEOUT_SECONDS": "1" for kind in ("LOAD", "PREDICT")}
    service = Service(light, tmp_path / "service.log", **limits)
    try:
        before = set(service.workers())
        with _half_a_request(service):
            service.process.send_signal(signal.SIGHUP)
            told = time.monotonic()
            eventually(lambda: before & set(service.workers()), wanted=set())
        # One that nothing is under way on has ended long before.
        assert time.monotonic() - told > 3
    finally:
        service.close()


def test_an_old_worker_that_lingers_takes_the_place_of_no_new_one(service: Service) -> None:
    old = set(service.workers())

    def old_and_new() -> tuple[int, int]:
        workers = set(service.workers())
        return len(workers & old), len(workers - old)

    with _half_a_request(service):
        service.process.send_signal(signal.SIGHUP)
        eventually(old_and_new, wanted=(1, 2))
        for worker in set(service.workers()) - old:
            _killed(worker)
        eventually(old_and_new, wanted=(1, 2))
        assert service.answer("/rose/1") == "one"
        # One fewer and one more: of those that stay.
        service.process.send_signal(signal.SIGTTOU)
        eventually(old_and_new, wanted=(1, 1))
        service.process.send_signal(signal.SIGTTIN)
        eventually(old_and_new, wanted=(1, 2))
        # The next reload replaces those, not the one that lingers.
        newer = set(service.workers()) - old
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: newer & set(service.workers()), wanted=set())
        eventually(old_and_new, wanted=(1, 2))
    eventually(old_and_new, wanted=(0, 2))


def test_a_reload_with_a_broken_certificate_changes_nothing_and_says_so(
    light: Settings, shelf: Shelf, tmp_path: Path
) -> None:
    pem, key, log = tmp_path / "me.pem", tmp_path / "me.key", tmp_path / "service.log"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-noenc", "-subj", "/CN=me", "-out", pem, "-keyout", key),
        ],
        capture_output=True,
        check=True,
    )
    both = pem.read_text() + key.read_text()
    pem.write_text(both)
    shelf.put("rose", 1, "one")
    service = Service(light, log, MLFLOW_TRACKING_CLIENT_CERT_PATH=str(pem))
    try:
        before = set(service.workers())
        pem.write_text(both[: len(both) // 2])
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: '"not reloaded"' in log.read_text())
        (line,) = [line for line in log.read_text().splitlines() if '"not reloaded"' in line]
        reason = json.loads(line)["reason"]
        assert reason.startswith(f"MLFLOW_TRACKING_CLIENT_CERT_PATH {pem} cannot be used (")
        assert set(service.workers()) == before
        assert service.answer("/rose/1") == "one"
        pem.write_text(both)
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: before & set(service.workers()), wanted=set())
        assert service.answer("/rose/1") == "one"
    finally:
        service.close()


def test_workers_end_with_their_first_process(service: Service, light: Settings) -> None:
    service.ask("GET", "/load_model/rose/pyfunc/1")
    _killed(service.process.pid)
    service.process.wait()
    eventually(service.refuses)
    eventually(lambda: runners_of(light), wanted={})
    # Its place is free.
    service.start()
    assert service.answer("/rose/1") == "one"


def test_metrics_count_what_a_killed_worker_has_answered(service: Service) -> None:
    service.ask("GET", "/load_model/rose/pyfunc/1")
    for worker in service.workers():
        with service.only(worker):
            assert [service.answer("/rose/1") for _ in range(5)] == 5 * ["one"]
    # An answer is counted after it was sent.
    eventually(lambda: service.counted()["model_server_rows_total"], wanted=10)
    _killed(service.workers()[0])
    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(service.ask, "GET", "/metrics") for _ in range(80)]
    assert {job.result().status_code for job in asking} == {200}
    eventually(lambda: service.counted()["model_server_workers"], wanted=2)
    assert service.answer("/rose/1") == "one"
    eventually(lambda: service.counted()["model_server_rows_total"], wanted=11)


def test_alias_moves_fail_no_request(service: Service, shelf: Shelf) -> None:
    shelf.point("rose", "champion", 1)
    assert service.answer("/rose/champion") == "one"
    done = Event()

    def ask() -> list[Any]:
        answers = []
        with httpx2.Client(base_url=service.url, timeout=60, verify=False) as client:
            while not done.is_set():
                answer = client.post("/rose/champion", json=ROW)
                answers.append((answer.status_code, answer.text))
        return answers

    seconds = []
    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        try:
            for version, answer in ((2, "two"), (1, "one"), (2, "two")):
                moved = time.monotonic()
                shelf.point("rose", "champion", version)
                eventually(lambda: service.answer("/rose/champion"), wanted=answer, seconds=30)
                seconds.append(time.monotonic() - moved)
        finally:
            done.set()
    good = {(200, f'{{"prediction":["{answer}"]}}') for answer in ("one", "two")}
    for job in asking:
        assert set(job.result()) == good
    # Noticed within five seconds. All but the first are moved right after the registry was asked,
    # and wait until it is asked again; one of them may be held up by a busy machine.
    assert min(seconds[1:]) < 5, seconds


def test_the_http_workers_are_thin(light: Settings, shelf: Shelf, tmp_path: Path) -> None:
    """Models and what they need live in the runners only, whatever the workers have done."""
    shelf.put("rose", 1, "one")
    log = tmp_path / "service.log"
    # Each module that a process imports is a line of the log.
    service = Service(light, log, PYTHONPROFILEIMPORTTIME="1")
    try:
        tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}
        for flavor in ("pyfunc", "sklearn"):
            assert service.ask("GET", f"/load_model/rose/{flavor}/1").status_code == 200
            rows = ROW | {"model_flavor": flavor}
            tensors = {"inputs": [tensor], "parameters": {"model_flavor": flavor}}
            for worker in service.workers():
                with service.only(worker):
                    answers = [
                        service.ask("POST", "/rose/1", json=rows),
                        service.ask("POST", "/v2/models/rose/versions/1/infer", json=tensors),
                        service.ask("GET", "/metrics"),
                    ]
                    assert [answer.status_code for answer in answers] == 3 * [200]
        assert any(_has_numpy(runner) for runner in runners_of(light))
        assert not any(_has_numpy(process) for process in (service.process.pid, *service.workers()))
    finally:
        service.close()
    imported = set(re.findall(r"^import time:.*\| +(\w+)", log.read_text(), re.MULTILINE))
    assert {"fastapi", "gunicorn", "prometheus_client"} <= imported
    assert not {"numpy", "pandas", "scipy", "sklearn", "mlflow"} & imported


def _has_numpy(process: int) -> bool:
    return "/numpy/" in Path(f"/proc/{process}/maps").read_text()


def test_what_callers_say_of_themselves_is_not_in_the_log(service: Service, tmp_path: Path) -> None:
    assert service.ask("POST", "/rose/1", json=ROW, headers=FORGED).status_code == 200
    assert service.ask("GET", "/nothing", headers=FORGED).status_code == 404
    log = tmp_path / "service.log"
    # A line is written when its answer is sent already.
    eventually(lambda: sorted(line["status"] for line in _requests(log)), [200, 404])
    assert {line["user"] for line in _requests(log)} == {None}
    assert "forged" not in log.read_text()
    assert "203.0.113.7" not in log.read_text()
    # Nor does the web server write lines of its own.
    assert "uvicorn.access" not in log.read_text()


def _requests(log: Path) -> list[dict[str, Any]]:
    """What it tells of requests but those for readiness; the last line may be half written."""
    lines = log.read_text().splitlines(keepends=True)
    told = [json.loads(line) for line in lines if '"message":"request"' in line and "}\n" in line]
    return [line for line in told if line["route"] != "/health/ready"]


def test_no_header_says_where_a_request_comes_from() -> None:
    """Uvicorn would believe whoever calls from its own host."""
    seen = []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append((scope["client"][0], scope["scheme"]))
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

    with served(app, **Worker.CONFIG_KWARGS) as url:
        assert httpx2.get(url, headers=FORGED, timeout=60).status_code == 204
    assert seen == [("127.0.0.1", "http")]


def test_a_short_answer_is_sent_in_one_piece(service: Service) -> None:
    """As seen by whoever takes what has come at once, before all else that is there."""
    body = json.dumps(ROW).encode()

    def request(number: int) -> bytes:
        head = f"POST /rose/1 HTTP/1.1\r\nhost: a\r\nx-request-id: {number}-\r\n"
        kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        return (head + kind).encode() + body

    assert service.ask("POST", "/rose/1", json=ROW).status_code == 200
    with socket.create_connection(service.address, timeout=60) as connection:
        for number in range(50):
            connection.sendall(request(number))
            answer = connection.recv(2**16)
            assert answer.endswith(b"}")
            assert f"x-request-id: {number}-".encode() in answer
        # Of several that are asked in one piece, too, each has its own.
        connection.sendall(request(1) + request(2) + request(3))
        answered = b""
        while answered.count(b"HTTP/1.1 200") < 3 or not answered.endswith(b"}"):
            piece = connection.recv(2**16)
            assert piece
            answered += piece
        assert re.findall(rb"x-request-id: (\d)-", answered) == [b"1", b"2", b"3"]


class _Sent(asyncio.Transport):
    """Keeps what it shall send."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))

    def close(self) -> None:
        self.pieces.append(b"closed")


def test_no_head_is_held_for_ever() -> None:
    sent = _Sent()
    transport = _JoiningTransport(sent)
    transport.write(b"a")
    transport.hold()
    transport.write(b"b")
    transport.write(b"c")
    transport.hold()
    transport.write(b"b")
    transport.writelines([b"c", b"d"])
    transport.hold()
    transport.write(b"e")
    transport.hold()
    transport.write(b"f")
    transport.close()
    assert sent.pieces == [b"a", b"bc", b"bcd", b"e", b"f", b"closed"]
