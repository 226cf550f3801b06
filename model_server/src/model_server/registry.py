"""Ask MLflow what a version or alias means, and fetch a model's files.

MLflow's REST API is spoken directly: five routes are all that is needed, and the HTTP workers stay
as small as they are without MLflow's client.
"""

import errno
import hashlib
import json
import math
import re
import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx2

from model_server.disk import write_out
from model_server.errors import (
    ModelNotFoundError,
    ModelNotLoadableError,
    ModelServerError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from model_server.settings import InvalidSettingsError, Settings

_API = "/api/2.0/mlflow"
_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
# An impossible name and an unknown alias are "invalid parameters" to MLflow.
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_VERSION = re.compile(r"[0-9]{1,9}")
_NO_FILE_NAME = re.compile(r"\.{0,2}|.*[/\0\ud800-\udfff].*", re.DOTALL)


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model; the digest also tells a re-created one apart."""

    name: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"model {self.name!r} version {self.version}"


def version_number(version_or_alias: str) -> int | None:
    """The number that a version is given by, or None for an alias."""
    return int(version_or_alias) if _VERSION.fullmatch(version_or_alias) else None


class ModelRegistry:
    """The registry of one MLflow server."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client

    @classmethod
    def connect(cls, settings: Settings) -> Self:
        """A registry at the address, and with the certificates, of the settings.

        Raises `InvalidSettingsError` where a certificate cannot be used.
        """
        url = httpx2.URL(settings.tracking_uri)
        auth = (url.username, url.password) if url.userinfo else None
        if settings.tracking_username and settings.tracking_password:
            auth = (settings.tracking_username, settings.tracking_password.get_secret_value())
        return cls(
            httpx2.Client(
                # Messages name it.
                base_url=url.copy_with(userinfo=b""),
                auth=auth,
                verify=_tls(settings),
                timeout=settings.registry_timeout_seconds,
            )
        )

    def close(self) -> None:
        """Give up the connections."""
        self._client.close()

    def resolve(self, name: str, version_or_alias: str) -> ModelVersion:
        """Which version is meant."""
        version = version_number(version_or_alias)
        if version is None:
            missing = ModelNotFoundError(
                f"MLflow has no model {name!r} with an alias {version_or_alias!r}."
            )
            found = self._ask(
                f"{_API}/registered-models/alias",
                {"name": name, "alias": version_or_alias},
                missing,
            )
        else:
            missing = ModelNotFoundError(
                f"MLflow has no model {name!r} with a version {version_or_alias}."
            )
            found = self._ask(
                f"{_API}/model-versions/get", {"name": name, "version": str(version)}, missing
            )
        try:
            entry = found["model_version"]
            number, status = int(entry["version"]), entry.get("status", "READY")
            identity = [name, number, entry["source"], entry["creation_timestamp"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RegistryRefusedError(
                f"MLflow's answer about model {name!r} cannot be understood."
            ) from error
        if status != "READY":
            raise ModelNotLoadableError(
                f"Version {number} of model {name!r} is {status} in MLflow, not READY."
            )
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        return ModelVersion(name, number, digest)

    def fetch(self, model: ModelVersion, target: Path, deadline: float) -> None:
        """Put the model's files into the folder `target`: completely or not at all.

        Needs the lock of the files. Raises `TimeoutError` past the deadline.
        """
        missing = ModelNotFoundError(f"MLflow has no {model} any more.")
        found = self._ask(
            f"{_API}/model-versions/get-download-uri",
            {"name": model.name, "version": str(model.version)},
            missing,
            deadline,
        )
        uri = urlsplit(str(found.get("artifact_uri")))
        if uri.scheme != "mlflow-artifacts" or uri.netloc:
            raise ModelNotLoadableError(
                f"The files of {model} lie at {uri.scheme or 'a path'}: and not behind MLflow; "
                "log models to an MLflow server that serves artifacts."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        # What was left by a worker that was killed.
        for stale in target.parent.glob(f"{target.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        try:
            if self._fetch_folder(model, uri.path.strip("/"), partial, deadline) == 0:
                raise ModelNotLoadableError(f"MLflow holds no files of {model}.")
            write_out(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _fetch_folder(self, model: ModelVersion, path: str, folder: Path, deadline: float) -> int:
        missing = ModelNotLoadableError(
            f"MLflow has no artifacts at {path!r}, where those of {model} should be; "
            "log the model anew."
        )
        listing = self._ask(_ARTIFACTS, {"path": path}, missing, deadline)
        count = 0
        for entry in listing.get("files", []):
            name = str(entry["path"])
            if _NO_FILE_NAME.fullmatch(name):
                raise ModelNotLoadableError(
                    f"MLflow lists a file of {model} by the impossible name {name!r}; "
                    "log the model anew with other names."
                )
            try:
                if entry.get("is_dir"):
                    (folder / name).mkdir()
                    inside = folder / name
                    count += self._fetch_folder(model, f"{path}/{name}", inside, deadline)
                else:
                    self._fetch_file(model, f"{path}/{name}", folder / name, deadline)
                    count += 1
            except OSError as error:
                if error.errno not in {errno.EEXIST, errno.ENAMETOOLONG}:
                    raise
                raise ModelNotLoadableError(
                    f"The artifact {path}/{name} of {model} cannot be stored "
                    f"({error.strerror}); log the model anew with other names."
                ) from error
        return count

    def _fetch_file(self, model: ModelVersion, path: str, target: Path, deadline: float) -> None:
        with (
            target.open("xb") as file,
            self._reachable(),
            self._client.stream("GET", f"{_ARTIFACTS}/{quote(path)}") as answer,
        ):
            if answer.status_code == httpx2.codes.NOT_FOUND:
                raise ModelNotLoadableError(
                    f"MLflow lists the artifact {path!r} of {model} and does not have it; "
                    "log the model anew."
                )
            if answer.status_code != httpx2.codes.OK:
                raise RegistryRefusedError(
                    f"MLflow answered {answer.status_code} for the artifact {path!r}."
                )
            for piece in _pieces(answer, deadline):
                file.write(piece)

    def _ask(
        self,
        path: str,
        params: dict[str, str],
        missing: ModelServerError,
        deadline: float = math.inf,
    ) -> dict[str, Any]:
        with self._reachable(), self._client.stream("GET", path, params=params) as answer:
            body = b"".join(_pieces(answer, deadline))
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if answer.status_code == httpx2.codes.OK and isinstance(content, dict):
            return content
        reason = content if isinstance(content, dict) else {}
        if reason.get("error_code") in _MISSING:
            raise missing
        raise RegistryRefusedError(
            f"MLflow answered {answer.status_code}: {reason.get('message', 'no reason given')}"
        )

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise RegistryUnavailableError(
                f"MLflow at {self._client.base_url} does not answer ({error})."
            ) from error


def _tls(settings: Settings) -> ssl.SSLContext:
    variable, path = "MLFLOW_TRACKING_SERVER_CERT_PATH", settings.tracking_server_cert_path
    try:
        tls = ssl.create_default_context(cafile=path)
        variable, path = "MLFLOW_TRACKING_CLIENT_CERT_PATH", settings.tracking_client_cert_path
        if path:
            # Nobody is there to be asked for a password.
            tls.load_cert_chain(path, password="")
    except OSError as error:
        raise InvalidSettingsError(
            f"{variable} {path} cannot be used ({error.strerror}); give a PEM file that this user "
            "may read."
        ) from None
    return tls


def _pieces(answer: httpx2.Response, deadline: float) -> Iterator[bytes]:
    """What is sent, as it comes. Raises `TimeoutError` past the deadline."""
    for piece in answer.iter_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError
        yield piece
