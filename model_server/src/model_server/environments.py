"""Turn a model's requirements into a virtual environment, kept under their digest."""

import errno
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from model_server.builds import BUILDER, build_wheels
from model_server.disk import write_out
from model_server.errors import (
    DeadlineExceededError,
    IndexUnavailableError,
    ModelNotLoadableError,
    ModelServerError,
)
from model_server.locks import exclusive
from model_server.replies import sane
from model_server.requirements import CONSTRAINTS, named_in, read_requirements
from model_server.settings import PYTHON_VERSION, Settings

_LOG = logging.getLogger(__name__)

_PASSED_ON = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LINES_SHOWN = 12
_LONGEST_LINE = 512
_UNREACHABLE = ("Failed to fetch", "error sending request", "Request failed after")
_NO_ROOM = ("No space left on device", "os error 28", "Disk quota exceeded")
_NO_WHEEL = "because building from source is disabled"
_PACKAGES = "archive-v*/*"
"""Where uv's cache has packages unpacked."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


class _NoWheelError(ModelNotLoadableError):
    """The requirements can be installed only if a package is built."""


class Environments:
    """The virtual environments under `<state_dir>/environments`, shared by models and workers."""

    def __init__(self, settings: Settings, *, builder: Path = BUILDER) -> None:
        self._settings = settings
        self._builder = builder
        self._folder = settings.state_dir / "environments"

    def python_for(self, model_files: Path, deadline: float) -> Path:
        """The interpreter of the environment for a model, built now if it is the first to ask."""
        requirements, constraints = _read(model_files)
        environment = self._place(requirements, constraints)
        with exclusive(self._lock(environment), deadline, "the model's environment"):
            if not environment.exists():
                self._build(environment, requirements, constraints, deadline)
            # Its time tells when it was used last.
            os.utime(environment)
        return environment / "bin" / "python"

    def environment_for(self, model_files: Path) -> Path:
        """Where the environment for a model is, or would be.

        Raises `ModelNotLoadableError` where the model says no requirements, or impossible ones.
        """
        return self._place(*_read(model_files))

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
            except (DeadlineExceededError, FileNotFoundError):
                # Somebody builds or takes it at this moment, or has built it by now.
                continue
        # A cache that an operator names may be others' as well.
        if self._settings.uv_cache_dir is None and self._cache.exists():
            self._tidy_cache(oldest)

    def _tidy_cache(self, oldest: float) -> None:
        """Have uv forget the packages in its cache that no environment has a file of any more.

        An environment's files are links to those of the cache, which keep their room taken.
        """
        unused = {
            info.stem.rpartition("-")[0]
            for package in self._cache.glob(_PACKAGES)
            if package.stat().st_mtime < oldest and not _is_linked(package)
            for info in package.glob("*.dist-info")
        }
        names = sorted(filter(_NAME.fullmatch, unused))
        # uv waits until nobody installs from the cache.
        deadline = time.monotonic() + self._settings.load_timeout_seconds
        try:
            # What an older uv has left there, or one that was killed.
            self._run(["cache", "prune", "--quiet"], self._folder, deadline, [])
            if names:
                self._run(["cache", "clean", "--quiet", *names], self._folder, deadline, [])
        except (ModelServerError, TimeoutError) as error:
            _LOG.warning("uv's cache not tidied", extra={"reason": str(error) or "it is in use"})

    @property
    def _cache(self) -> Path:
        return self._settings.uv_cache_dir or self._settings.state_dir / "cache" / "uv"

    def _place(self, requirements: list[str], constraints: list[str]) -> Path:
        identity = "\n".join(
            [PYTHON_VERSION, sys.base_prefix, *requirements, "-c", *constraints]
        ).encode()
        return self._folder / hashlib.sha256(identity).hexdigest()[:32]

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
            self._install(partial, requirements, constraints, deadline)
            # mkdtemp's folder is for its owner only; the runners may have another account.
            partial.chmod(0o755)
            write_out(partial)
            partial.rename(target)
        except TimeoutError:
            raise DeadlineExceededError(
                "The model's requirements could not be installed within "
                f"{self._settings.load_timeout_seconds:g} seconds."
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _LOG.info(
            "environment built",
            extra={"environment": target.name, "seconds": round(time.monotonic() - started, 3)},
        )

    def _install(
        self, partial: Path, requirements: list[str], constraints: list[str], deadline: float
    ) -> None:
        settings = self._settings
        # Not compiled here: for that uv runs the environment's Python, with all that packages
        # have it do at its start.
        install = ["pip", "install", "--no-progress", "--python", "bin/python"]
        if settings.wheels_dir:
            install += ["--no-index", "--find-links", str(settings.wheels_dir)]
        (partial / "requirements.txt").write_text("\n".join(requirements) + "\n")
        if constraints:
            (partial / CONSTRAINTS).write_text("\n".join(constraints) + "\n")
            install += ["--constraints", CONSTRAINTS]
        install += ["--requirements", "requirements.txt"]
        no_build = [*install, "--no-build"]
        try:
            self._run(no_build, partial, deadline, requirements)
        except _NoWheelError:
            if not settings.allow_source_builds:
                raise
        else:
            return
        complaint = self._install_built(install, partial, requirements, constraints, deadline)
        if complaint is None:
            return
        # A package may have printed it. What is wrong with the index or the disk, this tells.
        with suppress(_NoWheelError, TimeoutError):
            again = [*no_build, "--dry-run", "--refresh"]
            self._run(again, partial, deadline, requirements)
        raise ModelNotLoadableError(_told("built", complaint, requirements))

    def _install_built(
        self,
        install: list[str],
        partial: Path,
        requirements: list[str],
        constraints: list[str],
        deadline: float,
    ) -> str | None:
        """Build what has no wheel, and install; what a build complains of, if it fails, else None.

        Raises what `_run` and `build_wheels` do.
        """
        if not self._settings.runner_units:
            # A build is as free as a model, then.
            return self._uv(install, partial, deadline)
        if any("--hash=" in one for one in requirements):
            # A hash is one of a file of the index, never of what is built from it.
            raise ModelNotLoadableError(
                "The model's requirements have hashes, and of some package no wheel; what has "
                "hashes is never built, so log the model without them."
            )
        started = time.monotonic()
        with (
            exclusive(self._folder / "builds.lock", deadline, "packages of another model"),
            tempfile.TemporaryDirectory(prefix=f"{partial.name}-", dir=self._folder) as wheels,
        ):
            complaint = build_wheels(
                self._settings,
                requirements,
                constraints,
                Path(wheels),
                deadline,
                builder=self._builder,
            )
            if complaint is not None:
                return self._clean(complaint)
            built = sorted(path.name for path in Path(wheels).iterdir())
            seconds = round(time.monotonic() - started, 3)
            _LOG.info("wheels built", extra={"wheels": built, "seconds": seconds})
            # In a cache of its own, as nobody would ever find these wheels in the other one.
            sources = ["--cache-dir", f"{wheels}/cache", "--find-links", wheels]
            self._run([*install, "--no-build", *sources], partial, deadline, requirements)
        return None

    def _run(
        self, arguments: list[str], folder: Path, deadline: float, requirements: list[str]
    ) -> None:
        """Run uv in a folder, with no package's code, and raise what its complaint means."""
        complaint = self._uv(arguments, folder, deadline)
        if complaint is None:
            return
        if any(sign in complaint for sign in _NO_ROOM):
            raise OSError(errno.ENOSPC, "no room for the model's environment", str(self._folder))
        if any(sign in complaint for sign in _UNREACHABLE):
            raise IndexUnavailableError(f"The package index does not answer. {_said(complaint)}")
        if _NO_WHEEL not in complaint:
            raise ModelNotLoadableError(_told("installed", complaint, requirements))
        remedy = ""
        if not self._settings.allow_source_builds:
            variable = "model_server_allow_source_builds"
            name = variable if self._settings.runner_units else variable.upper()
            remedy = f" without building what has no wheel, which {name} would allow"
        raise _NoWheelError(_told("installed", complaint, requirements, remedy))

    def _uv(self, arguments: list[str], folder: Path, deadline: float) -> str | None:
        """Run uv in a folder; what it complains of, if it fails, else None.

        Raises `TimeoutError` past the deadline, with no process left.
        """
        try:
            process = subprocess.Popen(
                [self._settings.uv, "--no-config", *arguments],
                cwd=folder,
                env=self._uv_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise ModelNotLoadableError(
                f"The environment builder {self._settings.uv} cannot be run ({error.strerror})."
            ) from error
        with process:
            try:
                _, stderr = process.communicate(timeout=max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError from None
        return self._clean(stderr) if process.returncode else None

    def _clean(self, complaint: str) -> str:
        """A complaint without the index's URL, which may hold a password."""
        if self._settings.index_url:
            return complaint.replace(self._settings.index_url.get_secret_value(), "<index>").strip()
        return complaint.strip()

    def _uv_environment(self) -> dict[str, str]:
        """What uv gets: installing may run somebody else's code, so no secret of ours is in it."""
        settings = self._settings
        environment = {
            "PATH": os.defpath,
            "HOME": str(settings.state_dir),
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "UV_CACHE_DIR": str(self._cache),
        }
        if settings.index_url:
            environment["UV_DEFAULT_INDEX"] = settings.index_url.get_secret_value()
        for name in _PASSED_ON:
            for spelling in (name, name.lower()):
                if spelling in os.environ:
                    environment[spelling] = os.environ[spelling]
        return environment


def _read(model_files: Path) -> tuple[list[str], list[str]]:
    """A model's requirements and constraints."""
    return (
        read_requirements(model_files / "requirements.txt"),
        read_requirements(model_files / CONSTRAINTS, optional=True),
    )


def _is_linked(folder: Path) -> bool:
    """Whether a file of the folder is one of another folder, too."""
    return any(
        Path(parent, name).lstat().st_nlink > 1
        for parent, _, names in os.walk(folder)
        for name in names
    )


def _told(what: str, complaint: str, requirements: list[str], remedy: str = "") -> str:
    """What cannot be done with the requirements, naming those that uv complains of."""
    named = ", ".join(named_in(complaint, requirements))
    return (
        f"The model's requirements{f' ({named})' if named else ''} cannot be {what} for Python "
        f"{PYTHON_VERSION}{remedy}. {_said(complaint)}"
    )


def _said(complaint: str) -> str:
    """The end of uv's complaint; a package that was being built may have written it."""
    last = [sane(line, _LONGEST_LINE) for line in complaint.splitlines()[-_LINES_SHOWN:]]
    return "\n".join(["uv said:", *last])
