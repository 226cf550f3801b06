"""Turn a model's requirements into a virtual environment, kept under their digest."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from model_server.errors import (
    DeadlineExceededError,
    IndexUnavailableError,
    ModelNotLoadableError,
)
from model_server.locks import exclusive
from model_server.settings import PYTHON_VERSION, Settings

_LOG = logging.getLogger(__name__)

_CONSTRAINTS = "constraints.txt"
_PASSED_ON = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LINES_SHOWN = 12
_UNREACHABLE = ("Failed to fetch", "error sending request", "Request failed after")


class Environments:
    """The virtual environments under `<state_dir>/environments`, shared by models and workers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.state_dir / "environments"

    def python_for(self, model_files: Path, deadline: float) -> Path:
        """The interpreter of the environment for a model, built now if it is the first to ask."""
        requirements = _read_requirements(model_files / "requirements.txt")
        constraints = _read_requirements(model_files / _CONSTRAINTS, optional=True)
        identity = "\n".join(
            [PYTHON_VERSION, sys.base_prefix, *requirements, "-c", *constraints]
        ).encode()
        digest = hashlib.sha256(identity).hexdigest()[:32]
        environment = self._folder / digest
        with exclusive(self._folder / f"{digest}.lock", deadline, "the model's environment"):
            if not environment.exists():
                self._build(environment, requirements, constraints, deadline)
        return environment / "bin" / "python"

    def _build(
        self, target: Path, requirements: list[str], constraints: list[str], deadline: float
    ) -> None:
        started = time.monotonic()
        for stale in self._folder.glob(f"{target.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=self._folder))
        try:
            # Relocatable, as it moves to its place when it is complete.
            python = ["--python", sys.executable, "--no-python-downloads"]
            self._run(["venv", "--quiet", "--relocatable", *python, "."], partial, deadline)
            (partial / "requirements.txt").write_text("\n".join(requirements) + "\n")
            install = ["pip", "install", "--no-progress", "--python", "bin/python"]
            if not self._settings.allow_source_builds:
                install.append("--no-build")
            if constraints:
                (partial / _CONSTRAINTS).write_text("\n".join(constraints) + "\n")
                install += ["--constraints", _CONSTRAINTS]
            self._run([*install, "--requirements", "requirements.txt"], partial, deadline)
            # mkdtemp's folder is for its owner only; the runners may have another account.
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _LOG.info(
            "environment built",
            extra={"environment": target.name, "seconds": round(time.monotonic() - started, 3)},
        )

    def _run(self, arguments: list[str], folder: Path, deadline: float) -> None:
        try:
            done = subprocess.run(
                [self._settings.uv, "--no-config", *arguments],
                cwd=folder,
                env=self._uv_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=max(deadline - time.monotonic(), 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeadlineExceededError(
                "The model's requirements could not be installed within "
                f"{self._settings.load_timeout_seconds:g} seconds."
            ) from None
        except OSError as error:
            raise ModelNotLoadableError(
                f"The environment builder {self._settings.uv} cannot be run ({error.strerror})."
            ) from error
        if done.returncode != 0:
            lines = done.stderr.strip()
            if self._settings.index_url:
                lines = lines.replace(self._settings.index_url.get_secret_value(), "<index>")
            shown = "\n".join(lines.splitlines()[-_LINES_SHOWN:])
            if any(sign in lines for sign in _UNREACHABLE):
                raise IndexUnavailableError(f"The package index does not answer. uv said:\n{shown}")
            raise ModelNotLoadableError(
                f"The model's requirements cannot be installed for Python {PYTHON_VERSION}. "
                f"uv said:\n{shown}"
            )

    def _uv_environment(self) -> dict[str, str]:
        """What uv gets: installing may run somebody else's code, so no secret of ours is in it."""
        settings = self._settings
        environment = {
            "PATH": os.defpath,
            "HOME": str(settings.state_dir),
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "UV_CACHE_DIR": str(settings.uv_cache_dir or settings.state_dir / "cache" / "uv"),
        }
        if settings.index_url:
            environment["UV_DEFAULT_INDEX"] = settings.index_url.get_secret_value()
        for name in _PASSED_ON:
            for spelling in (name, name.lower()):
                if spelling in os.environ:
                    environment[spelling] = os.environ[spelling]
        return environment


def _read_requirements(file: Path, *, optional: bool = False) -> list[str]:
    """The requirements in a file, refusing every line that is more than a name and versions."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        if optional:
            return []
        raise ModelNotLoadableError(
            "The model was stored without a requirements.txt; log it with MLflow's log_model."
        ) from None
    except UnicodeDecodeError:
        raise ModelNotLoadableError(f"The model's {file.name} is not text.") from None
    requirements = []
    for raw in text.splitlines():
        line = raw.partition(" #")[0].strip()
        if not line or line.startswith("#") or line.split() == ["-c", _CONSTRAINTS]:
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            requirement = None
        if requirement is None or requirement.url:
            raise ModelNotLoadableError(
                f"The model's {file.name} has the line {line!r}; only package names with versions "
                "are allowed, no files, addresses or options."
            )
        requirements.append(str(requirement))
    return requirements
