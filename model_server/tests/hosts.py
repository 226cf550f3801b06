"""Hosts of a model server, each an application in this process with folders of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from model_server import create_app
from model_server.settings import Settings


class Host:
    """One host, asked over HTTP."""

    def __init__(self, client: TestClient, settings: Settings) -> None:
        self._client = client
        self.settings = settings

    def load(self, name: str, reference: str | int, flavor: str = "pyfunc") -> httpx2.Response:
        return self._client.get(f"/load_model/{name}/{flavor}/{reference}")

    def unload(self, name: str, reference: str | int, flavor: str = "pyfunc") -> httpx2.Response:
        return self._client.delete(f"/{name}/{flavor}/{reference}")

    def ask(
        self, name: str, reference: str | int, row: str = "a", flavor: str = "pyfunc"
    ) -> httpx2.Response:
        return self._client.post(
            f"/{name}/{reference}", json={"data": [row], "model_flavor": flavor}
        )

    def answer(self, name: str, reference: str | int, flavor: str = "pyfunc") -> Any:
        """The prediction for one row, or the status where there is none."""
        got = self.ask(name, reference, flavor=flavor)
        return got.json()["prediction"][0] if got.status_code == 200 else got.status_code

    def infer(self, name: str) -> Any:
        """What V2 predicts for one row, asked without a version, or the status."""
        tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}
        got = self._client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
        return got.json()["outputs"][0]["data"][0] if got.status_code == 200 else got.status_code

    def described(self, name: str, path: str = "") -> httpx2.Response:
        """V2's description of a model, or with `/ready` whether it is ready."""
        return self._client.get(f"/v2/models/{name}{path}")

    def listing(self) -> list[dict[str, Any]]:
        got = self._client.get("/loaded_models")
        assert got.status_code == 200, got.text
        listing: list[dict[str, Any]] = got.json()
        return listing

    def states(self) -> dict[tuple[str, int], str]:
        return {(entry["model_name"], entry["version"]): entry["state"] for entry in self.listing()}

    def metrics(self) -> str:
        got = self._client.get("/metrics")
        assert got.status_code == 200, got.text
        return got.text

    def is_ready(self) -> bool:
        return self._client.get("/health/ready").status_code == 200

    def runners(self) -> dict[int, str]:
        """The processes of this host's runners, with the model folder of each."""
        return runners_of(self.settings)


def runners_of(settings: Settings) -> dict[int, str]:
    own = str(settings.state_dir / "models").encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        folders = [part for part in command if part.startswith(own)]
        if folders and state != "Z" and any(b"runner" in part for part in command):
            found[int(process.name)] = Path(folders[0].decode()).name
    return found


@contextmanager
def running(*all_settings: Settings) -> Iterator[list[Host]]:
    """Hosts with these settings, until the end of the block."""
    with ExitStack() as stack:
        yield [
            Host(stack.enter_context(TestClient(create_app(settings))), settings)
            for settings in all_settings
        ]


def eventually(question: Callable[[], Any], wanted: Any = True, seconds: float = 60) -> None:
    """Ask until the answer is as wanted."""
    deadline = time.monotonic() + seconds
    while (answer := question()) != wanted:
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds} seconds it is {answer!r}, not {wanted!r}")
        time.sleep(0.02)
