"""As much of MLflow's REST API as a model server speaks, over HTTP, from folders of files."""

import contextlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_NO_NAME = re.compile(r"\.{0,2}|\s*|.*[/:].*", re.DOTALL)
_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


class RegistryServer:
    """A registry whose versions are folders; like MLflow it tells unknown things apart."""

    def __init__(self, port: int = 0) -> None:
        self.versions: dict[tuple[str, int], Path] = {}
        self.aliases: dict[tuple[str, str], int] = {}
        self.created = 1_700_000_000_000
        self.status = "READY"
        self.artifact_root = "mlflow-artifacts:/0/"
        self.listed: list[dict[str, Any]] | None = None
        self.status_of_missing = 404
        self.seconds_for_a_byte = 0.0
        self.slow = ""
        """In the addresses whose answers take so long."""
        self.requests: list[str] = []
        self.authorization: str | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                server.authorization = self.headers["Authorization"]
                status, content = server.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not server.seconds_for_a_byte or server.slow not in self.path:
                    self.wfile.write(content)
                    return
                # Until nobody takes them any more.
                with contextlib.suppress(ConnectionError):
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        time.sleep(server.seconds_for_a_byte)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = Thread(target=self._http.serve_forever, args=[0.05], daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, address: str) -> tuple[int, bytes]:
        parts = urlsplit(address)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if _NO_NAME.fullmatch(query.get("name", "a name")):
            return _error(400, "INVALID_PARAMETER_VALUE")
        if parts.path == "/api/2.0/mlflow/registered-models/alias":
            version = self.aliases.get((query["name"], query["alias"]))
            if version is None:
                return _error(400, "INVALID_PARAMETER_VALUE")
            return self._version(query["name"], version)
        if parts.path == "/api/2.0/mlflow/model-versions/get":
            return self._version(query["name"], int(query["version"]))
        if parts.path == "/api/2.0/mlflow/model-versions/get-download-uri":
            folder = self.versions.get((query["name"], int(query["version"])))
            if folder is None:
                return _error(404, "RESOURCE_DOES_NOT_EXIST")
            return _json({"artifact_uri": f"{self.artifact_root}{str(folder).lstrip('/')}"})
        if parts.path == _ARTIFACTS:
            return self._listing(Path("/") / query["path"].removeprefix("0/"))
        if parts.path.startswith(f"{_ARTIFACTS}/0/"):
            file = Path("/") / unquote(parts.path).removeprefix(f"{_ARTIFACTS}/0/")
            return (200, file.read_bytes()) if file.is_file() else (self.status_of_missing, b"")
        return 404, b"not found"

    def _version(self, name: str, version: int) -> tuple[int, bytes]:
        if (name, version) not in self.versions:
            return _error(404, "RESOURCE_DOES_NOT_EXIST")
        return _json(
            {
                "model_version": {
                    "name": name,
                    "version": str(version),
                    "source": "models:/m-0123456789abcdef",
                    "creation_timestamp": self.created,
                    "status": self.status,
                }
            }
        )

    def _listing(self, folder: Path) -> tuple[int, bytes]:
        if self.listed is not None:
            return _json({"files": self.listed})
        if not folder.is_dir():
            return _error(404, "RESOURCE_DOES_NOT_EXIST")
        files = [
            {"path": entry.name, "is_dir": entry.is_dir()} for entry in sorted(folder.iterdir())
        ]
        return _json({"files": files} if files else {})


def _json(content: Any) -> tuple[int, bytes]:
    return 200, json.dumps(content).encode()


def _error(status: int, code: str) -> tuple[int, bytes]:
    return status, json.dumps({"error_code": code, "message": "it said no"}).encode()
