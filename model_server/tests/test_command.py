"""The command `model-server`, as somebody on a laptop runs it."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx2
import pytest
from uv import find_uv_bin

from conftest import TrainedModels, coverage_settings
from hosts import eventually
from light_models import Shelf
from model_server import __version__
from model_server.settings import Settings
from packages import wheel, wheel_name
from registry_server import RegistryServer
from servers import kept_port

COMMAND = (sys.executable, "-m", "model_server")
PACKAGE = Path(__file__).parents[1]
# What the role installs: other versions would have to be fetched.
LOCK = PACKAGE.parent / "roles/model_server/files/requirements.txt"
NAME = "iris%20&%20co."


def _environment(settings: Settings) -> dict[str, str]:
    return coverage_settings() | {
        "PATH": os.environ["PATH"],
        "HOME": str(settings.state_dir.parent),
        "PYTHONPATH": str(PACKAGE / "src"),
        "MODEL_SERVER_RUNTIME_DIR": str(settings.runtime_dir),
        "MODEL_SERVER_UV": settings.uv,
    }


@contextmanager
def _running(
    settings: Settings,
    log: Path,
    *options: str | Path,
    tls: ssl.SSLContext | bool = False,
    command: Sequence[str | Path] = COMMAND,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with kept_port() as port:
        url = f"https://127.0.0.1:{port}" if tls else f"http://127.0.0.1:{port}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--tracking-uri", settings.tracking_uri, "--port", str(port), *options],
                env=environment or _environment(settings),
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
    return {child for child in children if b"model_server" in _command(child)}


def _command(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        # It has ended meanwhile.
        return b""


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
        eventually(lambda: len(_workers(process)), wanted=2)
        before = _workers(process)
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


def _installed(folder: Path) -> Path:
    """The command of the wheel, in an environment that has what the wheel asks for."""
    uv, python = find_uv_bin(), folder / "venv/bin/python"
    built = folder / f"model_server-{__version__}-py3-none-any.whl"
    environment = {"UV_DEFAULT_INDEX": os.environ.get("PIP_INDEX_URL", ""), **os.environ}
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        [uv, "venv", "--python", sys.executable, folder / "venv"],
        [uv, "pip", "install", "--python", python, "--constraints", LOCK, built],
    )
    for command in commands:
        done = subprocess.run(
            command, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return python.with_name("model-server")


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_the_wheel_brings_all_that_it_takes(
    settings: Settings, shelf: Shelf, tmp_path: Path
) -> None:
    """Nothing is on the path, nothing is activated; uv builds the model's environment."""
    index = tmp_path / "index"
    index.mkdir()
    light = Path(__file__).parent / "light_mlflow"
    files = {f"mlflow/{file.name}": file.read_text() for file in light.glob("*.py")}
    (index / wheel_name("light")).write_bytes(wheel("light", more=files))
    shelf.put("rose", 1, "one")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MODEL_SERVER_RUNTIME_DIR": str(settings.runtime_dir),
        "MODEL_SERVER_WHEELS_DIR": str(index),
    }
    command, log = [_installed(tmp_path)], tmp_path / "log"
    with _running(settings, log, command=command, environment=environment) as (url, _):
        answer = httpx2.post(f"{url}/rose/1", json={"data": ["a"]}, timeout=120)
        assert answer.json() == {"prediction": ["one"]}, log.read_text()


def test_only_who_shows_a_certificate_is_let_in(settings: Settings, tmp_path: Path) -> None:
    certificate, key, log = tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "log"
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
    with _running(settings, log, *options, tls=known) as (url, process):

        def check() -> None:
            assert httpx2.get(f"{url}/loaded_models", verify=known, timeout=60).json() == []
            with pytest.raises(httpx2.TransportError):
                httpx2.get(f"{url}/loaded_models", verify=stranger, timeout=60)

        check()
        # A reload with a certificate that cannot be used changes nothing, and says so.
        eventually(lambda: len(_workers(process)), wanted=2)
        before = _workers(process)
        certificate.write_text("half a certificate")
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while '"not reloaded"' not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        (line,) = [line for line in log.read_text().splitlines() if '"not reloaded"' in line]
        reason = json.loads(line)["reason"]
        assert reason.startswith(f"--certfile {certificate} with --keyfile {key} cannot be used (")
        # Longer than an idle worker takes to end.
        time.sleep(1)
        assert _workers(process) == before
        check()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tracking-uri", "mlflow"], "MLFLOW_TRACKING_URI must be the http:// or https://"),
        (["--port", "http"], "argument --port: 'http' is no port; give a number up to 65535"),
        (["--port", "70000"], "argument --port: '70000' is no port; give a number up to 65535"),
        (["--workers", "0"], "argument --workers: '0' is no number of workers; give 1 or more"),
        (["--workers", "-1"], "argument --workers: "),
        (
            ["--certfile", "/no/file"],
            "--certfile /no/file cannot be used (No such file or directory)",
        ),
        (["--certfile", __file__], f"--certfile {__file__} cannot be used ([SSL] PEM lib"),
        (["--ca-certs", __file__], "--keyfile and --ca-certs are for HTTPS; give --certfile, too"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (
            ["--state-dir", "/dev/null/state"],
            "/dev/null/state cannot be used (Not a directory); set MODEL_SERVER_STATE_DIR to a",
        ),
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


def test_a_folder_that_may_not_be_written_to_is_one_sentence(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "others"
    folder.mkdir(mode=0o555)
    # Root may write everywhere, unless it has given that up.
    less = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*less, *COMMAND, "--port", "0", "--state-dir", folder],
        env=_environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    sentence = f"{folder} cannot be used (this user may not write there); set MODEL_SERVER_STATE"
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
