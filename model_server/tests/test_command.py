"""The command `model-server`, as somebody on a laptop runs it."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx2
import pytest

from conftest import TrainedModels, coverage_settings
from model_server.settings import Settings
from registry_server import RegistryServer

COMMAND = (sys.executable, "-m", "model_server")
NAME = "iris%20&%20co."


def _environment(settings: Settings) -> dict[str, str]:
    return coverage_settings() | {
        "PATH": os.environ["PATH"],
        "HOME": str(settings.state_dir.parent),
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
        "MODEL_SERVER_RUNTIME_DIR": str(settings.runtime_dir),
        "MODEL_SERVER_UV": settings.uv,
    }


@contextmanager
def _running(
    settings: Settings, log: Path, *options: str | Path, tls: ssl.SSLContext | bool = False
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"https://127.0.0.1:{port}" if tls else f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "--tracking-uri", settings.tracking_uri, "--port", str(port), *options],
            env=_environment(settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                if httpx2.get(f"{url}/health/ready", verify=tls, timeout=60).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def _workers(process: subprocess.Popen[bytes]) -> set[str]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {
        child
        for child in children
        if b"model_server" in Path(f"/proc/{child}/cmdline").read_bytes()
    }


def test_one_command_serves_and_a_reload_loses_no_request(
    settings: Settings, stocked: RegistryServer, trained: TrainedModels, tmp_path: Path
) -> None:
    assert stocked.versions
    log = tmp_path / "log"
    body = {"data": trained.rows, "model_flavor": "sklearn"}
    with _running(settings, log) as (url, process):
        assert httpx2.post(f"{url}/{NAME}/1", json=body, timeout=60).json() == {
            "prediction": trained.predictions["logistic"]
        }
        assert (tmp_path / ".local/state/model-server/catalog.sqlite").exists()
        (loaded,) = httpx2.get(f"{url}/loaded_models", timeout=60).json()
        before = _workers(process)
        assert len(before) == 2
        # Said where the application is made: once, before both workers are forked.
        assert log.read_text().count("nothing limits the memory") == 1
        stopping = Event()

        def ask() -> list[int]:
            statuses = []
            while not stopping.is_set():
                statuses.append(httpx2.post(f"{url}/{NAME}/1", json=body, timeout=60).status_code)
            return statuses

        with ThreadPoolExecutor(3) as threads:
            asking = [threads.submit(ask) for _ in range(3)]
            process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 60
            while len(after := _workers(process)) != 2 or after & before:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.05)
            stopping.set()
            statuses = [status for one in asking for status in one.result()]
        assert set(statuses) == {200}
        # The runner has served through it all.
        (still,) = httpx2.get(f"{url}/loaded_models", timeout=60).json()
        assert (still["state"], still["since"]) == ("ready", loaded["since"])
        assert log.read_text().count("runner started") == 1
    assert process.returncode == 0


def test_only_who_shows_a_certificate_is_let_in(settings: Settings, tmp_path: Path) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-noenc", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", certificate, "-keyout", key),
        ],
        capture_output=True,
        check=True,
    )
    stranger = ssl.create_default_context(cafile=certificate)
    known = ssl.create_default_context(cafile=certificate)
    known.load_cert_chain(certificate, key)
    options = ("--certfile", certificate, "--keyfile", key, "--ca-certs", certificate)
    with _running(settings, tmp_path / "log", *options, tls=known) as (url, _):
        assert httpx2.get(f"{url}/loaded_models", verify=known).json() == []
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/loaded_models", verify=stranger)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tracking-uri", "mlflow"], "MLFLOW_TRACKING_URI must be the http:// or https://"),
        (["--port", "http"], "argument --port: invalid int value: 'http'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage_is_one_sentence(
    settings: Settings, arguments: list[str], sentence: str
) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=_environment(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
