"""Ask MLflow what a version or alias means, and fetch a model's files.

MLflow's REST API is spoken directly: five routes are all that is needed, and the HTTP workers stay
as small as they are without MLflow's client.
"""

import hashlib
import json
import re
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx2

from model_server.errors import (
    ModelNotFoundError,
    ModelNotLoadableError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from model_server.settings import Settings

_API = "/api/2.0/mlflow"
_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
_VERSION = re.compile(r"[0-9]{1,9}")


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
        """A registry at the address, and with the certificates, of the settings."""
        auth = None
        if settings.tracking_username and settings.tracking_password:
            auth = (settings.tracking_username, settings.tracking_password.get_secret_value())
        tls = ssl.create_default_context(cafile=settings.tracking_server_cert_path)
        if settings.tracking_client_cert_path:
            tls.load_cert_chain(settings.tracking_client_cert_path)
        return cls(
            httpx2.Client(
                base_url=settings.tracking_uri,
                auth=auth,
                verify=tls,
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
            missing = f"MLflow has no model {name!r} with an alias {version_or_alias!r}."
            found = self._ask(
                f"{_API}/registered-models/alias",
                {"name": name, "alias": version_or_alias},
                missing,
                # An unknown alias is an "invalid parameter" to MLflow.
                codes={"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"},
            )
        else:
            missing = f"MLflow has no model {name!r} with a version {version_or_alias}."
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

    def fetch(self, model: ModelVersion, target: Path) -> None:
        """Put the model's files into the folder `target`: completely or not at all."""
        missing = f"MLflow has no {model} any more."
        found = self._ask(
            f"{_API}/model-versions/get-download-uri",
            {"name": model.name, "version": str(model.version)},
            missing,
        )
        uri = urlsplit(str(found.get("artifact_uri")))
        if uri.scheme != "mlflow-artifacts" or uri.netloc:
            raise ModelNotLoadableError(
                f"The files of {model} lie at {uri.scheme or 'a path'}: and not behind MLflow; "
                "log models to an MLflow server that serves artifacts."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        try:
            if self._fetch_folder(uri.path.strip("/"), partial) == 0:
                raise ModelNotLoadableError(f"MLflow holds no files of {model}.")
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _fetch_folder(self, path: str, folder: Path) -> int:
        listing = self._ask(_ARTIFACTS, {"path": path}, f"MLflow has no artifacts at {path!r}.")
        count = 0
        for entry in listing.get("files", []):
            name = str(entry["path"])
            if name in {"", ".", ".."} or "/" in name or "\0" in name:
                raise RegistryRefusedError(f"MLflow lists a file of the impossible name {name!r}.")
            if entry.get("is_dir"):
                (folder / name).mkdir()
                count += self._fetch_folder(f"{path}/{name}", folder / name)
            else:
                self._fetch_file(f"{path}/{name}", folder / name)
                count += 1
        return count

    def _fetch_file(self, path: str, target: Path) -> None:
        with (
            self._reachable(),
            self._client.stream("GET", f"{_ARTIFACTS}/{quote(path)}") as answer,
            target.open("xb") as file,
        ):
            if answer.status_code != httpx2.codes.OK:
                raise RegistryRefusedError(
                    f"MLflow answered {answer.status_code} for the artifact {path!r}."
                )
            for chunk in answer.iter_bytes():
                file.write(chunk)

    def _ask(
        self,
        path: str,
        params: dict[str, str],
        missing: str,
        codes: frozenset[str] | set[str] = frozenset({"RESOURCE_DOES_NOT_EXIST"}),
    ) -> dict[str, Any]:
        with self._reachable():
            answer = self._client.get(path, params=params)
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code == httpx2.codes.OK and isinstance(content, dict):
            return content
        reason = content if isinstance(content, dict) else {}
        if reason.get("error_code") in codes:
            raise ModelNotFoundError(missing)
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
