"""Turn a model's requirements into a virtual environment, kept under their digest."""

import errno
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_server.errors import (
    DeadlineExceededError,
    IndexUnavailableError,
    ModelNotLoadableError,
)
from model_server.locks import exclusive
from model_server.requirements import CONSTRAINTS, named_in, read_requirements
from model_server.settings import PYTHON_VERSION, Settings

_LOG = logging.getLogger(__name__)

_PASSED_ON = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LINES_SHOWN = 12
_UNREACHABLE = ("Failed to fetch", "error sending request", "Request failed after")
_NO_ROOM = ("No space left on device", "os error 28", "Disk quota exceeded")


@dataclass(frozen=True)
class Built:
    """How a run of uv ended: its exit status and what it wrote to standard error."""

    status: int
    stderr: str


class Builder(Protocol):
    """Runs uv, which may run a package's own code where source builds are allowed."""

    def run_uv(
        self, arguments: list[str], folder: Path, deadline: float, environment: dict[str, str]
    ) -> Built:
        """Run uv in a folder, with this environment and nothing else, until the deadline.

        Raises `TimeoutError` past the deadline (of `time.monotonic`) with no process left, and
        `OSError` where uv cannot be run.
        """


class ChildBuilder:
    """Runs uv as a child of this process, with this process' rights."""

    def __init__(self, program: str) -> None:
        self._program = program

    def run_uv(
        self, arguments: list[str], folder: Path, deadline: float, environment: dict[str, str]
    ) -> Built:
        """Run uv; whatever it has started ends with it."""
        process = subprocess.Popen(
            [self._program, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        with process:
            try:
                _, stderr = process.communicate(timeout=max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError from None
        return Built(process.returncode, stderr)


class Environments:
    """The virtual environments under `<state_dir>/environments`, shared by models and workers."""

    def __init__(self, settings: Settings, builder: Builder | None = None) -> None:
        self._settings = settings
        self._builder = builder or ChildBuilder(settings.uv)
        self._folder = settings.state_dir / "environments"

    def python_for(self, model_files: Path, deadline: float) -> Path:
        """The interpreter of the environment for a model, built now if it is the first to ask."""
        requirements = read_requirements(model_files / "requirements.txt")
        constraints = read_requirements(model_files / CONSTRAINTS, optional=True)
        identity = "\n".join(
            [PYTHON_VERSION, sys.base_prefix, *requirements, "-c", *constraints]
        ).encode()
        digest = hashlib.sha256(identity).hexdigest()[:32]
        environment = self._folder / digest
        with exclusive(self._lock(environment), deadline, "the model's environment"):
            if not environment.exists():
                self._build(environment, requirements, constraints, deadline)
            # Its time tells when it was used last.
            os.utime(environment)
        return environment / "bin" / "python"

    def remove_unused(self, in_use: set[Path], oldest: float) -> None:
        """Remove environments used last before `oldest` (of the epoch), but none of `in_use`."""
        if not self._folder.exists():
            return
        for environment in self._folder.iterdir():
            if not environment.is_dir() or environment in in_use:
                continue
            name = environment.name.partition(".")[0]
            try:
                with exclusive(self._lock(self._folder / name), 0.0, "the model's environment"):
                    if environment.stat().st_mtime < oldest:
                        # Under another name first: half of one is never used.
                        stale = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=self._folder))
                        environment.rename(stale)
                        shutil.rmtree(stale, ignore_errors=True)
                        _LOG.info("environment removed", extra={"environment": environment.name})
            except DeadlineExceededError:
                # Somebody builds or takes it at this moment.
                continue

    def _lock(self, environment: Path) -> Path:
        return environment.with_suffix(".lock")

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
            self._run(["venv", "--quiet", "--relocatable", *python, "."], partial, deadline, [])
            (partial / "requirements.txt").write_text("\n".join(requirements) + "\n")
            # Not compiled here: for that uv runs the environment's Python, with all that packages
            # have it do at its start.
            install = ["pip", "install", "--no-progress", "--python", "bin/python"]
            if self._settings.wheels_dir:
                install += ["--no-index", "--find-links", str(self._settings.wheels_dir)]
            if not self._settings.allow_source_builds:
                install.append("--no-build")
            if constraints:
                (partial / CONSTRAINTS).write_text("\n".join(constraints) + "\n")
                install += ["--constraints", CONSTRAINTS]
            install += ["--requirements", "requirements.txt"]
            self._run(install, partial, deadline, requirements)
            # mkdtemp's folder is for its owner only; the runners may have another account.
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _LOG.info(
            "environment built",
            extra={"environment": target.name, "seconds": round(time.monotonic() - started, 3)},
        )

    def _run(
        self, arguments: list[str], folder: Path, deadline: float, requirements: list[str]
    ) -> None:
        try:
            done = self._builder.run_uv(
                ["--no-config", *arguments], folder, deadline, self._uv_environment()
            )
        except TimeoutError:
            raise DeadlineExceededError(
                "The model's requirements could not be installed within "
                f"{self._settings.load_timeout_seconds:g} seconds."
            ) from None
        except OSError as error:
            raise ModelNotLoadableError(
                f"The environment builder {self._settings.uv} cannot be run ({error.strerror})."
            ) from error
        if done.status == 0:
            return
        lines = done.stderr.strip()
        if self._settings.index_url:
            lines = lines.replace(self._settings.index_url.get_secret_value(), "<index>")
        shown = "\n".join(lines.splitlines()[-_LINES_SHOWN:])
        if any(sign in lines for sign in _NO_ROOM):
            raise OSError(errno.ENOSPC, "no room for the model's environment", str(self._folder))
        if any(sign in lines for sign in _UNREACHABLE):
            raise IndexUnavailableError(f"The package index does not answer. uv said:\n{shown}")
        named = ", ".join(named_in(lines, requirements))
        raise ModelNotLoadableError(
            f"The model's requirements{f' ({named})' if named else ''} cannot be installed for "
            f"Python {PYTHON_VERSION}. uv said:\n{shown}"
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
